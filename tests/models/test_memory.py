"""Predicted memory against what real models hold: parameters, bytes of weights, and what autograd keeps."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict

from lightning_lab.errors import LabError
from lightning_lab.models import memory, qlora
from lightning_lab.models.attention import attention_arguments, register_document_attention
from lightning_lab.models.base import load_base
from lightning_lab.models.fused_linear import KeptTensors
from lightning_lab.models.memory import MEMORY_SHARE, MIB, available_memory, choose, peak_parts, trainable_parameters
from tests.models.conftest import CPU, llama_3_2, saved_bytes, tiny_config

GPU = torch.device("cuda")


def settings(**changes: Any) -> AttributeDict:
    """What of QLoRAModule's hyper-parameters decides memory; float16 is as large as bfloat16 and asks no GPU."""
    common: dict[str, Any] = dict(
        bits=4,
        compute_dtype="float16",
        r=8,
        target_modules=qlora.DEFAULT_TARGETS,
        optimizer="adamw_8bit",
        checkpointing="none",
        fused_linear=True,
        dora=False,
        dropout=0.0,
        compile=False,
        cache_dequantised=False,
    )
    return AttributeDict(common | changes)


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


@pytest.mark.parametrize(
    ("size", "r", "expected"),
    [("1B", 16, 11_272_192), ("1B", 32, 22_544_384), ("3B", 16, 24_313_856), ("3B", 32, 48_627_712)],
)
def test_trainable_parameters_of_llama_3_2(size: str, r: int, expected: int) -> None:
    assert trainable_parameters(llama_3_2(size), settings(r=r)) == expected


def test_dora_adds_a_magnitude_for_each_output(folder: Path) -> None:
    model = qlora.add_adapters(
        load_base(str(folder), bits=16, compute_dtype=torch.float32, device=CPU),
        r=8, alpha=8, dropout=0.0, target_modules=qlora.DEFAULT_TARGETS, rslora=False, dora=True, seed=1,
    )  # fmt: skip
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trainable_parameters(model.config, settings(dora=True)) == trained


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(LabError, match="query_proj"):
        trainable_parameters(llama_3_2("1B"), settings(target_modules=["query_proj"]))


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
        base,
        r=8,
        alpha=8,
        dropout=0.0,
        target_modules=qlora.DEFAULT_TARGETS,
        rslora=False,
        dora=False,
        seed=1,
        fused=fused,
    )


