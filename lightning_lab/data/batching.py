"""Lengths -> splits -> steps -> packed micro-batches.

A batch is one optimizer step. Which conversations a step holds is a pure function of (seed, epoch, step); how the step
is cut into micro-batches only decides memory and speed, never the result.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_lab.data.conversation import Prompt
from lightning_lab.data.encoding import IGNORED
from lightning_lab.errors import LabError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SplitMethod = Literal["permutation", "lab"]


@dataclass(frozen=True)
class SplitData:
    """One split.

    Attributes:
        rows: int64 [conversations], the source rows that it keeps, in split order.
        dropped: Source rows that it dropped -> reason.

    """

    rows: np.ndarray
    dropped: dict[int, str]

    @classmethod
    def of(cls, rows: Sequence[int], dropped: Mapping[int, str]) -> "SplitData":
        """The split that some rows make, less those that are dropped."""
        kept = np.array([row for row in rows if row not in dropped], dtype=np.int64)
        return cls(kept, {row: dropped[row] for row in rows if row in dropped})


def split_rows(
    sizes: Sequence[int],
    rows: int,
    seed: int,
    dropped: Mapping[int, str],
    method: SplitMethod = "permutation",
    groups: np.ndarray | None = None,
) -> dict[str, SplitData]:
    """Deal ``rows`` source rows out to the three splits by ``numpy.random.default_rng(seed).permutation``.

    Rows are dropped within a split, so that a dropped one moves no other.

    Args:
        sizes: Of train, validation and test.
        rows: Number of source rows.
        seed: Of the permutation.
        dropped: Source rows that are dropped -> reason.
        method: ``permutation`` deals it out in that order. ``lab`` splits as ``datasets`` does twice with one seed:
            what is held out comes first in the permutation, and is permuted again; the test split comes first in that.
        groups: int [rows], the group of each row. A group goes whole, where the permutation has its first row, to the
            first split that has room for it, or to the one with the most; so sizes may differ from those asked for.

    """
    order = np.random.default_rng(seed).permutation(rows)
    if method == "lab":
        train, validation, test = sizes
        held_out, rest = np.split(order, [validation + test])
        held_out = held_out[np.random.default_rng(seed).permutation(len(held_out))]
        order = np.concatenate([rest[:train], held_out[test:], held_out[:test]])
    if groups is None:
        dealt = np.split(order, np.cumsum(sizes))  # the last are in no split
    else:
        room = [*sizes, rows - sum(sizes)]  # the last are in no split
        members, part_of = np.bincount(groups).tolist(), {}
        for group in dict.fromkeys(groups[order].tolist()):
            part = next((i for i, left in enumerate(room) if left >= members[group]), int(np.argmax(room)))
            part_of[group] = part
            room[part] -= members[group]
        parts = np.array([part_of[group] for group in groups[order].tolist()])
        dealt = [order[parts == part] for part in range(len(SPLITS))]
    return {name: SplitData.of(part.tolist(), dropped) for name, part in zip(SPLITS, dealt, strict=False)}


def split_sizes(
    split: Sequence[int | float],
    rows: int,
    source: str,
    method: SplitMethod = "permutation",
    own: Collection[str] = (),
) -> list[int]:
    """Turn counts or fractions into the sizes of train, validation and test.

    The splits of ``own`` have a source of their own: their fraction goes to train, their count must be 0.

    Fractions (a sum of at most 1) round validation and test to the nearest whole row and give the rest of their
    share to train. Under ``lab`` they round as in ``datasets``: up where rows are held out, and of those for test.

    Raises:
        LabError: Not three numbers, all of them 0, or more rows asked for than there are.

    """
    shown = "/".join(f"{part:g}" for part in split)
    if len(split) != 3 or not sum(split):
        raise LabError(f"data.split is {shown}; give three sizes or three fractions: train, validation, test")
    fractions = sum(split) <= 1 + 1e-9
    for place, name in enumerate(SPLITS):
        if name in own:
            if split[place] and not fractions:
                raise LabError(f"data.split is {shown}, but data.{name}_source is set; give 0 to {name} here")
            split = [split[0] + split[place], *(0 if i == place else split[i] for i in (1, 2))]
    if fractions:
        if method == "lab":
            share = round(split[1] + split[2], 12)  # 0.2 + 0.1 is a little more than 0.3, and would round up
            held_out = math.ceil(share * rows)
            test = math.ceil(split[2] / share * held_out) if share else 0
            return [min(math.floor(split[0] * rows + 1e-9), rows - held_out), held_out - test, test]
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


def share(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Deal documents out to processes so that their token counts are even: longest first to the least loaded.

    Returns:
        For each process the positions in ``lengths`` that it takes, ascending; a process may get none.

    """
    load = [0] * processes
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = load.index(min(load))
        dealt[least].append(position)
        load[least] += lengths[position]
    return [sorted(positions) for positions in dealt]


