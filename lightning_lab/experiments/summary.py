"""What follows from runs: their order, what makes it doubtful, comparisons, means over seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_lab.errors import LabError
from lightning_lab.experiments.compare import Comparison, compare
from lightning_lab.experiments.runs import (
    SEED,
    SWEEP_FILE,
    UNCOMPARED,
    Run,
    differing_settings,
    has_begun,
    read_run,
    read_sweep,
    run_directories,
)
from lightning_lab.files import flatten, read_yaml

VALIDATED_ON = ("data.fingerprint", "data.split_seed", "data.splits.validation")  # in environment.json


@dataclass(frozen=True)
class Summary:
    """Runs and what follows from them; losses are nats per supervised token, times seconds.

    Attributes:
        title: Of the report.
        runs: Lowest validation loss first, those without one last, each with a name of its own.
        damaged: One line for each path that could not be read.
        trials: Of the sweeps among the paths.
        settings: Config keys in which the runs differ.
        notes: What a reader of the ranking must know.
        seeds: `over_seeds`.
        split: On which runs are compared.
        comparisons: Each other run against the first.
        not_compared: Why those that are not compared cannot be.
        reference: The lab's published losses, if they are to stand beside: ``label``, ``steps`` and ``runs`` with
            ``name``, ``train`` and ``validation``.

    """

    title: str
    runs: Sequence[Run]
    damaged: Sequence[str]
    trials: Sequence[dict[str, Any]]
    settings: Sequence[str]
    notes: Sequence[str]
    seeds: Sequence[dict[str, Any]]
    split: str
    comparisons: Sequence[Comparison]
    not_compared: Sequence[str]
    reference: dict[str, Any] | None

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
        return {**vars(self), "runs": runs, "comparisons": [comparison.record() for comparison in self.comparisons]}


def summarise(paths: Sequence[Path], *, split: str = "test", reference: bool = False) -> Summary:
    """Read all runs that the paths stand for, whatever state they are in, and compare them.

    Raises:
        LabError: Nothing at all could be read.

    """
    runs, damaged, trials = find(paths)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    if len(runs) != 1 and len(paths) == 1:
        title = f"{paths[0].resolve().name}, {title}"
    settings = differing_settings(runs)
    comparisons, not_compared = compare([run for run in runs if run.best], split)
    return Summary(
        title=f"Report: {title}",
        runs=runs,
        damaged=damaged,
        trials=trials,
        settings=settings,
        notes=_notes(runs),
        seeds=over_seeds(runs, [key for key in settings if key != SEED]),
        split=split,
        comparisons=comparisons,
        not_compared=not_compared,
        reference=read_yaml(Path(__file__).with_name("published.yaml")) if reference else None,
    )


def find(paths: Sequence[Path]) -> tuple[list[Run], list[str], list[dict[str, Any]]]:
    """Read all runs that the paths stand for.

    Returns:
        The runs, the lowest validation loss first; a line for each path that cannot be read; the trials of sweeps.

    Raises:
        LabError: Nothing at all could be read.

    """
    directories: dict[Path, Path] = {}
    damaged: list[str] = []
    trials: list[dict[str, Any]] = []
    runs: list[Run] = []
    for path in paths:
        try:
            for directory in run_directories(path):
                directories.setdefault(directory.resolve(), directory)
            for sweep in (path, *sorted(path.iterdir())):
                if (sweep / SWEEP_FILE).is_file():
                    trials += read_sweep(sweep)
        except (LabError, OSError) as error:
            damaged.append(_line(path, error))
    states = {trial["run"].resolve(): trial["state"] for trial in trials}
    for resolved, directory in directories.items():
        state = states.get(resolved)
        if state in ("waiting", "failed") and not has_begun(directory):
            continue
        try:
            run = read_run(directory)
            if state in ("failed", "pruned"):  # of which the run knows nothing
                run = replace(run, described_state=f"{state}: {run.described_state}")
            runs.append(run)
        except (LabError, OSError) as error:
            damaged.append(_line(directory, error))
    if paths and not runs and not any(trial["state"] == "failed" for trial in trials):
        raise LabError("; ".join(damaged) or f"{', '.join(map(str, paths))}: no run has begun yet")
    runs.sort(key=lambda run: run.best["val_loss"] if run.best else math.inf)
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in runs], damaged, trials


def _notes(runs: Sequence[Run]) -> list[str]:
    found = []
    known = [(run.name, split) for run in runs if run.best and (split := _validated_on(run))]
    if other := [name for name, split in known if split != known[0][1]]:
        what = f"Not validated on the same tokens as {known[0][0]}: {', '.join(other)}."
        found.append(f"{what} Such losses do not rank against each other.")
    for run in runs:
        tested = run.evaluations.get("test", {}).get("step")
        if run.best and isinstance(tested, int) and tested != run.best["step"]:
            best = f"step {run.best['step']:,.0f}, where its validation loss is lowest"
            found.append(f"{run.name} was tested at step {tested:,}, not at {best}.")
    for base in (run.evaluations["test-base"] for run in runs if "test-base" in run.evaluations):
        found.append(
            f"The untouched base on the test split: loss {base['test_loss']:.6f}, perplexity "
            f"{base['test_perplexity']:.3f}, token accuracy {base['test_token_accuracy']:.4f}."
        )
    return list(dict.fromkeys(found))


def over_seeds(runs: Sequence[Run], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Finished runs that differ in the seed alone: mean and sample standard deviation (n - 1) of their losses.

    Args:
        runs: All runs.
        settings: What tells the groups apart.

    Returns:
        Nothing where no setting has two seeds. A deviation is None where a group has fewer.

    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.state == "finished" and run.config and run.best:
            rest = {key: value for key, value in run.config.items() if key not in (SEED, *UNCOMPARED)}
            groups.setdefault(repr(sorted(rest.items())), []).append(run)
    found: list[dict[str, Any]] = []
    for group in groups.values():
        validation = [run.best["val_loss"] for run in group if run.best]
        test = [run.evaluations["test"]["test_loss"] for run in group if "test" in run.evaluations]
        found.append(
            {
                "settings": {key: group[0].config.get(key) for key in settings},
                "runs": [run.name for run in group],
                "seeds": [run.config.get(SEED) for run in group],
                "n": len(validation),
                "val_mean": statistics.fmean(validation),
                "val_sd": statistics.stdev(validation) if len(validation) > 1 else None,
                "n_tested": len(test),
                "test_mean": statistics.fmean(test) if test else None,
                "test_sd": statistics.stdev(test) if len(test) > 1 else None,
            }
        )
    return found if any(group["n"] > 1 for group in found) else []


def _validated_on(run: Run) -> dict[str, Any]:
    """What the validation split consists of, as far as the run has recorded it."""
    return {key: value for key, value in flatten(run.environment).items() if key.startswith(VALIDATED_ON)}


def _line(path: Path, error: Exception) -> str:
    return str(error) if isinstance(error, LabError) else f"{path}: {error}"