def test_weights_adapters_and_optimizer_are_counted_to_the_byte(folder: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    model = build(folder, torch.float32)
    parts = peak_parts(model.config, settings(compute_dtype="float32"), GPU, 100, 50)
    packed = [w for n, w in model.named_parameters() if w.dtype == torch.uint8]
    whole = [w for n, w in model.named_parameters() if w.dtype != torch.uint8 and not w.requires_grad]
    states = [w.quant_state for w in packed]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    unfused = peak_parts(model.config, settings(compute_dtype="float32", fused_linear=False), GPU, 100, 50)
    assert unfused["quantisation_state"] == pytest.approx(scales, rel=0.02)  # a last block may be partly filled
    KeptTensors(model, torch.float16)
    layers = [layer for layer in model.modules() if getattr(layer, "plain_weight", None)]
    scales += sum(layer.plain_weight.scales.nbytes for layer in layers)
    in_half = peak_parts(model.config, settings(compute_dtype="float16"), GPU, 100, 50)
    rounded = sum(tensor.nbytes for layer in layers for pair in layer.rounded.values() for tensor in pair)
    trained = [w for w in model.parameters() if w.requires_grad]
    assert parts["tables"] == sum(w.nbytes for w in {w.data_ptr(): w for w in whole}.values())
    assert parts["linears"] == sum(w.nbytes for w in packed)
    assert parts["quantisation_state"] == pytest.approx(scales, rel=0.02)
    assert in_half["adapters"] == parts["adapters"] + rounded
    assert parts["adapters"] == parts["gradients"] == sum(w.nbytes for w in trained)
    adamw = peak_parts(model.config, settings(compute_dtype="float32", optimizer="adamw"), GPU, 100, 50)
    assert adamw["optimizer_state"] == 2 * parts["adapters"]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    large = [w for w in trained if w.numel() >= 4096]  # smaller ones keep float32 state
    optimizer = AdamW8bit(large)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for n, t in s.items() if n in ("state1", "state2"))
    assert state == 2 * sum(w.numel() for w in large)
    assert parts["optimizer_state"] == 2 * sum(w.numel() for w in trained)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "compiled"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(folder: Path, dtype: torch.dtype, fused: bool, checkpointing: str) -> None:
    compiled, checkpointing = checkpointing == "compiled", checkpointing.replace("compiled", "none")
    if (dtype == torch.float32 or compiled) and not fused:
        pytest.skip("PEFT's layers keep the same in float32, and the scaled product besides; they are never compiled")
    model = build(folder, dtype, fused)
    qlora.enable_checkpointing(model, checkpointing)
    if fused:
        KeptTensors(model, dtype)
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
                **attention_arguments(borders, lengths, kernel="cpu"),
            )
            .last_hidden_state
        )

    name = "float32" if dtype == torch.float32 else "float16"
    options = settings(compute_dtype=name, fused_linear=fused, compile=compiled)
    predicted = peak_parts(model.config, options, GPU, 256, 128, checkpointing=checkpointing)["activations"]
    if checkpointing != "none":  # the layer that is recomputed is no part of what the forward pass keeps
        whole = peak_parts(model.config, options, GPU, 256, 128)["activations"]
        predicted -= (whole - 256 * 4 * model.config.hidden_size) // 3
    if checkpointing == "selective":  # held outside of autograd: results and log-sum-exps of 3 layers
        predicted -= 3 * 256 * (256 * dtype.itemsize + 4 * 8)
    assert saved_bytes(model, forward) == pytest.approx(predicted, rel=0.03)


def test_the_heap_of_a_cpu() -> None:
    config = llama_3_2("1B")
    gpu, own = (peak_parts(config, settings(), device, 2048, 700) for device in (GPU, CPU))
    # 16 layers in 16 bits; gate, up and down (2,048 x 8,192) are exactly the 32 MiB that glibc gives back
    assert own["left_by_quantising"] == 16 * 2 * (2 * 2048 * 2048 + 2 * 2048 * 512)
    # a GPU's memory counts the larger of a layer's pass and the logits; a CPU's chunks are of 2**23 elements
    layer = 2048 * 2 * (3 * 8192 + 2 * 2048) + 2 * 2048 * 8192
    hidden = 2 * 700 * 2048 * 2
    assert own["temporaries"] == layer + 65 * 128_256 * (4 + 2 + 2) + hidden
    assert gpu["temporaries"] == max(layer, 261 * 128_256 * (4 + 2 + 2) + hidden)
    assert own["heap_holes"] == gpu["activations"] // 2 + 2 * own["temporaries"]
    assert 100 * MIB < own["program"] < psutil.virtual_memory().total
    assert (gpu["program"], gpu["left_by_quantising"], gpu["heap_holes"]) == (0, 0, 0)
    only_cpu = ("program", "left_by_quantising", "heap_holes", "temporaries")
    assert {k: v for k, v in own.items() if k not in only_cpu} == {k: v for k, v in gpu.items() if k not in only_cpu}
    assert peak_parts(config, settings(), CPU, 2048, 700, training=False)["heap_holes"] == 0
    assert peak_parts(config, settings(bits=16), CPU, 2048, 700)["left_by_quantising"] == 0


@pytest.mark.parametrize(("mode", "counted"), [("full", 4545), ("none", 13_400)])
def test_what_an_8_bit_base_holds_on_a_gpu(mode: str, counted: int) -> None:
    """Allocated MiB at the peak of a step of Llama-3.2-1B, r 32, as counted on a GPU that does not compute."""
    eight = settings(bits=8, r=32, checkpointing=mode)
    assert total(peak_parts(llama_3_2("1B"), eight, GPU, 4096, 2062)) / MIB == pytest.approx(counted, rel=0.05)


