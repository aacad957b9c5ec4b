"""Paragraphs, lists, tables and a figure: as Markdown that a terminal shows well, and as one HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Table:
    """Cells as they are shown.

    Attributes:
        columns: Headings.
        rows: Cells.
        text: Columns that hold text, by heading: aligned left, and broken where they are long. The others are numbers.
        best: Row and column of cells to mark; Markdown marks none.
        caption: What the table shows, where the section's heading does not say it.
        padded: Markdown columns line up; else as ``losses.md`` is written.

    """

    kind: ClassVar = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Collection[str] = ("run",)
    best: Collection[tuple[int, int]] = ()
    caption: str = ""
    padded: bool = True

    @property
    def head(self) -> str:
        """The column that names the rows: the first with text, if one has."""
        return next((column for column in self.columns if column in self.text), self.columns[0])


@dataclass(frozen=True)
class Tables:
    """Small tables, side by side where there is room."""

    kind: ClassVar = "tables"
    tables: Sequence[Table]


@dataclass(frozen=True)
class Items:
    """A list."""

    kind: ClassVar = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Paragraph:
    """Text; what stands between backticks is code."""

    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture: ``file`` in Markdown, SVG within HTML.

    Attributes:
        file: Name of the PNG file beside the page.
        alt: What it shows, for those who do not see it.
        caption: Stands below it.
        wide: SVG text.
        narrow: The same drawn for a phone.

    """

    kind: ClassVar = "figure"
    file: str
    alt: str
    caption: str
    wide: str = ""
    narrow: str = ""


Block = Table | Tables | Items | Paragraph | Figure


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown."""
    parts = [f"# {_inline(title)}"]
    for section in sections:
        parts.append(f"## {_inline(section.title)}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table as Markdown, its columns lined up unless it says otherwise."""
    lines = [[_inline(cell) for cell in row] for row in (table.columns, *table.rows)]
    left = [column in table.text for column in table.columns]
    widths = [max(3, *map(len, cells)) if table.padded else 0 for cells in zip(*lines, strict=True)]
    rule = [
        ("-" * (width + 2) if is_left else "-" * (width + 1) + ":") if table.padded else ("---" if is_left else "---:")
        for width, is_left in zip(widths, left, strict=True)
    ]
    padded = [
        [
            f" {cell.ljust(width) if is_left else cell.rjust(width)} " if cell or width else " "
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ]
        for line in lines
    ]
    return "\n".join(f"|{'|'.join(line)}|" for line in (padded[0], rule, *padded[1:]))


def html(title: str, sections: Sequence[Section]) -> str:
    """The page as one HTML file that loads nothing."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"inline": _html_inline, "uri": _svg_uri}
    template = (files(__package__) / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, sections=sections)


def _markdown_block(block: Block) -> str:
    if isinstance(block, Table):
        heading = f"### {_inline(block.caption)}\n\n" if block.caption else ""
        return heading + markdown_table(block)
    if isinstance(block, Tables):
        return "\n\n".join(_markdown_block(table) for table in block.tables)
    if isinstance(block, Items):
        return "\n".join(f"* {_inline(item)}" for item in block.items)
    if isinstance(block, Figure):
        return f"![{_inline(block.alt)}]({block.file})\n\n{_inline(block.caption)}"
    return _inline(block.text)


def _inline(text: str) -> str:
    """Text on one line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _html_inline(text: str) -> Markup:
    code = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(code.replace("_", "_<wbr>"))  # where names of runs and settings may be broken


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
