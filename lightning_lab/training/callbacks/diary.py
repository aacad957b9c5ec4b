"""The row diary of an evaluation: the loss of each token beside its text, and the base's losses beside the adapter's.

``<result>_tokens.parquet`` has a row for each conversation: ``row`` and ``where`` (its place in the source), ``text``
(its pieces, in order) and ``nll`` (of each piece, in nats; null where nothing is supervised). So a report needs neither
tokenizer nor source. ``<result>_examples.csv`` of an adapter has ``base_loss`` and ``loss_minus_base`` once both have
been evaluated.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lightning_lab import files, rundir
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.encoding import IGNORED
from lightning_lab.training.evaluation import Evaluation

JOINED = ("base_loss", "loss_minus_base")
_SCHEMA = pa.schema(
    {"row": pa.int64(), "where": pa.string(), "text": pa.list_(pa.string()), "nll": pa.list_(pa.float32())}
)
_BATCH = 64  # conversations that are text at a time; a row group of the file


def write_diary(run_dir: Path, name: str, record: Mapping[str, Any], found: Evaluation, data: ChatDataModule) -> bool:
    """Write what explains a result, which is saved by then: whatever goes wrong here is a warning.

    Args:
        run_dir: The run's directory, with the result's JSON and its losses by conversation.
        name: The result's, such as ``test-base``.
        record: What the JSON has.
        found: The evaluation, with the loss of each token.
        data: The conversations.

    Returns:
        Whether the losses of the tokens are there.

    """
    tokens = run_dir / f"{name}{rundir.TOKENS}"
    with_tokens, beside_base = partial(_write_tokens, tokens, found, data), partial(join_base, run_dir, record)
    tokens.unlink(missing_ok=True)  # never that of an evaluation before
    for how, step in (("with their tokens", with_tokens), ("beside the base", beside_base)):
        try:
            step()
        except Exception as error:  # whatever tokenizers, Arrow and old files lead to
            print(f"warning: {run_dir / name}: conversations cannot be reported {how} ({error})", file=sys.stderr)
    return tokens.exists()


def join_base(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Put the base's losses beside those of each adapter's result on the same conversations and tokens.

    A conversation that the base was not evaluated on (under a limit, say) has empty cells.

    Args:
        run_dir: The run's directory.
        record: The JSON of one of these results, the base's or an adapter's.

    Raises:
        KeyError, ValueError: A file is damaged.
        LabError: One cannot be written.

    """
    split = record["split"]
    names = [path.stem for mark in ("", "@*", "-base*") for path in sorted(run_dir.glob(f"{split}{mark}.json"))]
    same = [name for name in names if _known_by(files.read_json(run_dir / f"{name}.json")) == _known_by(record)]
    bases = [name for name in same if name.startswith(f"{split}-{rundir.BASE}")]
    if not bases:
        return
    base = {(row["row"], row["supervised_tokens"]): float(row["loss"]) for row in _examples(run_dir, bases[0])}
    for name in (name for name in same if name not in bases):
        lines: list[str] = []
        for row in _examples(run_dir, name):
            loss = base.get((row["row"], row["supervised_tokens"]))
            joined = ("", "") if loss is None else (repr(loss), repr(float(row["loss"]) - loss))
            row |= dict(zip(JOINED, joined, strict=True))
            lines += [",".join(row.values())] if lines else [",".join(row), ",".join(row.values())]
        if lines:
            files.write_whole(run_dir / f"{name}{rundir.EXAMPLES}", "".join(f"{line}\r\n" for line in lines))


def _known_by(record: Mapping[str, Any]) -> list[Any]:
    """What the results of the same conversations and tokens have in common."""
    # older ones do not say whether they are weighted
    settings = {**(record.get("settings") or {}), rundir.WEIGHTED: rundir.is_weighted(record)}
    return [record.get("contents"), record.get("data_fingerprint"), settings]


def _examples(run_dir: Path, name: str) -> list[dict[str, str]]:
    with (run_dir / f"{name}{rundir.EXAMPLES}").open(newline="") as file:
        return list(csv.DictReader(file))


def _write_tokens(path: Path, found: Evaluation, data: ChatDataModule) -> None:
    """Write the conversations in batches, each compressed when it is full: the text of all is never in memory."""
    assert found.token_nll is not None
    nll = np.split(found.token_nll.numpy(), np.cumsum(found.tokens.numpy())[:-1])
    buffer = io.BytesIO()
    with (
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar,
        pq.ParquetWriter(buffer, _SCHEMA, compression="zstd") as writer,
    ):
        rows = found.rows.tolist()
        for start in bar.track(range(0, len(rows), _BATCH), description=f"writing {path.name}"):
            batch = [
                dict(zip(_SCHEMA.names, (row, data.rows.where(row), *_conversation(data, row, losses)), strict=True))
                for row, losses in zip(rows[start : start + _BATCH], nll[start : start + _BATCH], strict=True)
            ]
            writer.write_table(pa.Table.from_pylist(batch, _SCHEMA))
    files.write_whole(path, buffer.getbuffer())


def _conversation(data: ChatDataModule, row: int, nll: np.ndarray) -> tuple[list[str], list[float | None]]:
    """The text of a conversation's documents and its losses, ``nll`` being those of the supervised tokens in order."""
    example = data.tokenized.example(row)
    starts = [0, *example.starts]
    supervised = example.labels != IGNORED
    supervised[starts] = False  # a document's first token has nothing before it to be predicted from
    each = np.full(len(supervised), None)
    each[supervised] = nll.tolist()
    parts = [(example.input_ids[a:b].tolist(), each[a:b].tolist()) for a, b in pairwise([*starts, len(each)])]
    found = [pieces(data.tokenizer.backend_tokenizer, *part) for part in parts]
    texts, sums = zip(*found, strict=True)
    return [*chain(*texts)], [*chain(*sums)]


def pieces(
    tokenizer: Tokenizer, ids: Sequence[int], nll: Sequence[float | None]
) -> tuple[list[str], list[float | None]]:
    """Cut a document's text where its tokens end, if a character ends there too.

    Args:
        tokenizer: Of the ids.
        ids: ``[T]``, the document.
        nll: ``[T]`` nats, None where a token is not supervised.

    Returns:
        The pieces, which are the whole text together, and the NLL of each: the sum over its supervised tokens, of which
        there are several where a character takes several; None where none is. Such pieces are as long as they can be.

    """
    texts: list[str] = []
    sums: list[float | None] = []
    stream = DecodeStream(skip_special_tokens=False)
    begun, total = 0, None
    for end, (token, loss) in enumerate(zip(ids, nll, strict=True), start=1):
        if loss is not None:
            total = loss + (total or 0.0)
        text = stream.step(tokenizer, token)  # None within a character
        if text is None and end == len(ids):
            text = tokenizer.decode(ids[begun:], skip_special_tokens=False)
        if text is None:
            continue
        if total is None and sums and sums[-1] is None:
            texts[-1] += text
        else:
            texts.append(text)
            sums.append(total)
        begun, total = end, None
    return texts, sums
