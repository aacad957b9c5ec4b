"""Lengths -> steps -> packed micro-batches.

A batch is one optimizer step. Which conversations a step holds is a pure function of (seed, epoch, step); how the step
is cut into micro-batches only decides memory and speed, never the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lightning_lab.data.rendering import IGNORED


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which epoch ``epoch`` (from 0) visits ``size`` examples.

    ``torch.randperm(size, generator=manual_seed(seed + epoch))``, which is also what Hugging Face's trainer visits.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut documents into micro-batches of at most ``budget`` tokens: first fit, longest first.

    A document longer than the budget is a micro-batch of its own. The result depends on the lengths alone.

    Args:
        lengths: Tokens of each document.
        budget: Most tokens in a micro-batch.

    Returns:
        Positions in ``lengths``, each exactly once, ascending within a micro-batch.

    """
    room: list[int] = []
    packed: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        fit = next((i for i, free in enumerate(room) if length <= free), None)
        if fit is None:
            packed.append([position])
            room.append(budget - length)
        else:
            packed[fit].append(position)
            room[fit] -= length
    return [sorted(documents) for documents in packed]


@dataclass(frozen=True)
class MicroBatch:
    """Documents laid one after another in a single row of ``T`` tokens, of which ``S`` are supervised.

    Attributes:
        input_ids: ``[1, T]`` int64.
        position_ids: ``[1, T]`` int64, from 0 in each document.
        cu_seqlens: ``[documents + 1]`` int32 borders, from 0 to ``T``.
        predicting: ``[S]`` int64 positions in the row whose next token is supervised.
        targets: ``[S]`` int64 those next tokens.
        target_documents: ``[S]`` int64 which document (index into ``rows``) each target belongs to.
        document_lengths: Tokens of each document, on the host.
        documents: Each document's number in its split.
        rows: Each document's row in the source.

    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    predicting: Tensor
    targets: Tensor
    target_documents: Tensor
    document_lengths: tuple[int, ...]
    documents: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Real tokens in the row."""
        return sum(self.document_lengths)

    @property
    def supervised_tokens(self) -> int:
        """Number of targets."""
        return len(self.targets)

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Copy the tensors to a device (asynchronously from pinned memory)."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Called by a DataLoader with ``pin_memory=True``."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, function: Any) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: this process's micro-batches, and the counts of the whole step on all processes.

    Attributes:
        micro_batches: What this process works on; may be empty on a process without documents.
        rows: Source rows of all conversations in the step, in visiting order.
        tokens: Real tokens of the step.
        supervised_tokens: Supervised tokens of the step; the loss and its gradient are divided by it.
        padded_tokens: Tokens that all processes work on, padding included.

    """

    micro_batches: tuple[MicroBatch, ...]
    rows: tuple[int, ...]
    tokens: int
    supervised_tokens: int
    padded_tokens: int

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Copy all micro-batches to a device."""
        return replace(self, micro_batches=tuple(m.to(device, non_blocking) for m in self.micro_batches))

    def pin_memory(self) -> Self:
        """Called by a DataLoader with ``pin_memory=True``."""
        return replace(self, micro_batches=tuple(m.pin_memory() for m in self.micro_batches))


def collate(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], documents: Sequence[int], rows: Sequence[int]
) -> MicroBatch:
    """Lay examples one after another in one row.

    A label at a document's first token has nothing before it to predict it from and is never a target; in a packed row
    it would otherwise be predicted from the document before.

    Args:
        examples: ``(input_ids, labels)`` of each document, int32 ``[length]``, -100 where masked.
        documents: Each document's number in its split.
        rows: Each document's row in the source.

    """
    lengths = tuple(len(ids) for ids, _ in examples)
    starts = np.cumsum((0, *lengths))
    predicting, targets, owners = [], [], []
    for number, ((_, labels), start) in enumerate(zip(examples, starts, strict=False)):
        supervised = np.flatnonzero(labels[1:] != IGNORED)
        predicting.append(supervised + start)
        targets.append(labels[1:][supervised])
        owners.append(np.full(len(supervised), number))

    def tensor(parts: Sequence[np.ndarray], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype)

    return MicroBatch(
        input_ids=tensor([ids for ids, _ in examples])[None],
        position_ids=tensor([np.arange(length) for length in lengths])[None],
        cu_seqlens=torch.from_numpy(starts).to(torch.int32),
        predicting=tensor(predicting),
        targets=tensor(targets),
        target_documents=tensor(owners),
        document_lengths=lengths,
        documents=tuple(documents),
        rows=tuple(rows),
    )


def share(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Deal documents out to processes so that their token counts are even: longest first to the least loaded.

    Returns:
        For each process the positions in ``lengths`` that it takes, ascending; a process may get none.

    """
    load = [0] * processes
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(range(processes), key=lambda p: (load[p], p))
        dealt[least].append(position)
        load[least] += lengths[position]
    return [sorted(positions) for positions in dealt]
