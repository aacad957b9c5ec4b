"""The run directory: which one a command takes, its lock, ``metrics.csv``, and names that several parts share.

Nothing of torch is imported: reports read runs of other machines and versions by this contract alone.
"""

from __future__ import annotations

import fcntl
import glob
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from lightning_lab.errors import LabError
from lightning_lab.files import flatten, read_json, set_aside, write_whole, writing

RUNS = Path("runs")
BASE = "base"
CONFIG, ENVIRONMENT, METRICS, LOSSES = "config.yaml", "environment.json", "metrics.csv", "losses.md"
SAMPLES, CURVE, CHECKPOINTS, LOCK = "samples.md", "loss_curve.png", "checkpoints", ".lock"
ROWS = "rows.parquet"  # among the checkpoints: what the run trained on and held out
EXAMPLES, TOKENS = "_examples.csv", "_tokens.parquet"  # behind a result's name
LEAKED = ("copies", "near_duplicates")  # what a result says of conversations that are training rows or nearly so
WEIGHTED = "weighted_eval"  # a setting that losses depend on, in `ENVIRONMENT` and in results
TRAIN_COLUMNS = (
    "epoch",
    "train_loss",
    "grad_norm",
    "lr",
    "tokens",
    "supervised_tokens",
    "padded_tokens",
    "tokens_per_second",
    "peak_memory_mib",
)
VALIDATION_COLUMNS = ("val_loss", "val_loss_hf", "val_token_accuracy", "val_perplexity")
COLUMNS = ("step", *TRAIN_COLUMNS, *VALIDATION_COLUMNS)

# --- which directory, which checkpoint ------------------------------------------------------------------------------


class RunPaths(NamedTuple):
    """A command's run directory and checkpoint file; no checkpoint for a new run or the untouched base."""

    run_dir: Path
    checkpoint: Path | None = None


def resolve_run(command: str, name: str, run_dir: str | None, ckpt_path: str | None) -> RunPaths:
    """Decide where a command reads and writes. Creates nothing.

    `fit` continues in place from ``last``; from any other checkpoint it makes a run of its own.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        name: The run's name: the first config's.
        run_dir: The ``run_dir`` key, or None for ``runs/<name>`` (its newest for anything but a new run).
        ckpt_path: ``best``, ``last``, ``base``, a file, or None.

    Raises:
        LabError: A checkpoint is needed, the one named does not exist, or the directory is a file.

    """
    asked = Path(run_dir).expanduser() if run_dir else None
    if asked and asked.exists() and not asked.is_dir():
        raise LabError(f"run_dir: {asked} is a file; name a directory, or one that does not exist yet")
    checkpoint = _checkpoint(command, name, asked, ckpt_path)
    if command == "fit" and ckpt_path != "last":
        wanted = asked or RUNS / name
        # one that is asked for and free is taken, whatever numbers stand beside it
        return RunPaths(wanted if asked and not asked.exists() else unused_directory(wanted), checkpoint)
    if asked:
        return RunPaths(asked, checkpoint)
    folder = checkpoint.absolute().parent if checkpoint else None
    if checkpoint and folder and folder.name == CHECKPOINTS:
        return RunPaths(checkpoint.parent.parent if checkpoint.parent.name else folder.parent, checkpoint)
    return RunPaths(newest_run(name) or RUNS / name, checkpoint)


def _checkpoint(command: str, name: str, asked: Path | None, ckpt_path: str | None) -> Path | None:
    """The file that ``ckpt_path`` stands for; None for a new run and for the untouched base."""
    if ckpt_path is None and command != "fit":
        raise LabError(
            f"{command} needs --ckpt_path: best or last (of the newest run of that name, or of --run_dir), a .ckpt "
            "file, or base for the untouched base model"
        )
    if ckpt_path == BASE and command == "fit":
        raise LabError("fit starts from the base anyway: leave --ckpt_path out, or pass last to continue a run")
    if ckpt_path in (None, BASE):
        return None
    if ckpt_path in ("best", "last"):
        file = f"{ckpt_path}.ckpt"
        run = asked or newest_run(name, file)
        latest = asked or newest_run(name, "last.ckpt")
        if ckpt_path == "best" and latest and not has_validation(latest):
            raise LabError(f"{latest} has no best.ckpt, as it has no validation split; pass last or a .ckpt file")
        if run is None:
            raise LabError(
                f"there is no run of the name {name} with a {file} under {RUNS}/; train one with `fit`, or pass "
                "--run_dir"
            )
        checkpoint = run / CHECKPOINTS / file
        if not checkpoint.is_file():
            raise LabError(f"{checkpoint}: no such checkpoint; has the run {run} saved one yet?")
        return checkpoint
    checkpoint = Path(str(ckpt_path)).expanduser()
    if ckpt_path and checkpoint.is_dir():
        beside = checkpoint.resolve().with_suffix(".ckpt")  # best/ and best.ckpt hold the same adapter
        if not beside.is_file():
            raise LabError(f"{ckpt_path}: is a folder; name a .ckpt file, or begin from an adapter with model.adapter")
        return beside
    if not checkpoint.is_file():
        raise LabError(f"{ckpt_path}: no such checkpoint; pass best, last, base or a .ckpt file")
    return checkpoint


def has_validation(run_dir: Path) -> bool:
    """Whether a run validates: not where its data has no validation split."""
    return flatten(read_json(run_dir / ENVIRONMENT)).get("data.splits.validation.conversations") != 0


