from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lab.models import attention
from lightning_lab.models.attention import (
    attention_arguments,
    attention_kernel,
    document_attention,
    register_document_attention,
)

LENGTHS = (5, 1, 9, 3)


def _tiny(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,  # keys are shared by three heads each
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def _packed(ids: torch.Tensor) -> dict[str, object]:
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "use_cache": False,
        "document_borders": torch.tensor([0, 5, 6, 15, 18]),
    }


@pytest.mark.parametrize("training", [False, True])
def test_packed_logits_and_gradients_equal_each_document_alone(training: bool) -> None:
    packed, alone = _tiny(register_document_attention()).train(training), _tiny("eager").train(training)
    if training:
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    logits = packed(**_packed(ids)).logits
    expected = torch.cat([alone(input_ids=piece, use_cache=False).logits for piece in ids.split(LENGTHS, 1)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_changing_one_document_leaves_the_others_bit_equal() -> None:
    model = _tiny(register_document_attention())
    ids = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[0, :5] = (other[0, :5] + 1) % 61
    with torch.no_grad():
        first, second = model(**_packed(ids)).logits, model(**_packed(other)).logits
    assert torch.equal(first[:, 5:], second[:, 5:])
    assert not torch.equal(first[:, :5], second[:, :5])


def test_no_mask_is_ever_built() -> None:
    tokens = sum(LENGTHS)
    square: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] == (tokens, tokens):
                square.append(out.shape)
            return out

    ids = torch.zeros((1, tokens), dtype=torch.int64)
    with Watch(), torch.no_grad():
        _tiny(register_document_attention())(**_packed(ids))
    assert square == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"document_borders": None},
        {"document_borders": None, "longest_document": 4},
        {"attention_mask": torch.ones(1)},
        {"dropout": 0.1},
        {"query": torch.zeros(2, 2, 4, 8)},
    ],
)
def test_what_it_cannot_honour_is_refused(wrong: dict[str, object]) -> None:
    q = torch.zeros(1, 2, 4, 8)
    good = {"query": q, "key": q, "value": q, "attention_mask": None, "scaling": 0.5}
    good["document_borders"] = torch.tensor([0, 4])
    document_attention(torch.nn.Identity(), **good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document attention"):
        document_attention(torch.nn.Identity(), **(good | wrong))  # type: ignore[arg-type]


# --- the memory-efficient kernel, which only a GPU has: its layout and the sums over heads that share a key ---

BORDERS = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Document by document, ``[1, T, heads, head_dim]``, as many keys as queries."""
    found = []
    for start, end in pairwise(BORDERS.tolist()):
        pieces = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
        found.append(F.scaled_dot_product_attention(*pieces, is_causal=True, scale=scale).transpose(1, 2))
    return torch.cat(found, 1)


class _Kernels:
    """Stand in for the two operators, in float64, with their arguments' order and shapes."""

    @staticmethod
    def _efficient_attention_forward(q, k, v, bias, cu_q, cu_k, longest_q, longest_k, dropout, mask, keep, *, scale):  # type: ignore[no-untyped-def]
        assert (bias, dropout, mask, keep, longest_q, longest_k) == (None, 0.0, 1, True, 9, 9)  # 1: causal
        assert torch.equal(cu_q, BORDERS)
        assert torch.equal(cu_k, BORDERS)
        return _plain(q, k, v, scale), torch.zeros(len(LENGTHS), q.shape[2], 32), None, None, 9, 9

    @staticmethod
    def _efficient_attention_backward(  # type: ignore[no-untyped-def]
        grad, q, k, v, bias, out, cu_q, cu_k, longest_q, longest_k, sums, dropout, seed, offset, mask, of_bias, *, scale
    ):
        assert (bias, dropout, mask, of_bias, longest_q, longest_k) == (None, 0.0, 1, False, 9, 9)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return *torch.autograd.grad(_plain(*leaves, scale), leaves, grad), None


def test_the_efficient_kernel_gets_and_gives_what_attention_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 18, 16, dtype=torch.float64, generator=generator) for heads in (8, 2, 2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    repeated = [leaves[0], *(x.repeat_interleave(4, 1) for x in leaves[1:])]
    expected = _plain(*(x.transpose(1, 2) for x in repeated), 0.25)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    monkeypatch.setattr(torch.ops, "aten", _Kernels)
    out, sums = attention.efficient_document_attention._init_fn(q, k, v, BORDERS, 9, 0.25)
    grads = attention._efficient_backward._init_fn(grad, q, k, v, out, sums, BORDERS, 9, 0.25)
    monkeypatch.undo()
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_efficient_kernel_is_differentiated_without_a_gpu_too() -> None:
    q, k, v = (torch.empty(1, heads, 18, 16, device="meta", requires_grad=True) for heads in (8, 2, 2))
    arguments = attention_arguments(BORDERS.to("meta"), LENGTHS, kernel="efficient")
    out, _ = document_attention(torch.nn.Identity(), q, k, v, None, 0.25, **arguments)
    assert out.shape == (1, 18, 8, 16)
    out.sum().backward()
    assert [x.grad is not None and x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((9, 0), torch.bfloat16, "varlen"),
        ((8, 0), torch.float16, "varlen"),
        ((8, 0), torch.float32, "efficient"),
        ((7, 5), torch.float16, "efficient"),
    ],
)
def test_kernel_choice(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, kernel: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_kernel(torch.device("cuda"), dtype) == kernel


def test_kernel_choice_without_a_gpu() -> None:
    assert attention_kernel(torch.device("cpu"), torch.bfloat16) == "cpu"
