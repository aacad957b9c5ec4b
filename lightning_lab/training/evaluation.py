"""Held-out loss, conversation by conversation: the same for any batch size, packing and number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lab.data.batching import MicroBatch


@dataclass(frozen=True)
class Evaluation:
    """What one pass over ``C`` conversations of a split found, in the split's order.

    Attributes:
        rows: ``[C]`` int64, each conversation's row in the source.
        nll: ``[C]`` float64, its summed negative log-likelihood in nats, each token's times its weight.
        tokens: ``[C]`` int64, its supervised tokens.
        weight: ``[C]`` float64, the sum of their weights: their number, unless weights are asked for.
        correct: ``[C]`` int64, those of them that were the most likely token.
        hf_batch_size: Conversations in the batches that `loss_hf` imitates.
        trained: The conversations that were trained on, which are not among these; None if there were none.
        token_nll: ``[sum of tokens]`` float32, of each supervised token, one conversation after another; None where
            they were not kept.

    """

    rows: Tensor
    nll: Tensor
    tokens: Tensor
    weight: Tensor
    correct: Tensor
    hf_batch_size: int = 8  # Hugging Face's default
    trained: Evaluation | None = None
    token_nll: Tensor | None = None

    @property
    def loss(self) -> float:
        """Sum of NLL / supervised tokens (or their weights), in nats per token."""
        return (self.nll.sum() / self.weight.sum()).item()  # NaN of no conversation

    def apart(self, rows: Sequence[int]) -> tuple[Evaluation, Evaluation]:
        """The other conversations, and those of some rows of the source."""

        def chosen(which: Tensor) -> Evaluation:
            kept = {key: getattr(self, key)[which] for key in ("rows", "nll", "tokens", "weight", "correct")}
            if self.token_nll is not None:
                kept["token_nll"] = self.token_nll[which.repeat_interleave(self.tokens)]
            return replace(self, **kept)

        those = torch.isin(self.rows, torch.tensor(rows, dtype=torch.int64))
        return chosen(~those), chosen(those)

    @property
    def loss_hf(self) -> float:
        """Sample-weighted mean of the means of batches in sequential order, as Hugging Face's trainer prints.

        Not token-weighted, and different for another batch size: only for comparison with published tables.
        """
        nll, weight = self.nll.split(self.hf_batch_size), self.weight.split(self.hf_batch_size)
        means = torch.stack([n.sum() / w.sum() for n, w in zip(nll, weight, strict=True)])
        sizes = torch.tensor([len(n) for n in nll], dtype=means.dtype)
        return ((means * sizes).sum() / sizes.sum()).item()

    def figures(self, prefix: str) -> dict[str, float]:
        """Loss, Hugging Face's loss, perplexity ``exp(loss)`` and token accuracy, named ``<prefix>_loss`` and so on."""
        loss = self.loss
        return {
            f"{prefix}_loss": loss,
            f"{prefix}_loss_hf": self.loss_hf,
            f"{prefix}_perplexity": math.exp(loss) if loss < 700 else math.inf,
            f"{prefix}_token_accuracy": (self.correct.sum().double() / self.tokens.sum()).item(),
        }


class EvaluationSums:
    """Adds up a split's micro-batches on the device; one copy to the host, when all are in.

    Args:
        trained_rows: Rows of the source to keep apart, as they were trained on.
        weighted: Whether the data's weights count; else each supervised token has 1.
        keep_tokens: Keep the NLL of each token too. They stay on the device until all are in, 4 bytes each: 160 MB for
            40 million.

    """

    def __init__(self, trained_rows: Sequence[int] = (), *, weighted: bool = False, keep_tokens: bool = False) -> None:
        self._trained_rows, self._weighted, self._keep_tokens = trained_rows, weighted, keep_tokens
        self._token_nll: list[Tensor] = []
        self._device: list[tuple[Tensor, Tensor, Tensor]] = []
        self._host: list[tuple[int, int, int]] = []

    def add(self, batch: MicroBatch, nll: Tensor, correct: Tensor) -> None:
        """Add one micro-batch of ``C`` conversations and ``S`` supervised tokens.

        Args:
            batch: The micro-batch.
            nll: ``[S]`` float32 nats.
            correct: ``[S]`` bool.

        """
        conversations = len(batch.documents)
        given = batch.weights if self._weighted else None
        weights = torch.ones_like(nll, dtype=torch.float64) if given is None else given.double()
        # float64: a sum over any packing then rounds to the same float32
        sums, weight = torch.zeros(2, conversations, dtype=torch.float64, device=nll.device)
        hits = torch.zeros(conversations, dtype=torch.int64, device=nll.device)
        sums.index_add_(0, batch.target_documents, nll.double() * weights)
        weight.index_add_(0, batch.target_documents, weights)
        hits.index_add_(0, batch.target_documents, correct.long())
        self._device.append((sums, weight, hits))
        if self._keep_tokens:
            self._token_nll.append(nll)
        self._host += zip(batch.documents, batch.rows, batch.target_counts, strict=True)

    def evaluation(self, world_size: int, hf_batch_size: int = 8) -> Evaluation:
        """Return what all processes found."""
        sums = [torch.cat(parts).tolist() for parts in zip(*self._device, strict=True)]
        each: Sequence[np.ndarray] = [np.empty(0, np.float32)] * len(self._host)
        if self._keep_tokens:  # numpy: a part of a tensor is sent with the whole of it
            ends = np.cumsum([tokens for _, _, tokens in self._host])[:-1]
            each = np.split(torch.cat(self._token_nll).cpu().numpy(), ends)
        found = [(*host, *rest) for host, *rest in zip(self._host, *sums, each, strict=True)]
        if world_size > 1:
            shares: list[list[Any]] = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(shares, found)
            found = [conversation for share in shares for conversation in share]
        _, rows, tokens, nll, weight, correct, each = zip(*sorted(found, key=itemgetter(0)), strict=True)
        every = Evaluation(
            rows=torch.tensor(rows),
            nll=torch.tensor(nll, dtype=torch.float64),
            tokens=torch.tensor(tokens),
            weight=torch.tensor(weight, dtype=torch.float64),
            correct=torch.tensor(correct),
            hf_batch_size=hf_batch_size,
            token_nll=torch.from_numpy(np.concatenate(each)) if self._keep_tokens else None,
        )
        others, trained = every.apart(self._trained_rows)
        return replace(others, trained=trained) if len(trained.rows) else every
