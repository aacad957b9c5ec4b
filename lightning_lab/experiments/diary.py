"""The row diary: on which conversations a run is worst, and which its adapter improved and harmed most."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lab.errors import LabError
from lightning_lab.experiments.runs import Example, Run, evaluation_command
from lightning_lab.rundir import BASE, EXAMPLES, TOKENS, is_weighted
from lightning_lab.tables import NONE, Table, escape, numbers, without_controls

SHOWN = 3  # of each kind
BEGINNING = 80  # characters of an answer in the table
TOLERANCE = 1e-3  # of a loss against the float32 losses of its tokens

COLUMNS = (
    *("conversation", "row", "place", "loss", "base loss", "loss minus base", "supervised tokens", "first answer"),
)
Stored = tuple[str, list[str], list[float | None]]


class Piece(NamedTuple):
    """A stretch of a conversation's text, as a rule one token; masked text is one piece as far as it goes.

    Attributes:
        text: Without control characters.
        nll: Its negative log-likelihood, nats; None where it is masked.
        base_nll: The untouched base's; None where it is masked or not known.

    """

    text: str
    nll: float | None
    base_nll: float | None


class Text(NamedTuple):
    """A conversation's place in its source, and its text."""

    where: str
    pieces: list[Piece]

    @property
    def answer(self) -> str:
        """The beginning of its first answer: what comes before it is the template's, and the same in many."""
        supervised = dropwhile(lambda piece: piece.nll is None, self.pieces)
        text = "".join(piece.text for piece in takewhile(lambda piece: piece.nll is not None, supervised))
        return text if len(text) <= BEGINNING else f"{text[:BEGINNING]}…"


