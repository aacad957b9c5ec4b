"""The data's settings -> all rows, their tokens and the rows of each split."""

import sys
from typing import Any

import numpy as np

from lightning_lab.data.batching import SplitData, split_rows, split_sizes
from lightning_lab.data.conversation import RowFormat
from lightning_lab.data.duplicates import find_duplicates
from lightning_lab.data.encoding import ConversationEncoder
from lightning_lab.data.rows import Rows
from lightning_lab.data.sources import load_rows
from lightning_lab.data.summary import check_dropped
from lightning_lab.data.tokenized import TokenizedRows, tokenize_rows
from lightning_lab.errors import LabError


def prepare_rows(
    options: Any, encoder: ConversationEncoder, row_format: RowFormat, progress: bool
) -> tuple[Rows, TokenizedRows, dict[str, SplitData]]:
    """Load the rows, tokenise them and split them.

    Rows of ``validation_source`` and ``test_source`` come after those of ``source``, in one numbering.

    Args:
        options: `ChatDataModule`'s ``hparams``.
        encoder: Tokenises.
        row_format: How to read the rows.
        progress: Say on stderr what is worth knowing.

    Raises:
        LabError: As `ChatDataModule.prepare`.

    """
    group, size = options["micro_mean"], options["batch_size"]
    if group and group > size:
        raise LabError(f"data.micro_mean {group} is more than data.batch_size {size}; lower it")
    commit, config = options["revision"], options["source_config"]
    rows = load_rows(options["source"], options["rows"], commit, config, options["source_split"], row_format)
    sources = {"validation": options["validation_source"], "test": options["test_source"]}
    own = {}
    for name, source in sources.items():
        if source is not None:
            same = str(source).partition(":")[0] == rows.name.partition(":")[0]
            own[name] = load_rows(source, None, commit if same else None, config if same else None, name, row_format)
    method = options["split_method"]
    if options["group_duplicates"] and method == "lab":
        raise LabError("data.group_duplicates moves rows, which data.split_method lab cannot; leave one of them out")
    sizes = split_sizes(options["split"], len(rows), rows.name, method, own)
    if progress and not encoder.template.end_of_turn:
        print(
            f"warning: data.template {options['template']} writes no control token after an answer, so the model "
            "does not learn to end one",
            file=sys.stderr,
        )
    if progress and len(rows) < rows.total:
        print(f"data.rows: the first {len(rows):,} of {rows.total:,} rows are used", file=sys.stderr)
    every = Rows(
        parts=[part for each in (rows, *own.values()) for part in each.parts],
        name=", ".join(each.name for each in (rows, *own.values())),
        fingerprint=" ".join([rows.fingerprint, *(f"{name} {each.fingerprint}" for name, each in own.items())]),
        total=sum(each.total for each in (rows, *own.values())),
        row_format=row_format,
    )
    tokenized = tokenize_rows(every, encoder, on_bad_row=options["on_bad_row"], progress=progress)
    check_dropped(every, tokenized, options["max_dropped"])
    groups = find_duplicates(every, progress).groups(len(rows)) if options["group_duplicates"] else None
    splits = split_rows(sizes, len(rows), options["split_seed"], tokenized.dropped, method, groups)
    dealt = [len(split.rows) + len(split.dropped) for split in splits.values()]
    if any(size and not got for size, got in zip(sizes, dealt, strict=True)) and groups is not None:
        largest = f"one group of near-duplicates has {np.bincount(groups).max():,} of {len(rows):,} rows"
        raise LabError(f"data.group_duplicates would leave a split empty: {largest}; set it to false")
    if progress and dealt != sizes:
        shown = ["/".join(f"{size:,}" for size in each) for each in (dealt, sizes)]
        print(f"data.group_duplicates: the splits have {shown[0]} rows, {shown[1]} were asked for", file=sys.stderr)
    first = len(rows)
    for name, held_out in own.items():
        splits[name] = SplitData.of(range(first, first + len(held_out)), tokenized.dropped)
        first += len(held_out)
    return every, tokenized, splits
