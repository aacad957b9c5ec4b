"""Linear cross-entropy over supervised positions only, in chunks: logits never exist whole.

The head of Llama-3 has 128,256 columns. 2,048 positions of float32 logits are 1.05 GB, and as much again for their
gradient, while completion-only masking throws many of those rows away. Here the caller has gathered the supervised
positions already, and each chunk's logits are dropped before the next chunk's are made.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one chunk of logits: 2**25 float32 values are 134 MB, 261 positions of Llama-3's vocabulary.
CHUNK_ELEMENTS = 2**25


def supervised_nll_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, gradient_scale: float = 1.0, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Sum of the negative log-likelihood of ``targets``, differentiable with respect to ``hidden``.

    The head is frozen (adapters on it are refused), so it gets no gradient. The gradient of ``hidden`` is made together
    with the loss, while a chunk's logits are at hand.

    Args:
        hidden: ``[S, hidden_size]`` last hidden states at the positions that predict a supervised token.
        head: ``[vocabulary, hidden_size]``, same dtype as ``hidden``.
        targets: ``[S]`` int64 token ids.
        gradient_scale: Loss scaling for float16: the gradient comes out multiplied by it, the value does not. It is
            applied in float32 before the gradient is rounded, since a probability under 6e-8 is 0 in float16.
        chunk_elements: Upper bound on the elements of one chunk of logits (at least one row is taken).

    Returns:
        float32 scalar in nats; 0 with a graph when ``S`` is 0.

    """
    return _NLLSum.apply(hidden, head, targets, gradient_scale, chunk_elements)


@torch.no_grad()
def supervised_nll(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and whether it was the most likely token. No gradient.

    Args:
        hidden: ``[S, hidden_size]``, as in :func:`supervised_nll_sum`.
        head: ``[vocabulary, hidden_size]``.
        targets: ``[S]`` int64 token ids.
        chunk_elements: As in :func:`supervised_nll_sum`.

    Returns:
        ``[S]`` float32 nats and ``[S]`` bool.

    """
    nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for rows in _chunks(len(targets), head.shape[0], chunk_elements):
        nll[rows], _, _, best = _chunk_nll(hidden[rows], head, targets[rows])
        correct[rows] = best == targets[rows]
    return nll, correct


class _NLLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, gradient_scale: float, chunk_elements: int
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(targets), head.shape[0], chunk_elements):
            nll, exponentials, sums, _ = _chunk_nll(hidden[rows], head, targets[rows])
            total += nll.sum()
            if gradient is not None:
                # d nll / d logits = softmax - onehot, made in place of the logits
                softmax = exponentials.div_(sums[:, None])
                softmax[torch.arange(len(softmax), device=softmax.device), targets[rows]] -= 1.0
                gradient[rows] = softmax.mul_(gradient_scale).to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None, None


def _chunks(positions: int, vocabulary: int, chunk_elements: int) -> Iterator[slice]:
    size = max(1, chunk_elements // vocabulary)
    return (slice(start, min(start + size, positions)) for start in range(0, positions, size))


def _chunk_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return NLL, exponentials of the logits less each row's maximum, their sums, and the most likely token.

    The exponentials take the logits' place: ``torch.logsumexp`` would make a second matrix of that size.
    """
    logits = (hidden @ head.T).float()
    top, best = logits.max(dim=-1)
    at_target = logits.gather(-1, targets[:, None]).squeeze(-1) - top
    exponentials = logits.sub_(top[:, None]).exp_()
    sums = exponentials.sum(dim=-1)
    return sums.log() - at_target, exponentials, sums, best
