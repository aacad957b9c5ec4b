"""Lengths -> splits -> steps -> packed micro-batches.

A batch is one optimizer step. Which conversations a step holds is a pure function of (seed, epoch, step); how the step
is cut into micro-batches only decides memory and speed, never the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lightning_lab.data.conversation import Prompt
from lightning_lab.data.encoding import IGNORED
from lightning_lab.errors import LabError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitData:
    """One split.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        rows: int64 [conversations], the source rows that it keeps, in split order.
        dropped: Source rows that it dropped -> reason.

    """

    name: str
    rows: np.ndarray
    dropped: dict[int, str]

    @property
    def all_rows(self) -> list[int]:
        """The split's rows, those dropped too, in source order."""
        return sorted([*self.rows.tolist(), *self.dropped])


def split_rows(sizes: Sequence[int], rows: int, seed: int, dropped: Mapping[int, str]) -> dict[str, SplitData]:
    """Deal ``rows`` source rows out to the three splits by ``numpy.random.default_rng(seed).permutation``.

    Rows are dropped within a split, so that a dropped one moves no other.
    """
    order = np.random.default_rng(seed).permutation(rows).tolist()
    splits = {}
    for name, size, end in zip(SPLITS, sizes, np.cumsum(sizes).tolist(), strict=True):
        mine = order[end - size : end]
        kept = np.array([row for row in mine if row not in dropped], dtype=np.int64)
        splits[name] = SplitData(name, kept, {row: dropped[row] for row in mine if row in dropped})
    return splits


def split_sizes(split: Sequence[int | float], rows: int, source: str) -> list[int]:
    """Turn counts or fractions into the sizes of train, validation and test.

    Fractions (a sum of at most 1) round validation and test to the nearest whole row and give the rest of their
    share to train.

    Raises:
        LabError: Not three numbers, a negative one, or more rows asked for than there are.

    """
    shown = "/".join(f"{part:g}" for part in split)
    if len(split) != 3 or not all(0 <= part < math.inf for part in split) or not sum(split):
        raise LabError(f"data.split is {shown}; give three sizes or three fractions: train, validation, test")
    if sum(split) <= 1 + 1e-9:
        used = round(sum(split) * rows)
        validation = min(round(split[1] * rows), used)
        test = min(round(split[2] * rows), used - validation)
        return [used - validation - test, validation, test]
    if any(part != int(part) for part in split):
        raise LabError(f"data.split is {shown}; counts must be whole numbers, and fractions add up to at most 1")
    sizes = [int(part) for part in split]
    if sum(sizes) > rows:
        raise LabError(
            f"data.split asks for {sum(sizes):,} rows ({shown}), but {source} gives {rows:,}; "
            "lower data.split, raise data.rows, or use fractions such as [0.8, 0.1, 0.1]"
        )
    return sizes


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


def packing_figures(steps: Sequence[Sequence[int]], budget: int) -> dict[str, Any]:
    """How well steps, each the lengths of its documents, fill micro-batches of ``budget`` tokens; for display."""
    micro_batches = sum(len(pack(step, budget)) for step in steps)
    tokens = sum(map(sum, steps))
    padded = sum(len(step) * max(step) for step in steps)
    return {
        "tokens a step (mean)": round(tokens / max(1, len(steps))),
        "micro-batches a step (mean)": round(micro_batches / max(1, len(steps)), 2),
        "fill of a micro-batch (mean)": f"{tokens / max(1, micro_batches * budget):.0%}",
        "tokens that padding each step to its longest would add": f"{padded / max(1, tokens) - 1:.0%}",
    }


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
        target_counts: Targets of each document, on the host.
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
    target_counts: tuple[int, ...]
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


@dataclass
class PromptBatch:
    """Prompts to answer, tokenised.

    Attributes:
        prompts: The conversations and their references.
        input_ids: Token ids of each prompt, with the header that opens the answer; not padded.
        pad_id: What to pad with.
        stop_ids: Tokens that end an answer, ascending.
        tokenizer: Turns answers into text.

    """

    prompts: list[Prompt]
    input_ids: list[list[int]]
    pad_id: int
    stop_ids: list[int]
    tokenizer: Any

    def texts(self, answers: list[list[int]]) -> list[str]:
        """Decode answers' token ids, without control tokens."""
        texts: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts


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
        target_counts=tuple(map(len, targets)),
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