def unused_directory(wanted: Path) -> Path:
    """``wanted``, or with the number after the highest there is (-2 after none), so that the newest run is the last."""
    numbers = [number for number, _ in _numbered(wanted.parent, wanted.name)]
    return wanted.with_name(f"{wanted.name}-{max(numbers) + 1}") if numbers else wanted


def newest_run(name: str, checkpoint: str | None = None) -> Path | None:
    """The run of that name with the highest suffix under ``runs/``, or None.

    ``a-2`` is the second run of ``a.yaml`` or the first of ``a-2.yaml``; the name in ``environment.json`` tells.

    Args:
        name: The run's name.
        checkpoint: Only runs that have this file among their checkpoints: a `fit` that failed early has none.

    """
    runs = [
        (number, path)
        for number, path in _numbered(RUNS, name)
        if path.is_dir()
        and [entry.name for entry in path.iterdir()] != ["tensorboard"]  # which a fit that failed leaves
        and read_json(path / ENVIRONMENT).get("name", name) == name
        and (checkpoint is None or (path / CHECKPOINTS / checkpoint).is_file())
    ]
    return max(runs)[1] if runs else None


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """What stands in a folder under that name, with the number of its suffix; 1 without one."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    matches = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"{glob.escape(name)}*"))
    return [(int(match.group(1) or 1), path) for match, path in matches if match]


# --- one process a run ----------------------------------------------------------------------------------------------


def lock_run(run_dir: Path) -> IO[str]:
    """Hold a run for as long as the returned file is open and this process lives, which tells reports that it runs.

    Raises:
        LabError: Another process holds it.

    """
    with writing(run_dir / LOCK):
        file = (run_dir / LOCK).open("w")
    for _ in range(20):  # a report that looks whether the run is held has the lock itself for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks: the run is not guarded, and reports call it stopped
            break
    else:
        file.close()
        raise LabError(f"{run_dir}: another process is training this run; wait for it, or stop it first")
    os.register_at_fork(after_in_child=file.close)  # in a data loader's worker the lock would outlive the run itself
    return file


def is_locked(run_dir: Path) -> bool:
    """Whether a living process trains the run."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        pass
    return False


# --- metrics.csv ----------------------------------------------------------------------------------------------------


class MetricsRow(NamedTuple):
    """One row of ``metrics.csv``: as it is written, and its numbers by column, less empty cells."""

    line: str
    values: dict[str, float]


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row at once; columns that it lacks stay empty."""
    with writing(path), path.open("a", newline="") as file:
        header = "" if file.tell() else ",".join(COLUMNS) + "\n"
        file.write(header + ",".join("" if row.get(c) is None else repr(row[c]) for c in COLUMNS) + "\n")


def read_metrics(path: Path) -> tuple[list[MetricsRow], list[int]]:
    """Whole rows in order, and the numbers of the lines (from 1) that are damaged.

    A last line without an end is neither: it is being written, or a kill cut it short.
    """
    if not path.is_file():
        return [], []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    header = lines[0].strip().split(",") if lines else []
    known = {"step", "train_loss", "val_loss"} <= set(header)
    rows, damaged = [], [] if known or "\n" not in "".join(lines[:1]) else [1]
    last = {"train_loss": 0.0, "val_loss": 0.0}
    for number, line in enumerate(lines[1:], start=2):
        if not line.endswith("\n"):
            continue
        try:
            cells = zip(header, line.strip().split(","), strict=True)
            values = {name: float(cell) for name, cell in cells if cell}
            kind = "train_loss" if "train_loss" in values else "val_loss"
            if kind not in values or values["step"] <= last[kind] or not values["step"].is_integer():
                raise ValueError
        except (ValueError, KeyError):
            damaged.append(number)
            continue
        last[kind] = values["step"]
        rows.append(MetricsRow(line, values))
    return rows, damaged


def keep_metrics(path: Path, step: int, *, validated: bool) -> None:
    """Drop the rows after ``step``, and its validation row unless it was validated; set a damaged file aside first."""
    if not path.is_file():
        return
    rows, damaged = read_metrics(path)
    if damaged:
        set_aside(path, f"line {damaged[0]} is damaged")
    kept = [r.line for r in rows if r.values["step"] < step + ("train_loss" in r.values or validated)]
    write_whole(path, ",".join(COLUMNS) + "\n" + "".join(kept))


def is_weighted(result: Mapping[str, Any]) -> bool:
    """Whether the loss of a ``<split>.json`` is weighted; those of earlier versions, which do not say so, are not."""
    return bool(flatten(result).get(f"settings.{WEIGHTED}"))


def base_loss(run_dir: Path) -> float | None:
    """The untouched base's validation loss, where it has been measured, weighted or not as the run's own are."""
    result, weighted = read_json(run_dir / f"validation-{BASE}.json"), read_json(run_dir / ENVIRONMENT).get(WEIGHTED)
    loss = result.get("validation_loss")
    return loss if isinstance(loss, float) and is_weighted(result) == bool(weighted) else None


def stopped_early(validation_losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last ``patience`` validations brought no lower loss."""
    if not patience or not validation_losses:
        return False
    losses = [loss if math.isfinite(loss) else math.inf for loss in validation_losses]
    return len(losses) - 1 - losses.index(min(losses)) >= patience