def test_the_peaks_measured_on_a_cpu() -> None:
    """Of whole runs of SmolLM2 with r 32, as ``benchmarks/plan.py`` recorded them."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "plan" / "avx512.json"
    smollm2 = tiny_config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    recorded = json.loads(results.read_text())["settings"]
    assert len(recorded) >= 4
    for name, result in recorded.items():
        own = settings(r=32, checkpointing=name.split("-")[0], compile="compiled" in name)
        assert "float32" not in name
        parts = peak_parts(smollm2, own, CPU, 2048, 900)
        program = result["parts_mib"]["program and libraries"]  # of that machine
        predicted = (total(parts) - parts["program"]) / MIB + program
        assert predicted == pytest.approx(result["measured_mib"], rel=0.06), name


def test_evaluation_needs_neither_gradients_nor_activations() -> None:
    config = llama_3_2("1B")
    parts = peak_parts(config, settings(), GPU, 2048, 700, training=False)
    assert (parts["gradients"], parts["optimizer_state"], parts["activations"]) == (0, 0, 0)
    assert total(parts) < total(peak_parts(config, settings(checkpointing="full"), GPU, 2048, 700))


def test_kept_dequantised_weights_are_a_16_bit_base() -> None:
    off, on = (
        peak_parts(llama_3_2("1B"), settings(cache_dequantised=cached), GPU, 2048, 700) for cached in (False, True)
    )
    linear = 973_078_528  # of Llama-3.2-1B's decoder layers: 1,235,814,400 less embeddings and norms
    assert (off["dequantised"], on["dequantised"]) == (0, 2 * linear)
    assert total(on) - on["dequantised"] <= total(off)


def test_modes_in_order_of_memory() -> None:
    sizes = [
        total(peak_parts(llama_3_2("1B"), settings(), GPU, 4096, 2000, checkpointing=mode))
        for mode in qlora.CHECKPOINTING
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"dora": True}, {"bits": 8}])
def test_what_pefts_layers_train_is_counted_as_theirs(changes: dict[str, Any]) -> None:
    sizes = [
        peak_parts(llama_3_2("1B"), settings(**changes, fused_linear=fused), GPU, 2048, 700)["activations"]
        for fused in (True, False)
    ]
    assert sizes[0] == sizes[1] > peak_parts(llama_3_2("1B"), settings(), GPU, 2048, 700)["activations"]


# --- auto ---


def chosen(available: int, device: torch.device = GPU, budget: int | None = None, **changes: Any) -> tuple[Any, ...]:
    """Checkpointing and micro-batch; whether layers are compiled too, where that is chosen."""
    options: dict[str, Any] = dict(max_length=2048, batch_size=8, micro_batch_tokens=budget, may_compile=True)
    asked = settings(**({"checkpointing": "auto"} | changes))
    found = choose(llama_3_2("1B"), asked, device, available, **options)
    return tuple(found)[: 3 if asked.compile == "auto" else 2]


def enough(mode: str, tokens: int, **changes: Any) -> int:
    """Bytes that must be free for exactly this."""
    needed = total(peak_parts(llama_3_2("1B"), settings(checkpointing=mode, **changes), GPU, tokens, tokens))
    return int(needed / MEMORY_SHARE) + 1


def test_auto_takes_the_mode_that_recomputes_least_and_fits_and_then_the_most_tokens() -> None:
    assert chosen(2**40) == ("none", 16_384)  # a whole step: 8 conversations of 2,048 tokens
    assert chosen(enough("none", 4096)) == ("none", 4096)
    assert chosen(enough("none", 4096) - 2) == ("none", 2048)
    assert chosen(enough("none", 2048) - 2)[0] == "full"  # `selective` is slower where layers are not compiled
    assert chosen(enough("full", 2048) - 2)[0] == "offload"
    with pytest.raises(LabError, match=r"MiB are needed .* MiB available .*lower data\.max_length"):
        chosen(enough("offload", 2048) - 2)


def test_auto_compiles_where_it_may_unless_that_leaves_nothing_that_fits() -> None:
    both = partial(chosen, compile="auto")
    assert both(2**40) == ("none", 16_384, True)
    assert both(enough("none", 2048, compile=True) - 2)[::2] == ("selective", True)
    assert both(enough("selective", 2048, compile=True) - 2)[::2] == ("full", True)
    assert both(2**40, checkpointing="offload")[::2] == ("offload", False)  # which is never compiled
    options: dict[str, Any] = dict(max_length=32_768, batch_size=1)
    asked = settings(checkpointing="auto", compile="auto")
    little = enough("full", 32_768, compile=True) - 2
    assert choose(llama_3_2("1B"), asked, GPU, little, may_compile=True, **options)[::2] == ("offload", False)
    assert not choose(llama_3_2("1B"), asked, GPU, 2**40, **options).compile


def test_auto_dequantises_once_where_there_is_room_beside_all_else() -> None:
    def cached(available: int, device: torch.device = GPU, **changes: Any) -> tuple[Any, ...]:
        asked = settings(**({"checkpointing": "auto", "cache_dequantised": "auto"} | changes))
        found = choose(llama_3_2("1B"), asked, device, available, max_length=2048, batch_size=8)
        return found.checkpointing, found.micro_batch_tokens, found.cache_dequantised

    assert cached(2**40) == ("none", 16_384, True)
    assert cached(enough("none", 16_384, cache_dequantised=True)) == ("none", 16_384, True)
    assert cached(enough("none", 16_384, cache_dequantised=True) - 2) == ("none", 16_384, False)
    assert cached(2**40, checkpointing="full") == ("full", 16_384, False)
    assert cached(2**40, CPU) == ("none", 4096, False)
    for changes in ({"bits": 8}, {"bits": 16}, {"dora": True}):
        assert not cached(2**40, **changes)[2]


def test_auto_leaves_what_was_given() -> None:
    assert chosen(2**40, budget=1000) == ("none", 1000)
    assert chosen(enough("none", 8192) - 2, budget=8192) == ("full", 8192)
    assert chosen(enough("full", 8192), checkpointing="full") == ("full", 8192)
    with pytest.raises(LabError, match="checkpointing none"):
        chosen(enough("none", 2048) - 2, checkpointing="none")


def test_auto_chooses_nothing_that_cannot_be_honoured() -> None:
    with pytest.raises(LabError, match="checkpointing full"):  # offload is not compiled
        chosen(enough("full", 2048, compile=True) - 2, compile=True)
    with pytest.raises(LabError, match="checkpointing full"):  # nor has a CPU a host to go to
        chosen(0, CPU)
    assert chosen(2**40, CPU) == ("none", 4096)


def test_memory_of_a_cpu_is_within_what_the_machine_has() -> None:
    alone, shared = (available_memory(CPU, processes) for processes in (1, 4))
    assert 100 * MIB < shared < alone < psutil.virtual_memory().total


@pytest.mark.parametrize("limit", ["max\n", "2000000000\n"])
def test_a_control_group_bounds_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(memory, "_resident", lambda: 10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3_000_000_000))

    def read(path: Path) -> str:
        if path != Path("/sys/fs/cgroup/memory.max"):
            raise FileNotFoundError
        return limit

    monkeypatch.setattr(Path, "read_text", read)
    free = 3_000_000_000 if limit == "max\n" else 2_000_000_000
    assert available_memory(CPU, 2) == free // 2 + 10


def test_the_memory_of_a_gpu_is_that_of_the_very_one(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 5 * MIB, 1: 7 * MIB}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=GPU: (free[device.index or 0], 80 * MIB))
    assert available_memory(torch.device("cuda", 1)) == 7 * MIB


def test_auto_asks_what_the_very_gpu_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (8, 0), 1: (7, 5)}
    asked = []
    monkeypatch.setattr(
        "torch.cuda.get_device_capability",
        lambda device: (asked.append(device.index), capabilities[device.index])[1],
    )
    peak_parts(llama_3_2("1B"), settings(compute_dtype="auto"), torch.device("cuda", 1), 2048, 700)
    assert asked == [1]
