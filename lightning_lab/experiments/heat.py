"""The diary's conversations as HTML: their texts, each token on a background that says what it loses."""

from __future__ import annotations

import html
from bisect import bisect_right
from collections.abc import Iterator

from lightning_lab.experiments.diary import Diary, Piece, title
from lightning_lab.experiments.runs import Example

EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats, at which the next darker colour begins
# Characters of a conversation that are shown. Nine conversations of one token a character are 2.5 MB of HTML, of
# English 0.5 MB.
MOST_CHARACTERS = 4_000
MASKED_END = 300  # characters that are kept at both ends of a longer stretch of masked text


def heat(diary: Diary) -> str:
    """The texts of the chosen conversations under a legend; nothing where none can be shown."""
    texts, _ = diary.texts
    parts = []
    for kind, examples in diary.chosen.items():
        for number, example in enumerate(examples, start=1):
            if text := texts.get(int(example.row)):
                compared = kind != "worst" and any(piece.base_nll is not None for piece in text.pieces)
                parts.append(_conversation(f"{title(kind)} {number}: {text.where}", example, text.pieces, compared))
    return "".join([_legend(), *parts]) if parts else ""


def _legend() -> str:
    below = f"<span>below {EDGES[0]:g}</span>"
    worse, better = (
        "".join(f'<span class="{kind}{i}">{edge:g}</span>' for i, edge in enumerate(EDGES, 1)) for kind in "wb"
    )
    return (
        f'<p class="heat legend">Loss of a token in nats, from: {below}{worse} Masked text is <span class="masked">dim'
        f"</span>.<br>Difference to the base: higher loss {below}{worse} lower loss {below}{better} A token's number "
        "shows when the pointer rests on it.</p>\n"
    )


def _conversation(name: str, example: Example, pieces: list[Piece], compared: bool) -> str:
    figures = [f"loss {example.loss:.4f}", f"{example.supervised_tokens:,.0f} supervised tokens"]
    if example.base_loss is not None:
        figures[1:1] = [f"base {example.base_loss:.4f}", f"loss minus base {example.loss_minus_base:+.4f}"]
    colours = "the difference to the base" if compared else "the loss"
    label, text = html.escape(name), "".join(_spans(pieces, compared))
    return (
        f"<h3>{label}</h3>\n<p>{', '.join(figures)}. Colours: {colours} of each token.</p>\n"
        f'<pre class="heat" role="region" aria-label="{label}" tabindex="0">{text}</pre>\n'
    )


def _spans(pieces: list[Piece], compared: bool) -> Iterator[str]:
    left, cut = MOST_CHARACTERS, 0
    for text, nll, base_nll in pieces:
        middle = len(text) - 2 * MASKED_END
        if left and nll is None and middle > MASKED_END:
            yield _masked(text[:MASKED_END]) + _cut(middle)
            text, left = text[-MASKED_END:], max(0, left - MASKED_END)
        shown = text[:left]
        cut, left = cut + len(text) - len(shown), left - len(shown)
        if nll is None:
            yield _masked(shown)
        elif shown:
            difference = nll - base_nll if compared and base_nll is not None else None
            value = nll if difference is None else difference
            number = f"{nll:.2f}" if difference is None else f"{difference:+.2f}, loss {nll:.2f}"
            level = bisect_right(EDGES, abs(value))
            colour = f' class="{"w" if value > 0 else "b"}{level}"' if level else ""
            yield f'<span{colour} title="{number}">{html.escape(shown)}</span>'
    if cut:
        yield _cut(cut)


def _masked(text: str) -> str:
    return f'<span class="masked">{html.escape(text)}</span>' if text else ""


def _cut(characters: int) -> str:
    return f"<em>[{characters:,} characters are cut here]</em>"
