"""Compiled decoder layers: one graph for all lengths, no graph breaks, the same results; what a GPU would be given."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from lightning_lab.models import qlora
from lightning_lab.models.attention import attention_arguments, document_attention, register_document_attention
from lightning_lab.models.base import load_base
from lightning_lab.models.fused_linear import KeptTensors, Weight, qlora_linear
from tests.models.conftest import CPU, saved_bytes, tiny_config

PACKED = ((7, 5, 21), (40,), (3, 1, 2, 9, 4, 1), (64, 30))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


def adapted(folder: Path, bits: int) -> Any:
    base = load_base(
        str(folder),
        bits=bits,
        compute_dtype=torch.float32,
        device=CPU,
        attn_implementation=register_document_attention(),
    )
    model = qlora.add_adapters(
        base, r=4, alpha=8, dropout=0.0, target_modules=qlora.DEFAULT_TARGETS, rslora=False, dora=False, seed=1
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    KeptTensors(model, torch.float32)
    return model


def hidden(model: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, 60, (1, sum(lengths)), generator=generator)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return (
        model.get_base_model()
        .model(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            use_cache=False,
            **attention_arguments(borders, lengths, kernel="cpu"),
        )
        .last_hidden_state
    )


def gradients(model: Any, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = hidden(model, lengths)
    # not a sum of squares: the last norm makes that nearly constant, and its gradient mere rounding
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("selective", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize("bits", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_one_graph_for_all_lengths_and_the_same_gradients(folder: Path, bits: int, checkpointing: str) -> None:
    eager, compiled = adapted(folder, bits), adapted(folder, bits)
    qlora.enable_checkpointing(eager, checkpointing)
    qlora.enable_checkpointing(compiled, checkpointing)
    qlora.compile_layers(compiled, backend="aot_eager")
    for lengths in PACKED:
        ours, expected = gradients(compiled, lengths), gradients(eager, lengths)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs in (1, 2)  # the first layer's input needs no gradient
    assert not counters["graph_break"]
    qlora.evaluation_mode(compiled)
    with torch.no_grad():
        for lengths in PACKED:
            torch.testing.assert_close(hidden(compiled, lengths), hidden(eager, lengths), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= graphs + 2


def test_compiled_layers_keep_no_dequantised_weight(folder: Path) -> None:
    """Of few tokens, the activations are smaller than the weights."""
    eager, compiled = adapted(folder, 4), adapted(folder, 4)
    qlora.compile_layers(compiled, backend="aot_eager_decomp_partition")
    kept = [saved_bytes(model, lambda model=model: hidden(model, (3,))) for model in (eager, compiled)]
    weights = 4 * sum(
        math.prod(m.plain_weight.sizes[:2]) for m in compiled.modules() if getattr(m, "plain_weight", None)
    )
    assert kept[1] - kept[0] < 0.1 * weights


@pytest.mark.slow
def test_inductor_gives_the_same_gradients(folder: Path) -> None:
    eager, compiled = adapted(folder, 4), adapted(folder, 4)
    qlora.compile_layers(compiled)
    for lengths in PACKED:
        ours, expected = gradients(compiled, lengths), gradients(eager, lengths)
        for name in expected:  # sums in another order: an element's error goes with its tensor's largest
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-5 * max(1, largest))


def test_generation_runs_uncompiled(folder: Path) -> None:
    eager, compiled = adapted(folder, 4), adapted(folder, 4)
    qlora.compile_layers(compiled, backend="aot_eager")
    ids = torch.tensor([[5, 6, 7]])
    answers = []
    for model in (eager, compiled):
        model.get_base_model().set_attn_implementation("sdpa")
        with torch.compiler.set_stance("force_eager"):
            answers.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    assert torch.equal(*answers)
    assert counters["stats"]["unique_graphs"] == 0


def test_what_a_gpu_is_given_has_the_right_shapes() -> None:
    """The variable-length kernel and the fused linear in bfloat16, forward and backward on the meta device."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype, requires_grad=grad)

    q, k, v = (meta(1, heads, 30, 64) for heads in (8, 2, 2))
    borders = meta(4, dtype=torch.int32, grad=False)
    arguments = attention_arguments(borders, (10, 15, 5), kernel="varlen")
    assert arguments["longest_document"] == 15
    out, _ = document_attention(torch.nn.Identity(), q, k, v, None, 0.125, **arguments)
    assert (out.shape, out.dtype) == ((1, 30, 8, 64), torch.bfloat16)
    out.sum().backward()
    assert [tensor.grad is not None and tensor.grad.shape for tensor in (q, k, v)] == [t.shape for t in (q, k, v)]

    packed, scales = meta(128 * 64 // 2, 1, dtype=torch.uint8, grad=False), meta(128, dtype=torch.float32, grad=False)
    weight = Weight(packed, scales, (128, 64, 64))
    x, a, b = meta(1, 30, 64), meta(4, 64, dtype=torch.float32), meta(128, 4, dtype=torch.float32)
    y = qlora_linear(x, weight, a, b, 2.0)
    assert (y.shape, y.dtype) == ((1, 30, 128), torch.bfloat16)
    y.sum().backward()
    assert [t.grad is not None and t.grad.dtype for t in (x, a, b)] == [torch.bfloat16, torch.float32, torch.float32]
    # on CUDA an adapter's gradient is multiplied by this call; here only its signature can be tried
    assert torch.mm(meta(4, 30, grad=False), meta(30, 64, grad=False), out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("checkpointing", "linears", "attentions"), [("none", 7, 1), ("selective", 7 + 6, 1), ("full", 7 + 6, 2)]
)
def test_what_a_gpu_would_run_is_one_graph_for_all_lengths(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str, linears: int, attentions: int
) -> None:
    """A layer in bfloat16 with variable-length attention, forward and backward, on the meta device.

    A PyTorch without CUDA cannot index even a fake CUDA tensor. Of what is recomputed, the last linear's result is of
    no use.
    """
    model = adapted(folder, 16)
    model.train()
    qlora.enable_checkpointing(model, checkpointing)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    dtype = (
                        torch.bfloat16 if tensor.dtype == torch.float32 and not tensor.requires_grad else tensor.dtype
                    )
                    moved = torch.empty(tensor.shape, dtype=dtype, device="meta")
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no meta device
    traced: list[str] = []

    def keep(graph: Any, _: Any) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    layer = model.get_base_model().model.layers[1]  # the first one's input needs no gradient
    layer.compile(
        fullgraph=True,
        dynamic=True,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition),
    )
    for lengths in PACKED:
        ids = torch.zeros(1, sum(lengths), dtype=torch.int64, device="meta")
        borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="meta")
        arguments = attention_arguments(borders, lengths, kernel="varlen")
        out = model.get_base_model().model(input_ids=ids, position_ids=ids, use_cache=False, **arguments)
        assert (out.last_hidden_state.shape[1], out.last_hidden_state.dtype) == (sum(lengths), torch.bfloat16)
        out.last_hidden_state.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    operators = Counter(name for name in traced if name.startswith(("lightning_lab.", "torch_attn.")))
    assert operators == {
        "lightning_lab.qlora_linear.default": linears + 7,  # and as many input gradients
        "torch_attn._varlen_attn.default": attentions,
        "torch_attn._varlen_attn_backward.default": 1,
    }


def test_compiling_changes_no_name_of_a_checkpoint(folder: Path) -> None:
    model = adapted(folder, 16)
    before = list(model.state_dict())
    qlora.compile_layers(model, backend="aot_eager")
    assert list(model.state_dict()) == before
