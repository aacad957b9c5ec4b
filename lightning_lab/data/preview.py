"""Conversations as the model sees them: what is supervised, what is masked, what was cut or dropped."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TextIO

import numpy as np

from lightning_lab.data.conversation import parse_conversation
from lightning_lab.data.encoding import IGNORED, Renderer
from lightning_lab.data.sources import Rows
from lightning_lab.data.tokenized import TokenizedRows

_NAMED_ROWS = 20  # of a long list; the rest is counted
_BATCH_ROWS = 256  # tokenised at once


def preview(
    tokenized: TokenizedRows,
    rows: Rows,
    tokenizer: Any,
    renderer: Renderer,
    *,
    limit: int = 3,
    indices: Sequence[int] | None = None,
    as_json: bool = False,
    packing: Mapping[str, Any] | None = None,
    file: TextIO | None = None,
) -> None:
    """Print conversations, then counts over all rows of ``indices``.

    On a terminal supervised tokens are coloured and masked ones dim; elsewhere supervised tokens stand in ⟦ ⟧.

    Args:
        tokenized: the tokens.
        rows: where they come from.
        tokenizer: turns ids back to text.
        renderer: what tokenised them; counts the rows that come out otherwise without cuts at the answers.
        limit: conversations to print; dropped rows are skipped.
        indices: rows to look at, such as those of a split; all by default.
        as_json: print only the conversations, one object a line: ``row``, ``input_ids``, ``labels`` (-100 where
            nothing is supervised) and ``text``, which is that of the ids, so truncated like them.
        packing: statistics to print after the counts.
        file: standard output by default.

    """
    file = file or sys.stdout
    indices = range(len(tokenized)) if indices is None else indices
    shown = [index for index in indices if index not in tokenized.dropped][:limit]
    if as_json:
        for index in shown:
            ids, labels = tokenized.input_ids(index).tolist(), tokenized.labels(index).tolist()
            shown_row = {"row": int(index), "input_ids": ids, "labels": labels, "text": _decode(tokenizer, ids)}
            print(json.dumps(shown_row, ensure_ascii=False), file=file)
        return

    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, soft_wrap=True)
    for index in shown:
        counts = f"{tokenized.lengths[index]} tokens, {tokenized.supervised[index]} supervised"
        console.print(Text(f"--- {rows.where(index)}: {counts}", style="bold"))
        text = Text()
        for piece, supervised in _runs(tokenized, index, tokenizer):
            if console.is_terminal:
                text.append(piece, style="green" if supervised else "dim")
            else:
                text.append(f"⟦{piece}⟧" if supervised else piece)
        console.print(text)
    for line in _summary(tokenized, rows, renderer, indices, packing or {}):
        console.print(line)


def _runs(tokenized: TokenizedRows, index: int, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield the text of each run of supervised or masked tokens; a span never begins or ends inside a character."""
    ids = tokenized.input_ids(index)
    supervised = tokenized.labels(index) != IGNORED
    edges = [0, *(np.flatnonzero(supervised[1:] != supervised[:-1]) + 1).tolist(), len(ids)]
    for start, end in pairwise(edges):
        # A row may quote the codes that steer a terminal.
        yield _decode(tokenizer, ids[start:end].tolist()).replace("\x1b", "␛"), bool(supervised[start])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _boundary_shifted(rows: Rows, kept: Sequence[int], renderer: Renderer) -> Iterator[int]:
    """Tokenise the kept rows whole, with cuts at the answers and without, and name those that differ."""
    for first in range(0, len(kept), _BATCH_ROWS):
        batch = kept[first : first + _BATCH_ROWS]
        texts = [renderer.render(parse_conversation(rows.rows[index])) for index in batch]
        cut, uncut = renderer.token_ids(texts), renderer.token_ids([replace(text, spans=()) for text in texts])
        yield from (index for index, a, b in zip(batch, cut, uncut, strict=True) if a != b)


def _summary(
    tokenized: TokenizedRows, rows: Rows, renderer: Renderer, indices: Sequence[int], packing: Mapping[str, Any]
) -> Iterator[str]:
    chosen = set(indices)
    dropped = [index for index in tokenized.dropped if index in chosen]
    kept = [int(index) for index in indices if index not in tokenized.dropped]
    lengths = tokenized.lengths[kept]
    tokens, supervised = int(lengths.sum()), int(tokenized.supervised[list(indices)].sum())
    share = 100 * supervised / tokens if tokens else 0.0
    yield f"{len(chosen)} rows of {rows.name}: {len(lengths)} kept, {len(dropped)} dropped"
    yield f"{tokens} tokens, {supervised} supervised ({share:.1f} %)"
    if len(lengths):
        points = (0, 25, 50, 75, 95, 99, 100)
        values = np.percentile(lengths, points, method="nearest")
        percentiles = ", ".join(f"p{point} {value}" for point, value in zip(points, values, strict=True))
        yield f"tokens a row: mean {lengths.mean():.1f}, {percentiles}"
    for title, found in (
        ("cut at max_length", [index for index in tokenized.truncated if index in chosen]),
        ("tokenised otherwise without cuts at the answers", sorted(_boundary_shifted(rows, kept, renderer))),
    ):
        named = f": rows {', '.join(map(str, found[:_NAMED_ROWS]))}" if found else ""
        yield f"{len(found)} {title}{named}{_more(found)}"
    for index in dropped[:_NAMED_ROWS]:
        yield f"dropped {rows.where(index)}: {tokenized.dropped[index]}"
    if len(dropped) > _NAMED_ROWS:
        yield f"dropped{_more(dropped)}"
    for name, value in packing.items():
        yield f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"


def _more(found: Sequence[int]) -> str:
    return f" and {len(found) - _NAMED_ROWS} more" if len(found) > _NAMED_ROWS else ""
