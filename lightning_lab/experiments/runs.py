"""Finished, running, crashed and empty run directories, read through their contract alone: the files and their columns.

Nothing of training is imported: a directory that another machine or an older version wrote reads the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lab import files, rundir
from lightning_lab.errors import LabError
from lightning_lab.loss_table import losses
from lightning_lab.rundir import CONFIG, ENVIRONMENT, METRICS

SWEEP_FILE = "sweep.json"  # what makes a directory a sweep's; its runs are in TRIALS
TRIALS = "trials"
REPORT_FILES = ("report.md", "report.html", "losses.png")  # written by `report`; they make no directory a run's
RUN_FILES = (CONFIG, ENVIRONMENT, METRICS)
SEED = "seed_everything"  # runs that differ in nothing else are one setting over seeds
# Where a run writes its results, and with what it names its parts; never what makes one run differ from another.
UNCOMPARED = ("run_dir", "trainer.default_root_dir")
DAMAGED = "the run directory is damaged"
MOST = 2**63  # steps, parameters or rows


class Example(NamedTuple):
    """A held-out conversation.

    Attributes:
        row: In the source.
        loss: Mean negative log-likelihood of its supervised tokens, nats.
        supervised_tokens: Their number.
        weight: By which the loss counts: their number, or under `model.weighted_eval` the sum of their weights.
        base_loss: The untouched base's; None where that is not known.

    """

    row: int
    loss: float
    supervised_tokens: float
    weight: float
    base_loss: float | None = None

    @property
    def loss_minus_base(self) -> float | None:
        """Below 0 where the adapter is better than the base."""
        return None if self.base_loss is None else self.loss - self.base_loss


class Run:
    """A run directory, read in whatever state it is.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        name: Its name, under which reports show it.
        config: The resolved config by dotted key, such as ``model.lr``; empty before ``fit`` has written one.
        environment: ``environment.json``.
        total_steps: Optimizer steps of the whole run, if it got as far as knowing them.
        trainable_parameters: Of the adapters.
        metrics: The rows of ``metrics.csv``.
        evaluations: ``test.json``, ``validation.json``, ``test-base.json`` and so on, by the name before ``.json``;
            those of other data than the run's own are such as ``test@faq``.
        step: The last that is recorded; 0 before the first.
        state: ``empty`` (nothing recorded), ``running``, ``stopped`` (crashed, killed or interrupted) or ``finished``.
        described_state: In words, with how far the run is.
        best: The validation with the lowest loss, the first of equal ones, as `fit` chooses ``best.ckpt``.
        train_loss_window: Steps behind a training loss of the table; None for those since the row before.
        losses: The lab's table.
        seconds: Time in optimizer steps; validations, samples and saving are not in it.
        tokens_per_second: Real tokens of all steps over their time.
        peak_memory_mib: Most memory of any step: reserved on CUDA, resident on a CPU.

    Raises:
        LabError: There is no such directory, it is not a run's, or one of its files is damaged (names the file, and
            the line where there is one).

    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise LabError(f"{path}: no such run directory")
        self.path = path
        self.name = path.name or path.resolve().name
        self.config = files.flatten(files.read_yaml(path / CONFIG)) if (path / CONFIG).exists() else {}
        self.environment = _json(path / ENVIRONMENT)
        for key in ("total_steps", "trainable_parameters"):
            value = self.environment.get(key)
            if not isinstance(value, int | None) or (value or 0) >= MOST:
                raise LabError(f"{path / ENVIRONMENT}: {key} is {value!r}, not a number of them; {DAMAGED}")
        self.total_steps: int | None = self.environment.get("total_steps")
        self.trainable_parameters: int | None = self.environment.get("trainable_parameters")
        self.metrics, damaged = rundir.read_metrics(path / METRICS)
        if damaged:
            row = "is not a row of numbers, or its step comes twice"
            what = "lacks the columns step, train_loss and val_loss" if damaged[0] == 1 else row
            raise LabError(f"{path / METRICS} line {damaged[0]}: {what}; {DAMAGED}")
        names = [f"{split}{base}" for split in ("train", "validation", "test") for base in ("", "-base")]
        found = [file for file in sorted(path.glob("*.json")) if file.stem.partition("@")[0] in names]
        self.evaluations = {file.stem: _evaluation(file) for file in found if file.is_file()}
        recorded = bool(self.config or self.environment or self.metrics or self.evaluations)
        own = {rundir.LOCK, rundir.CHECKPOINTS, "tensorboard", *REPORT_FILES}
        if not recorded and any(entry.name not in own and entry.suffix != ".tmp" for entry in path.iterdir()):
            raise LabError(f"{path}: is not a run directory (it has none of {', '.join(RUN_FILES)})")

        train = [row.values for row in self.metrics if "train_loss" in row.values]
        validation = [row.values for row in self.metrics if "train_loss" not in row.values]
        self.step = int(max((row.values["step"] for row in self.metrics), default=0))
        total, patience = self.total_steps, self.config.get("early_stopping")
        whole = validation if rundir.has_validation(path) else train
        done = total is not None and bool(whole) and whole[-1]["step"] >= total
        early = isinstance(patience, int) and rundir.stopped_early([row["val_loss"] for row in validation], patience)
        progress = f"at step {self.step:,}" + (f" of {total:,}" if total else "")
        self.state, self.described_state = "stopped", f"stopped {progress}"
        if rundir.is_locked(path):
            self.state, self.described_state = "running", f"running {progress}"
        elif not recorded:
            self.state, self.described_state = "empty", "empty: nothing recorded yet"
        elif done or early:
            described = f"finished, {self.step:,} steps" if done else f"finished early {progress}"
            self.state, self.described_state = "finished", described

        finite = [row for row in validation if math.isfinite(row["val_loss"])]
        self.best = min(finite, key=lambda row: row["val_loss"], default=None)
        window = self.config.get("train_loss_window")
        self.train_loss_window = window if isinstance(window, int) and window > 0 else None
        self.losses = losses(self.metrics, self.train_loss_window)
        timed = [row for row in train if row.get("tokens_per_second")]
        self.seconds = sum(row.get("tokens", 0.0) / row["tokens_per_second"] for row in timed)
        tokens = sum(row.get("tokens", 0.0) for row in timed)
        self.tokens_per_second = tokens / self.seconds if self.seconds else None
        self.peak_memory_mib = max((row["peak_memory_mib"] for row in train if "peak_memory_mib" in row), default=None)

    def examples(self, split: str) -> list[Example]:
        """Read ``<split>_examples.csv``.

        Returns:
            The conversations, sorted by row.

        Raises:
            LabError: The split has not been evaluated, or the file is damaged or contradicts ``<split>.json``.

        """
        path = self.path / f"{split}{rundir.EXAMPLES}"
        if not path.is_file():
            raise LabError(f"{path}: not there; make it with `{evaluation_command(self.path, split)}`")
        found = {}
        header, *lines = path.read_text(errors="replace").splitlines() or [""]
        for line, text in enumerate(lines, start=2):
            cells = dict(zip(header.split(","), text.split(","), strict=False))
            try:
                if abs(row := int(cells["row"])) >= MOST:
                    raise ValueError
                base, count = float(cells.get("base_loss") or math.nan), float(cells["supervised_tokens"])
                figures = float(cells["loss"]), count, float(cells.get("weight", count))
                found[row] = Example(row, *figures, base if math.isfinite(base) else None)
            except (KeyError, ValueError):
                raise LabError(f"{path} line {line}: needs row, loss and supervised_tokens; evaluate again") from None
        tokens = sum(example.supervised_tokens for example in found.values())
        weight = sum(example.weight for example in found.values())
        loss = sum(example.loss * example.weight for example in found.values()) / (weight or math.nan)
        recorded = self.evaluations.get(split, {})
        recorded_loss = recorded.get(f"{split.removesuffix('-base')}_loss", math.nan)
        # Both come from the same float64 sums, so that anything beyond rounding is damage, or another evaluation.
        same = math.isfinite(loss) and math.isclose(loss, recorded_loss, rel_tol=1e-6)
        if not same or tokens != recorded.get("supervised_tokens"):
            what = f"has a loss of {loss:.6f} over {tokens:.0f} supervised tokens"
            said = f"{split}.json says {recorded_loss:.6f} over {recorded.get('supervised_tokens')}"
            raise LabError(f"{path}: {what}, {said}; train or evaluate {self.name} again")
        return sorted(found.values())


