"""A report as sections of tables and sentences: what is shown, and with how many digits."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from lightning_lab.experiments.page import Block, Figure, Items, Paragraph, Section, Table, Tables, markdown_table
from lightning_lab.experiments.runs import REPORT_FILES, SEED, Run

if TYPE_CHECKING:
    from lightning_lab.experiments.compare import Comparison, Interval
    from lightning_lab.experiments.report import Report

SETTING_COLUMNS = 6  # in the ranking; more settings than that get a table of their own
NONE = "–"
COVERS = (
    "An interval covers other conversations, drawn from the same population as the split and answered by these trained "
    "adapters. It does not cover another seed's run: whether a setting is better takes several seeds."
)


def sections(report: Report, wide: str = "", narrow: str = "") -> list[Section]:
    """The report's parts.

    Args:
        report: What to show.
        wide: The plot as SVG text.
        narrow: The plot for a phone.

    """
    runs = report.runs
    caption = (
        "Losses over optimizer steps. Validation: the whole split, weighted by tokens. Training: running mean over a "
        "twentieth of the steps."
    )
    parts = [Section("Runs", [Items(_states(report))])]
    if runs:
        parts.append(Section("Ranking" if len(runs) > 1 else "Result", _ranking_blocks(report)))
    figure = Figure(REPORT_FILES[-1], _alt(runs), caption, wide, narrow)
    parts.append(Section("Losses", [figure, *_loss_tables(runs)]))
    if report.reference:
        parts.append(Section("Beside the lab's numbers", _reference_blocks(runs)))
    if seeds := report.seeds():
        parts.append(Section("Over seeds", _seed_blocks(seeds, report.settings)))
    if len(runs) > 1:
        parts.append(Section(f"Comparisons on the {report.split} split", _comparison_blocks(report)))
    if lost := [trial for trial in report.trials if trial.state in ("failed", "pruned")]:
        columns = ("trial", "state", "settings", "error")
        rows = [[trial.name, trial.state, _settings_text(trial.settings), trial.error or NONE] for trial in lost]
        parts.append(Section("Trials that failed or were pruned", [Table(columns, rows, columns)]))
    return parts


def ranking_table(report: Report) -> Table:
    """One row a run, the lowest validation loss first."""
    runs = report.runs
    settings = report.settings if len(report.settings) <= SETTING_COLUMNS else []
    text = [key for key in settings if not all(_is_number(run.config.get(key)) for run in runs if run.config)]
    columns = [
        *("rank", "run", *settings, "best val loss", "at step", "test loss", "test perplexity", "test token accuracy"),
        *("trainable parameters", "time in steps", "real tokens/s", "peak memory (MiB)", "state"),
    ]
    rows = []
    for rank, run in enumerate(runs, start=1):
        best, test = run.best or {}, run.evaluations.get("test", {})
        rows.append(
            [
                str(rank) if best else NONE,
                run.name,
                *(_setting(run, key) for key in settings),
                _number(best.get("val_loss"), ".6f"),
                _number(best.get("step"), ",.0f"),
                _number(test["test_loss"], ".6f") if test else "not tested",
                _number(test.get("test_perplexity"), ".3f"),
                _number(test.get("test_token_accuracy"), ".4f"),
                _number(run.trainable_parameters, ",d"),
                _duration(run.seconds),
                _number(run.tokens_per_second, ",.0f"),
                _number(run.peak_memory_mib, ",.0f"),
                report.state(run),
            ]
        )
    tests = [run.evaluations.get("test", {}) for run in runs]
    marked = [
        ("best val loss", _lowest([run.best["val_loss"] if run.best else None for run in runs])),
        ("test loss", _lowest([test.get("test_loss") for test in tests])),
        ("test perplexity", _lowest([test.get("test_perplexity") for test in tests])),
        ("test token accuracy", _lowest([-test["test_token_accuracy"] if test else None for test in tests])),
    ]
    best_cells = {(row, columns.index(column)) for column, places in marked for row in places}
    return Table(columns, rows, ("run", "state", *text), best_cells)


def notes(report: Report) -> list[str]:
    """What a reader of the ranking must know."""
    found = []
    ranked = [run for run in report.runs if run.best]
    first = next((run for run in ranked if _validated_on(run)), None)
    if first is not None:
        other = [run.name for run in ranked if _validated_on(run) not in (None, _validated_on(first))]
        if other:
            found.append(
                f"Not validated on the same tokens as {first.name}: {', '.join(other)}. Such losses do not rank "
                "against each other."
            )
    for run in ranked:
        step = run.evaluations.get("test", {}).get("step")
        if run.best and step not in (None, run.best["step"]):
            found.append(
                f"{run.name} was tested at step {step:,}, not at step {run.best['step']:,.0f}, where its validation "
                "loss is lowest."
            )
    for base in dict.fromkeys(_base_figures(run) for run in report.runs):
        if base:
            found.append(f"The untouched base on the test split: {base}.")
    return found


def comparison_text(c: Comparison) -> str:
    """One comparison as Markdown: its sentence, a table, and what the intervals cover."""
    both = (
        (c.a, c.loss_a, _log(c.perplexity_a_interval), c.perplexity_a, c.perplexity_a_interval),
        (c.b, c.loss_b, _log(c.perplexity_b_interval), c.perplexity_b, c.perplexity_b_interval),
        ("second - first", c.difference, c.interval, c.perplexity_difference, c.perplexity_difference_interval),
    )
    rows = [
        [name, f"{loss:z.6f}", _interval(interval, "z.6f"), f"{perplexity:z.3f}", _interval(its, "z.3f")]
        for name, loss, interval, perplexity, its in both
    ]
    interval = f"{100 * c.level:g} % interval"
    table = Table(("run", f"{c.split} loss (nats a token)", interval, "perplexity", interval), rows)
    return f"{c.sentence}\n\n{markdown_table(table)}\n\n{COVERS}\n"


@cache
def published() -> dict[str, Any]:
    """The lab's published losses: ``label``, ``steps`` and ``runs`` with ``name``, ``train`` and ``validation``."""
    return yaml.safe_load((files(__package__) / "published.yaml").read_text(encoding="utf-8"))


