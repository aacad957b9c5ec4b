"""Tables and text as Markdown: columns that line up in a terminal, and nothing in a name that is taken for markup."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

NONE = "–"
# Code stays; it ends at the next run of as many backticks as it begins with. Emphasis, HTML, entities, links, and what
# begins a heading, a list, a quotation or a block of code. An underscore within a word is none of these.
CODE_OR_MARKUP = re.compile(
    r"(?P<run>(?<!`)`+(?!`)).+?(?<!`)(?P=run)(?!`)"
    r"|[\\*<]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|\](?=[(\[:])|^(?=>|~~~|```|[-+#]+(?:\s|$))"
)
# Rows quote the codes that steer terminals, and characters that no page may have: C0 has pictures, C1 has none.
CONTROLS = {**{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}, 127: 0x2421}
CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)


class Best(str):
    """A cell to mark."""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown.

    Attributes:
        columns: Headings.
        rows: Cells, as many in a row as there are headings.
        text: Headings of the columns that are aligned left; the others hold numbers.
        padded: Whether columns line up; else as ``losses.md`` is written.

    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Collection[str] = ()
    padded: bool = True

    def markdown(self, *, marked: bool = False) -> str:
        """Markdown without a last line's end; `Best` cells are bold where ``marked``."""
        lines = [[_cell(cell, marked) for cell in row] for row in (self.columns, *self.rows)]
        aligned = []
        for name, column in zip(self.columns, zip(*lines, strict=True), strict=True):
            is_left = name in self.text
            width = max(3, *map(len, column)) if self.padded else 0
            cells = [cell.ljust(width) if is_left else cell.rjust(width) for cell in column]
            head, *rest = [f" {cell} " if cell else " " for cell in cells]
            rule = "-" * (max(width, 2) + 1) + ("-" if is_left else ":")
            aligned.append((head, rule, *rest))
        return "\n".join(f"|{'|'.join(line)}|" for line in zip(*aligned, strict=True))


def numbers(
    values: Sequence[float | None],
    form: str,
    best: Callable[[Sequence[float]], float] | None = None,
    missing: str = NONE,
) -> list[str]:
    """Cells of numbers.

    Args:
        values: The numbers.
        form: As in a format string.
        best: Such as ``min``: which of the finite numbers is marked, with its equals, where there are several.
        missing: The cell of a number that is None.

    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    chosen = best(finite) if best and len(finite) > 1 else None
    cells = [missing if value is None else f"{value:{form}}" for value in values]
    return [Best(c) if value is not None and value == chosen else c for c, value in zip(cells, values, strict=True)]


def without_controls(text: str) -> str:
    """Text with a sign in the place of each control character but tabs and line ends."""
    return text.translate(CONTROLS)


def escape(text: str) -> str:
    """Text on one line whose characters Markdown shows as they are; what stands between backticks is code."""
    line = CODE_OR_MARKUP.sub(lambda found: found[0] if found["run"] else f"\\{found[0]}", " ".join(text.split()))
    return re.sub(r"^(\d+)(?=[.)](?:\s|$))", r"\1\\", line)  # no numbered list


def _cell(text: str, marked: bool) -> str:
    cell = escape(text).replace("|", "\\|")
    return f"**{cell}**" if marked and isinstance(text, Best) else cell
