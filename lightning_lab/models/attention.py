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

    return [
        torch.ops.lightning_lab.cpu_document_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        # all that is left where there is no variable-length kernel, in float32 or before sm80
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    ]


def attention_arguments(cu_seqlens: Tensor, lengths: Sequence[int], varlen: bool) -> dict[str, Any]:
    """What a model's forward needs to pass on to :func:`document_attention`, for one packed row.

    Args:
        cu_seqlens: ``[documents + 1]`` int32 borders on the device, from 0 to ``T``.
        lengths: The same as lengths on the host, adding up to ``T``.
        varlen: Use the variable-length kernel; see :func:`has_varlen_kernel`.

    """
    # borders, not lengths: a tensor of one element would be compiled apart
    borders = cu_seqlens if varlen else torch.tensor([0, *accumulate(lengths)], device="cpu")
    return {"document_borders": borders, "longest_document": max(lengths) if varlen else None}


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    document_borders: Tensor | None = None,
    longest_document: int | None = None,
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
        document_borders: ``[documents + 1]`` from 0 to ``T``; int64 on the CPU, or int32 on the device for the
            variable-length kernel.
        longest_document: Tokens of the longest document, for the variable-length kernel; None for any other.
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
    if longest_document is not None:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
        borders, longest = (document_borders, document_borders), (longest_document, longest_document)
        out = varlen_attn(q, k, v, *borders, *longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    if query.device.type == "cpu":
        return cpu_document_attention(query, key, value, document_borders, scaling)[0], None
    # GPUs without the variable-length kernel (before sm80, or in float32), which are not compiled;
    # without flash enable_gqa leaves only the kernel that builds T x T scores
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    lengths = document_borders.diff().tolist()
    pieces = [
        F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True, scale=scaling)
        for q_i, k_i, v_i in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None