def _states(report: Report) -> list[str]:
    lines = [f"{run.name}: {report.state(run)}" for run in report.runs]
    if report.trials:
        counts = Counter(trial.state for trial in report.trials)
        lines.append(f"trials of sweeps: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    return lines + [f"damaged: {line}" for line in report.damaged]


def _ranking_blocks(report: Report) -> list[Block]:
    table, several = ranking_table(report), len(report.runs) > 1
    blocks: list[Block] = [table if several else replace(table, best=())]
    if several:
        blocks.append(Paragraph("Ranked by the lowest validation loss; the test split takes no part in the choice."))
    blocks += [Paragraph(note) for note in notes(report)]
    if len(report.settings) > SETTING_COLUMNS:
        rows = [[key, *(_setting(run, key) for run in report.runs)] for key in report.settings]
        names = [run.name for run in report.runs]
        blocks.append(Table(["setting", *names], rows, ["setting"], caption="Settings in which the runs differ"))
    return blocks


def _loss_tables(runs: Sequence[Run]) -> list[Block]:
    with_losses = [run for run in runs if run.losses or _base_loss(run) is not None]
    if not with_losses:
        return [Paragraph("No run has a validation yet.")]
    text = "Training loss: mean over the steps since the row before. Validation loss: weighted by tokens."
    blocks: list[Block] = [Paragraph(text)]
    if len(with_losses) > 1:
        cells = {run.name: _loss_cells(run) for run in with_losses}
        blocks.append(_combined(cells, "All runs: training loss / validation loss"))
    return [*blocks, Tables([_loss_table(run) for run in with_losses])]


def _loss_table(run: Run) -> Table:
    """One run's table, as in its ``losses.md``."""
    base = _base_loss(run)
    rows = [] if base is None else [["0 (base)", "", f"{base:.6f}"]]
    for step, train, loss in run.losses:
        rows.append([str(step), "" if train is None else f"{train:.4f}", f"{loss:.6f}"])
    losses = [*([] if base is None else [base]), *(loss for _, _, loss in run.losses)]
    best = {(row, 2) for row in _lowest(losses)}
    return Table(("Step", "Training Loss", "Validation Loss"), rows, (), best, run.name, padded=False)


def _loss_cells(run: Run, column: str = "val_loss") -> dict[str, str]:
    """The lab's cells by step, such as ``0.9648 / 0.879919``; step 0 is the untouched base."""
    base = _base_loss(run) if column == "val_loss" else None
    cells = {} if base is None else {"0 (base)": f"{base:.6f}"}
    for (step, train, _), row in zip(run.losses, run.validation, strict=True):
        cells[str(step)] = f"{_number(train, '.4f')} / {_number(row.get(column), '.6f')}"
    return cells


def _combined(columns: Mapping[str, Mapping[str, str]], caption: str) -> Table:
    """Several runs' cells side by side, a row for each step that one of them has."""
    steps = sorted({step for cells in columns.values() for step in cells}, key=lambda step: int(step.split()[0]))
    rows = [[step, *(cells.get(step, "") for cells in columns.values())] for step in steps]
    return Table(["step", *columns], rows, (), caption=caption)


def _reference_blocks(runs: Sequence[Run]) -> list[Block]:
    lab = published()
    columns = {run.name: _loss_cells(run, "val_loss_hf") for run in runs if run.losses}
    for run in lab["runs"]:
        losses = zip(lab["steps"], run["train"], run["validation"], strict=True)
        columns[run["name"]] = {str(step): f"{train:.4f} / {loss:.6f}" for step, train, loss in losses}
    text = (
        f"Columns that begin with lab: {lab['label']}. Its validation losses are Hugging Face's mean of batch means at "
        "batch size 8, so the runs' `val_loss_hf`, the same figure, stands beside them here."
    )
    return [_combined(columns, "Training loss / validation loss as Hugging Face prints it"), Paragraph(text)]


def _comparison_blocks(report: Report) -> list[Block]:
    comparisons, refused = report.compared
    blocks: list[Block] = []
    if comparisons:
        first = comparisons[0]
        text = f"Differences are to {first.a}, the best on validation. {COVERS}"
        if first.comparisons > 1:
            text += (
                f" Each interval is at {100 * first.level:.4g} %, so that all {first.comparisons} together hold at "
                f"{100 * first.family_level:g} %."
            )
        sentences = Items([comparison.sentence for comparison in comparisons])
        blocks = [sentences, _comparison_table(comparisons), Paragraph(text)]
    if refused:
        blocks.append(Items([f"not compared: {line}" for line in refused]))
    return blocks or [Paragraph("Nothing to compare: fewer than two runs have a validation loss.")]


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    first = comparisons[0]
    interval = f"{100 * first.level:.4g} % interval"
    columns = (
        *("run", f"{first.split} loss", "difference", interval, "perplexity", interval),
        *("perplexity difference", interval, "real?"),
    )
    rows = [
        [
            *(first.a, f"{first.loss_a:.6f}", NONE, NONE, f"{first.perplexity_a:.3f}"),
            *(_interval(first.perplexity_a_interval, ".3f"), NONE, NONE, NONE),
        ]
    ]
    for c in comparisons:
        rows.append(
            [
                c.b,
                f"{c.loss_b:.6f}",
                f"{c.difference:+.6f}",
                _interval(c.interval, "+.6f"),
                f"{c.perplexity_b:.3f}",
                _interval(c.perplexity_b_interval, ".3f"),
                f"{c.perplexity_difference:+.3f}",
                _interval(c.perplexity_difference_interval, "+.3f"),
                ("better" if c.difference < 0 else "worse") if c.is_real else "cannot be told",
            ]
        )
    return Table(columns, rows, ("run", "real?"))


def _seed_blocks(seeds: Sequence[Mapping[str, Any]], settings: Iterable[str]) -> list[Block]:
    shown = [key for key in settings if key != SEED]
    columns = [
        *("settings", "seeds", "n", "val loss, mean", "val loss, s.d.", "n tested", "test loss, mean"),
        "test loss, s.d.",
    ]
    rows = [
        [
            _settings_text({key: group["settings"].get(key) for key in shown}) or "all the same",
            ", ".join(map(str, group["seeds"])),
            *(str(group["n"]), _number(group["val_mean"], ".6f"), _number(group["val_sd"], ".6f")),
            *(str(group["n_tested"]), _number(group["test_mean"], ".6f"), _number(group["test_sd"], ".6f")),
        ]
        for group in seeds
    ]
    text = (
        f"Finished runs that differ in nothing but `{SEED}`, which decides the adapters' initial values and the order "
        "of examples. Each run's lowest validation loss, and the test loss where it was tested. s.d.: sample standard "
        "deviation (n - 1) between runs."
    )
    return [Table(columns, rows, ("settings", "seeds")), Paragraph(text)]


def _alt(runs: Sequence[Run]) -> str:
    count = f"{len(runs)} runs" if len(runs) != 1 else "the run"
    alt = f"Line plot of training and validation loss over optimizer steps for {count}."
    if runs and (best := runs[0].best):
        alt += f" Lowest validation loss: {best['val_loss']:.6f} at step {best['step']:,.0f}, by {runs[0].name}."
    return alt


def _base_loss(run: Run) -> float | None:
    return run.evaluations.get("validation-base", {}).get("validation_loss")


def _base_figures(run: Run) -> str | None:
    base = run.evaluations.get("test-base")
    if base is None:
        return None
    return (
        f"loss {base['test_loss']:.6f}, perplexity {base['test_perplexity']:.3f}, token accuracy "
        f"{base['test_token_accuracy']:.4f}"
    )


def _validated_on(run: Run) -> str | None:
    """What the validation split consists of, if the run has recorded it."""
    data = run.environment.get("data")
    if not isinstance(data, Mapping) or "fingerprint" not in data:
        return None
    return json.dumps([data["fingerprint"], data.get("split_seed"), (data.get("splits") or {}).get("validation")])


# -- cells -------------------------------------------------------------------------------------------------------


def _setting(run: Run, key: str) -> str:
    return _value(run.config.get(key)) if run.config else "?"


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in settings.items())


def _value(value: Any) -> str:
    """A setting, as YAML would have it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def _interval(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _log(interval: Interval) -> Interval:
    """A perplexity's interval as the loss's: BCa intervals go through exp unchanged."""
    return replace(interval, low=math.log(interval.low), high=math.log(interval.high))


def _lowest(values: Sequence[float | None]) -> list[int]:
    """Places of the lowest number, of all equal ones; none where there is nothing to choose from."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    return [place for place, value in enumerate(values) if len(there) > 1 and value == min(there)]


def _duration(seconds: float) -> str:
    if not seconds:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