def evaluation_command(run_dir: Path, name: str) -> str:
    """The command that makes a result of a run, such as ``test-base``."""
    command = "validate" if name.startswith("validation") else "test"
    model = rundir.BASE if name.endswith(f"-{rundir.BASE}") else "best"
    return f"python -m lightning_lab {command} --run_dir {run_dir} --ckpt_path {model}"


def read_sweep(directory: Path) -> list[dict[str, Any]]:
    """Read the trials of a sweep's directory.

    Returns:
        For each: ``number`` (from 0, in the order in which they were planned), ``name``, ``run`` (its directory; one
        that has not begun, or failed early, has none), ``state`` (``waiting``, ``running``, ``complete``, ``pruned`` or
        ``failed``), ``settings`` (by dotted key), ``value`` (its lowest validation loss, once complete) and ``error``.

    Raises:
        LabError: ``sweep.json`` is missing or damaged (names the trial).

    """
    path = directory / SWEEP_FILE
    trials = _json(path).get("trials")
    if not isinstance(trials, list):
        raise LabError(f"{path}: lists no trials; the sweep's directory is damaged")
    kinds = {"name": str, "run": str, "state": str, "settings": dict}
    found = []
    for place, trial in enumerate(trials):
        full = {"settings": {}, "error": None, **(trial if isinstance(trial, dict) else {})}
        if not all(isinstance(full.get(key), kind) for key, kind in kinds.items()):
            raise LabError(f"{path} trial {place}: needs {', '.join(kinds)}; the sweep's directory is damaged")
        found.append({**full, "run": directory / full["run"]})
    return found