class Diary:
    """Conversations of one run, the first that has the losses of its tokens.

    Args:
        runs: The best first.
        split: Whose conversations.

    Attributes:
        run: The run; None where none has them.
        split: Whose conversations.
        chosen: Conversations by kind, at most `SHOWN` of each: those with the highest mean loss, and where the base
            was evaluated those with the lowest and the highest difference to it, if that is below and above 0.
        notes: What is missing, and how to get it.

    """

    def __init__(self, runs: Sequence[Run], split: str) -> None:
        self.split = split
        self.run = next((run for run in runs if (run.path / f"{split}{TOKENS}").is_file()), None)
        self.chosen: dict[str, list[Example]] = {}
        self.notes: list[str] = []
        if runs and self.run is not runs[0]:
            how = evaluation_command(runs[0].path, split)
            self.notes.append(f"{runs[0].name} has no {split}{TOKENS}; `{how}` writes it")
        if self.run is None:
            return
        try:
            examples = self.run.examples(split)
        except LabError as error:
            self.notes.append(str(error))
            return
        worst = sorted(examples, key=lambda example: (-example.loss, example.row))
        compared = [example for example in examples if example.loss_minus_base is not None]
        compared.sort(key=lambda example: (example.loss_minus_base, example.row))
        self.chosen = {"worst": worst[:SHOWN]}
        if compared:
            self.chosen["most_improved"] = [e for e in compared[:SHOWN] if (e.loss_minus_base or 0) < 0]
            self.chosen["most_harmed"] = [e for e in compared[: -SHOWN - 1 : -1] if (e.loss_minus_base or 0) > 0]
        if lacking := len(examples) - len(compared):
            how = evaluation_command(self.run.path, f"{split}-{BASE}")
            some = f"{lacking:,} of {len(examples):,} conversations have" if compared else f"{split}{EXAMPLES} has"
            self.notes.append(f"{some} no loss of the base, to which the adapter's is compared; `{how}` adds it")

    @cached_property
    def texts(self) -> tuple[dict[int, Text], list[str]]:
        """The texts of the chosen conversations by row, and why others cannot be shown."""
        chosen = [example for examples in self.chosen.values() for example in examples]
        found, why = self._read(self.split, {e.row: (e.loss, e.supervised_tokens) for e in chosen})
        compared = {e.row: (e.base_loss, e.supervised_tokens) for e in chosen if e.base_loss is not None}
        of_base, why_base = self._read(f"{self.split}-{BASE}", compared)
        texts = {}
        for row, (where, pieces, nll) in found.items():
            unknown: list[float | None] = [None] * len(pieces)
            _, same, base_nll = of_base.get(row, (where, pieces, unknown))
            texts[row] = Text(where, list(map(Piece, pieces, nll, base_nll if same == pieces else unknown)))
        return texts, why + why_base

    def _read(self, name: str, expected: dict[int, tuple[float, float]]) -> tuple[dict[int, Stored], list[str]]:
        """Read the places, pieces and losses of some rows of a result, and say why not, where they cannot be read.

        Args:
            name: The result's.
            expected: The mean loss and the number of tokens of each row, with which its tokens must agree.

        """
        if not self.run or not expected:
            return {}, []
        path, found = self.run.path / f"{name}{TOKENS}", {}
        why = f"{path}: is of another evaluation"
        weighted = is_weighted(self.run.evaluations.get(name, {}))  # as its tokens are not
        try:
            for row, where, pieces, nll in _stored(path, expected):
                mean = sum(value for value in nll if value is not None) / expected[row][1]
                same = weighted or math.isclose(mean, expected[row][0], rel_tol=TOLERANCE)
                if len(pieces) == len(nll) and same:
                    found[row] = without_controls(where), list(map(without_controls, pieces)), nll
        except Exception as error:  # whatever Arrow makes of a damaged file
            why = f"{path}: cannot be read ({' '.join(str(error).split())})"
        if len(found) == len(expected):
            return found, []
        return found, [f"{why}; write it anew with `{evaluation_command(self.run.path, name)}`"]

    def record(self) -> dict[str, Any]:
        """The numbers, unrounded, for JSON."""
        chosen = {
            kind: [{**example._asdict(), "loss_minus_base": example.loss_minus_base} for example in examples]
            for kind, examples in self.chosen.items()
        }
        return {"run": self.run and self.run.name, "split": self.split, **chosen, "notes": self.notes}

    def blocks(self) -> list[str | Table]:
        """The section's paragraphs and its table."""
        texts, notes = self.texts
        rows = []
        for kind, example in ((kind, example) for kind, examples in self.chosen.items() for example in examples):
            text = texts.get(example.row, Text(NONE, []))
            compared = *numbers([example.base_loss], ".4f"), *numbers([example.loss_minus_base], "+.4f")
            figures = f"{example.loss:.4f}", *compared, f"{example.supervised_tokens:,.0f}"
            rows.append((title(kind), str(example.row), text.where, *figures, text.answer))
        blocks: list[str | Table] = [f"## Conversations of the {self.split} split"]
        if self.run and rows:
            which = (
                f"Those of {self.run.name} with the highest mean loss, in nats a token, and where the base was "
                "evaluated those with the largest differences to it; below 0 the adapter is better. The page has their "
                "texts with the loss of each token. Another run's: `python -m lightning_lab report` with its directory."
            )
            blocks += [escape(which), Table(COLUMNS, rows, ("conversation", "place", "first answer"))]
        none = [f"{title(kind)}: none." for kind, examples in self.chosen.items() if not examples]
        items = [f"* {escape(note)}" for note in (*none, *self.notes, *notes)]
        return [*blocks, "\n".join(items)] if items else blocks


def title(kind: str) -> str:
    """A kind of `Diary.chosen` in words."""
    return kind.replace("_", " ").capitalize()


def _stored(path: Path, rows: Collection[int]) -> Iterator[Any]:
    """Yield row, place, pieces and losses; parts of the file that have none of the rows are not read."""
    import pyarrow.parquet as pq  # a third of a second, which numbers alone do not cost; its filters import pandas too

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            found = file.read_row_group(group, ["row"])["row"].to_pylist()
            if places := [place for place, row in enumerate(found) if row in rows]:
                columns = file.read_row_group(group, ["row", "where", "text", "nll"]).columns
                yield from ([column[place].as_py() for column in columns] for place in places)
