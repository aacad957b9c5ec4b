"""Finished, running, crashed and empty run directories, read through their contract alone: the files and their columns.

Nothing of training is imported: a directory that another machine or an older version wrote reads the same.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from lightning_lab.errors import LabError

State = Literal["empty", "running", "stopped", "finished"]
TrialState = Literal["waiting", "running", "complete", "pruned", "failed"]
SWEEP_FILE = "sweep.json"  # what makes a directory a sweep's; its runs are in TRIALS
TRIALS = "trials"
LOCK_FILE = ".lock"  # `fit` holds an flock on it for as long as it lives
REPORT_FILES = ("report.md", "report.html", "losses.png")  # written by `report`; they make no directory a run's
RUN_FILES = ("config.yaml", "environment.json", "metrics.csv")
SEED = "seed_everything"  # runs that differ in nothing else are one setting over seeds
# Where a run writes its results, and with what it names its parts; never what makes one run differ from another.
UNCOMPARED = ("run_dir", "trainer.default_root_dir")


@dataclass(frozen=True)
class Examples:
    """Each held-out conversation of one split, in split order.

    Attributes:
        rows: ``[C]`` int64, the conversation's row in the source.
        loss: ``[C]`` float64, mean negative log-likelihood of its supervised tokens, nats.
        tokens: ``[C]`` int64, how many those are.

    """

    rows: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Run:
    """What a run directory says.

    Attributes:
        path: The directory.
        name: Its name, under which reports show it.
        config: The resolved config by dotted key, such as ``model.lr``; empty before ``fit`` has written one.
        environment: ``environment.json``.
        train: Rows of ``metrics.csv`` with a training loss, by column; one an optimizer step.
        validation: Its rows with a validation loss.
        evaluations: ``test.json``, ``validation.json``, ``test-base.json`` and so on, by the name before ``.json``.
        state: ``empty`` (nothing recorded), ``running``, ``stopped`` (crashed, killed or interrupted) or ``finished``.

    """

    path: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    train: Sequence[Mapping[str, float]]
    validation: Sequence[Mapping[str, float]]
    evaluations: Mapping[str, Mapping[str, Any]]
    state: State

    @property
    def step(self) -> int:
        """The last optimizer step that is recorded; 0 before the first."""
        return int(max([row["step"] for row in (*self.train[-1:], *self.validation[-1:])], default=0))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, if it got as far as knowing them."""
        return self.environment.get("total_steps")

    @property
    def best(self) -> Mapping[str, float] | None:
        """The validation with the lowest loss, the first of equal ones, as `fit` chooses ``best.ckpt``."""
        finite = [row for row in self.validation if math.isfinite(row["val_loss"])]
        return min(finite, key=lambda row: row["val_loss"], default=None)

    @property
    def seconds(self) -> float:
        """Time in optimizer steps; validations, samples and saving are not in it."""
        return sum(row["tokens"] / row["tokens_per_second"] for row in self.train if row.get("tokens_per_second"))

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens of all steps over their time."""
        return sum(row["tokens"] for row in self.train) / self.seconds if self.seconds else None

    @property
    def peak_memory_mib(self) -> float | None:
        """Most memory of any step: reserved on CUDA, resident on a CPU."""
        return max((row["peak_memory_mib"] for row in self.train if "peak_memory_mib" in row), default=None)

    @property
    def trainable_parameters(self) -> int | None:
        """Parameters of the adapters."""
        return self.environment.get("trainable_parameters")

    @property
    def losses(self) -> list[tuple[int, float | None, float]]:
        """The lab's table: step, training loss (mean over the steps since the row before), validation loss."""
        rows = []
        before = 0.0
        for validation in self.validation:
            since = [row["train_loss"] for row in self.train if before < row["step"] <= validation["step"]]
            mean = sum(since) / len(since) if since else None
            rows.append((int(validation["step"]), mean, validation["val_loss"]))
            before = validation["step"]
        return rows

    @cached_property
    def described_state(self) -> str:
        """The state in words, with how far the run is."""
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        if self.state == "empty":
            return "empty: nothing recorded yet"
        if self.state == "finished":
            early = self.total_steps and self.step < self.total_steps
            return f"finished early at step {self.step:,}{of}" if early else f"finished, {self.step:,} steps"
        return f"{self.state} at step {self.step:,}{of}"

    def examples(self, split: str) -> Examples:
        """Read ``<split>_examples.csv``.

        Raises:
            LabError: The split has not been evaluated, or the file is damaged.

        """
        path = self.path / f"{split}_examples.csv"
        if not path.is_file():
            command = "validate" if split.startswith("validation") else "test"
            ckpt = "base" if split.endswith("-base") else "best"
            raise LabError(
                f"{path}: not there; make it with `python -m lightning_lab {command} --run_dir {self.path} "
                f"--ckpt_path {ckpt}`"
            )
        rows, losses, tokens = [], [], []
        for line, row in enumerate(csv.DictReader(_lines(path)), start=2):
            try:
                rows.append(int(row["row"]))
                losses.append(float(row["loss"]))
                tokens.append(int(row["supervised_tokens"]))
            except (KeyError, TypeError, ValueError):
                raise LabError(f"{path} line {line}: needs row, loss and supervised_tokens; evaluate again") from None
        if not rows:
            raise LabError(f"{path}: holds no conversation; evaluate again")
        return Examples(np.array(rows), np.array(losses), np.array(tokens))


