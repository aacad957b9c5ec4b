"""Conversations as the model sees them: what is supervised, what is masked, what was cut or dropped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lab.data.batching import SPLITS, pack
from lightning_lab.data.conversation import unread_keys
from lightning_lab.data.duplicates import KINDS, find_duplicates
from lightning_lab.data.encoding import IGNORED
from lightning_lab.data.summary import named, some, summary
from lightning_lab.tables import Table, without_controls

if TYPE_CHECKING:
    from lightning_lab.data.datamodule import ChatDataModule


def preview(data: ChatDataModule, *, limit: int = 3, as_json: bool = False) -> None:
    """Print conversations, then counts over all rows of ``eval_split``, or of the source where there is none.

    On a terminal supervised tokens are coloured and masked ones dim; elsewhere supervised tokens stand in ⟦ ⟧.

    Args:
        data: Prepared.
        limit: Conversations to print; dropped rows are skipped.
        as_json: Print only the conversations, one object a line: ``row``, ``input_ids``, ``labels`` (-100 where
            nothing is supervised) and ``text``, which is that of the ids, so truncated like them.

    """
    split = data.splits[data.eval_split] if data.eval_split else None
    rows = sorted([*split.rows.tolist(), *split.dropped]) if split else range(len(data.rows))
    kept = [row for row in rows if row not in data.tokenized.dropped]
    if as_json:
        for row in kept[:limit]:
            ids, labels = data.tokenized.input_ids(row).tolist(), data.tokenized.labels(row).tolist()
            shown = {"row": row, "input_ids": ids, "labels": labels, "text": _decode(data, ids)}
            print(json.dumps(shown, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for row in kept[:limit]:
        counts = f"{data.tokenized.lengths[row]} tokens, {data.tokenized.supervised[row]} supervised"
        console.print(Text(f"--- {data.rows.where(row)}: {counts}", style="bold"))
        text = Text()
        for piece, supervised in _runs(data, row):
            if console.is_terminal:
                text.append(piece, style="green" if supervised else "dim")
            else:
                text.append(f"⟦{piece}⟧" if supervised else piece)
        console.print(text)
    for line in _summary(data, rows, kept):
        console.print(line)


def check(data: ChatDataModule, *, as_json: bool = False) -> None:
    """Print how many conversations of each split repeat others of it, and of the splits before it, and a few places.

    Args:
        data: Prepared.
        as_json: Print one object instead, with every such row and one that it repeats.

    """
    duplicates = find_duplicates(data.rows)
    splits = {str(name): data.splits[name].rows for name in SPLITS if len(data.splits[name].rows)}
    pairs = [*((name, name) for name in splits), *((later, first) for first, later in combinations(splits, 2))]
    contents, sizes = data.tokenized.contents, {name: len(rows) for name, rows in splits.items()}
    found = [(one, of, duplicates.matches(contents, splits[one], splits[of])) for one, of in pairs]
    if as_json:
        each = [{"split": one, "repeats": of} | {k: [*v.items()] for k, v in kinds.items()} for one, of, kinds in found]
        print(json.dumps({"source": data.rows.name, "conversations": sizes, "found": each}))
        return
    columns = ("split", "conversations", "repeats", *(kind.replace("_", " ") for kind in KINDS))
    cells = [(one, f"{sizes[one]:,}", of, *(f"{len(rows):,}" for rows in kinds.values())) for one, of, kinds in found]
    print(Table(columns, cells, text=("split", "repeats")).markdown())
    for one, of, kinds in found:
        for kind, rows in kinds.items():
            if rows:
                places = [f"{data.rows.where(row)} as {data.rows.where(other)}" for row, other in rows.items()]
                print(f"{one}, {kind.replace('_', ' ')} of {of}: {some(places)}")


def _runs(data: ChatDataModule, row: int) -> Iterator[tuple[str, bool]]:
    """Yield the text of each run of supervised or masked tokens; a span never begins or ends inside a character."""
    ids, supervised = data.tokenized.input_ids(row), data.tokenized.labels(row) != IGNORED
    edges = [0, *(np.flatnonzero(supervised[1:] != supervised[:-1]) + 1).tolist(), len(ids)]
    for start, end in pairwise(edges):
        yield without_controls(_decode(data, ids[start:end].tolist())), bool(supervised[start])


def _decode(data: ChatDataModule, ids: list[int]) -> str:
    return data.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _changed_by_cuts(data: ChatDataModule, row: int) -> bool:
    """Whether the row has other ids than it would have without cuts at its answers."""
    texts = data.encoder.template.documents(data.rows.conversation(row))
    cut, uncut = (data.encoder.token_ids(variant) for variant in (texts, [replace(t, spans=()) for t in texts]))
    return cut != uncut


def _summary(data: ChatDataModule, rows: Sequence[int], kept: Sequence[int]) -> Iterator[str]:
    yield from summary(data.rows, data.tokenized, rows)
    lengths = data.tokenized.lengths[kept]
    if kept:
        points = (0, 25, 50, 75, 95, 99, 100)
        values = np.percentile(lengths, points, method="nearest")
        percentiles = ", ".join(f"p{point} {value}" for point, value in zip(points, values, strict=True))
        yield f"tokens a row: mean {lengths.mean():.1f}, {percentiles}"
    changed = [row for row in kept if _changed_by_cuts(data, row)]
    yield f"{len(changed)} tokenised otherwise without cuts at the answers" + named(changed)
    unread = Counter(key for row in kept for key in unread_keys(data.rows[row], data.rows.row_format))
    for part in data.rows.parts:
        unread.update(dict.fromkeys(part.unread, len(part.stored)))
    if unread:
        counted = ", ".join(f"{key} ({count})" for key, count in sorted(unread.items()))
        yield f"keys that are not read, and the rows that have them: {counted}"
    for name, value in packing_statistics(data).items():
        yield f"{name}: {value}"


def packing_statistics(data: ChatDataModule) -> dict[str, Any]:
    """How the first epoch's steps are cut into micro-batches."""
    steps, budget = data.steps_per_epoch, data.budget(data.micro_batch_tokens)
    of_train = data.tokenized.lengths[data.splits["train"].rows]
    tokens = micro_batches = padded = 0
    for step in range(steps):
        lengths = of_train[data.step_documents(step)].tolist()
        tokens += sum(lengths)
        micro_batches += len(pack(lengths, budget))
        padded += len(lengths) * max(lengths)
    return {
        "optimizer steps an epoch": steps,
        "conversations a step": data.batch_size,
        "tokens a step (mean)": round(tokens / max(1, steps)),
        "micro-batches a step (mean)": round(micro_batches / max(1, steps), 2),
        "fill of a micro-batch (mean)": f"{tokens / max(1, micro_batches * budget):.0%}",
        "tokens that padding each step to its longest would add": f"{padded / max(1, tokens) - 1:.0%}",
    }
