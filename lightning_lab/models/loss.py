"""Linear cross-entropy over supervised positions only, in chunks: logits never exist whole.

The head of Llama-3 has 128,256 columns. 2,048 positions of float32 logits are 1.05 GB, and as much again for their
gradient, while completion-only masking throws many of those rows away. Here the caller has gathered the supervised
positions already, and each chunk's logits are dropped before the next chunk's are made.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lab.models import cpu

# Elements of a chunk of logits on a GPU, by the bytes of its memory from which on they are taken. 2**25 are 261 rows of
# Llama-3's vocabulary, 134 MB as float32. The head, 0.5 GB in a Llama-3.2-1B, is read twice for each chunk: of 4,096
# positions 16.8 GB with 2**25 elements, 4.2 GB with 2**27.
CHUNK_ELEMENTS = ((36 * 2**30, 2**27), (20 * 2**30, 2**26), (0, 2**25))


def supervised_nll_sum(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    gradient_scale: float = 1.0,
    compiled: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the negative log-likelihood of ``targets``, differentiable with respect to ``hidden``.

    A sum, not a mean: `training.module` divides by the weights of the whole step, over all micro-batches and
    processes, after the last of them (`QLoRAModule.training_step`, `on_before_optimizer_step`).

    The head is frozen (adapters on it are refused), so it gets no gradient. The gradient of ``hidden`` is made together
    with the loss, while a chunk's logits are at hand.

    Args:
        hidden: ``[S, hidden_size]`` last hidden states at the positions that predict a supervised token.
        head: ``[vocabulary, hidden_size]``, same dtype as ``hidden``.
        targets: ``[S]`` int64 token ids.
        gradient_scale: Loss scaling for float16: the gradient comes out multiplied by it, the value does not. It is
            applied in float32 before the gradient is rounded, since a probability under 6e-8 is 0 in float16.
        compiled: Compile what is done to the logits, so that no float32 copy of them is made.
        weights: ``[S]`` float32, of each target; None for 1.

    Returns:
        float32 scalar in nats; 0 with a graph when ``S`` is 0.

    """
    return _NLLSum.apply(hidden, head, targets, weights, gradient_scale, compiled)


@torch.no_grad()
def supervised_nll(hidden: Tensor, head: Tensor, targets: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and whether it was the most likely token. No gradient.

    Args:
        hidden: ``[S, hidden_size]``, as in :func:`supervised_nll_sum`.
        head: ``[vocabulary, hidden_size]``.
        targets: ``[S]`` int64 token ids.
        compiled: As in :func:`supervised_nll_sum`.

    Returns:
        ``[S]`` float32 nats and ``[S]`` bool.

    """
    summarise = _compile(_summary) if compiled else _summary
    nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for rows in _chunks(len(targets), head, compiled):
        logits = hidden[rows] @ head.T
        at_target = _at(logits, targets[rows])
        logsumexp, best = summarise(logits)
        nll[rows] = logsumexp - at_target
        correct[rows] = best == targets[rows]
    return nll, correct


class _NLLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        gradient_scale: float,
        compiled: bool,
    ) -> Tensor:
        softmax_of = _compile(_scaled_softmax) if compiled else _scaled_softmax
        # tensors: torch.compile would take each number for a new constant
        one = torch.full((1,), gradient_scale, dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for rows in _chunks(len(targets), head, compiled):
            logits = hidden[rows] @ head.T
            at_target = _at(logits, targets[rows])
            scale = one if weights is None else weights[rows] * gradient_scale
            logsumexp, softmax = softmax_of(logits, scale[:, None])
            del logits
            nll = logsumexp - at_target
            total += (nll if weights is None else nll * weights[rows]).sum()
            # d nll / d logits = softmax - onehot
            less_one = (at_target - logsumexp).expm1() * scale
            softmax.scatter_(-1, targets[rows, None], less_one.to(softmax.dtype)[:, None])
            gradient[rows] = softmax @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # only hidden can need one
        return gradient * grad_output.to(gradient.dtype), None, None, None, None, None


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Positions in one chunk of logits, at least 1."""
    elements = cpu.CHUNK_ELEMENTS if device.type == "cpu" else _elements_on_gpu(device)
    return max(1, elements // vocabulary)


@cache
def _elements_on_gpu(device: torch.device) -> int:
    memory = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    return next(elements for least, elements in CHUNK_ELEMENTS if memory >= least)


def _chunks(positions: int, head: Tensor, compiled: bool) -> list[slice]:
    size = chunk_rows(len(head), head.device)
    while compiled and positions > size > 2 and positions % size == 1:  # a chunk of one row would be compiled apart
        size -= 1
    return [slice(start, start + size) for start in range(0, positions, size)]


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1).float()


@cache
def _compile(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(function, fullgraph=True, dynamic=True)


# Both may overwrite the logits: ``torch.logsumexp`` would make another matrix of that size.


def _scaled_softmax(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's log-sum-exp in float32, and its softmax times ``scale`` (``[rows or 1, 1]``) in their dtype."""
    scores = logits.float()
    top = scores.amax(-1, keepdim=True)
    exponentials = scores.sub_(top).exp_()
    sums = exponentials.sum(-1, keepdim=True)
    return (sums.log() + top).squeeze(-1), exponentials.mul_(scale / sums).to(logits.dtype)


def _summary(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's log-sum-exp in float32, and where its largest value is."""
    scores = logits.float()
    top, best = scores.max(-1, keepdim=True)
    return (scores.sub_(top).exp_().sum(-1, keepdim=True).log() + top).squeeze(-1), best.squeeze(-1)
