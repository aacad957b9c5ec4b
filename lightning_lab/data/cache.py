"""Arrow files in the cache: made whole or not at all, read only if nothing in them has changed, their making shown."""

import gc
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

_OBJECTS_A_SEARCH = 100_000  # a search at each 700, the default, takes a third of the time
_SUM_BYTES = hashlib.sha256().digest_size  # the file ends with the sum of what is before
_ABANDONED_S = 24 * 60 * 60  # no preparation takes so long


@contextmanager
def making(what: str, shown: bool) -> Iterator[Progress]:
    """Say on stderr what is being done, and give bars, which only a terminal has; neither unless ``shown``."""
    if shown:
        print(what, file=sys.stderr)
    with Progress(console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bars:
        yield bars


def read_cached(path: Path) -> pa.Table | None:
    """Read a file whole; None where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[:-_SUM_BYTES]).digest() == content[-_SUM_BYTES:]:
        return pa.ipc.open_stream(content).read_all()
    print(f"warning: {path} is damaged; making it anew", file=sys.stderr)
    return None


def write_cached(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Table:
    """Make a file beside its place, add the sum, and put it there whole; any number of processes may do so at once.

    Raises:
        OSError: It cannot be written.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in path.parent.glob(".*"):  # of a process that was killed
        with suppress(FileNotFoundError):  # it has just ended well
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(unfinished, ignore_errors=True)  # it may be somebody else's
    thresholds = gc.get_threshold()
    # The search for reference cycles goes by the number of new objects, here texts and ids that are soon gone.
    gc.set_threshold(_OBJECTS_A_SEARCH, *thresholds[1:])
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            made = Path(folder) / path.name
            with pa.ipc.new_stream(str(made), schema) as writer:
                for table in tables:
                    writer.write_table(table)
            content = made.read_bytes()
            with made.open("ab") as file:
                file.write(hashlib.sha256(content).digest())
            os.replace(made, path)
    finally:
        gc.set_threshold(*thresholds)
    return pa.ipc.open_stream(content).read_all()