def read_run(path: Path) -> Run:
    """Read a run directory in whatever state it is.

    Raises:
        LabError: There is no such directory, it is not a run's, or one of its files is damaged (names file and line).

    """
    if not path.is_dir():
        raise LabError(f"{path}: no such run directory")
    config = _config(path / "config.yaml")
    environment = _json(path / "environment.json")
    total = environment.get("total_steps")
    if not isinstance(total, int | None):
        raise LabError(f"{path / 'environment.json'}: total_steps is {total!r}; the run directory is damaged")
    train, validation = _metrics(path / "metrics.csv")
    evaluations = {
        file.stem: _evaluation(file)
        for split in ("train", "validation", "test")
        for file in (path / f"{split}.json", path / f"{split}-base.json")
        if file.is_file()
    }
    if not (config or environment or train or validation or evaluations):
        if any(entry.name not in (LOCK_FILE, "checkpoints", "tensorboard", *REPORT_FILES) for entry in path.iterdir()):
            raise LabError(f"{path}: is not a run directory (it has none of {', '.join(RUN_FILES)})")
        state: State = "running" if is_locked(path / LOCK_FILE) else "empty"
    elif is_locked(path / LOCK_FILE):
        state = "running"
    else:
        done = bool(validation) and total is not None and validation[-1]["step"] >= total
        state = "finished" if done or _stopped_early(validation, config.get("early_stopping")) else "stopped"
    name = path.name or path.resolve().name
    return Run(path, name, config, environment, train, validation, evaluations, state)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, as ``sweep.json`` has it.

    Attributes:
        number: From 0, in the order in which they were planned.
        name: The run's name.
        run: Its directory; one that has not begun, or failed early, has none.
        state: What the sweep made of it.
        settings: What it sets, by dotted config key.
        value: Its lowest validation loss, once complete.
        error: Why it failed.

    """

    number: int
    name: str
    run: Path
    state: TrialState
    settings: Mapping[str, Any]
    value: float | None
    error: str | None


def read_sweep(directory: Path) -> list[Trial]:
    """Read the trials of a sweep's directory.

    Raises:
        LabError: ``sweep.json`` is missing or damaged (names the trial).

    """
    path = directory / SWEEP_FILE
    trials = _json(path).get("trials")
    if not isinstance(trials, list):
        raise LabError(f"{path}: lists no trials; the sweep's directory is damaged")
    found = []
    for position, trial in enumerate(trials):
        try:
            state = trial["state"]
            if state not in get_args(TrialState):
                raise ValueError
            run = directory / trial["run"]
            rest = trial.get("settings") or {}, trial.get("value"), trial.get("error")
            found.append(Trial(int(trial["number"]), str(trial["name"]), run, state, *rest))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise LabError(
                f"{path} trial {position}: needs number, name, run and a state of {', '.join(get_args(TrialState))}; "
                "the sweep's directory is damaged"
            ) from None
    return found


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """Expand what a report is asked for: a sweep stands for its trials, a folder for the runs and sweeps in it.

    Raises:
        LabError: A path does not exist, or holds neither a run nor runs.

    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise LabError(f"{path}: no such run directory")
        trials = path / TRIALS
        if (path / SWEEP_FILE).is_file() or trials.is_dir():
            found += sorted(entry for entry in trials.glob("*") if entry.is_dir())
        elif any((path / name).exists() for name in RUN_FILES):
            found.append(path)
        else:
            inner = [e for e in sorted(path.iterdir()) if any((e / name).exists() for name in (*RUN_FILES, SWEEP_FILE))]
            found += run_directories(inner) if inner else [path]
    return list(dict.fromkeys(found))


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The config keys in which the runs that have a config differ, in the config's order."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key not in UNCOMPARED and any(config.get(key) != configs[0].get(key) for config in configs[1:])
    ]


def is_locked(path: Path) -> bool:
    """Whether a living process holds an exclusive flock on the file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also beside another process that writes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise LabError(f"{path}: is not a config; the run directory is damaged")
    return flatten(content)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise LabError(f"{path}: is not a JSON object; the run directory is damaged")
    return content


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines(keepends=True)
    except UnicodeDecodeError:
        raise LabError(f"{path}: is not text; the run directory is damaged") from None


def _evaluation(path: Path) -> dict[str, Any]:
    content = _json(path)
    split = path.stem.removesuffix("-base")
    numbers = (f"{split}_loss", f"{split}_perplexity", f"{split}_token_accuracy")
    if not all(isinstance(content.get(key), int | float) for key in numbers):
        raise LabError(f"{path}: lacks one of {', '.join(numbers)}; evaluate again")
    return content


def _metrics(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Rows with a training loss and rows with a validation loss, less a last line that is still being written."""
    if not path.is_file():
        return [], []
    lines = _lines(path)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    train: list[dict[str, float]] = []
    validation: list[dict[str, float]] = []
    reader = csv.reader(lines)
    header = next(reader, ["step", "train_loss", "val_loss"])
    if not {"step", "train_loss", "val_loss"} <= set(header):
        raise LabError(f"{path} line 1: lacks the columns step, train_loss and val_loss; the run directory is damaged")
    for number, cells in enumerate(reader, start=2):
        try:
            row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell}
        except ValueError:
            raise LabError(f"{path} line {number}: is not a row of numbers; the run directory is damaged") from None
        rows = train if "train_loss" in row else validation
        if "step" not in row or not ("train_loss" in row or "val_loss" in row):
            raise LabError(f"{path} line {number}: has no step or no loss; the run directory is damaged")
        if rows and row["step"] <= rows[-1]["step"]:
            raise LabError(f"{path} line {number}: step {row['step']:.0f} comes twice; the run directory is damaged")
        rows.append(row)
    return train, validation


def _stopped_early(validation: Sequence[Mapping[str, float]], patience: int | None) -> bool:
    """Whether the last ``patience`` validations brought no lower loss."""
    if not patience or not validation:
        return False
    losses = [row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf for row in validation]
    return len(losses) - 1 - losses.index(min(losses)) >= patience
