"""All rows -> tokens and masks, made once and kept as an Arrow file in the cache."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_lab.data.batching import Example
from lightning_lab.data.cache import making, read_cached, write_cached
from lightning_lab.data.conversation import Conversation
from lightning_lab.data.encoding import IGNORED, ConversationEncoder, Encoded, RowTooLongError
from lightning_lab.data.rows import Rows
from lightning_lab.data.turns import RowError, or_error
from lightning_lab.errors import LabError
from lightning_lab.hub import cache_dir

OnBadRow = Literal["error", "drop"]

# Part of the cache key: raise it whenever the columns, or what parsing or rendering makes of the same input, change.
_FORMAT = 7
_BATCH_ROWS = 256  # bounds the memory of preparation; more is no faster
_NAMED_ROWS = 10  # of a long list; the rest is counted
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.bool_()),
        "weights": pa.list_(pa.float32()),  # null where every supervised token has 1
        "starts": pa.list_(pa.int32()),  # null for the usual one document
        "truncated": pa.bool_(),
        "reason": pa.string(),  # why the row is dropped; null for the others
        "too_long": pa.bool_(),
        "content": pa.uint64(),  # null where the row cannot be read
    }
)


class TokenizedRows:
    """Every row of a source, tokenised; a dropped row keeps its index and has length 0.

    All ids are held in memory, in 5 bytes a token: a file that is mapped ends the process when it is cut short.

    Args:
        table: The content of a finished cache file.
        fingerprint: Its name.

    Attributes:
        lengths: int64 [rows], tokens of each row.
        supervised: int64 [rows], labels of each row that can be predicted: those after a document's first token.
        weight: float64 [rows], the sum of their weights in the training loss.
        dropped: Index of each dropped row -> reason.
        truncated: Indices of rows that were cut at ``max_length``.
        contents: uint64 [rows], a hash of what is said: roles, contents, tool calls and tools. The same in any file,
            format or order, under any template and length.
        fingerprint: Of the rows, the encoder and the file's format.

    """

    def __init__(self, table: pa.Table, fingerprint: str) -> None:
        self.lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
        ends = np.cumsum(self.lengths)[:-1]
        self._ids = np.split(pc.list_flatten(table["input_ids"]).to_numpy(), ends)
        self._masks = np.split(pc.list_flatten(table["supervised"]).to_numpy(), ends)
        self._starts = _filled(table["starts"])
        self._weights = _filled(table["weights"])
        self.supervised = np.array([np.count_nonzero(mask[1:]) for mask in self._masks])
        for i, starts in self._starts.items():
            self.supervised[i] -= np.count_nonzero(self._masks[i][starts])
        self.weight = self.supervised.astype(np.float64)
        for i, weights in self._weights.items():
            first = [0, *self._starts.get(i, ())]
            self.weight[i] = np.delete(weights, first).sum(dtype=np.float64)
        self.dropped = {i: reason for i, reason in enumerate(table["reason"].to_pylist()) if reason is not None}
        self.truncated = np.flatnonzero(table["truncated"].to_numpy()).tolist()
        self.contents = pc.fill_null(table["content"], 0).to_numpy()
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, index: int) -> np.ndarray:
        """Return the token ids of a row: int32 [length], a copy."""
        return self._ids[index].copy()

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of a row: int32 [length], not shifted, -100 where it is not supervised."""
        return np.where(self._masks[index], self._ids[index], np.int32(IGNORED))

    def example(self, index: int) -> Example:
        """Return a row to train on or to evaluate."""
        return Example(self.input_ids(index), self.labels(index), self._weights.get(index), self._starts.get(index, ()))

    @cached_property
    def row_hashes(self) -> np.ndarray:
        """CRC-32 of all that a row's example holds, uint32 [rows]: equal where a run trains or evaluates the same."""
        pairs = zip(self._ids, self._masks, strict=True)
        hashes = [zlib.crc32(mask.data, zlib.crc32(ids.data)) for ids, mask in pairs]
        for rest in (self._weights, self._starts):
            for i, values in rest.items():
                hashes[i] = zlib.crc32(values.data, hashes[i])
        return np.array(hashes, dtype=np.uint32)


def _filled(column: pa.ChunkedArray) -> dict[int, np.ndarray]:
    """The lists of a column that has few of them, by row."""
    rows = np.flatnonzero(column.is_valid().to_numpy()).tolist()
    return {i: column[i].values.to_numpy() for i in rows}


