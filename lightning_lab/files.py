"""Files: written whole or not at all, read within bounds, checked against their sums, set aside when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lightning_lab.errors import LabError

SUMS = "SHA256SUMS"  # beside the files of a folder, as `sha256sum --check` reads it
LONGEST_NAME = 120  # bytes of a name from a user's text: a file system takes 255, and endings add to it
LARGEST_YAML = 100_000  # nodes, with all aliases written out; a config has about 100


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where the system refuses to write it.

    Raises:
        LabError: In place of an OSError.

    """
    try:
        yield
    except OSError as error:
        raise LabError(f"{path}: cannot be written ({error.strerror or error})") from error


def make_directory(path: Path) -> None:
    """Make a directory with its parents.

    Raises:
        LabError: It cannot be made.

    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file whole or not at all, on the disk when this returns, also beside another process that writes it.

    Raises:
        LabError: The disk is full, or the file cannot be written.

    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Put a folder's entries on the disk, so that a renamed file survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path, why: str) -> None:
    """Keep a damaged record under another name, and say so: a record never stops a run."""
    taken = [p.name for p in path.parent.glob(f"{path.name}.damaged*")]
    kept = path.with_name(f"{path.name}.damaged" + (f"-{len(taken) + 1}" if taken else ""))
    with writing(kept):
        path.rename(kept)
    print(f"warning: {path}: {why}; kept as {kept.name} and begun anew", file=sys.stderr)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of bounded size: aliases of aliases would grow without end.

    Raises:
        LabError: Names the file, and the line where there is one.

    """
    try:
        loader = yaml.SafeLoader(path.read_bytes().decode())
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > LARGEST_YAML:
            raise LabError(f"{path}: has more than {LARGEST_YAML:,} values with its aliases written out; shorten it")
        content = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise LabError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise LabError(f"{path}: is not UTF-8 text") from None
    except RecursionError:
        raise LabError(f"{path}: is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise LabError(f"{path}{line}: is not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise LabError(f"{path}: holds no settings; a config is `key: value` lines such as those of --print_config")
    return content


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below and with this one, each alias written out; a key that is given twice is an error."""
    if id(node) not in known:
        known[id(node)] = LARGEST_YAML + 1  # an alias of itself has no end
        inner = node.value if isinstance(node.value, list) else []
        keys: set[str] = set()
        for key in (entry[0] for entry in inner if isinstance(entry, tuple)):
            if (name := f"{key.tag} {key.value}") in keys:
                twice = f"the key {key.value} is given twice; keep one"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            keys.add(name)
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def cut(name: str, longest: int = LONGEST_NAME) -> str:
    """As many of a name's first characters as ``longest`` bytes of UTF-8 hold."""
    return name.encode(errors="replace")[:longest].decode(errors="ignore")


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of each file of a folder beside them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    write_whole(folder / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in files))


def check_sums(folder: Path) -> None:
    """Compare a folder's files with their sums, where there are any.

    Raises:
        LabError: Names the first file that is missing or damaged.

    """
    if not (folder / SUMS).is_file():
        return
    *lines, end = (folder / SUMS).read_bytes().decode(errors="replace").split("\n")
    for line in lines or [end]:
        digest, _, name = line.partition("  ")
        path = folder / name
        if end or not path.is_file() or sha256(path) != digest:
            raise LabError(f"{path}: is damaged or missing ({SUMS} of {folder} says otherwise)")


def sha256(path: Path) -> str:
    """Hash a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
