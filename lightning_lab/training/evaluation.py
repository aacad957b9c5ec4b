"""Held-out loss, token by token: the same for any batch size, packing and number of processes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

HF_BATCH_SIZE = 8


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split found, per conversation.

    Attributes:
        nll: ``[conversations]`` float64, each conversation's summed negative log-likelihood in nats.
        tokens: ``[conversations]`` int64, supervised tokens.
        correct: ``[conversations]`` int64, supervised tokens that were the most likely one.

    """

    nll: Tensor
    tokens: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        """Sum of NLL / supervised tokens, in nats per token."""
        return self.nll.sum().item() / int(self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of supervised tokens that were the most likely one."""
        return int(self.correct.sum()) / int(self.tokens.sum())

    @property
    def loss_hf(self) -> float:
        """Sample-weighted mean of batch means at batch size 8 in sequential order, as Hugging Face's trainer prints.

        Not token-weighted, and different for another batch size: only for comparison with published tables.
        """
        nll, tokens = self.nll.split(HF_BATCH_SIZE), self.tokens.split(HF_BATCH_SIZE)
        means = torch.stack([n.sum() / t.sum() for n, t in zip(nll, tokens, strict=True)])
        sizes = torch.tensor([len(n) for n in nll], dtype=means.dtype)
        return ((means * sizes).sum() / sizes.sum()).item()


class PerConversation(Metric):
    """Collects NLL, token count and hits of each conversation of a split; torchmetrics adds the processes up.

    Args:
        conversations: How many conversations the split holds.

    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    correct: Tensor

    def __init__(self, conversations: int) -> None:
        super().__init__()
        # float64: a sum over any packing then rounds to the same float32
        self.add_state("nll", torch.zeros(conversations, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(conversations, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(conversations, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, conversation: Tensor, nll: Tensor, correct: Tensor) -> None:
        """Add targets.

        Args:
            conversation: ``[S]`` int64, which conversation each target belongs to.
            nll: ``[S]`` float32.
            correct: ``[S]`` bool.

        """
        self.nll.index_add_(0, conversation, nll.double())
        self.tokens.index_add_(0, conversation, torch.ones_like(conversation))
        self.correct.index_add_(0, conversation, correct.long())

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return NLL, tokens and hits of each conversation, over all processes."""
        return self.nll, self.tokens, self.correct

    def evaluation(self) -> Evaluation:
        """Return the totals over all processes, on the CPU."""
        nll, tokens, correct = (total.reshape(-1).cpu() for total in self.compute())  # torchmetrics squeezes one value
        return Evaluation(nll, tokens, correct)
