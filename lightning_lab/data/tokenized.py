"""Rows -> tokens and labels, made once and then memory-mapped from an Arrow file in the cache."""

import gc
import hashlib
import os
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lightning_lab.data.conversation import Conversation, RowError, parse_conversation
from lightning_lab.data.rendering import IGNORED, Encoded, Renderer, RowTooLongError
from lightning_lab.data.sources import Rows
from lightning_lab.errors import LabError

OnBadRow = Literal["error", "drop"]

# Part of the cache key: raise it whenever the columns, or what parsing or rendering makes of the same input, change.
_FORMAT = 2
_BATCH_ROWS = 128  # bounds the memory of preparation; more is no faster
_BATCHES_A_SEARCH = 8  # for reference cycles
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        # Labels as [start, end) pairs of tokens: half the file that a second column of ids would make.
        "learned": pa.list_(pa.int32()),
        "truncated": pa.bool_(),
        "reason": pa.string(),  # why the row is dropped; null for the others
        "too_long": pa.bool_(),
    }
)


class TokenizedRows:
    """Every row of a source, tokenised; a dropped row keeps its index and has length 0.

    Attributes:
        lengths: int64 [rows], tokens of each row.
        supervised: int64 [rows], labels of each row that can be predicted: those after the first token.
        dropped: index of each dropped row -> reason.
        truncated: indices of rows that were cut at ``max_length``.
        fingerprint: of the rows, the renderer and the file's format.

    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open a finished cache file.

        Raises:
            ValueError, OSError: the file is not whole.

        """
        self._path, self.fingerprint = path, fingerprint
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != _SCHEMA:
            raise ValueError("other columns")
        self._batches: list[pa.RecordBatch] = []
        for number in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(number)
            if metadata is None or metadata.get(b"crc32") != _checksum(batch):
                raise ValueError(f"batch {number} is damaged")
            self._batches.append(batch)
        table = pa.Table.from_batches(self._batches, _SCHEMA)
        self.lengths = np.concatenate([np.diff(_column(b, "input_ids").offsets.to_numpy()) for b in self._batches])
        self.lengths = self.lengths.astype(np.int64)
        self.supervised = np.concatenate([_count_supervised(batch) for batch in self._batches])
        reasons = table.column("reason").to_pylist()
        self.dropped = {i: reason for i, reason in enumerate(reasons) if reason is not None}
        self.truncated = np.flatnonzero(table.column("truncated").to_numpy()).tolist()
        self._too_long = set(np.flatnonzero(table.column("too_long").to_numpy()).tolist())

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file itself instead of receiving it.
        return TokenizedRows, (self._path, self.fingerprint)

    def input_ids(self, index: int) -> np.ndarray:
        """Return the token ids of a row: int32 [length], a copy."""
        return self._values("input_ids", index)

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of a row: int32 [length], not shifted, -100 where nothing is learned."""
        ids = self._values("input_ids", index)
        labels = np.full_like(ids, IGNORED)
        for start, end in self._values("learned", index).reshape(-1, 2):
            labels[start:end] = ids[start:end]
        return labels

    def _values(self, name: str, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        column = _column(self._batches[index // _BATCH_ROWS], name)
        start, end = column.offsets[index % _BATCH_ROWS : index % _BATCH_ROWS + 2].to_numpy()
        return column.values[int(start) : int(end)].to_numpy().copy()


def tokenize_rows(
    rows: Rows, renderer: Renderer, *, on_bad_row: OnBadRow, cache_dir: Path, progress: bool = True
) -> TokenizedRows:
    """Tokenise all rows, or map them from the cache when rows and renderer are those of an earlier call.

    Rows that are too long under ``truncation: drop`` are dropped, and under ``truncation: error`` are an error,
    whatever ``on_bad_row`` says of malformed rows and of rows with nothing left to learn.

    Args:
        rows: the source.
        renderer: template, tokenizer and rules.
        on_bad_row: ``error`` stops at the first bad row, ``drop`` keeps it as an empty one with its reason.
        cache_dir: the file is made in its subdirectory ``tokenized``; any number of processes may do so at once.
        progress: report on stderr.

    Raises:
        LabError: a bad row, named with its place; or the cache directory cannot be written.

    """
    fingerprint = hashlib.sha256(f"{_FORMAT} {rows.fingerprint} {renderer.fingerprint}".encode()).hexdigest()
    path = cache_dir / "tokenized" / f"{fingerprint[:32]}.arrow"
    tokenized = _open(path, fingerprint, len(rows))
    if tokenized is None:
        try:
            _write(path, rows, renderer, on_bad_row, progress)
        except OSError as error:
            raise LabError(f"cannot write {path}: {error.strerror or error}; set LIGHTNING_LAB_CACHE") from None
        tokenized = TokenizedRows(path, fingerprint)
    for index, reason in tokenized.dropped.items():
        _raise_if_fatal(rows, index, reason, index in tokenized._too_long, renderer, on_bad_row)
    if len(tokenized.dropped) == len(tokenized):
        raise LabError(f"every row of {rows.name} is dropped; {rows.where(0)}: {tokenized.dropped[0]}")
    return tokenized


def _open(path: Path, fingerprint: str, length: int) -> TokenizedRows | None:
    try:
        tokenized = TokenizedRows(path, fingerprint)
    except (OSError, ValueError):  # pyarrow.ArrowInvalid is a ValueError
        return None
    return tokenized if len(tokenized) == length else None


def _write(path: Path, rows: Rows, renderer: Renderer, on_bad_row: OnBadRow, progress: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.partial")
    try:
        with (
            pa.OSFile(str(partial), "wb") as file,
            pa.ipc.new_file(file, _SCHEMA) as writer,
            _Progress(len(rows), progress) as report,
        ):
            first = 0
            for batch in _batches(rows, renderer):
                reasons, too_long = _column(batch, "reason"), _column(batch, "too_long")
                for number in np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False)).tolist():
                    reason, long = reasons[number].as_py(), too_long[number].as_py()
                    _raise_if_fatal(rows, first + number, reason, long, renderer, on_bad_row)
                writer.write_batch(batch, custom_metadata={"crc32": _checksum(batch)})
                report.advance(len(batch))
                first += len(batch)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _batches(rows: Rows, renderer: Renderer) -> Iterator[pa.RecordBatch]:
    parsed = (
        [_parse(rows.rows[index]) for index in range(first, min(first + _BATCH_ROWS, len(rows)))]
        for first in range(0, len(rows), _BATCH_ROWS)
    )
    # Searching for reference cycles, which templates make, takes a tenth of the time when it goes by the number of new
    # objects, most of them texts and ids that are soon gone; and what torch and transformers hold need not be searched.
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        for number, results in enumerate(renderer.encode_batches(parsed), start=1):
            yield _record_batch(results)
            if number % _BATCHES_A_SEARCH == 0:
                gc.collect()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _parse(row: Any) -> Conversation | RowError:
    try:
        return parse_conversation(row)
    except RowError as error:
        return error


def _record_batch(results: list[Encoded | RowError]) -> pa.RecordBatch:
    kept = [result if isinstance(result, Encoded) else None for result in results]
    columns = {
        "input_ids": _list_array([result.input_ids if result else [] for result in kept]),
        "learned": _list_array([list(chain.from_iterable(result.learned)) if result else [] for result in kept]),
        "truncated": [result is not None and result.truncated for result in kept],
        "reason": [str(result) if isinstance(result, RowError) else None for result in results],
        "too_long": [isinstance(result, RowTooLongError) for result in results],
    }
    return pa.RecordBatch.from_pydict(columns, _SCHEMA)


def _list_array(lists: list[list[int]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(lists), np.int32, offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _raise_if_fatal(
    rows: Rows, index: int, reason: str, too_long: bool, renderer: Renderer, on_bad_row: OnBadRow
) -> None:
    if too_long and renderer.truncation == "error":
        raise LabError(f"{rows.where(index)}: {reason}; raise data.max_length or set data.truncation")
    if not too_long and on_bad_row == "error":
        raise LabError(f"{rows.where(index)}: {reason}; correct the row or set data.on_bad_row to drop")


def _column(batch: pa.RecordBatch, name: str) -> Any:
    return batch.column(_SCHEMA.get_field_index(name))


def _count_supervised(batch: pa.RecordBatch) -> np.ndarray:
    """Count each row's labels after its first token: int64 [rows of the batch]."""
    column = _column(batch, "learned")
    edges = np.maximum(column.values.to_numpy().astype(np.int64), 1)
    total = np.concatenate([[0], np.cumsum(edges[1::2] - edges[::2])])
    return np.diff(total[column.offsets.to_numpy() // 2])


def _checksum(batch: pa.RecordBatch) -> bytes:
    checksum = 0
    for column in batch.columns:
        # Offsets, values and bits, but not the validity bitmap, which Arrow leaves out when nothing is null.
        for values in (column.offsets, column.values) if pa.types.is_list(column.type) else (column.to_pylist(),):
            content = repr(values).encode() if isinstance(values, list) else values.to_numpy()
            checksum = zlib.crc32(content, checksum)
    return str(checksum).encode()


class _Progress:
    """A bar on a terminal; elsewhere a line at every tenth, so that logs stay short."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._done, self._tenth, self._bar = total, 0, 0, None
        self._lines = shown and not sys.stderr.isatty()
        if shown and not self._lines:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)

    def __enter__(self) -> "_Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, rows: int) -> None:
        self._done += rows
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], rows)
        tenth = 10 * self._done // self._total
        if self._lines and tenth > self._tenth:
            self._tenth = tenth
            print(f"tokenising: {self._done} of {self._total} rows", file=sys.stderr, flush=True)
