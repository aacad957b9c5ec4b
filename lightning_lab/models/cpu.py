"""All that serves a CPU alone: attention over packed documents, and its oddities.

The documents are attended one after another in one operator that `torch.compile` does not look into, so that neither
their number nor their lengths compile a layer anew. Several query heads share a key by stride or reshape, never by a
copy.
"""

import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Elements of a chunk of logits. glibc gives blocks over 32 MiB back at once, and new pages cost more than smaller
# products do: of 819 positions of SmolLM2, 0.37 s with 2**23 elements, 0.54 s with 2**25, 0.52 s with 2**22.
CHUNK_ELEMENTS = 2**23
# Queries worked on at once in bfloat16. Of 1,365 tokens and 9 heads on two AMX cores: 64 rows 22 ms, 128 and 256 18 ms,
# 342 25 ms, PyTorch's flash kernel 25 ms; on two AVX512-BF16 cores: 64 rows 33 ms, 128 30 ms, 256 37 ms, flash 65 ms.
_BLOCK = 128
# Kernels that oneDNN keeps, and PyTorch besides, for the shapes they were made for: 0.1 to 0.6 MiB each. Micro-batches
# differ in length, so the default of 1,024 fills up with kernels that are never used again, and cuts up the heap: 5.4
# GiB after 35 steps of SmolLM2 at 2,048 tokens, 3.0 to 3.5 with 128, at the same speed.
_CACHED_KERNELS = 128


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, by AVX512-BF16, AMX, or Arm's BF16 extension."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def bound_kernel_caches() -> None:
    """Bound the memory of compiled kernels, unless the user has; has effect before the first bfloat16 product.

    One variable is read by oneDNN, the other by PyTorch's bridge to it.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(_CACHED_KERNELS))


@torch.library.custom_op("lightning_lab::cpu_document_attention", mutates_args=(), device_types="cpu")
def cpu_document_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention within each document by PyTorch's flash kernel, which takes strided input.

    Args:
        q: ``[1, heads, T, head_dim]``.
        k: ``[1, kv_heads, T, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        v: As ``k``.
        borders: ``[documents + 1]`` int64, from 0 to ``T``.
        scaling: Factor on the scores.

    Returns:
        ``[1, T, heads, head_dim]``, and the scores' log-sum-exp ``[1, heads, T]``.

    """
    out, logsumexp = _empty_results(q)
    for start, end in pairwise(borders.tolist()):
        pieces = (x[:, :, start:end] for x in (q, k, v))
        out_i, logsumexp[:, :, start:end] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *pieces, 0.0, True, scale=scaling
        )
        out[:, start:end] = out_i.transpose(1, 2)
    return out, logsumexp


@cpu_document_attention.register_fake
def _empty_results(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    heads, tokens, width = q.shape[1:]
    return q.new_empty(1, tokens, heads, width), q.new_empty(1, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("lightning_lab::cpu_document_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, borders: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_gradients(grad, q, k, v)
    whole = (grad.transpose(1, 2), q, k, v, out.transpose(1, 2), logsumexp)
    for start, end in pairwise(borders.tolist()):
        pieces = [x[:, :, start:end] for x in whole]
        if q.dtype == torch.bfloat16:
            found = _backward_in_blocks(*(piece[0] for piece in pieces), scaling=scaling)
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *pieces, 0.0, True, scale=scaling
            )
        for gradient, piece in zip(grads, found, strict=True):
            gradient[:, :, start:end] = piece
    return grads


@_attention_backward.register_fake
def _empty_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_in_blocks(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one document, ``[heads, T, head_dim]`` without a batch, from bfloat16 products of 128 queries.

    The score less its row's log-sum-exp comes out of one product, by two more columns that hold the latter in two
    bfloat16 pieces; so it is rounded where it is small, and where it is large its exponential is nothing. The
    same goes for the gradient of the probabilities less its row's mean (equation 4 of arXiv:2205.14135, appendix B).
    """
    heads, tokens, width = q.shape
    groups, shared = k.shape[0], heads // k.shape[0]
    mean = (grad.float() * out.float()).sum(-1)
    q_less, k_less = _less(q * scaling, logsumexp, k)
    grad_less, v_less = _less(grad, mean, v)
    dq = q.new_empty(heads, tokens, width)
    dk, dv = (torch.zeros(groups, width, tokens) for _ in range(2))
    scratch = [q.new_empty(heads * min(_BLOCK, tokens) * tokens) for _ in range(2)]
    future = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).triu(1)
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        rows = end - start
        q_i, q_less_i, grad_i, grad_less_i = (
            x[:, start:end].reshape(groups, shared * rows, -1) for x in (q, q_less, grad, grad_less)
        )
        p, ds = (x[: heads * rows * end].view(groups, shared * rows, end) for x in scratch)
        torch.bmm(q_less_i, k_less[..., :end], out=p)
        p.view(heads, rows, end)[..., start:].masked_fill_(future[:rows, :rows], -torch.inf)
        p.exp_()
        torch.bmm(grad_less_i, v_less[..., :end], out=ds)
        ds.mul_(p)
        dv[..., :end] += grad_i.transpose(1, 2) @ p
        dk[..., :end] += q_i.transpose(1, 2) @ ds
        dq[:, start:end] = (ds @ k[:, :end]).mul_(scaling).view(heads, rows, width)
    return dq[None], dk.mul_(scaling).transpose(1, 2)[None], dv.transpose(1, 2)[None]


def _less(rows: Tensor, subtracted: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[heads, T, head_dim + 2]`` and ``[kv_heads, head_dim + 2, T]`` of ``rows columns^T - subtracted``."""
    high = subtracted.to(rows.dtype)
    low = (subtracted - high).to(rows.dtype)
    left = torch.cat([rows, high[..., None], low[..., None]], -1)
    right = torch.cat([columns, columns.new_full((*columns.shape[:-1], 2), -1.0)], -1)
    return left, right.transpose(1, 2).contiguous()


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, ctx.scaling = inputs
    ctx.save_for_backward(q, k, v, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scaling), None, None


cpu_document_attention.register_autograd(_backward, setup_context=_keep)
