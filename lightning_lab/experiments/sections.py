"""A summary of runs as Markdown: what is shown, and with how many digits."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lab.experiments.compare import Comparison, Interval
from lightning_lab.experiments.reference import as_published, lab_run, less_published
from lightning_lab.experiments.runs import REPORT_FILES, SEED, Run
from lightning_lab.experiments.summary import Summary
from lightning_lab.loss_table import Loss, lab_table, window_note
from lightning_lab.rundir import base_loss
from lightning_lab.tables import NONE, Table, escape, numbers

Block = str | Table
FIGURE = (
    f"![Training and validation losses of the runs over optimizer steps]({REPORT_FILES[-1]})\n\n"
    "Losses over optimizer steps. Thick: validation, the whole split, weighted by tokens. Thin: training, running mean "
    "over a twentieth of the steps. Losses far above the others leave the axes."
)
COVERS = (
    "An interval covers other conversations, drawn from the same population as the split and answered by these trained "
    "adapters. It does not cover another seed's run: whether a setting is better takes several seeds."
)


def document(summary: Summary, *, marked: bool = False) -> str:
    """The whole report; the best values are bold where ``marked``."""
    runs = summary.runs
    several = len(runs) > 1
    blocks: list[Block] = [f"# {escape(summary.title)}", "## Runs", _states(summary)]
    if runs:
        blocks += ["## Ranking" if several else "## Result", ranking_table(summary)]
    if several:
        blocks.append("Ranked by the lowest validation loss; the test split takes no part in the choice.")
    blocks += [*map(escape, summary.notes), *_other_data(runs), "## Losses", FIGURE, *_loss_tables(runs)]
    if summary.reference:
        blocks += _reference(runs, summary.reference)
    if summary.seeds:
        blocks += _seeds(summary.seeds)
    if several:
        blocks += [f"## Comparisons on the {summary.split} split", *_comparisons(summary)]
    if runs:
        blocks += summary.diary.blocks()
    return "\n\n".join(b if isinstance(b, str) else b.markdown(marked=marked) for b in blocks) + "\n"


def ranking_table(summary: Summary) -> Table:
    """One row a run, the lowest validation loss first."""
    runs = summary.runs
    settings = {key: [run.config.get(key, "?") for run in runs] for key in summary.settings}
    best, test = [run.best or {} for run in runs], [run.evaluations.get("test", {}) for run in runs]
    columns = {
        "rank": [str(rank) if run.best else NONE for rank, run in enumerate(runs, start=1)],
        "run": [run.name for run in runs],
        **{key: list(map(_value, values)) for key, values in settings.items()},
        "best val loss": numbers([row.get("val_loss") for row in best], ".6f", min),
        "at step": numbers([row.get("step") for row in best], ",.0f"),
        "test loss": numbers([row.get("test_loss") for row in test], ".6f", min, missing="not tested"),
        "test perplexity": numbers([row.get("test_perplexity") for row in test], ".3f", min),
        "test token accuracy": numbers([row.get("test_token_accuracy") for row in test], ".4f", max),
        "trainable parameters": numbers([run.trainable_parameters for run in runs], ",d"),
        "time in steps": [_duration(run.seconds) for run in runs],
        "real tokens/s": numbers([run.tokens_per_second for run in runs], ",.0f"),
        "peak memory (MiB)": numbers([run.peak_memory_mib for run in runs], ",.0f"),
        "state": [run.described_state for run in runs],
    }
    text = [key for key, values in settings.items() if not all(type(value) in (int, float) for value in values)]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), ("run", "state", *text))


def _other_data(runs: Sequence[Run]) -> list[Block]:
    """Evaluations of other conversations than the runs' own, by their source."""
    named = [(run.name, *name.partition("@"), own) for run in runs for name, own in run.evaluations.items()]
    rows = []
    for run, kind, at, source, own in named:
        loss, perplexity = (own[f"{kind.removesuffix('-base')}_{figure}"] for figure in ("loss", "perplexity"))
        if at:
            trained = own.get("trained")
            left_out = trained.get("conversations") if isinstance(trained, dict) else 0
            counts = _value(own.get("conversations")), _value(left_out)
            rows.append((source, run, kind, f"{loss:.6f}", f"{perplexity:.3f}", *counts))
    columns = ("source", "run", "split", "loss", "perplexity", "conversations", "trained on, left out")
    return ["## Evaluated on other data", Table(columns, sorted(rows), columns[:3])] if rows else []


def comparison_markdown(found: Comparison) -> str:
    """One comparison: its sentence, the table, and what the intervals cover."""
    return f"{escape(found.sentence)}\n\n{_comparison_table([found]).markdown()}\n\n{COVERS}\n"


