"""What a run trained on and held out, known by the contents of its conversations: rows move, and files are renamed.

A table with the columns ``split``, ``row`` (in the run's own source), ``content`` (`TokenizedRows.contents`) and, if
that is known, ``near``, a row of the training split that a held-out one nearly repeats. Beside the three splits,
``trained_before`` has what only the runs before were trained on, those that this one continues or began from.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_lab.data.conversation import Prompt
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.summary import some
from lightning_lab.errors import LabError
from lightning_lab.files import write_whole
from lightning_lab.rundir import ROWS

BEFORE = "trained_before"
_SCHEMA = pa.schema({"split": pa.string(), "row": pa.int64(), "content": pa.uint64(), "near": pa.int64()})
UNKNOWN = f"warning: what the model was trained on is not known: no ckpt_path is given, or no {ROWS} stands beside it"


class Standing(NamedTuple):
    """How a split stands to a run.

    Attributes:
        is_own: It has exactly the conversations that the run dealt to the split of its name.
        trained: Its rows that were trained on.
        copies: Its rows that the run dealt to it, but a copy of which, another row of the run's source, was trained on.
        near_duplicates: The same of a near-duplicate; copies are among them. None where these are not known.

    """

    is_own: bool
    trained: list[int]
    copies: list[int]
    near_duplicates: list[int] | None


def deal_rows(data: ChatDataModule, earlier: pa.Table | None) -> pa.Table:
    """What a run trains on and holds out; ``earlier`` is the table of the one that it continues or began from."""
    contents, train = data.tokenized.contents, data.splits["train"].rows
    parts: list[tuple[str, Any, np.ndarray, list[int | None]]] = []
    for name, split in data.splits.items():
        near: dict[int, int] = {}
        if data.duplicates and name != "train":
            (near,) = data.duplicates.matches(contents, split.rows, train, ["near_duplicates"]).values()
        parts.append((name, split.rows, contents[split.rows], [near.get(row) for row in split.rows.tolist()]))
    if earlier is not None:
        before = np.setdiff1d(_contents(earlier, "train", BEFORE), contents[train])
        parts.append((BEFORE, pa.nulls(len(before), pa.int64()), before, [None] * len(before)))
    tables = [pa.table([[name] * len(rows), rows, said, near], schema=_SCHEMA) for name, rows, said, near in parts]
    table = pa.concat_tables(tables)
    return table if data.duplicates else table.drop_columns(["near"])


def say_trained(dealt: pa.Table, data: ChatDataModule) -> None:
    """Say on stderr how much of what a run holds out is trained on all the same."""
    for name in ("validation", "test"):
        stands, rows = standing(dealt, data, name), data.splits[name].rows
        trained, size = stands.trained, len(rows)
        if data.duplicates and stands.near_duplicates is not None:
            train, near, copies = data.splits["train"].rows, len(stands.near_duplicates), len(stands.copies)
            (first,) = data.duplicates.matches(data.tokenized.contents, rows, train, ["same_first_turn"]).values()
            what = f"{near:,} of {size:,} {name} conversations are near-duplicates of training ones ({copies:,} copies)"
            if near or first:
                print(f"{what}, {len(first):,} share their first turn; see preview --check", file=sys.stderr)
        if trained:
            what = f"{len(trained):,} of {size:,} {name} conversations were trained on by the run before this one"
            print(f"warning: {what}; set data.split and its seed as they were", file=sys.stderr)


def standing(dealt: pa.Table, data: ChatDataModule, split: str) -> Standing:
    """Compare a split with what a run was dealt; of the training split nothing is said to be trained on."""
    rows = data.splits[split].rows
    contents, own = data.tokenized.contents[rows], _contents(dealt, split)
    is_own = np.array_equal(np.sort(contents), np.sort(own))
    if split == "train":
        return Standing(is_own, [], [], [])
    before, train = (np.isin(contents, _contents(dealt, name)) for name in (BEFORE, "train"))
    is_part = np.isin(contents, own).all()
    copies = train & ~before & is_part
    near = None
    if "near" in dealt.column_names:
        repeats = np.isin(contents, _contents(dealt.filter(dealt["near"].is_valid()), split))
        near = rows[copies | repeats & ~before & is_part].tolist()
    trained = rows[(train | before) & ~copies]
    return Standing(is_own, sorted(trained.tolist()), rows[copies].tolist(), near)


def trained_rows(dealt: pa.Table, data: ChatDataModule, split: str) -> list[int]:
    """Rows of a split that were trained on, which ``allow_trained`` lets through unless nothing else is left.

    Raises:
        LabError: There are some; names the first ones.

    """
    trained, size = standing(dealt, data, split).trained, len(data.splits[split].rows)
    if trained and not (data.hparams["allow_trained"] and len(trained) < size):
        places = some(trained, data.rows.where)
        raise LabError(
            f"{len(trained):,} of the {size:,} {split} conversations were trained on: {places}; set data.source, "
            "data.rows, data.split, data.split_seed, data.split_method and data.group_duplicates as in training, "
            "evaluate another source, or set data.allow_trained to true for figures of the others, or data.eval_split "
            "to train"
        )
    return trained


def trained_prompts(dealt: pa.Table, prompts: Sequence[Prompt]) -> list[int]:
    """Rows of ``predict_source`` that were trained on, of those that have an answer: conversations are known whole."""
    trained = set(_contents(dealt, "train", BEFORE).tolist())
    return [prompt.row for prompt in prompts if prompt.content in trained]


def read_rows(beside: Path) -> pa.Table | None:
    """The table beside a checkpoint or an adapter's folder; None where it is missing or damaged."""
    try:
        path = beside.expanduser().resolve().with_name(ROWS)
        known = [name for name in _SCHEMA.names if name != "near" or name in pq.read_schema(path).names]
        return pq.read_table(path, schema=_SCHEMA, columns=known)
    except (OSError, pa.ArrowException):
        return None


def write_rows(dealt: pa.Table, folder: Path) -> None:
    """Write the table beside a run's checkpoints."""
    buffer = io.BytesIO()
    pq.write_table(dealt, buffer)
    write_whole(folder / ROWS, buffer.getbuffer())


def _contents(dealt: pa.Table, *splits: str) -> np.ndarray:
    return dealt.filter(pc.is_in(dealt["split"], pa.array(splits)))["content"].to_numpy()
