"""The rows of a data source: read one by one when they are asked for, each with a place to name in errors."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa

from lightning_lab.data.conversation import BY_KEYS, Conversation, RowFormat, parse_conversation
from lightning_lab.data.turns import RowError


class Part(NamedTuple):
    """The rows of one file or Hub data set.

    Attributes:
        name: What to call it in messages.
        stored: The rows in a compact form: lines of JSON as bytes (as much memory as the file has), an Arrow table
            (a Hub data set's stays on disk), or a JSON list's Python objects.
        lines: For JSON Lines, each row's line number counted from 1.
        unread: A table's columns that are left out.

    """

    name: str
    stored: Any
    lines: Sequence[int] | None = None
    unread: Sequence[str] = ()


@dataclass(frozen=True)
class Rows(Sequence[Any]):
    """The rows of all parts, one after another: mappings, or a `RowError` in the place of one that cannot be read.

    Attributes:
        parts: Files and Hub data sets, in order.
        name: What to call them together.
        fingerprint: Changes whenever the rows do.
        total: Rows that there are, those beyond the limit too.
        row_format: How to read them.

    """

    parts: Sequence[Part]
    name: str
    fingerprint: str
    total: int
    row_format: RowFormat = BY_KEYS

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((len(part.stored) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        part, within = self._find(index)
        if isinstance(part.stored, pa.Table):
            return _converted(part.stored.slice(within, 1))
        row = part.stored[within]
        if not isinstance(row, bytes):
            return row
        try:
            return json.loads(row.decode())
        except (ValueError, RecursionError) as error:
            return RowError(f"the line is not JSON ({error})")

    def conversation(self, index: int) -> Conversation:
        """Read a row; raises `RowError` as `parse_conversation`."""
        return parse_conversation(self[index], self.row_format)

    def where(self, index: int) -> str:
        """Name a row's place for a message: its line counted from 1, otherwise its index counted from 0."""
        part, within = self._find(index)
        return f"{part.name} line {part.lines[within]}" if part.lines else f"{part.name} row {within}"

    def _find(self, index: int) -> tuple[Part, int]:
        index = range(len(self))[index]
        number = bisect_right(self._starts, index) - 1
        return self.parts[number], index - self._starts[number]


def _converted(table: pa.Table) -> dict[str, Any] | RowError:
    """A table's only row. Null fields of objects are left out: a table has every field in every row."""
    row = {}
    for key in table.column_names:
        cell = table[key][0]
        try:
            row[key] = _without_nulls(cell.as_py())
        except (ValueError, OverflowError) as error:
            return RowError(f"the cell of column {key!r}, of type {cell.type}, does not convert ({error})")
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value
