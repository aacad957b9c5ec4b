"""Causal attention inside each packed document, never across two.

A packed micro-batch is one row of ``T`` tokens that holds several documents one after another. Their borders come
from the collator, computed on the CPU (``cu_seqlens`` and ``document_lengths``), so that no layer has to ask the device
for them, and no ``T x T`` mask is ever built.

The function is registered with transformers' ``AttentionInterface``, which is how it accepts attention from outside
(https://huggingface.co/docs/transformers/attention_interface). A name that has no entry in the mask interface gets no
mask from transformers, which is what is wanted here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
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
        cu_seqlens: ``[documents + 1]`` int32 borders on the device, from 0 to ``T``.
        document_lengths: The same as lengths on the host, adding up to ``T``.
        kwargs: What transformers passes to any attention function; not used.

    Returns:
        ``[1, T, heads, head_dim]``, and None in place of attention weights.

    Raises:
        ValueError: The borders are missing, a mask or dropout was passed, or the batch has more than one row.

    """
    if cu_seqlens is None or document_lengths is None:
        raise ValueError("document attention needs cu_seqlens and document_lengths; generation uses sdpa instead")
    if attention_mask is not None or dropout != 0.0 or query.shape[0] != 1:
        raise ValueError("document attention takes one packed row, without a mask and without dropout")
    if has_varlen_kernel(query.device, query.dtype):
        return _varlen(query, key, value, cu_seqlens, max(document_lengths), scaling), None
    return _per_document(query, key, value, document_lengths, scaling), None


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # [T, heads, head_dim]
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _per_document(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scaling: float | None) -> Tensor:
    if q.is_cuda:  # without flash (sm80, 16 bits) enable_gqa leaves only the kernel that builds T x T scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    pieces = [
        F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True, scale=scaling, enable_gqa=not q.is_cuda)
        for q_i, k_i, v_i in zip(
            q.split(list(lengths), dim=2), k.split(list(lengths), dim=2), v.split(list(lengths), dim=2), strict=True
        )
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)
