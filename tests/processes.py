"""Which processes a test has started, theirs included."""

import os
from pathlib import Path


def processes_in(folder: Path) -> set[int]:
    """All processes that work in a directory."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd") == str(folder) and (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found
