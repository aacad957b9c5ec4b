"""``report``: what finished, running and damaged runs say, ranked, compared and drawn."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_lab.errors import LabError
from lightning_lab.experiments.page import html, markdown, markdown_table
from lightning_lab.experiments.runs import (
    REPORT_FILES,
    RUN_FILES,
    SEED,
    SWEEP_FILE,
    UNCOMPARED,
    Run,
    Trial,
    differing_settings,
    read_run,
    read_sweep,
    run_directories,
    write_whole,
)
from lightning_lab.experiments.sections import comparison_text, notes, published, ranking_table, sections

if TYPE_CHECKING:
    from lightning_lab.experiments.compare import Comparison
    from lightning_lab.experiments.plots import Panel

SPLITS = ("test", "validation")
EPILOG = """\
RUN is a run directory, a sweep's directory, or a folder of both; runs may still be in progress. The report goes to
standard output as Markdown, and with losses.png as report.md and report.html (one file that loads nothing) into --out.

  python -m lightning_lab report runs/demo                       one run
  python -m lightning_lab report runs --reference seed           all runs in runs/, beside the lab's numbers
  python -m lightning_lab report --compare runs/demo runs/demo-2 is the difference real?

exit status: 0; 2 where a run is damaged (the others are still reported) or nothing could be read
"""


@dataclass(frozen=True)
class Report:
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
    damaged: Sequence[str]
    name: str = ""
    trials: Sequence[Trial] = ()
    split: str = "test"
    reference: bool = False

    @cached_property
    def settings(self) -> list[str]:
        """Config keys in which the runs differ."""
        return differing_settings(self.runs)

    @cached_property
    def compared(self) -> tuple[list[Comparison], list[str]]:
        """Each other run against the first, and why those that are not compared cannot be."""
        ranked = [run for run in self.runs if run.best]
        if len(ranked) < 2:
            return [], []
        best, others = ranked[0], [run for run in ranked[1:] if self.split in run.evaluations]
        command = "validate" if self.split == "validation" else "test"
        how = f"`python -m lightning_lab {command} --run_dir RUN --ckpt_path best` does that"
        if self.split not in best.evaluations:
            return [], [f"{best.name}, the best on validation, has not been evaluated on {self.split}; {how}"]
        refused = []
        if missing := [run.name for run in ranked if self.split not in run.evaluations]:
            refused.append(f"not evaluated on {self.split}: {', '.join(missing)}; {how}")
        from lightning_lab.experiments.compare import compare, compare_to_best

        kept = [best]
        for run in others:
            try:  # few resamples, to see which can be: their number decides the level of each interval
                compare(best, run, self.split, level=0.5, resamples=1)
                kept.append(run)
            except LabError as error:
                refused.append(str(error))
        return compare_to_best(kept, self.split), refused

    def state(self, run: Run) -> str:
        """A run's state in words, where a sweep says more than the run does with that."""
        trial = {trial.run.resolve(): trial for trial in self.trials}.get(run.path.resolve())
        if trial is None or trial.state not in ("failed", "pruned"):
            return run.described_state
        return f"{trial.state}: {run.described_state}"

    def seeds(self) -> list[dict[str, Any]]:
        """Finished runs that differ in the seed alone: mean and sample standard deviation (n - 1) of their losses.

        Empty where no setting has two seeds; a deviation is None where there are fewer.
        """
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.state == "finished" and run.config and run.best:
                rest = {key: value for key, value in run.config.items() if key not in (SEED, *UNCOMPARED)}
                groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
        if all(len(group) == 1 for group in groups.values()):
            return []
        records = []
        for group in groups.values():
            validation = [run.best["val_loss"] for run in group if run.best]
            test = [run.evaluations["test"]["test_loss"] for run in group if "test" in run.evaluations]
            records.append(
                {
                    "settings": {key: group[0].config.get(key) for key in self.settings if key != SEED},
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
        return records

    @property
    def ranking(self) -> str:
        """The ranking as a Markdown table."""
        return markdown_table(ranking_table(self))

    def record(self) -> dict[str, Any]:
        """Everything, unrounded, for JSON; losses are nats per supervised token, times seconds."""
        comparisons, refused = self.compared
        return {
            "runs": [
                {
                    "rank": rank if run.best else None,
                    "name": run.name,
                    "path": str(run.path),
                    "state": run.state,
                    "described_state": self.state(run),
                    "step": run.step,
                    "total_steps": run.total_steps,
                    "settings": {key: run.config.get(key) for key in self.settings},
                    "best": run.best and dict(run.best),
                    "evaluations": dict(run.evaluations),
                    "losses": [
                        {"step": step, "train_loss": train, "val_loss": validation}
                        for step, train, validation in run.losses
                    ],
                    "trainable_parameters": run.trainable_parameters,
                    "seconds": run.seconds,
                    "tokens_per_second": run.tokens_per_second,
                    "peak_memory_mib": run.peak_memory_mib,
                    "config": dict(run.config),
                }
                for rank, run in enumerate(self.runs, start=1)
            ],
            "damaged": list(self.damaged),
            "notes": notes(self),
            "seeds": self.seeds(),
            "comparisons": [comparison.record() for comparison in comparisons],
            "not_compared": refused,
            "trials": [asdict(trial) | {"run": str(trial.run)} for trial in self.trials],
            "reference": published() if self.reference else None,
        }

    @property
    def title(self) -> str:
        """Of the page."""
        if len(self.runs) == 1:
            return f"Report: {self.runs[0].name}"
        return f"Report: {self.name}, {len(self.runs)} runs" if self.name else f"Report: {len(self.runs)} runs"

    def markdown(self) -> str:
        """The whole report as Markdown."""
        return markdown(self.title, sections(self))

    def panels(self) -> list[Panel]:
        """What is drawn: the runs, and the lab's numbers on axes of their own."""
        from lightning_lab.experiments.plots import Curve, Panel, curve_of

        curves = [
            curve_of(run, f"{rank}. {run.name}" if len(self.runs) > 1 else run.name)
            for rank, run in enumerate(self.runs, start=1)
        ]
        panels = [Panel("", curves, "thin: training loss, running mean over a twentieth of the steps")]
        if self.reference:
            lab = published()
            steps = lab["steps"]
            curves = [
                Curve(
                    run["name"],
                    list(zip(steps, run["train"], strict=True)),
                    list(zip(steps, run["validation"], strict=True)),
                )
                for run in lab["runs"]
            ]
            panels.append(Panel(lab["label"], curves, "thin: training loss, mean of 250 steps"))
        return panels

    def write(self, out: Path) -> None:
        """Write ``report.md``, ``report.html`` and ``losses.png``, each whole or not at all.

        Raises:
            LabError: The directory cannot be written.

        """
        from lightning_lab.experiments.plots import draw, png, svg

        panels = self.panels()
        wide, narrow = draw(panels, narrow=False), draw(panels, narrow=True)
        page = html(self.title, sections(self, svg(wide), svg(narrow)))
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, content in zip(REPORT_FILES, (self.markdown().encode(), page.encode(), png(wide)), strict=True):
                write_whole(out / name, content)
        except OSError as error:
            raise LabError(f"{out}: cannot be written ({error.strerror or error}); pass --out") from None


def read_report(paths: Sequence[Path], *, split: str = "test", reference: bool = False) -> Report:
    """Read all runs that the paths stand for, whatever state they are in.

    Raises:
        LabError: Nothing at all could be read.

    """
    directories: dict[Path, Path] = {}
    damaged: list[str] = []
    trials: list[Trial] = []
    for path in paths:
        try:
            for directory in run_directories([path]):
                directories.setdefault(directory.resolve(), directory)
            for sweep in (path, *sorted(path.iterdir())):
                if (sweep / SWEEP_FILE).is_file():
                    trials += read_sweep(sweep)
        except (LabError, OSError) as error:
            damaged.append(_line(path, error))
    without_run = {trial.run.resolve() for trial in trials if trial.state in ("waiting", "failed")}
    runs = []
    for resolved, directory in directories.items():
        if resolved in without_run and not any((directory / name).exists() for name in RUN_FILES):
            continue
        try:
            runs.append(read_run(directory))
        except (LabError, OSError) as error:
            damaged.append(_line(directory, error))
    if not runs and not any(trial.state == "failed" for trial in trials):
        raise LabError("; ".join(damaged) or f"{', '.join(map(str, paths))}: no run has begun yet")
    runs.sort(key=lambda run: run.best["val_loss"] if run.best else math.inf)
    names = Counter(run.name for run in runs)
    runs = [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in runs]
    name = paths[0].resolve().name if len(paths) == 1 else ""
    return Report(runs, damaged, name, trials, split, reference)


def write_report(paths: Sequence[Path], out: Path, reference: bool = False) -> Report:
    """Write ``report.md``, ``report.html`` and ``losses.png`` on the runs that the paths stand for.

    Returns:
        The report; its ``ranking`` is the ranking alone.

    Raises:
        LabError: Nothing could be read, or ``out`` cannot be written.

    """
    report = read_report(paths, reference=reference)
    report.write(out)
    return report


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    try:
        options = _parser().parse_args(argv)
        return _compare(options) if options.compare else _report(options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LabError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lightning_lab report",
        description="The lab's tables, a ranking, the curves and comparisons with intervals, for any number of runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="run, sweep, or folder of both")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object with everything, unrounded; writes no files without --out"
    )
    parser.add_argument(
        "--reference", choices=("seed",), help="the lab's published losses beside: seed (four runs of its experiment)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="only compare two runs: directories, or names of runs among those of RUN",
    )
    parser.add_argument(
        "--comparisons",
        type=int,
        default=1,
        metavar="N",
        help="with --compare: this is one of N comparisons whose intervals shall hold together (Bonferroni)",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="on which to compare; needs its evaluation (default: test)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write; by default the directory of the sweep or the run, and for several runs `report` beside "
        "them",
    )
    return parser


def _report(options: argparse.Namespace) -> int:
    if options.comparisons != 1:
        raise LabError("--comparisons is for --compare; a whole report counts its comparisons itself")
    if not options.runs:
        raise LabError("report needs a RUN: a run directory, a sweep's directory or a folder of runs, such as runs")
    report = read_report(options.runs, split=options.split, reference=bool(options.reference))
    for line in report.damaged:
        print(f"error: {line}", file=sys.stderr)
    out = None if options.json and not options.out else options.out or _default_out(options.runs, report)
    try:  # files first: whoever reads the output may stop early, such as `head`
        if out is not None:
            report.write(out)
            print(f"written: {out}/{', '.join(REPORT_FILES)}", file=sys.stderr)
    finally:
        print(_json(report.record()) if options.json else report.markdown(), end="", flush=True)
    return 2 if report.damaged else 0


def _compare(options: argparse.Namespace) -> int:
    from lightning_lab.experiments.compare import compare

    for option, given in (("--out", options.out), ("--reference", options.reference)):
        if given:
            raise LabError(f"{option} is for a whole report; leave it out with --compare")
    report = read_report(options.runs) if options.runs else Report([], [])
    for line in report.damaged:
        print(f"error: {line}", file=sys.stderr)
    known = {run.name: run for run in report.runs}
    runs = []
    for name in options.compare:
        if name not in known and not Path(name).is_dir():
            raise LabError(
                f"--compare {name}: no such run directory"
                + (f", and no run of that name; there are {', '.join(known)}" if known else "")
            )
        runs.append(known[name] if name in known else read_run(Path(name)))
    if runs[0].name == runs[1].name:
        runs = [replace(run, name=str(run.path)) for run in runs]
    comparison = compare(runs[0], runs[1], options.split, comparisons=options.comparisons)
    print(_json(comparison.record()) if options.json else comparison_text(comparison), end="", flush=True)
    return 0


def _default_out(paths: Sequence[Path], report: Report) -> Path:
    if len(paths) == 1 and ((paths[0] / SWEEP_FILE).is_file() or [run.path for run in report.runs] == list(paths)):
        return paths[0]
    parents = {path.resolve().parent for path in paths}
    if len(paths) == 1:
        return paths[0] / "report"
    return paths[0].parent / "report" if len(parents) == 1 else Path("runs/report")


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), indent=2, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """Numbers that JSON does not know become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _line(path: Path, error: Exception) -> str:
    return str(error) if isinstance(error, LabError) else f"{path}: {error}"
