"""What became of the rows: kept, dropped and why, cut; for the screen and for ``environment.json``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lab.errors import LabError

if TYPE_CHECKING:
    from lightning_lab.data.datamodule import ChatDataModule
    from lightning_lab.data.rows import Rows
    from lightning_lab.data.tokenized import TokenizedRows

WARN_DROPPED = 0.1
_NAMED_REASONS, _NAMED_ROWS = 8, 3  # of long lists; the rest is counted


def summary(rows: Rows, tokenized: TokenizedRows, indices: Sequence[int]) -> Iterator[str]:
    """Say in a few lines what became of some of the rows.

    Args:
        rows: As they were read.
        tokenized: Their tokens.
        indices: The rows to speak of.

    """
    kept = [row for row in indices if row not in tokenized.dropped]
    dropped, cut = len(indices) - len(kept), sorted(set(tokenized.truncated).intersection(kept))
    tokens, supervised = int(tokenized.lengths[kept].sum()), int(tokenized.supervised[kept].sum())
    warning = "warning: " if dropped > WARN_DROPPED * len(indices) else ""
    files = f" ({len(rows.parts)} parts)" if len(rows.parts) > 1 else ""
    yield f"{warning}{len(indices):,} rows of {rows.name}{files}: {len(kept):,} kept, {dropped:,} dropped"
    yield f"{tokens:,} tokens, {supervised:,} supervised ({100 * supervised / max(1, tokens):.1f} %)"
    yield f"{len(cut):,} cut at max_length" + named(cut)
    yield from dropped_reasons(rows, tokenized, indices)


def print_summary(data: ChatDataModule) -> None:
    """Say on stderr what became of all rows."""
    print(*summary(data.rows, data.tokenized, range(len(data.rows))), sep="\n", file=sys.stderr)


def dropped_reasons(rows: Rows, tokenized: TokenizedRows, indices: Sequence[int]) -> list[str]:
    """Why rows are dropped, the most frequent reason first, each with its count and the places of a few rows."""
    groups: dict[str, list[int]] = {}  # reasons that differ in numbers alone, such as a turn's, are one
    for row in indices:
        if row in tokenized.dropped:
            groups.setdefault(re.sub(r"\d+", "0", tokenized.dropped[row]), []).append(row)
    found = sorted(groups.values(), key=len, reverse=True)
    lines = []
    for alike in found[:_NAMED_REASONS]:
        lines.append(f"dropped {len(alike):,}: {tokenized.dropped[alike[0]]} ({some(alike, rows.where)})")
    if rest := sum(map(len, found[_NAMED_REASONS:])):
        lines.append(f"dropped {rest:,} for other reasons")
    return lines


def named(found: Sequence[int]) -> str:
    """Name the first rows of a list, if it has any, after a count of them."""
    return f": rows {some(found)}" if found else ""


def some(found: Sequence[Any], name: Callable[[Any], str] = str) -> str:
    """The first of a list by name, and how many more there are."""
    more = f" and {len(found) - _NAMED_ROWS:,} more" if len(found) > _NAMED_ROWS else ""
    return ", ".join(map(name, found[:_NAMED_ROWS])) + more


def check_dropped(rows: Rows, tokenized: TokenizedRows, allowed: float) -> None:
    """Refuse data of which more than ``allowed``, a fraction, is dropped.

    Raises:
        LabError: Has the reasons with their counts and a few places.

    """
    dropped = len(tokenized.dropped)
    if dropped > allowed * len(rows):
        reasons = "; ".join(dropped_reasons(rows, tokenized, range(len(rows))))
        raise LabError(
            f"{dropped:,} of {len(rows):,} rows of {rows.name} would be dropped, more than data.max_dropped "
            f"({allowed:g}) allows: {reasons}; correct the rows, or raise data.max_dropped"
        )


def data_record(data: ChatDataModule) -> dict[str, Any]:
    """What ``environment.json`` says of the data: fingerprint, split sizes, rows dropped and truncated."""
    tokenized, truncated = data.tokenized, set(data.tokenized.truncated)
    return {
        "source": data.rows.name,
        "fingerprint": tokenized.fingerprint,
        "splits": {
            name: {
                "conversations": len(split.rows),
                "tokens": int(tokenized.lengths[split.rows].sum()),
                "supervised_tokens": int(tokenized.supervised[split.rows].sum()),
                "truncated": len(truncated.intersection(split.rows.tolist())),
                "dropped": {str(row): reason for row, reason in sorted(split.dropped.items())},
            }
            for name, split in data.splits.items()
        },
        "split_method": data.hparams["split_method"],
        "split_seed": data.hparams["split_seed"],
    }
