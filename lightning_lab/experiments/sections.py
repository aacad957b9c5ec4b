"""A summary of runs as Markdown: what is shown, and with how many digits."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_lab.experiments.compare import Comparison, Interval
from lightning_lab.experiments.runs import REPORT_FILES, SEED, Run
from lightning_lab.experiments.summary import Summary, published
from lightning_lab.losses import lab_table
from lightning_lab.tables import NONE, Table, escape, numbers

Block = str | Table
SETTING_COLUMNS = 6  # in the ranking; more settings than that get a table of their own
COVERS = (
    "An interval covers other conversations, drawn from the same population as the split and answered by these trained "
    "adapters. It does not cover another seed's run: whether a setting is better takes several seeds."
)


def document(summary: Summary, *, marked: bool = False) -> str:
    """The whole report; the best values are bold where ``marked``."""
    runs = summary.runs
    blocks: list[Block] = [f"# {escape(summary.title)}", "## Runs", _states(summary)]
    if runs:
        blocks += _ranking(summary)
    blocks += ["## Losses", *_figure(runs), *_loss_tables(runs)]
    if summary.reference:
        blocks += _reference(runs)
    if summary.seeds:
        blocks += _seeds(summary)
    if len(runs) > 1:
        blocks += [f"## Comparisons on the {summary.split} split", *_comparisons(summary)]
    if lost := [trial for trial in summary.trials if trial["state"] in ("failed", "pruned")]:
        columns = ("trial", "state", "settings", "error")
        rows = [
            (trial["name"], trial["state"], _settings(trial["settings"]), str(trial["error"] or NONE)) for trial in lost
        ]
        blocks += ["## Trials that failed or were pruned", Table(columns, rows, columns)]
    return "\n\n".join(b if isinstance(b, str) else b.markdown(marked=marked) for b in blocks) + "\n"


def ranking_table(summary: Summary) -> Table:
    """One row a run, the lowest validation loss first."""
    runs = summary.runs
    settings = summary.settings if len(summary.settings) <= SETTING_COLUMNS else []
    best, test = [run.best or {} for run in runs], [run.evaluations.get("test", {}) for run in runs]
    losses = [row.get("test_loss") for row in test]
    columns = {
        "rank": [str(rank) if run.best else NONE for rank, run in enumerate(runs, start=1)],
        "run": [run.name for run in runs],
        **{key: [_setting(run, key) for run in runs] for key in settings},
        "best val loss": numbers([row.get("val_loss") for row in best], ".6f", min),
        "at step": numbers([row.get("step") for row in best], ",.0f"),
        "test loss": numbers(losses, ".6f", min, missing="not tested"),
        "test perplexity": numbers([row.get("test_perplexity") for row in test], ".3f", min),
        "test token accuracy": numbers([row.get("test_token_accuracy") for row in test], ".4f", max),
        "trainable parameters": numbers([run.trainable_parameters for run in runs], ",d"),
        "time in steps": [_duration(run.seconds) for run in runs],
        "real tokens/s": numbers([run.tokens_per_second for run in runs], ",.0f"),
        "peak memory (MiB)": numbers([run.peak_memory_mib for run in runs], ",.0f"),
        "state": [run.described_state for run in runs],
    }
    values = {key: [run.config.get(key) for run in runs if run.config] for key in settings}
    text = [key for key in settings if not all(type(value) in (int, float) for value in values[key])]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), ("run", "state", *text))


def comparison_markdown(found: Comparison) -> str:
    """One comparison: its sentence, the table, and what the intervals cover."""
    return f"{escape(found.sentence)}\n\n{_comparison_table([found]).markdown()}\n\n{COVERS}\n"


def _states(summary: Summary) -> str:
    lines = [f"{run.name}: {run.described_state}" for run in summary.runs]
    if summary.trials:
        counts = Counter(trial["state"] for trial in summary.trials)
        lines.append(f"trials of sweeps: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    return _items(lines + [f"damaged: {line}" for line in summary.damaged])


def _ranking(summary: Summary) -> list[Block]:
    several = len(summary.runs) > 1
    blocks: list[Block] = ["## Ranking" if several else "## Result", ranking_table(summary)]
    if several:
        blocks.append("Ranked by the lowest validation loss; the test split takes no part in the choice.")
    blocks += [escape(note) for note in summary.notes]
    if len(summary.settings) > SETTING_COLUMNS:
        rows = [[key, *(_setting(run, key) for run in summary.runs)] for key in summary.settings]
        names = [run.name for run in summary.runs]
        blocks += ["### Settings in which the runs differ", Table(["setting", *names], rows, ["setting"])]
    return blocks


def _figure(runs: Sequence[Run]) -> list[Block]:
    alt = f"Line plot of training and validation loss over optimizer steps, {len(runs)} run{'s' * (len(runs) > 1)}."
    if runs and (best := runs[0].best):
        alt += f" Lowest validation loss: {best['val_loss']:.6f} at step {best['step']:,.0f}."
    caption = (
        "Losses over optimizer steps. Validation: the whole split, weighted by tokens. Training: running mean over a "
        "twentieth of the steps."
    )
    return [f"![{alt}]({REPORT_FILES[-1]})", caption]


def _loss_tables(runs: Sequence[Run]) -> list[Block]:
    cells: dict[str, dict[str, str]] = {}
    tables: list[Block] = []
    for run in runs:
        base = run.evaluations.get("validation-base", {}).get("validation_loss")
        if run.losses or base is not None:
            cells[run.name] = ({} if base is None else {"0 (base)": f"{base:.6f}"}) | _pairs(run.losses)
            tables += [f"### {escape(run.name)}", lab_table(run.losses, base)]
    if not tables:
        return ["No run has a validation yet."]
    text = "Training loss: mean over the steps since the row before. Validation loss: weighted by tokens."
    if len(cells) == 1:
        return [text, *tables]
    return [text, "### All runs: training loss / validation loss", _side_by_side(cells), *tables]


def _pairs(losses: Iterable[tuple[int, float | None, float | None]]) -> dict[str, str]:
    """The lab's cells by step, such as ``0.9648 / 0.879919``."""
    rows = list(losses)
    train, validation = numbers([row[1] for row in rows], ".4f"), numbers([row[2] for row in rows], ".6f")
    return {str(row[0]): f"{mean} / {loss}" for row, mean, loss in zip(rows, train, validation, strict=True)}


