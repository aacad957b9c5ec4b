"""A report's Markdown as one HTML file that loads nothing."""

import base64
import html
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt

BOX = '<div class="box" role="region" aria-label="table" tabindex="0">\n<table>'  # scrolls where it is too wide


def page(title: str, markdown: str, picture: str, svg: bytes, conversations: str = "") -> str:
    """The page.

    Args:
        title: Of the window.
        markdown: Its content.
        picture: The file that the content's image names.
        svg: What takes its place.
        conversations: HTML that follows the content.

    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    # in text, quotes and angle brackets are escaped
    for old, new in ((f'src="{picture}"', f'src="{source}"'), ("<table>", BOX), ("</table>", "</table>\n</div>")):
        body = body.replace(old, new)
    shell = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return shell.substitute(title=html.escape(title), body=body, conversations=conversations)
