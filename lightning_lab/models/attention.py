"""Causal attention inside each packed document, never across two.

A packed micro-batch is one row of ``T`` tokens that holds several documents one after another. Their borders come
from the collator, computed on the CPU (``cu_seqlens`` and ``document_lengths``), so that no layer has to ask the device
for them, and no ``T x T`` mask is ever built.

The function is registered with transformers' ``AttentionInterface``, which is how it accepts attention from outside
(https://huggingface.co/docs/transformers/attention_interface). A name that has no entry in the mask interface gets no
mask from transformers, which is what is wanted here.

On GPUs with PyTorch's variable-length kernel one call serves all documents. On a CPU they are attended one by one
(`cpu`).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lab.models.cpu import cpu_document_attention

DOCUMENT_ATTENTION = "lightning_lab_documents"


def register_document_attention() -> str:
    """Make :func:`document_attention` known to transformers; return the name to pass as ``attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    return DOCUMENT_ATTENTION


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``torch.nn.attention.varlen`` serves this device and dtype: CUDA sm80 or newer, bfloat16 or float16."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attention_operators() -> list[torch._ops.OpOverload]:
    """The operators that :func:`document_attention` comes down to on any device, for selective checkpointing."""
    import torch.nn.attention.varlen  # registers its operator

    aten = torch.ops.aten
    return [
        torch.ops.lightning_lab.cpu_document_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]


def attention_arguments(cu_seqlens: Tensor, lengths: Sequence[int], varlen: bool) -> dict[str, Any]:
    """What a model's forward needs to pass on to :func:`document_attention`, for one packed row.

    Args:
        cu_seqlens: ``[documents + 1]`` int32 borders on the device, from 0 to ``T``.
        lengths: The same as lengths on the host, adding up to ``T``.
        varlen: Use the variable-length kernel; see :func:`has_varlen_kernel`.

    """
    if varlen:
        return {"cu_seqlens": cu_seqlens, "longest_document": max(lengths)}
    # borders, not lengths: a tensor of one element would be compiled apart
    return {"document_borders": torch.tensor([0, *accumulate(lengths)], device="cpu")}


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    longest_document: int | None = None,
    document_borders: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document of a packed row.

    Args:
        module: The attention layer that calls; not used.
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        value: As ``key``.
        attention_mask: Must be None; the borders say all there is to say.
        scaling: Factor on the scores; ``1 / sqrt(head_dim)`` by default.
        dropout: Attention dropout; Llama has none, and anything but 0 is refused.
        cu_seqlens: As in :func:`attention_arguments`; given for the variable-length kernel.
        longest_document: Tokens of the longest document; with ``cu_seqlens``.
        document_borders: ``[documents + 1]`` int64 on the CPU, from 0 to ``T``; without ``cu_seqlens``.
        kwargs: What transformers passes to any attention function; not used.

    Returns:
        ``[1, T, heads, head_dim]``, and None in place of attention weights.

    Raises:
        ValueError: The borders are missing, a mask or dropout was passed, or the batch has more than one row.

    """
    if attention_mask is not None or dropout != 0.0 or query.shape[0] != 1:
        raise ValueError("document attention takes one packed row, without a mask and without dropout")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if cu_seqlens is not None and longest_document is not None:
        return _varlen(query, key, value, cu_seqlens, longest_document, scaling), None
    if document_borders is None:
        raise ValueError("document attention needs the documents' borders; generation uses sdpa instead")
    if query.device.type == "cpu":
        return cpu_document_attention(query, key, value, document_borders, scaling)[0], None
    return _sdpa_per_document(query, key, value, document_borders.diff().tolist(), scaling), None


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # [T, heads, head_dim]
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """For GPUs without the variable-length kernel (before sm80, or in float32); not compiled."""
    # without flash enable_gqa leaves only the kernel that builds T x T scores
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    pieces = [
        F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True, scale=scaling)
        for q_i, k_i, v_i in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)