def changed_rows(before: Sequence[int], now: Sequence[int]) -> str:
    """Say in words which rows differ, by their hashes (`TokenizedRows.row_hashes`) then and now; empty if none do."""
    old, new = np.asarray(before, dtype=np.int64), np.asarray(now, dtype=np.int64)
    shared = min(len(old), len(new))
    rows = np.flatnonzero(old[:shared] != new[:shared]).tolist()
    if len(old) != len(new):
        first = f"row {rows[0]} is the first that differs" if rows else f"the first {shared:,} are the same"
        return f"the source has {len(new):,} rows, was {len(old):,}; {first}"
    if len(rows) < 2:
        return f"row {rows[0]} differs" if rows else ""
    named, more = rows[:_NAMED_ROWS], len(rows) - _NAMED_ROWS
    *most, last = [*map(str, named), f"{more:,} more"] if more > 0 else map(str, named)
    return f"rows {', '.join(most)} and {last} differ"


def tokenize_rows(
    rows: Rows,
    encoder: ConversationEncoder,
    *,
    on_bad_row: OnBadRow,
    progress: bool = True,
) -> TokenizedRows:
    """Tokenise all rows, or read them from the cache when rows and encoder are those of an earlier call.

    Rows that are too long under ``truncation: drop`` are dropped, and under ``truncation: error`` are an error,
    whatever ``on_bad_row`` says of malformed rows and of rows with nothing left to learn.

    The file is made in the cache's subdirectory ``tokenized``; any number of processes may do so at once.

    Args:
        rows: The source.
        encoder: Template, tokenizer and rules.
        on_bad_row: ``error`` stops at the first bad row, ``drop`` keeps it as an empty one with its reason.
        progress: Report on stderr.

    Raises:
        LabError: A bad row, named with its place; or the cache directory cannot be written.

    """
    key = f"{_FORMAT} {rows.fingerprint} {rows.row_format} {encoder.fingerprint}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    path = cache_dir() / "tokenized" / f"{fingerprint[:32]}.arrow"

    def checked(table: pa.Table, first: int) -> pa.Table:
        """Stop at a row that may not be dropped; the table's rows are those from ``first`` on."""
        columns = table["reason"].to_pylist(), table["too_long"].to_pylist()
        for index, (reason, too_long) in enumerate(zip(*columns, strict=True), first):
            if too_long and encoder.truncation == "error":
                raise LabError(f"{rows.where(index)}: {reason}; raise data.max_length or set data.truncation")
            if reason is not None and not too_long and on_bad_row == "error":
                raise LabError(f"{rows.where(index)}: {reason}; correct the row or set data.on_bad_row to drop")
        return table

    table = read_cached(path)
    if table is None:
        with making(f"tokenising {len(rows):,} rows of {rows.name}", progress) as bar:
            firsts = bar.track(range(0, len(rows), _BATCH_ROWS), description="tokenising")
            try:
                table = write_cached(path, _SCHEMA, (checked(_encode(rows, encoder, first), first) for first in firsts))
            except OSError as error:
                raise LabError(f"cannot write {path}: {error.strerror or error}; set LIGHTNING_LAB_CACHE") from None
    tokenized = TokenizedRows(checked(table, 0), fingerprint)
    if len(tokenized.dropped) == len(tokenized):
        raise LabError(f"every row of {rows.name} is dropped; {rows.where(0)}: {tokenized.dropped[0]}")
    return tokenized


def _encode(rows: Rows, encoder: ConversationEncoder, first: int) -> pa.Table:
    batch = range(first, min(first + _BATCH_ROWS, len(rows)))
    conversations = [or_error(rows.conversation, index) for index in batch]
    results = encoder.encode_batch(conversations)
    kept = [result if isinstance(result, Encoded) else Encoded([], [], False) for result in results]
    return pa.table(
        {
            "input_ids": [encoded.input_ids for encoded in kept],
            "supervised": [encoded.supervised for encoded in kept],
            "weights": [encoded.weights for encoded in kept],
            "starts": [encoded.starts or None for encoded in kept],
            "truncated": [encoded.truncated for encoded in kept],
            "reason": [str(result) if isinstance(result, RowError) else None for result in results],
            "too_long": [isinstance(result, RowTooLongError) for result in results],
            "content": [None if isinstance(said, RowError) else content_hash(said) for said in conversations],
        },
        _SCHEMA,
    )


def content_hash(conversation: Conversation) -> int:
    """A hash of what is said."""
    said = [(m.role, m.content.strip(), [call["function"] for call in m.tool_calls]) for m in conversation.messages]
    return hashed([said, conversation.tools])


def hashed(said: Any) -> int:
    """A hash of what can be JSON; 8 bytes, so that two of a million differ in all but 1 of 10 million data sets."""
    text = json.dumps(said, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