def _states(summary: Summary) -> str:
    lines = [f"{run.name}: {run.described_state}" for run in summary.runs]
    if counts := Counter(trial["state"] for trial in summary.trials):
        lines.append(f"trials of sweeps: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    lines += [f"{trial['name']} {trial['state']}: {trial['error']}" for trial in summary.trials if trial["error"]]
    return _items(lines + [f"damaged: {line}" for line in summary.damaged])


def _loss_tables(runs: Sequence[Run]) -> list[Block]:
    found = [(run.name, lab_table(run.losses, base_loss(run.path))) for run in runs]
    tables = {name: table for name, table in found if table.rows}
    if not tables:
        return ["No run has a validation yet."]
    blocks: list[Block] = [
        "Validation loss: weighted by tokens. Training loss: a mean over the steps named below each run's own table."
    ]
    if len(tables) > 1:
        blocks += ["### All runs: training loss / validation loss", _side_by_side(tables)]
    for run in (run for run in runs if run.name in tables):
        blocks += [f"### {escape(run.name)}", tables[run.name], window_note(run.train_loss_window)]
    return blocks


def _side_by_side(tables: Mapping[str, Table]) -> Table:
    """Several runs' tables in one, a column each, a row for each step that one of them has."""
    cells = {
        name: {step: f"{train or NONE} / {loss}" for step, train, loss in table.rows} for name, table in tables.items()
    }
    steps = sorted({step for own in cells.values() for step in own}, key=lambda step: int(step.split()[0]))
    return Table(["step", *cells], [[step, *(own.get(step, "") for own in cells.values())] for step in steps])


def _reference(runs: Sequence[Run], lab: Mapping[str, Any]) -> list[Block]:
    steps, window, noise = lab["steps"], lab["train_loss_window"], lab["noise"]
    found = {run.name: lab_run(run.config, lab) for run in runs}
    blocks: list[Block] = ["## Beside the lab's numbers"]
    for split in ("validation", "test"):
        tables = {}
        for run in runs:
            if own := as_published(run, split, window):
                tables[run.name] = lab_table(own)
            if left := less_published(own, split, found[run.name][0], steps):
                tables[f"{run.name} less {found[run.name][0]['name']} ({noise})"] = lab_table(left)
        for column in lab["runs"]:
            if split in column:
                tables[column["name"]] = lab_table(map(Loss, steps, column["train"], column[split]))
        blocks += [f"### Training loss / {split} loss as Hugging Face prints it", _side_by_side(tables)]
    notes = [f"{name} is set otherwise than the lab: {', '.join(keys)}" for name, (_, keys) in found.items() if keys]
    return [*blocks, _items([f"Columns that begin with lab: {lab['label']}. {lab['measured']}", *notes])]


def _seeds(groups: Sequence[Mapping[str, Any]]) -> list[Block]:
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
    found = summary.comparisons
    blocks: list[Block] = []
    if found:
        text = f"Differences are to {escape(found[0].a)}, the best on validation. {COVERS}"
        if len(found) > 1:
            text += (
                f" Each interval is at {100 * found[0].level:.4g} %, so that all {len(found)} together hold at "
                f"{100 * found[0].family_level:g} %."
            )
        blocks = [_items([c.sentence for c in found]), _comparison_table(found), text]
    if summary.not_compared:
        blocks.append(_items([f"not compared: {line}" for line in summary.not_compared]))
    return blocks or ["Nothing to compare: fewer than two runs have a validation loss."]


def _comparison_table(found: Sequence[Comparison]) -> Table:
    first = found[0]
    rows = [(first.a, *_figures(first.loss_a, first.loss_a_interval), NONE, NONE, NONE)]
    for c in found:
        finding = ("better" if c.difference < 0 else "worse") if c.is_real else "cannot be told"
        difference = f"{c.difference:+.6f}", f"{c.interval:+.6f}"
        rows.append((c.b, *_figures(c.loss_b, c.loss_b_interval), *difference, finding))
    interval = f"{100 * first.level:.4g} % interval"
    columns = ("run", f"{first.split} loss", interval, "perplexity", interval, "difference in loss", interval, "real?")
    return Table(columns, rows, ("run", "real?"))


def _figures(loss: float, interval: Interval) -> tuple[str, str, str, str]:
    """Loss and perplexity, each with its interval, whose ends go through exp as the loss does."""
    value, low, high = (math.exp(x) if x < 709 else math.inf for x in (loss, interval.low, interval.high))
    return f"{loss:.6f}", f"{interval:.6f}", f"{value:.3f}", f"{Interval(low, high):.3f}"


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"* {escape(line)}" for line in lines)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in settings.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds else NONE
    minutes, rest = divmod(round(seconds, 0), 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes < 60 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
