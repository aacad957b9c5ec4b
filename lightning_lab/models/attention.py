"""Causal attention inside each packed document, never across two.

A packed micro-batch is one row of ``T`` tokens that holds several documents one after another. Their borders come
from the collator, computed on the CPU (``cu_seqlens`` and ``document_lengths``), so that no layer has to ask the device
for them, and no ``T x T`` mask is ever built.

The function is registered with transformers' ``AttentionInterface``, which is how it accepts attention from outside
(https://huggingface.co/docs/transformers/attention_interface). A name that has no entry in the mask interface gets no
mask from transformers, which is what is wanted here.

On a GPU one kernel serves all documents: PyTorch's variable-length one, or where that does not run (before compute
capability 8.0, or in float32) the memory-efficient one. On a CPU they are attended one by one (`cpu`).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lab.models.cpu import cpu_document_attention

DOCUMENT_ATTENTION = "lightning_lab_documents"
Kernel = Literal["varlen", "efficient", "cpu"]
_CAUSAL = 1  # the memory-efficient kernel's mask type
_ROWS = 32  # its log-sum-exps are kept for multiples of so many queries


def register_document_attention() -> str:
    """Make :func:`document_attention` known to transformers; return the name to pass as ``attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    return DOCUMENT_ATTENTION


def attention_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Which kernel serves a device and a dtype: ``varlen`` needs CUDA sm80 or newer, and bfloat16 or float16."""
    if device.type == "cpu":
        return "cpu"
    half = dtype in (torch.bfloat16, torch.float16)
    return "varlen" if half and torch.cuda.get_device_capability(device) >= (8, 0) else "efficient"


def attention_operators() -> list[torch._ops.OpOverload]:
    """The operators that :func:`document_attention` comes down to on any device, for selective checkpointing."""
    import torch.nn.attention.varlen  # registers its operator

    return [
        torch.ops.lightning_lab.cpu_document_attention.default,
        torch.ops.lightning_lab.efficient_document_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ]


def attention_arguments(cu_seqlens: Tensor, lengths: Sequence[int], kernel: Kernel) -> dict[str, Any]:
    """What a model's forward needs to pass on to :func:`document_attention`, for one packed row.

    Args:
        cu_seqlens: ``[documents + 1]`` int32 borders on the device, from 0 to ``T``.
        lengths: The same as lengths on the host, adding up to ``T``.
        kernel: See :func:`attention_kernel`.

    """
    # borders, not lengths: a tensor of one element would be compiled apart
    borders = torch.tensor([0, *accumulate(lengths)], device="cpu") if kernel == "cpu" else cu_seqlens
    return {"document_borders": borders, "longest_document": max(lengths), "attention_kernel": kernel}


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    document_borders: Tensor | None = None,
    longest_document: int = 0,
    attention_kernel: Kernel = "cpu",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document of a packed row.

    Args:
        module: The attention layer that calls; not used.
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        value: As ``key``.
        attention_mask: Must be None; the borders say all there is to say.
        scaling: Factor on the scores.
        dropout: Attention dropout; Llama has none, and anything but 0 is refused.
        document_borders: ``[documents + 1]`` from 0 to ``T``; int64 on the CPU, int32 on a GPU.
        longest_document: Tokens of the longest document, which a GPU's kernels need.
        attention_kernel: See :func:`attention_kernel`.
        kwargs: What transformers passes to any attention function; not used.

    Returns:
        ``[1, T, heads, head_dim]``, and None in place of attention weights.

    Raises:
        ValueError: The borders are missing, a mask or dropout was passed, or the batch has more than one row.

    """
    if attention_mask is not None or dropout != 0.0 or query.shape[0] != 1 or document_borders is None:
        raise ValueError(
            "document attention takes one packed row with its documents' borders, without a mask and without dropout; "
            "generation uses sdpa instead"
        )
    if attention_kernel == "cpu":
        return cpu_document_attention(query, key, value, document_borders, scaling)[0], None
    if attention_kernel == "efficient":
        return efficient_document_attention(query, key, value, document_borders, longest_document, scaling)[0], None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    borders, longest = (document_borders, document_borders), (longest_document, longest_document)
    out = varlen_attn(q, k, v, *borders, *longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0), None


# In operators of our own: PyTorch 2.13 cannot trace the backward pass of the kernel's (its meta function is given
# ``scale`` twice), and keys are repeated for their query heads only while the kernel runs.
@torch.library.custom_op("lightning_lab::efficient_document_attention", mutates_args=(), device_types="cuda")
def efficient_document_attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document by PyTorch's memory-efficient kernel; sm50 and newer, also in float32.

    Args:
        q: ``[1, heads, T, head_dim]``.
        k: ``[1, kv_heads, T, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        v: As ``k``.
        borders: ``[documents + 1]`` int32 on the device, from 0 to ``T``.
        longest: Tokens of the longest document.
        scaling: Factor on the scores.

    Returns:
        ``[1, T, heads, head_dim]``, and the scores' log-sum-exp ``[documents, heads, longest]``, ``longest`` rounded up
        to a multiple of 32.

    """
    out, logsumexp, *_ = torch.ops.aten._efficient_attention_forward(
        *_one_key_a_head(q, k, v), None, borders, borders, longest, longest, 0.0, _CAUSAL, True, scale=scaling
    )
    return out, logsumexp


@efficient_document_attention.register_fake
def _(q: Tensor, k: Any, v: Any, borders: Tensor, longest: int, scaling: Any) -> tuple[Tensor, Tensor]:
    _, heads, tokens, width = q.shape
    rows = (longest + _ROWS - 1) // _ROWS * _ROWS
    sums = q.new_empty(borders.shape[0] - 1, heads, rows, dtype=torch.float32)
    return q.new_empty(1, tokens, heads, width), sums


@torch.library.custom_op("lightning_lab::efficient_document_attention_backward", mutates_args=(), device_types="cuda")
def _efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)  # the seed and offset of none
    lengths = borders, borders, longest, longest
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        grad, *_one_key_a_head(q, k, v), None, out, *lengths, logsumexp, 0.0, no_dropout, no_dropout, _CAUSAL, False,
        scale=scaling,
    )  # fmt: skip
    groups = k.shape[1]
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@_efficient_backward.register_fake
def _(grad: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


def _one_key_a_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``[1, T, heads, head_dim]`` of each: the kernel shares no key between heads."""
    repeats = q.shape[1] // k.shape[1]
    key, value = (x.transpose(1, 2).repeat_interleave(repeats, dim=2) for x in (k, v))
    return q.transpose(1, 2), key, value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, ctx.longest, ctx.scaling = inputs
    ctx.save_for_backward(q, k, v, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_efficient_backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scaling), None, None, None


efficient_document_attention.register_autograd(_backward, setup_context=_keep)
