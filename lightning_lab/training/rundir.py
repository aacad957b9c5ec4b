"""Which run directory a command writes to, and which checkpoint it reads."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from lightning_lab.errors import LabError

RUNS = Path("runs")
BASE = "base"


@dataclass(frozen=True)
class RunPaths:
    """A command's run directory and checkpoint file; no checkpoint for a new run or the untouched base."""

    run_dir: Path
    checkpoint: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.run_dir / "checkpoints"


def resolve_run(command: str, name: str, run_dir: str | None, ckpt_path: str | None) -> RunPaths:
    """Decide where a command reads and writes. Creates nothing.

    `fit` continues in place from ``last``; from any other checkpoint it makes a run of its own.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        name: The run's name: the first config's.
        run_dir: The ``run_dir`` key, or None for ``runs/<name>`` (its newest for anything but a new run).
        ckpt_path: ``best``, ``last``, ``base``, a file, or None.

    Raises:
        LabError: A checkpoint is needed, or the one named does not exist.

    """
    wanted = Path(run_dir) if run_dir else RUNS / name
    # one that is asked for and free is taken, whatever numbers stand beside it
    fresh = wanted if run_dir and not wanted.exists() else unused_directory(wanted)
    if ckpt_path is None:
        if command == "fit":
            return RunPaths(fresh)
        raise LabError(
            f"{command} needs --ckpt_path: best or last (of the newest run of that name, or of --run_dir), a .ckpt "
            "file, or base for the untouched base model"
        )
    if ckpt_path == BASE:
        if command == "fit":
            raise LabError("fit starts from the base anyway: leave --ckpt_path out, or pass last to continue a run")
        return RunPaths(Path(run_dir) if run_dir else newest_run(name) or RUNS / name)
    if ckpt_path in ("best", "last"):
        found = Path(run_dir) if run_dir else newest_run(name)
        if found is None:
            raise LabError(f"there is no run of the name {name} under {RUNS}/; train one with `fit`, or pass --run_dir")
        checkpoint = found / "checkpoints" / f"{ckpt_path}.ckpt"
        if not checkpoint.is_file():
            raise LabError(f"{checkpoint}: no such checkpoint; has the run {found} saved one yet?")
        return RunPaths(fresh if command == "fit" and ckpt_path == "best" else found, checkpoint)
    checkpoint = Path(ckpt_path)
    if not checkpoint.is_file():
        raise LabError(f"{ckpt_path}: no such checkpoint; pass best, last, base or a .ckpt file")
    if command == "fit":
        return RunPaths(fresh, checkpoint)
    if run_dir:
        return RunPaths(Path(run_dir), checkpoint)
    folder = checkpoint.parent if checkpoint.parent.name else checkpoint.resolve().parent
    return RunPaths(folder.parent if folder.name == "checkpoints" else newest_run(name) or RUNS / name, checkpoint)


def unused_directory(wanted: Path) -> Path:
    """``wanted``, or with the number after the highest there is (-2 after none), so that the newest run is the last."""
    numbers = [number for number, _ in _numbered(wanted.parent, wanted.name)]
    return wanted.with_name(f"{wanted.name}-{max(numbers) + 1}") if numbers else wanted


def newest_run(name: str) -> Path | None:
    """The run of that name with the highest suffix under ``runs/``, or None.

    ``a-2`` is the second run of ``a.yaml`` or the first of ``a-2.yaml``; the name in ``environment.json`` tells.
    """
    runs = [
        (number, path)
        for number, path in _numbered(RUNS, name)
        if path.is_dir() and _recorded_name(path) in (None, name)
    ]
    return max(runs)[1] if runs else None


def _recorded_name(run_dir: Path) -> str | None:
    try:
        return json.loads((run_dir / "environment.json").read_text())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """What stands in a folder under that name, with the number of its suffix; 1 without one."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    matches = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"{glob.escape(name)}*"))
    return [(int(match.group(1) or 1), path) for match, path in matches if match]