def run_directories(path: Path) -> list[Path]:
    """Expand what a report is asked for: a sweep stands for its trials, a folder for the runs and sweeps in it.

    Raises:
        LabError: The path does not exist.

    """
    if not path.is_dir():
        raise LabError(f"{path}: no such run directory")
    if (path / SWEEP_FILE).is_file() or (path / TRIALS).is_dir():
        return sorted(entry for entry in path.glob(f"{TRIALS}/*") if entry.is_dir())
    inner = [entry for entry in sorted(path.iterdir()) if has_begun(entry) or (entry / SWEEP_FILE).exists()]
    if has_begun(path) or not inner:
        return [path]
    return [directory for entry in inner for directory in run_directories(entry)]


def has_begun(path: Path) -> bool:
    """Whether the directory holds a run's files."""
    return any((path / name).exists() for name in RUN_FILES)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The config keys in which the runs that have a config differ, in the config's order."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config if key not in UNCOMPARED)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs[1:])]


def _json(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if path.is_file() and not content:
        raise LabError(f"{path}: is not a JSON object; {DAMAGED}")
    return content


def _evaluation(path: Path) -> dict[str, Any]:
    content = _json(path)
    split = path.stem.partition("@")[0].removesuffix("-base")
    keys = [f"{split}_{kind}" for kind in ("loss", "perplexity", "token_accuracy")]
    try:
        return content | {key: float(content[key]) for key in keys}
    except (KeyError, TypeError, ValueError, OverflowError):  # OverflowError: an integer of 400 digits
        raise LabError(f"{path}: lacks one of {', '.join(keys)}, or it is no number; evaluate again") from None
