"""The diary's conversations as HTML: their texts, each token on a background that says what it loses."""

import html
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from lightning_lab.experiments.diary import Diary, Piece, title
from lightning_lab.experiments.runs import Example

# Nats at which the next darker colour begins: of a loss, and of a difference to the base's either way.
LOSSES = (0.5, 1.0, 2.0, 4.0, 8.0)
DIFFERENCES = (0.1, 0.25, 0.5, 1.0, 2.0)
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
            if text := texts.get(example.row):
                compared = kind != "worst" and any(piece.base_nll is not None for piece in text.pieces)
                parts.append(_conversation(f"{title(kind)} {number}: {text.where}", example, text.pieces, compared))
    return "".join([_legend(), *parts]) if parts else ""


def _legend() -> str:
    def scale(kind: str, edges: Sequence[float], form: str) -> list[str]:
        return [f'<span class="{kind}{level}">{edge:{form}}</span>' for level, edge in enumerate(edges, start=1)]

    lower = scale("b", [-edge for edge in DIFFERENCES], "+g")[::-1]
    higher = scale("w", DIFFERENCES, "+g")
    return (
        f'<p class="heat legend">Loss of a token, nats: <span>0</span>{"".join(scale("w", LOSSES, "g"))}<br>Loss minus '
        f"base: {''.join(lower)}<span>0</span>{''.join(higher)}<br>Each colour begins at its number; resting the "
        'pointer on a token shows its own. Masked text is <span class="masked">dim</span></p>\n'
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
            level = bisect_right(LOSSES if difference is None else DIFFERENCES, abs(value))
            colour = f' class="{"w" if value > 0 else "b"}{level}"' if level else ""
            yield f'<span{colour} title="{number}">{html.escape(shown)}</span>'
    if cut:
        yield _cut(cut)


def _masked(text: str) -> str:
    return f'<span class="masked">{html.escape(text)}</span>' if text else ""


def _cut(characters: int) -> str:
    return f"<em>[{characters:,} characters are cut here]</em>"
