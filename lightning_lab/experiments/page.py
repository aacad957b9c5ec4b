"""A report's Markdown as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token


def page(title: str, markdown: str, wide: bytes, narrow: bytes) -> str:
    """The page.

    Args:
        title: Of the window.
        markdown: Its content; the one image in it is the picture.
        wide: SVG.
        narrow: The same drawn for a phone.

    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    sources = [f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (wide, narrow)]
    rules: dict[str, Callable[[Token], str]] = {
        "text": lambda token: _breakable(token.content),
        "code_inline": lambda token: f"<code>{_breakable(token.content)}</code>",
        "image": lambda token: (
            f'<picture><source media="(max-width: 640px)" srcset="{sources[1]}">'
            f'<img src="{sources[0]}" alt="{html.escape(token.content)}"></picture>'
        ),
        "table_open": lambda token: (
            f'<div class="box" role="region" aria-label="{html.escape(token.info)}" tabindex="0">\n<table>\n'
        ),
        "table_close": lambda token: "</table>\n</div>\n",
    }
    for name, rule in rules.items():
        parser.add_render_rule(name, lambda self, tokens, place, *_, rule=rule: rule(tokens[place]))
    tokens = parser.parse(markdown)
    links = _mark(tokens)
    body = parser.renderer.render(tokens, parser.options, {})
    nav = f'<nav aria-label="Sections"><ul>\n{"".join(links)}</ul></nav>\n' if len(links) > 2 else ""
    shell = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return shell.substitute(title=html.escape(title), body=body.replace("</h1>\n", f"</h1>\n{nav}", 1))


def _mark(tokens: list[Token]) -> list[str]:
    """Give each section an id, and each table its name: the heading before it, which becomes its caption if it is h3.

    Returns:
        Links to the sections.

    """
    links: list[str] = []
    name = ""
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            name = tokens[place + 1].content
            if token.tag == "h2":
                token.attrSet("id", f"s{len(links)}")
                links.append(f'<li><a href="#s{len(links)}">{html.escape(name)}</a></li>\n')
            elif token.tag == "h3":
                tokens.insert(place, tokens.pop(place + 3))
                tokens[place].info = name
                token.tag = tokens[place + 3].tag = "caption"
        elif token.type == "table_open":
            token.info = name
    return links


def _breakable(text: str) -> str:
    """Text that may be broken at underscores, where names of runs and settings are long."""
    return html.escape(text, quote=False).replace("_", "_<wbr>")
