"""The plan against what real models hold: parameters, bytes of weights, and what autograd keeps."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lab.__main__ import main
from lightning_lab.errors import LabError
from lightning_lab.experiments.plan import (
    HEAP_HOLES,
    HEAP_TRANSIENTS,
    MEMORY_SHARE,
    MIB,
    Settings,
    available_memory,
    choose,
    known_speed,
    memory,
    peak,
    plan,
    trainable_parameters,
    work_of,
)
from lightning_lab.models import qlora
from lightning_lab.models.attention import attention_arguments, register_document_attention
from lightning_lab.models.base import load_base
from tests.models.conftest import CPU, llama_3_2, saved_bytes

ALL = qlora.DEFAULT_TARGETS


def settings(**changes: Any) -> Settings:
    common: dict[str, Any] = dict(
        bits=4, dtype_bytes=4, r=8, target_modules=ALL, optimizer="adamw_8bit", checkpointing="none"
    )
    return Settings(**(common | changes))


@pytest.mark.parametrize(
    ("size", "r", "expected"),
    [("1B", 16, 11_272_192), ("1B", 32, 22_544_384), ("3B", 16, 24_313_856), ("3B", 32, 48_627_712)],
)
def test_trainable_parameters_of_llama_3_2(size: str, r: int, expected: int) -> None:
    assert trainable_parameters(llama_3_2(size), r, ALL) == expected


def test_dora_adds_a_magnitude_for_each_output(folder: Path) -> None:
    model = qlora.add_adapters(
        load_base(str(folder), bits=16, compute_dtype=torch.float32, device=CPU),
        r=8, alpha=8, dropout=0.0, target_modules=ALL, rslora=False, dora=True, seed=1,
    )  # fmt: skip
    assert trainable_parameters(model.config, 8, ALL, dora=True) == qlora.count_trainable(model)


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(LabError, match="query_proj"):
        trainable_parameters(llama_3_2("1B"), 8, ["query_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("plan")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build(folder: Path, dtype: torch.dtype, fused: bool = True) -> Any:
    base = load_base(
        str(folder), bits=4, compute_dtype=dtype, device=CPU, attn_implementation=register_document_attention()
    )
    return qlora.add_adapters(
        base, r=8, alpha=8, dropout=0.0, target_modules=ALL, rslora=False, dora=False, seed=1, fused=fused
    )


def test_weights_adapters_and_optimizer_are_counted_to_the_byte(folder: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    model = build(folder, torch.float32)
    parts = list(memory(model.config, settings(), 100, 50).values())
    packed = [w for n, w in model.named_parameters() if w.dtype == torch.uint8]
    whole = [w for n, w in model.named_parameters() if w.dtype != torch.uint8 and not w.requires_grad]
    states = [w.quant_state for w in packed]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    trained = [w for w in model.parameters() if w.requires_grad]
    assert parts[0] == sum(w.nbytes for w in {w.data_ptr(): w for w in whole}.values())
    assert parts[1] == sum(w.nbytes for w in packed)
    assert parts[2] == pytest.approx(scales, rel=0.02)  # a last block may be partly filled
    assert parts[3] == parts[4] == sum(w.nbytes for w in trained)
    assert list(memory(model.config, settings(optimizer="adamw"), 100, 50).values())[5] == 2 * parts[3]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    large = [w for w in trained if w.numel() >= 4096]  # smaller ones keep float32 state
    optimizer = AdamW8bit(large)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for n, t in s.items() if n in ("state1", "state2"))
    assert state == 2 * sum(w.numel() for w in large)
    assert parts[5] == 2 * sum(w.numel() for w in trained)


def activations(parts: dict[str, int]) -> int:
    return next(size for name, size in parts.items() if name.startswith("activations"))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "compiled"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(folder: Path, dtype: torch.dtype, fused: bool, checkpointing: str) -> None:
    compiled, checkpointing = checkpointing == "compiled", checkpointing.replace("compiled", "none")
    if (dtype == torch.float32 or compiled) and not fused:
        pytest.skip("PEFT's layers keep the same in float32, and the scaled product besides; they are never compiled")
    model = build(folder, dtype, fused)
    qlora.enable_checkpointing(model, checkpointing)
    if compiled:
        torch.compiler.reset()
        qlora.compile_layers(model, backend="aot_eager_decomp_partition")
    lengths = (200, 56)
    borders = torch.tensor([0, 200, 256])

    def forward() -> torch.Tensor:
        return (
            model.get_base_model()
            .model(
                input_ids=torch.zeros(1, 256, dtype=torch.int64),
                position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
                use_cache=False,
                **attention_arguments(borders, lengths, varlen=False),
            )
            .last_hidden_state
        )

    options: dict[str, Any] = dict(dtype_bytes=dtype.itemsize, fused_linear=fused, compiled=compiled)
    predicted = activations(memory(model.config, settings(**options, checkpointing=checkpointing), 256, 128))
    if checkpointing != "none":  # the layer that is recomputed is no part of what the forward pass keeps
        whole = activations(memory(model.config, settings(**options), 256, 128))
        predicted -= (whole - 256 * 4 * model.config.hidden_size) // 3
    if checkpointing == "selective":  # held outside of autograd: results and log-sum-exps of 3 layers
        predicted -= 3 * 256 * (256 * dtype.itemsize + 4 * 8)
    assert saved_bytes(model, forward) == pytest.approx(predicted, rel=0.03)


def test_the_heap_of_a_cpu() -> None:
    config, tokens = llama_3_2("1B"), 2048
    gpu, cpu = (memory(config, settings(dtype_bytes=2), tokens, 700, cpu=cpu) for cpu in (False, True))
    added = {name: size for name, size in cpu.items() if name not in gpu}
    holes, left = added.pop("holes in the heap"), added.pop("left by quantising")
    assert holes == int(HEAP_HOLES["16 bits"] * activations(gpu)) + HEAP_TRANSIENTS * sum(added.values())
    # 16 layers in bfloat16; gate, up and down (2,048 x 8,192) are exactly the 32 MiB that glibc gives back
    assert left == 16 * 2 * (2 * 2048 * 2048 + 2 * 2048 * 512)
    # a GPU's memory counts the larger of the layer's pass and the logits; a CPU's chunks are of 2**23 elements
    assert set(added) == {"backward pass of one layer", "a chunk of logits, 65 positions"}
    assert "a chunk of logits, 261 positions" in gpu
    assert "holes in the heap" not in memory(config, settings(), tokens, 700, cpu=True, training=False)


def test_evaluation_needs_neither_gradients_nor_activations() -> None:
    config = llama_3_2("1B")
    parts = memory(config, settings(dtype_bytes=2), 2048, 700, training=False)
    assert not any("gradients" in name or "optimizer" in name or "activations" in name for name in parts)
    assert sum(parts.values()) < sum(memory(config, settings(dtype_bytes=2, checkpointing="full"), 2048, 700).values())


def test_kept_dequantised_weights_are_a_16_bit_base() -> None:
    config = llama_3_2("1B")
    off, on = (memory(config, settings(dtype_bytes=2, cached=cached), 2048, 700) for cached in (False, True))
    linear = 973_078_528  # of Llama-3.2-1B's decoder layers: 1,235,814,400 less embeddings and norms
    assert on.pop("dequantised weights, kept") == 2 * linear
    assert sum(on.values()) <= sum(off.values())


def test_modes_in_order_of_memory() -> None:
    sizes = [
        sum(memory(llama_3_2("1B"), settings(dtype_bytes=2, checkpointing=mode), 4096, 2000).values())
        for mode in qlora.CHECKPOINTING
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


GPU = torch.device("cuda")


def chosen(available: int, device: torch.device = GPU, budget: int | None = None, **changes: Any) -> tuple[str, int]:
    options: dict[str, Any] = dict(max_length=2048, batch_size=8, micro_batch_tokens=budget)
    own = settings(**({"dtype_bytes": 2, "checkpointing": "auto"} | changes))
    return choose(llama_3_2("1B"), own, device, available, **options)


def enough(mode: str, tokens: int, **changes: Any) -> int:
    """Bytes that must be free for exactly this."""
    needed = peak(llama_3_2("1B"), settings(dtype_bytes=2, checkpointing=mode, **changes), tokens, tokens, GPU)
    return int(needed / MEMORY_SHARE) + 1


def test_auto_takes_the_fastest_mode_that_fits_and_then_the_most_tokens() -> None:
    assert chosen(2**40) == ("none", 16_384)  # a whole step: 8 conversations of 2,048 tokens
    assert chosen(enough("none", 4096)) == ("none", 4096)
    assert chosen(enough("none", 4096) - 2) == ("none", 2048)
    assert chosen(enough("none", 2048) - 2)[0] == "selective"
    assert chosen(enough("selective", 2048) - 2)[0] == "full"
    assert chosen(enough("full", 2048) - 2)[0] == "offload"
    with pytest.raises(LabError, match=r"MiB are needed .* MiB available .*lower data\.max_length"):
        chosen(enough("offload", 2048) - 2)


def test_auto_leaves_what_was_given() -> None:
    assert chosen(2**40, budget=1000) == ("none", 1000)
    assert chosen(enough("none", 8192) - 2, budget=8192) == ("selective", 8192)
    assert chosen(enough("full", 8192), checkpointing="full") == ("full", 8192)
    with pytest.raises(LabError, match="checkpointing none"):
        chosen(enough("none", 2048) - 2, checkpointing="none")


def test_auto_chooses_nothing_that_cannot_be_honoured() -> None:
    with pytest.raises(LabError, match="checkpointing full"):  # offload is not compiled
        chosen(enough("full", 2048, compiled=True) - 2, compiled=True)
    with pytest.raises(LabError, match="checkpointing full"):  # nor has a CPU a host to go to
        chosen(0, torch.device("cpu"))
    assert chosen(2**40, torch.device("cpu")) == ("none", 4096)


def test_memory_of_a_cpu_is_within_what_the_machine_has() -> None:
    alone, shared = (available_memory(CPU, processes) for processes in (1, 4))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 100 * MIB < shared < alone < total


def test_work_is_counted_over_all_steps(tiny_base: Path, short_chats: Path, one_tokenizer: None) -> None:
    from lightning_lab.data.datamodule import ChatDataModule

    data = ChatDataModule(
        source=str(short_chats),
        split=[18, 2, 0],
        tokenizer=str(tiny_base),
        template="tokenizer",
        batch_size=4,
        micro_batch_tokens=150,
    )
    data.prepare(progress=False)
    lengths = data.tokenized.lengths[data.splits["train"].rows]
    work = work_of(data, 2, -1)
    assert work.steps == 10
    assert work.tokens == 2 * lengths.sum()
    assert lengths.max() <= work.largest_tokens <= max(150, lengths.max())
    assert work.largest_supervised < work.largest_tokens
    assert work_of(data, None, 1).tokens == np.sum(lengths[data.step_documents(0)])


def test_what_is_shown(
    tiny_base: Path, short_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["plan", "--config=embedded.yaml", f"--model.base={tiny_base}", f"--data.source={short_chats}"]
    args += ["--data.split=[18,2,0]", "--trainer.max_steps=2"]
    assert main([*args, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(planned["peak memory by checkpointing"]) == ["none", "selective", "full"]
    assert planned["peak memory by checkpointing"]["none"] == pytest.approx(planned["peak memory in all"], rel=0.02)
    assert planned["optimizer steps"] == 2
    assert planned["peak memory in all"] == sum(planned["peak memory"].values())
    assert planned["seconds of training"] is None
    run = Path("runs/embedded")
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,tokens_per_second\n1,50.0\n2,200.0\n3,100.0\n")
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert "optimizer steps: 2" in shown
    assert "training at" in shown
    assert main([*args, "--model.target_modules=[nonsense]"]) == 2


def test_known_speed_and_time() -> None:
    assert known_speed([{"tokens_per_second": ""}]) is None
    assert known_speed([{"tokens_per_second": "3.0"}, {"tokens_per_second": ""}]) == 3.0
    from lightning_lab.experiments.plan import Work

    planned = plan(llama_3_2("1B"), settings(), Work(10, 1000, 500, 100, 50), torch.device("cuda"), 20.0)
    assert planned["seconds of training"] == 50.0
    assert "program and libraries" not in planned["peak memory"]  # a GPU's memory holds no program
