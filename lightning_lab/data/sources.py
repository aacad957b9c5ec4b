"""A data source named in the config -> rows, in a fixed order, each with a place to name in errors."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lightning_lab import hub
from lightning_lab.data.conversation import RowError
from lightning_lab.errors import LabError

_SUFFIXES = (".json", ".jsonl", ".parquet")
_SAMPLES = {  # package, file, version
    "embedded": ("zaragoza_construction_faq", "data/faq-en-sharegpt.jsonl", "1.2.1"),
    "chitchat": ("chitchat_dataset", "dataset.json", "0.9.0"),
}


@dataclass(frozen=True)
class Rows(Sequence[Any]):
    """Rows of one source: mappings, or a `RowError` in the place of a row that could not be read.

    Attributes:
        stored: The rows in a compact form: lines of JSON as bytes (as much memory as the file has), an Arrow table, a
            Hub data set, which stays on disk, or a JSON list's Python objects.
        name: What to call the source in messages.
        fingerprint: Changes whenever the rows do.
        total: Rows that the source has, those beyond the limit too.
        lines: For JSON Lines, each row's line number counted from 1.

    """

    stored: Any
    name: str
    fingerprint: str
    total: int
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.stored, pa.Table):
            return self.stored.slice(index, 1).to_pylist()[0]
        row = self.stored[index]
        if not isinstance(row, bytes):
            return row
        try:
            return json.loads(row.decode())
        except (ValueError, RecursionError) as error:
            return RowError(f"the line is not JSON ({error})")

    def where(self, index: int) -> str:
        """Name a row's place for a message: its line counted from 1, otherwise its index counted from 0."""
        return f"{self.name} line {self.lines[index]}" if self.lines else f"{self.name} row {index}"


def load_rows(source: str, limit: int | None = None, revision: str | None = None) -> Rows:
    """Open a source and keep its first ``limit`` rows (all of them if None).

    Args:
        source: ``embedded``, ``chitchat``, a local .json, .jsonl or .parquet file, or a Hub id ``owner/name``,
            of which the split ``train`` is read.
        limit: At least 1.
        revision: Commit of a Hub data set; None for its newest.

    Raises:
        LabError: The source does not exist, cannot be reached or read, has no revisions, or holds no row.

    """
    path = Path(source).expanduser()
    is_file = path.suffix in _SUFFIXES or path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    lines = None
    if source not in _SAMPLES and not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        found: Any = hub.load_dataset(source, revision=revision)
        kept = found.select(range(min(len(found), limit or len(found))))
        fingerprint = found._fingerprint  # depends on the data set's id, configuration and revision
    elif revision is not None:
        raise LabError(f"data.revision is for data sets of the Hub, which {source} is not; leave it out")
    elif source in _SAMPLES or is_file:
        path = hub.package_file(*_SAMPLES[source]) if source in _SAMPLES else path
        content = _read(path, source)
        fingerprint = hashlib.sha256(content).hexdigest()
        if path.suffix == ".jsonl":
            kept, lines = _json_lines(content, source, limit)
            found = lines
        else:
            found = _parquet(content, source) if path.suffix == ".parquet" else _json(content, source)
            kept = found[:limit]
    else:
        raise LabError(
            f"data.source '{source}' is not embedded, chitchat, a {', '.join(_SUFFIXES)} file or a Hub id owner/name"
        )
    if not len(found):
        raise LabError(f"{source} holds no rows; give a data.source with at least one conversation")
    return Rows(kept, source, f"{fingerprint}:{len(kept)}", len(found), lines)


def _read(path: Path, name: str) -> bytes:
    """Read a file whole, as one that is mapped and cut short by someone else would end the process."""
    if not path.exists():
        raise LabError(f"{name}: no such file (data.source)")
    if path.suffix not in _SUFFIXES or not path.is_file():
        raise LabError(f"{name}: data.source must be a {', '.join(_SUFFIXES)} file, an id owner/name, or embedded")
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabError(f"{name} cannot be read: {error.strerror}") from None


def _json_lines(content: bytes, name: str, limit: int | None) -> tuple[list[bytes], list[int]]:
    """The first lines that hold a row, to be parsed when they are asked for, and the numbers of all that do."""
    rows: list[bytes] = []
    numbers: list[int] = []
    # Only "\n" ends a line: JSON text may hold U+2028 and its like, at which str.splitlines would cut.
    for number, line in enumerate(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), start=1):
        if _decode(line, name, number).strip():
            numbers.append(number)
            if limit is None or len(rows) < limit:
                rows.append(line)
    return rows, numbers


def _parquet(content: bytes, name: str) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise LabError(f"{name} is not a readable Parquet file: {error}") from None


def _json(content: bytes, name: str) -> list[Any]:
    try:
        rows = json.loads(_decode(content.removeprefix(codecs.BOM_UTF8), name, 1))
    except (ValueError, RecursionError) as error:
        raise LabError(f"{name} is not JSON: {error}; name it .jsonl if it holds one object a line") from None
    if name == "chitchat":
        return _chitchat(rows)
    if not isinstance(rows, list):
        raise LabError(f"{name} must hold a list of rows; name it .jsonl if it holds one object a line")
    return rows


def _decode(content: bytes, name: str, first_line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + first_line
        raise LabError(f"{name} line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _chitchat(conversations: dict[str, Any]) -> list[Any]:
    """Make user and assistant turns of the Chit Chat Challenge: whoever writes first is the user."""
    rows = []
    for conversation in conversations.values():
        # Blank messages carry nothing; one conversation has two sides only by a blank first message.
        written = [m for burst in conversation["messages"] for m in burst if m["text"].strip()]
        if len({message["sender"] for message in written}) != 2:
            continue
        turns: list[dict[str, str]] = []
        for sender, messages in groupby(written, key=lambda message: message["sender"]):
            role = "user" if sender == written[0]["sender"] else "assistant"
            turns.append({"role": role, "content": "\n".join(message["text"] for message in messages)})
        rows.append({"messages": turns})
    return rows
