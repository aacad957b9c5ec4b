"""A data source named in the config -> rows, in a fixed order, each with a place to name in errors."""

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lab import hub
from lightning_lab.data.conversation import Prompt, RowError, UnreadableRow, parse_prompt
from lightning_lab.errors import LabError

_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Rows:
    """Rows of one source.

    Attributes:
        rows: Mappings, or `UnreadableRow` where a row could not be read. JSON Lines and Hub data sets stay on disk
            and are read row by row; Parquet is held as an Arrow table, a JSON list as Python objects.
        name: What to call the source in messages.
        fingerprint: Changes whenever the rows do.
        total: Rows that the source has, those beyond the limit too.
        lines: For JSON Lines, each row's line number counted from 1.

    """

    rows: Sequence[Any]
    name: str
    fingerprint: str
    total: int
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

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
    if source not in ("embedded", "chitchat") and not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        rows = _hub(source, limit, revision)
    elif revision is not None:
        raise LabError(f"data.revision is for data sets of the Hub, which {source} is not; leave it out")
    elif source == "embedded":
        faq = hub.package_file("zaragoza_construction_faq", "data/faq-en-sharegpt.jsonl", "1.2.1")
        rows = _json_lines(faq, source, limit)
    elif source == "chitchat":
        rows = _chitchat(_read(hub.package_file("chitchat_dataset", "dataset.json", "0.9.0"), source), limit)
    elif is_file:
        rows = _local_file(path, source, limit)
    else:
        raise LabError(
            f"data.source '{source}' is not embedded, chitchat, a {', '.join(_SUFFIXES)} file or a Hub id owner/name"
        )
    if not len(rows):
        raise LabError(f"{source} holds no rows; give a data.source with at least one conversation")
    return rows


def load_prompts(source: str) -> list[Prompt]:
    """Read every row of a source as something to answer.

    Raises:
        LabError: As `load_rows`; or a row is malformed.

    """
    rows = load_rows(source)
    prompts = []
    for index in range(len(rows)):
        try:
            prompts.append(Prompt(index, *parse_prompt(rows.rows[index])))
        except RowError as error:
            raise LabError(f"{rows.where(index)}: {error}") from None
    return prompts


class _LazyRows(Sequence[Any]):
    """Rows made when they are asked for, so that a large file is held once, in its compact form."""

    def __init__(self, length: int, row: Callable[[int], Any]) -> None:
        self._length, self._row = length, row

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._row(index % self._length)


def _local_file(path: Path, name: str, limit: int | None) -> Rows:
    if not path.exists():
        raise LabError(f"{name}: no such file (data.source)")
    if path.suffix not in _SUFFIXES or not path.is_file():
        raise LabError(f"{name}: data.source must be a {', '.join(_SUFFIXES)} file, an id owner/name, or embedded")
    if path.suffix == ".parquet":
        return _parquet(path, name, limit)
    if path.suffix == ".jsonl":
        return _json_lines(path, name, limit)
    content = _read(path, name)
    try:
        rows = json.loads(_decode(content.removeprefix(codecs.BOM_UTF8), name, 1))
    except (ValueError, RecursionError) as error:
        raise LabError(f"{name} is not JSON: {error}; name it .jsonl if it holds one object a line") from None
    if not isinstance(rows, list):
        raise LabError(f"{name} must hold a list of rows; name it .jsonl if it holds one object a line")
    return _python_rows(rows, name, content, limit)


def _python_rows(rows: list[Any], name: str, content: bytes, limit: int | None) -> Rows:
    kept = rows[:limit]
    return Rows(kept, name, f"{hashlib.sha256(content).hexdigest()}:{len(kept)}", len(rows))


def _json_lines(path: Path, name: str, limit: int | None) -> Rows:
    """Note where each row stands in the file; the rows themselves are read when they are asked for."""
    starts, ends, numbers = array("q"), array("q"), array("q")
    digest = hashlib.sha256()
    position = 0
    try:
        with path.open("rb") as file:
            # Only "\n" ends a line: JSON text may hold U+2028 and its like, at which str.splitlines would cut.
            for number, line in enumerate(file, start=1):
                digest.update(line)
                mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                if _decode(line[mark:], name, number).strip():
                    starts.append(position + mark)
                    ends.append(position + len(line) - line.endswith(b"\n"))
                    numbers.append(number)
                position += len(line)
    except OSError as error:
        raise LabError(f"{name} cannot be read: {error.strerror}") from None

    def row(index: int) -> Any:
        try:
            # Not mapped: a file that is cut short meanwhile would end the process.
            with path.open("rb", buffering=0) as file:
                file.seek(starts[index])
                return json.loads(file.read(ends[index] - starts[index]).decode())
        except OSError as error:
            raise LabError(f"{name} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            return UnreadableRow(f"the line is not JSON ({error})")

    kept = min(len(starts), limit or len(starts))
    return Rows(_LazyRows(kept, row), name, f"{digest.hexdigest()}:{kept}", len(starts), numbers)


def _parquet(path: Path, name: str, limit: int | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise LabError(f"{name} is not a readable Parquet file: {error}") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept = min(len(table), limit or len(table))
    rows = _LazyRows(kept, lambda index: table.slice(index, 1).to_pylist()[0])
    return Rows(rows, name, f"{digest}:{kept}", len(table))


def _chitchat(content: bytes, limit: int | None) -> Rows:
    """Make user and assistant turns of the Chit Chat Challenge: whoever writes first is the user."""
    rows = []
    for conversation in json.loads(content).values():
        # Blank messages carry nothing; one conversation has two sides only by a blank first message.
        written = [m for burst in conversation["messages"] for m in burst if m["text"].strip()]
        if len({message["sender"] for message in written}) != 2:
            continue
        turns: list[dict[str, str]] = []
        before = None
        for message in written:
            if message["sender"] == before:
                turns[-1]["content"] += "\n" + message["text"]
            else:
                role = "user" if message["sender"] == written[0]["sender"] else "assistant"
                turns.append({"role": role, "content": message["text"]})
            before = message["sender"]
        rows.append({"messages": turns})
    return _python_rows(rows, "chitchat", content, limit)


def _hub(name: str, limit: int | None, revision: str | None) -> Rows:
    dataset = hub.load_dataset(name, revision=revision)
    kept = min(len(dataset), limit or len(dataset))
    # The data set's own fingerprint depends on its id, configuration and revision.
    return Rows(dataset.select(range(kept)), name, f"{dataset._fingerprint}:{kept}", len(dataset))


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabError(f"{name} cannot be read: {error.strerror}") from None


def _decode(content: bytes, name: str, first_line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + first_line
        raise LabError(f"{name} line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None