def pack(lengths: Sequence[int], budget: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Cut a process's `share` of documents into micro-batches of ``budget`` tokens: first fit, longest first.

    A document longer than the budget is a micro-batch of its own. The result depends on the lengths alone.

    Args:
        lengths: Tokens of each document, of all processes.
        budget: Most tokens in a micro-batch.
        rank: The process.
        world_size: Number of processes.

    Returns:
        Positions in ``lengths``, each of the share's exactly once, ascending within a micro-batch.

    """
    room: list[int] = []
    packed: list[list[int]] = []
    for position in sorted(share(lengths, world_size)[rank], key=lambda i: -lengths[i]):
        length = lengths[position]
        fit = next((i for i, free in enumerate(room) if length <= free), None)
        if fit is None:
            packed.append([position])
            room.append(budget - length)
        else:
            packed[fit].append(position)
            room[fit] -= length
    return [sorted(documents) for documents in packed]


def mean_factors(weights: np.ndarray, group: int | None) -> tuple[list[float] | None, float]:
    """How a step's loss is a mean of the token means of ``group`` conversations each, by weights of tokens.

    Args:
        weights: float64 ``[conversations]``, the summed weights of each conversation's labels, in visiting order.
        group: Conversations of which a mean is taken first; None for one mean over the whole step.

    Returns:
        By what to multiply the weights of each conversation (None for nothing), and the sum of all weights then.

    """
    if group is None:
        return None, float(weights.sum())
    groups = np.arange(len(weights)) // group
    sums = np.bincount(groups, weights)
    return (1 / sums[groups]).tolist(), float(len(sums))


class Example(NamedTuple):
    """A conversation's tokens, of one document or of several (see `Encoded.starts`).

    Attributes:
        input_ids: int32 ``[length]``.
        labels: int32 ``[length]``, not shifted, -100 where not supervised.
        weights: float32 ``[length]``, of each label in the training loss; None where all have 1.
        starts: Where each document after the first begins.

    """

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    starts: Sequence[int] | np.ndarray = ()


# The batches are named tuples, as Lightning and PyTorch move and pin what stands in those.
class MicroBatch(NamedTuple):
    """Conversations laid one after another in a single row of ``T`` tokens, of which ``S`` are supervised.

    Each conversation is one document, to which attention is confined; or several, where the template rewrites earlier
    turns (`Encoded.starts`).

    Attributes:
        input_ids: ``[1, T]`` int64.
        position_ids: ``[1, T]`` int64, from 0 in each document.
        cu_seqlens: ``[documents + 1]`` int32 borders, from 0 to ``T``.
        predicting: ``[S]`` int64 positions in the row whose next token is supervised.
        targets: ``[S]`` int64 those next tokens.
        target_documents: ``[S]`` int64 which conversation (index into ``rows``) each target belongs to.
        document_lengths: Tokens of each document, on the host.
        target_counts: Targets of each conversation, on the host.
        documents: Each conversation's number in its split.
        rows: Each conversation's row in the source.
        weights: ``[S]`` float32, of each target in the training loss; None where all have 1.

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
    weights: Tensor | None = None


class StepBatch(NamedTuple):
    """One optimizer step: this process's micro-batches, and the counts of the whole step on all processes.

    Attributes:
        micro_batches: What this process works on; may be empty on a process without documents.
        rows: Source rows of all conversations in the step, in visiting order.
        tokens: Real tokens of the step.
        supervised_tokens: Supervised tokens of the step.
        weight: The sum of their weights, by which the loss and its gradient are divided; None for their number.

    """

    micro_batches: tuple[MicroBatch, ...]
    rows: tuple[int, ...]
    tokens: int
    supervised_tokens: int
    weight: float | None = None


class PromptBatch(NamedTuple):
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
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def collate(
    examples: Sequence[Example],
    documents: Sequence[int],
    rows: Sequence[int],
    factors: Sequence[float] | None = None,
) -> MicroBatch:
    """Lay conversations one after another in one row.

    A label at a document's first token has nothing before it to predict it from and is never a target; in a packed row
    it would otherwise be predicted from the document before.

    Args:
        examples: The conversations.
        documents: Their numbers in the split.
        rows: Their rows in the source.
        factors: By which each conversation's weights are multiplied; None for 1.

    """
    sizes = [len(example.input_ids) for example in examples]
    ends = np.cumsum([0, *sizes])
    starts = [begin + start for begin, example in zip(ends, examples, strict=False) for start in (0, *example.starts)]
    lengths = np.diff([*starts, ends[-1]])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.concatenate([example.labels for example in examples])
    labels[starts] = IGNORED
    supervised = np.flatnonzero(labels != IGNORED)
    weights = None
    if factors is not None or any(example.weights is not None for example in examples):
        each = [np.ones(len(e.labels)) if e.weights is None else e.weights for e in examples]
        scaled = [w * factor for w, factor in zip(each, factors or [1.0] * len(each), strict=True)]
        weights = torch.from_numpy(np.concatenate(scaled)[supervised]).float()
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([example.input_ids for example in examples])).long()[None],
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, lengths))[None],
        cu_seqlens=torch.from_numpy(np.array([*starts, ends[-1]])).int(),
        predicting=torch.from_numpy(supervised - 1),
        targets=torch.from_numpy(labels[supervised]).long(),
        target_documents=torch.from_numpy(owners[supervised]),
        document_lengths=tuple(lengths.tolist()),
        target_counts=tuple(np.bincount(owners[supervised], minlength=len(sizes)).tolist()),
        documents=tuple(documents),
        rows=tuple(rows),
        weights=weights,
    )