def _side_by_side(columns: Mapping[str, Mapping[str, str]]) -> Table:
    """Several runs' cells, a row for each step that one of them has."""
    steps = sorted({step for cells in columns.values() for step in cells}, key=lambda step: int(step.split()[0]))
    return Table(["step", *columns], [[step, *(cells.get(step, "") for cells in columns.values())] for step in steps])


def _reference(runs: Sequence[Run]) -> list[Block]:
    lab = published()
    columns = {}
    for run in (run for run in runs if run.losses):
        hf = [row.get("val_loss_hf") for row in run.validation]
        columns[run.name] = _pairs((step, train, loss) for (step, train, _), loss in zip(run.losses, hf, strict=True))
    for column in lab["runs"]:
        columns[column["name"]] = _pairs(zip(lab["steps"], column["train"], column["validation"], strict=True))
    text = (
        f"Columns that begin with lab: {lab['label']}. Its validation losses are Hugging Face's mean of batch means at "
        "batch size 8, so the runs' `val_loss_hf`, the same figure, stands beside them here."
    )
    title = "### Training loss / validation loss as Hugging Face prints it"
    return ["## Beside the lab's numbers", title, _side_by_side(columns), text]


def _seeds(summary: Summary) -> list[Block]:
    groups = summary.seeds
    columns = {
        "settings": [_settings(group["settings"]) or "all the same" for group in groups],
        "seeds": [", ".join(map(str, group["seeds"])) for group in groups],
        "n": [str(group["n"]) for group in groups],
        "val loss, mean": numbers([group["val_mean"] for group in groups], ".6f"),
        "val loss, s.d.": numbers([group["val_sd"] for group in groups], ".6f"),
        "n tested": [str(group["n_tested"]) for group in groups],
        "test loss, mean": numbers([group["test_mean"] for group in groups], ".6f"),
        "test loss, s.d.": numbers([group["test_sd"] for group in groups], ".6f"),
    }
    text = (
        f"Finished runs that differ in nothing but `{SEED}`, which decides the adapters' initial values and the order "
        "of examples. Each run's lowest validation loss, and the test loss where it was tested. s.d.: sample standard "
        "deviation (n - 1) between runs."
    )
    table = Table(list(columns), list(zip(*columns.values(), strict=True)), ("settings", "seeds"))
    return ["## Over seeds", table, text]


def _comparisons(summary: Summary) -> list[Block]:
    found, refused = summary.compared
    blocks: list[Block] = []
    if found:
        text = f"Differences are to {escape(found[0].a)}, the best on validation. {COVERS}"
        if found[0].comparisons > 1:
            text += (
                f" Each interval is at {100 * found[0].level:.4g} %, so that all {found[0].comparisons} together hold "
                f"at {100 * found[0].family_level:g} %."
            )
        blocks = [_items([c.sentence for c in found]), _comparison_table(found), text]
    if refused:
        blocks.append(_items([f"not compared: {line}" for line in refused]))
    return blocks or ["Nothing to compare: fewer than two runs have a validation loss."]


def _comparison_table(found: Sequence[Comparison]) -> Table:
    first = found[0]
    rows = [(first.a, *_figures(first.loss_a, first.loss_a_interval), NONE, NONE, NONE)]
    for c in found:
        finding = ("better" if c.difference < 0 else "worse") if c.is_real else "cannot be told"
        figures = *_figures(c.loss_b, c.loss_b_interval), f"{c.difference:+.6f}", _ends(c.interval, "+.6f")
        rows.append((c.b, *figures, finding))
    interval = f"{100 * first.level:.4g} % interval"
    columns = ("run", f"{first.split} loss", interval, "perplexity", interval, "difference in loss", interval, "real?")
    return Table(columns, rows, ("run", "real?"))


def _figures(loss: float, interval: Interval) -> tuple[str, str, str, str]:
    """Loss and perplexity, each with its interval, whose ends go through exp as the loss does."""
    value, low, high = (math.exp(x) if x < 709 else math.inf for x in (loss, interval.low, interval.high))
    return f"{loss:.6f}", _ends(interval, ".6f"), f"{value:.3f}", _ends(Interval(low, high), ".3f")


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"* {escape(line)}" for line in lines)


def _ends(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _setting(run: Run, key: str) -> str:
    return _value(run.config.get(key)) if run.config else "?"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in settings.items())


def _value(value: Any) -> str:
    """A setting, as YAML would have it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds else NONE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
