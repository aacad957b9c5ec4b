"""Data sources named in the config -> `Rows`, in a fixed order."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from lightning_lab import hub
from lightning_lab.data.conversation import BY_KEYS, RowFormat
from lightning_lab.data.rows import Part, Rows
from lightning_lab.errors import LabError

_KINDS = (".json", ".jsonl", ".parquet", ".arrow", ".feather")
_COMPRESSED = (".gz", ".zst")
_FILE = f"a {', '.join(_KINDS)} file, with {' or '.join(_COMPRESSED)} after it too"
# What may stand beside the files of a folder: what is to be read by people, and what `Dataset.save_to_disk` adds.
_BESIDE = re.compile(r"[^.]*|.*\.md|dataset_info\.json|state\.json")
_NO_ID = re.compile(r"[*?\[]|/.*/")  # what no Hub id has: a pattern's signs, a second slash
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SAMPLES = {  # package, file, version
    "embedded": ("zaragoza_construction_faq", "data/faq-en-sharegpt.jsonl", "1.2.1"),
    "chitchat": ("chitchat_dataset", "dataset.json", "0.9.0"),
}


def load_rows(
    source: str | Sequence[str],
    limit: int | None = None,
    revision: str | None = None,
    config: str | None = None,
    split: str = "train",
    row_format: RowFormat = BY_KEYS,
) -> Rows:
    """Open a source, or several, and keep the first ``limit`` rows (all of them if None).

    Args:
        source: ``embedded``, ``chitchat``, a local file, a folder or a pattern of such files, which are read in the
            order of their names, or a Hub id ``owner/name`` or ``owner/name:split``; or a list of these.
        limit: At least 1.
        revision: Commit of a Hub data set; None for its newest.
        config: Configuration of a Hub data set; None for its only or default one.
        split: Split of a Hub data set that names none itself.
        row_format: How to read the rows; columns of tables that it leaves unread are not loaded.

    Raises:
        LabError: A source does not exist, cannot be reached or read; has no revisions or configurations; or there is
            no row.

    """
    sources = [source] if isinstance(source, str) else source
    name = ", ".join(sources)
    places: list[tuple[str, Path | None]] = []  # a Hub data set has no path
    for each in sources:
        path = Path(each).expanduser()
        if each in _SAMPLES:
            places.append((each, hub.package_file(*_SAMPLES[each])))
        elif _kind(path) in _KINDS or path.exists() or each.startswith((".", "/", "~")) or _NO_ID.search(each):
            places += [(str(file), file) for file in _files(path)]
        elif _HUB_ID.fullmatch(each):
            places.append((each, None))
        else:
            raise LabError(f"data.source '{each}' is not embedded, chitchat, {_FILE} or a Hub id owner/name")
    for key, value in (("data.revision", revision), ("data.source_config", config)):
        if value is not None and all(path for _, path in places):
            raise LabError(f"{key} is for data sets of the Hub, which {name} is not; leave it out")

    unread = row_format.unread
    parts: list[Part] = []
    fingerprints: list[str] = []
    total, left = 0, limit
    for place, file in places:
        if file is None:
            repository, _, own_split = place.partition(":")
            found = hub.load_dataset(repository, config=config, split=own_split or split, revision=revision)
            fingerprint = found._fingerprint  # depends on the data set's id, configuration and revision
            part = _chosen(place, found.column_names, found.data.table.select, unread)
        else:
            content = _read(file, place)
            fingerprint = hashlib.sha256(content).hexdigest()
            part = _parsed(content, place, _kind(file), unread)
        kept = part.stored[:left]
        parts.append(part._replace(stored=kept))
        fingerprints.append(f"{fingerprint}:{len(kept)}")
        total += len(part.stored)
        left = None if left is None else left - len(kept)
    if not total:
        raise LabError(f"{name} holds no rows; give a data.source with at least one conversation")
    return Rows(parts, name, " ".join(fingerprints), total, row_format)


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def _files(path: Path) -> list[Path]:
    """The files that a path, a folder or a pattern stands for; a folder's may not be of a kind that is not read."""
    if not path.is_dir():
        return sorted(map(Path, [] if path.exists() else glob(str(path), recursive=True))) or [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    found = [entry for entry in entries if entry.is_dir() or not _BESIDE.fullmatch(entry.name)]
    for entry in found or [path]:
        if not entry.is_file() or _kind(entry) not in _KINDS:
            raise LabError(f"{path}: {entry.name} is not {_FILE}; name files by a pattern such as {path / '*.jsonl'}")
    return found


def _read(path: Path, name: str) -> bytes:
    """Read a file whole, as one that is mapped and cut short by someone else would end the process."""
    if not path.exists():
        raise LabError(f"{name}: no such file (data.source)")
    if _kind(path) not in _KINDS or not path.is_file():
        raise LabError(f"{name}: data.source must be {_FILE}, a Hub id owner/name, or embedded")
    try:
        return pa.input_stream(str(path)).read() if path.suffix in _COMPRESSED else path.read_bytes()
    except OSError as error:
        raise LabError(f"{name} cannot be read: {error.strerror or error}") from None


def _chosen(name: str, columns: Sequence[str], read: Callable[[list[str]], pa.Table], unread: Collection[str]) -> Part:
    """A table without the columns that are not read."""
    used = [column for column in columns if column not in unread]
    return Part(name, read(used), unread=[column for column in columns if column in unread])


def _parsed(content: bytes, name: str, kind: str, unread: Collection[str]) -> Part:
    if kind == ".json":
        return Part(name, _json(content, name))
    if kind != ".jsonl":
        return _table(content, name, kind, unread)
    if re.match(rb"(\xef\xbb\xbf)?\s*\[", content):  # one list, whatever the name says
        with suppress(ValueError, RecursionError):
            return Part(name, json.loads(content))
    return Part(name, *_json_lines(content, name))


def _json_lines(content: bytes, name: str) -> tuple[list[bytes], list[int]]:
    """The lines that hold a row, to be parsed when they are asked for, and their numbers."""
    rows: list[bytes] = []
    numbers: list[int] = []
    # Only "\n" ends a line: JSON text may hold U+2028 and its like, at which str.splitlines would cut.
    for number, line in enumerate(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), start=1):
        if _decode(line, name, number).strip():
            numbers.append(number)
            rows.append(line)
    return rows, numbers


def _table(content: bytes, name: str, kind: str, unread: Collection[str]) -> Part:
    file = pa.BufferReader(content)
    try:
        if kind == ".parquet":
            columns = pyarrow.parquet.read_schema(file).names
            return _chosen(name, columns, lambda used: pyarrow.parquet.read_table(file, columns=used), unread)
        table = _arrow(file)
        return _chosen(name, table.column_names, table.select, unread)
    except (pa.ArrowException, OSError) as error:
        what = "Parquet" if kind == ".parquet" else "Arrow"
        raise LabError(f"{name} is not a readable {what} file: {error}") from None


def _arrow(content: pa.BufferReader) -> pa.Table:
    """Read either of Arrow's two formats: `datasets` writes the stream under the name of the other."""
    try:
        return pyarrow.feather.read_table(content)
    except pa.ArrowInvalid:
        content.seek(0)
        return pa.ipc.open_stream(content).read_all()


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
