"""What follows from runs: their order, what makes it doubtful, comparisons, means over seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_lab.errors import LabError
from lightning_lab.experiments.compare import Comparison, compare_to_first
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
from lightning_lab.files import read_yaml

ROWS = ("metrics", "train", "validation", "environment")  # of a run, not in the JSON


@dataclass(frozen=True)
class Summary:
    """Runs and what follows from them.

    Attributes:
        runs: Lowest validation loss first, those without one last.
        damaged: One line for each path that could not be read.
        name: Of the sweep or the folder, if it is one.
        trials: Of the sweeps among the paths.
        split: On which runs are compared.
        reference: Whether the lab's published numbers stand beside.

    """

    runs: Sequence[Run]
    damaged: Sequence[str] = ()
    name: str = ""
    trials: Sequence[dict[str, Any]] = ()
    split: str = "test"
    reference: bool = False

    @cached_property
    def settings(self) -> list[str]:
        """Config keys in which the runs differ."""
        return differing_settings(self.runs)

    @property
    def title(self) -> str:
        """Of the page."""
        if len(self.runs) == 1:
            return f"Report: {self.runs[0].name}"
        return f"Report: {self.name}, {len(self.runs)} runs" if self.name else f"Report: {len(self.runs)} runs"

    @cached_property
    def compared(self) -> tuple[list[Comparison], list[str]]:
        """Each other run against the first, and why those that are not compared cannot be."""
        ranked = [run for run in self.runs if run.best]
        tested = [run for run in ranked if self.split in run.evaluations]
        untested = [run.name for run in ranked if self.split not in run.evaluations]
        command = "validate" if self.split == "validation" else "test"
        how = f"`python -m lightning_lab {command} --run_dir RUN --ckpt_path best` does that"
        if len(ranked) < 2:
            return [], []
        if self.split not in ranked[0].evaluations:
            return [], [f"{untested[0]}, the best on validation, has not been evaluated on {self.split}; {how}"]
        found, refused = compare_to_first(tested, self.split)
        return found, [f"not evaluated on {self.split}: {', '.join(untested)}; {how}"] * bool(untested) + refused

    @cached_property
    def notes(self) -> list[str]:
        """What a reader of the ranking must know."""
        found = []
        ranked = [run for run in self.runs if run.best]
        splits = {run.name: validated_on for run in ranked if (validated_on := _validated_on(run))}
        first = next(iter(splits), "")
        if other := [name for name, split in splits.items() if split != splits[first]]:
            found.append(
                f"Not validated on the same tokens as {first}: {', '.join(other)}. Such losses do not rank against "
                "each other."
            )
        for run in ranked:
            tested = run.evaluations.get("test", {}).get("step")
            if run.best and isinstance(tested, int) and tested != run.best["step"]:
                found.append(
                    f"{run.name} was tested at step {tested:,}, not at step {run.best['step']:,.0f}, where its "
                    "validation loss is lowest."
                )
        bases = [run.evaluations["test-base"] for run in self.runs if "test-base" in run.evaluations]
        lines = [
            f"The untouched base on the test split: loss {base['test_loss']:.6f}, perplexity "
            f"{base['test_perplexity']:.3f}, token accuracy {base['test_token_accuracy']:.4f}."
            for base in bases
        ]
        return [*found, *dict.fromkeys(lines)]

    @cached_property
    def seeds(self) -> list[dict[str, Any]]:
        """Finished runs that differ in the seed alone: mean and sample standard deviation (n - 1) of their losses.

        Empty where no setting has two seeds; a deviation is None where there are fewer.
        """
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.state == "finished" and run.config and run.best:
                rest = {key: value for key, value in run.config.items() if key not in (SEED, *UNCOMPARED)}
                groups.setdefault(repr(sorted(rest.items())), []).append(run)
        return [self._over_seeds(group) for group in groups.values()] if any(g[1:] for g in groups.values()) else []

    def _over_seeds(self, group: Sequence[Run]) -> dict[str, Any]:
        validation = [run.best["val_loss"] for run in group if run.best]
        test = [run.evaluations["test"]["test_loss"] for run in group if "test" in run.evaluations]
        spread = {
            f"{name}_{kind}": statistic(losses) if len(losses) > least else None
            for name, losses in (("val", validation), ("test", test))
            for kind, statistic, least in (("mean", statistics.fmean, 0), ("sd", statistics.stdev, 1))
        }
        return {
            "settings": {key: group[0].config.get(key) for key in self.settings if key != SEED},
            "runs": [run.name for run in group],
            "seeds": [run.config.get(SEED) for run in group],
            **{"n": len(validation), "n_tested": len(test), **spread},
        }

    def record(self) -> dict[str, Any]:
        """Everything, unrounded, for JSON; losses are nats per supervised token, times seconds."""
        comparisons, refused = self.compared
        runs = [
            {
                "rank": rank if run.best else None,
                **{key: value for key, value in vars(run).items() if key not in ROWS},
                "settings": {key: run.config.get(key) for key in self.settings},
                "losses": [dict(zip(("step", "train_loss", "val_loss"), row, strict=True)) for row in run.losses],
            }
            for rank, run in enumerate(self.runs, start=1)
        ]
        return {
            "runs": runs,
            "damaged": self.damaged,
            "notes": self.notes,
            "seeds": self.seeds,
            "comparisons": [comparison.record() for comparison in comparisons],
            "not_compared": refused,
            "trials": self.trials,
            "reference": published() if self.reference else None,
        }


def summarise(paths: Sequence[Path], *, split: str = "test", reference: bool = False) -> Summary:
    """Read all runs that the paths stand for, whatever state they are in.

    Raises:
        LabError: Nothing at all could be read.

    """
    directories: dict[Path, Path] = {}
    damaged: list[str] = []
    trials: list[dict[str, Any]] = []
    runs: list[Run] = []
    for path in paths:
        try:
            for directory in run_directories([path]):
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
    if not runs and not any(trial["state"] == "failed" for trial in trials):
        raise LabError("; ".join(damaged) or f"{', '.join(map(str, paths))}: no run has begun yet")
    runs.sort(key=lambda run: run.best["val_loss"] if run.best else math.inf)
    names = Counter(run.name for run in runs)
    runs = [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in runs]
    return Summary(runs, damaged, paths[0].resolve().name if len(paths) == 1 else "", trials, split, reference)


def published() -> dict[str, Any]:
    """The lab's published losses: ``label``, ``steps`` and ``runs`` with ``name``, ``train`` and ``validation``."""
    return read_yaml(Path(__file__).with_name("published.yaml"))


def _validated_on(run: Run) -> str | None:
    """What the validation split consists of, if the run has recorded it."""
    data = run.environment.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("splits"), Mapping) or "fingerprint" not in data:
        return None
    return repr((data["fingerprint"], data.get("split_seed"), data["splits"].get("validation")))


def _line(path: Path, error: Exception) -> str:
    return str(error) if isinstance(error, LabError) else f"{path}: {error}"
