"""The lab's tables, a ranking, the curves and comparisons with intervals, for any number of runs.

RUN is a run directory, a sweep's directory, or a folder of both; runs may still be in progress. The report goes to
standard output as Markdown, and with losses.png as report.md and report.html (one file that loads nothing) into --out.

  python -m lightning_lab report runs/demo                       one run
  python -m lightning_lab report runs --reference seed           all runs in runs/, beside the lab's numbers
  python -m lightning_lab report --compare runs/demo runs/demo-2 is the difference real?

Of the first run in the ranking whose tokens' losses are there, it shows the conversations with the highest loss, and
beside `test --ckpt_path base` those that were improved and harmed most; report.html has their texts, token by token.

exit status: 0; 2 where a run is damaged (the others are still reported) or nothing could be read
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_lab import plots
from lightning_lab.errors import LabError
from lightning_lab.experiments.compare import compare
from lightning_lab.experiments.heat import heat
from lightning_lab.experiments.page import page
from lightning_lab.experiments.runs import REPORT_FILES, SWEEP_FILE, Run
from lightning_lab.experiments.sections import comparison_markdown, document
from lightning_lab.experiments.summary import Summary, find
from lightning_lab.files import make_directory, write_whole


def write_report(summary: Summary, out: Path) -> None:
    """Write ``report.md``, ``report.html`` and ``losses.png``, each whole or not at all.

    Raises:
        LabError: The directory cannot be written.

    """
    panels = {plots.OF_RUNS: [plots.curve(run.name, run.metrics) for run in summary.runs]}
    if lab := summary.reference:
        curves = panels[f"{lab['label']}; thin: mean of {lab['train_loss_window']} steps"] = []
        for run in (run for run in lab["runs"] if "validation" in run):
            train, validation = (list(zip(lab["steps"], run[key], strict=True)) for key in ("train", "validation"))
            curves.append(plots.Curve(run["name"], train, validation))
    try:
        figure = plots.draw(panels)
        svg, png = plots.saved(figure, "svg"), plots.saved(figure, "png")
    except Exception as error:  # a picture never stops a report
        print(f"warning: {out / REPORT_FILES[-1]} is empty: it could not be drawn ({error})", file=sys.stderr)
        svg = png = b""
    make_directory(out)
    html = page(summary.title, document(summary, marked=True), REPORT_FILES[-1], svg, heat(summary.diary))
    contents: tuple[str | bytes, ...] = document(summary), html, png
    for name, content in zip(REPORT_FILES, contents, strict=True):
        write_whole(out / name, content)


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    try:
        options = _parser().parse_args(argv)
        for option in ("out", "reference") if options.compare else ("comparisons",):
            if getattr(options, option) is not None:
                raise LabError(f"--{option} is for {'a whole report' if options.compare else '--compare'}")
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
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m lightning_lab report", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", type=Path, help="run, sweep, or folder of both")
    add("--json", action="store_true", help="one JSON object with everything, unrounded; no files without --out")
    add("--reference", choices=("seed",), help="the lab's published losses beside: seed (its experiment)")
    add(
        "--compare", nargs=2, metavar=("A", "B"), help="only compare two runs: directories, or names among those of RUN"
    )
    text = "with --compare: this is one of N comparisons whose intervals shall hold together (Bonferroni)"
    add("--comparisons", type=int, metavar="N", help=text)
    add("--split", choices=("test", "validation"), default="test", help="on which to compare; needs its evaluation")
    text = "where to write; by default the sweep or the run itself, and for several runs `report` beside them"
    add("--out", type=Path, help=text)
    return parser


def _report(options: argparse.Namespace) -> int:
    if not options.runs:
        raise LabError("report needs a RUN: a run directory, a sweep's directory or a folder of runs, such as runs")
    summary = Summary(options.runs, options.split, reference=bool(options.reference))
    _say_damaged(summary.damaged)
    try:  # files first: whoever reads the output may stop early, such as `head`
        if options.out or not options.json:
            out = options.out or _default_out(options.runs, summary)
            write_report(summary, out)
            print(f"written: {out}/{', '.join(REPORT_FILES)}", file=sys.stderr)
    finally:
        print(_json(summary.record()) if options.json else document(summary), end="", flush=True)
    return 2 if summary.damaged else 0


def _compare(options: argparse.Namespace) -> int:
    among, damaged, _ = find(options.runs)
    _say_damaged(damaged)
    known = {run.name: run for run in among}
    runs = []
    for name in options.compare:
        if name not in known and not Path(name).is_dir():
            there = f", and no run of that name; there are {', '.join(known)}" if known else ""
            raise LabError(f"--compare {name}: no such run directory{there}")
        runs.append(known[name] if name in known else Run(Path(name)))
    if runs[0].name == runs[1].name:
        for run in runs:
            run.name = str(run.path)
    found, refused = compare(runs, options.split, comparisons=options.comparisons)
    if refused:
        raise LabError(refused[0])
    print(_json(found[0].record()) if options.json else comparison_markdown(found[0]), end="", flush=True)
    return 0


def _say_damaged(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)


def _default_out(paths: Sequence[Path], summary: Summary) -> Path:
    if len(paths) == 1:
        itself = (paths[0] / SWEEP_FILE).is_file() or [run.path for run in summary.runs] == list(paths)
        return paths[0] if itself else paths[0] / "report"
    one_parent = len({path.resolve().parent for path in paths}) == 1
    return paths[0].parent / "report" if one_parent else Path("runs/report")


def _json(record: Mapping[str, Any]) -> str:
    """JSON, in which numbers that it does not know are null."""
    plain = json.loads(json.dumps(record, default=str, skipkeys=True), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2) + "\n"
