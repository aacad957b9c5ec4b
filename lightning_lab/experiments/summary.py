"""What follows from runs: their order, what makes it doubtful, comparisons, means over seeds."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning_lab.errors import LabError
from lightning_lab.experiments.compare import compare
from lightning_lab.experiments.diary import Diary
from lightning_lab.experiments.reference import published
from lightning_lab.experiments.runs import SEED, SWEEP_FILE, Run, differing_settings, read_sweep, run_directories
from lightning_lab.files import flatten
from lightning_lab.rundir import LEAKED, WEIGHTED

T = TypeVar("T")
VALIDATED_ON = ("data.fingerprint", "data.split_seed", "data.splits.validation")  # in environment.json


class Summary:
    """Runs and what follows from them; losses are nats per supervised token, times seconds.

    Args:
        paths: Run directories, sweeps, or folders of both; their runs may be in any state.
        split: On which runs are compared.
        reference: Whether the lab's published losses stand beside.

    Attributes:
        runs: Lowest validation loss first, those without one last, each with a name of its own.
        damaged: One line for each path that could not be read.
        trials: Of the sweeps among the paths.
        title: Of the report.
        settings: Config keys in which the runs differ.
        notes: What a reader of the ranking must know.
        seeds: `over_seeds`.
        split: On which runs are compared.
        comparisons: Each other run against the first.
        not_compared: Why those that are not compared cannot be.
        diary: The conversations that say most of the best run.
        reference: The lab's numbers, where they are asked for: see `reference.published`.

    Raises:
        LabError: Nothing at all could be read.

    """

    def __init__(self, paths: Sequence[Path], split: str = "test", *, reference: bool = False) -> None:
        self.runs, self.damaged, self.trials = find(paths)
        title = self.runs[0].name if len(self.runs) == 1 else f"{len(self.runs)} runs"
        if len(self.runs) != 1 and len(paths) == 1:
            title = f"{paths[0].resolve().name}, {title}"
        self.title = f"Report: {title}"
        self.settings = differing_settings(self.runs)
        self.notes = _notes(self.runs)
        self.seeds = over_seeds(self.runs, [key for key in self.settings if key != SEED])
        self.split = split
        self.comparisons, self.not_compared = compare([run for run in self.runs if run.best], split)
        self.diary = Diary(self.runs, split)
        self.reference = published() if reference else None

    def record(self) -> dict[str, Any]:
        """Everything, unrounded, for JSON."""
        runs = [
            {
                "rank": rank if run.best else None,
                **{key: value for key, value in vars(run).items() if key not in ("metrics", "environment")},
                "settings": {key: run.config.get(key) for key in self.settings},
                "losses": [loss._asdict() for loss in run.losses],
            }
            for rank, run in enumerate(self.runs, start=1)
        ]
        comparisons = [comparison.record() for comparison in self.comparisons]
        return {**vars(self), "runs": runs, "comparisons": comparisons, "diary": self.diary.record()}


def find(paths: Sequence[Path]) -> tuple[list[Run], list[str], list[dict[str, Any]]]:
    """Read all runs that the paths stand for.

    Returns:
        The runs, the lowest validation loss first; a line for each path that cannot be read; the trials of sweeps.

    Raises:
        LabError: Nothing at all could be read.

    """
    damaged: list[str] = []

    def attempt(read: Callable[[Path], T], path: Path) -> T | None:
        try:
            return read(path)
        except (LabError, OSError) as error:
            damaged.append(str(error) if isinstance(error, LabError) else f"{path}: {error}")
        return None

    directories: dict[Path, Path] = {}
    trials: dict[Path, dict[str, Any]] = {}
    runs: list[Run] = []
    for path in paths:
        for directory in attempt(run_directories, path) or []:
            directories.setdefault(directory.resolve(), directory)
        for sweep in (path, *sorted(path.glob("*"))):
            if (sweep / SWEEP_FILE).is_file():
                trials |= {trial["run"].resolve(): trial for trial in attempt(read_sweep, sweep) or []}
    for resolved, directory in directories.items():
        state = trials.get(resolved, {}).get("state")
        run = attempt(Run, directory)
        if run and not (run.state == "empty" and state in ("waiting", "failed")):
            runs.append(run)
            if state in ("failed", "pruned"):  # of which the run knows nothing
                run.described_state = f"{state}: {run.described_state}"
    if paths and not runs and not any(trial["state"] == "failed" for trial in trials.values()):
        raise LabError("; ".join(damaged) or f"{', '.join(map(str, paths))}: no run has begun yet")
    runs.sort(key=lambda run: run.best["val_loss"] if run.best else math.inf)
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = str(run.path)
    return runs, damaged, list(trials.values())


def _notes(runs: Sequence[Run]) -> list[str]:
    found = []
    known = [(run.name, split) for run in runs if run.best and (split := _validated_on(run))]
    if other := [name for name, split in known if split != known[0][1]]:
        what = f"Not validated on the same tokens and weights as {known[0][0]}: {', '.join(other)}."
        found.append(f"{what} Such losses do not rank against each other.")
    for run in runs:
        tested = run.evaluations.get("test", {}).get("step")
        if run.best and isinstance(tested, int) and tested != run.best["step"]:
            best = f"step {run.best['step']:,.0f}, where its validation loss is lowest"
            found.append(f"{run.name} was tested at step {tested:,}, not at {best}.")
        for name, own in run.evaluations.items():
            for kind in (kind for kind in LEAKED if own.get(kind)):
                what = f"{own[kind]} conversations are {kind.replace('_', '-')} of training ones"
                loss = own.get(f"{name.partition('@')[0].removesuffix('-base')}_loss_without_{kind}")
                found.append(f"{run.name}, {name}: {what}; without them the loss is {loss}.")
    for base in (run.evaluations["test-base"] for run in runs if "test-base" in run.evaluations):
        found.append(
            f"The untouched base on the test split: loss {base['test_loss']:.6f}, perplexity "
            f"{base['test_perplexity']:.3f}, token accuracy {base['test_token_accuracy']:.4f}."
        )
    return list(dict.fromkeys(found))


def over_seeds(runs: Sequence[Run], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Finished runs that differ in the seed alone: mean and sample standard deviation (n - 1) of their losses.

    Of several runs with one seed, which are repeats of one, the first by name counts.

    Args:
        runs: All runs.
        settings: Config keys, without the seed's, in which the runs differ.

    Returns:
        Nothing where no setting has two seeds. A deviation is None where a group has fewer.

    """
    groups: dict[str, dict[Any, Run]] = {}
    for run in runs:
        if run.state == "finished" and run.config and run.best:
            of_seed = groups.setdefault(repr([run.config.get(key) for key in settings]), {})
            seed = run.config.get(SEED)
            of_seed[seed] = min(run, of_seed.get(seed, run), key=lambda each: each.name)
    found: list[dict[str, Any]] = []
    for group in (list(of_seed.values()) for of_seed in groups.values()):
        validation = [run.best["val_loss"] for run in group if run.best]
        tested = [run.evaluations["test"]["test_loss"] for run in group if "test" in run.evaluations]
        test = [loss for loss in tested if math.isfinite(loss)]
        found.append(
            {
                "settings": {key: group[0].config.get(key) for key in settings},
                "runs": [run.name for run in group],
                "seeds": [run.config.get(SEED) for run in group],
                "n": len(validation),
                "val_mean": _figure(statistics.fmean, validation, 1),
                "val_sd": _figure(statistics.stdev, validation, 2),
                "n_tested": len(test),
                "test_mean": _figure(statistics.fmean, test, 1),
                "test_sd": _figure(statistics.stdev, test, 2),
            }
        )
    return found if any(group["n"] > 1 for group in found) else []


def _figure(function: Callable[[Sequence[float]], float], losses: Sequence[float], least: int) -> float | None:
    """A figure of at least so many losses; infinite where losses near 1e308 leave no float for it."""
    try:
        return function(losses) if len(losses) >= least else None
    except OverflowError:
        return math.inf


def _validated_on(run: Run) -> dict[str, Any]:
    """What the validation split consists of, as far as the run has recorded it."""
    known = {key: value for key, value in flatten(run.environment).items() if key.startswith(VALIDATED_ON)}
    return known and known | {WEIGHTED: bool(run.environment.get(WEIGHTED))}
