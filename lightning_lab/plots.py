"""The losses of one run or of many in one plot, wide for a page and narrow for a phone."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lab.files import write_whole
from lightning_lab.rundir import MetricsRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness, without the yellow that white swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
SHOWN = 10  # runs that a reader can follow; the others are drawn in grey
GREY = "#b0b0b0"
TRAIN_POINTS = 400  # of a training curve; more than a plot has pixels to show
LINE_INCHES = 0.17  # a legend's line at 8 points, with the space between entries
# Names are text, not formulas; a fixed salt gives the same file for the same runs.
STYLE = {
    "font.size": 9,
    "text.parse_math": False,
    "svg.hashsalt": "lightning_lab",
    "axes.grid": True,
    "grid.alpha": 0.3,
}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One run's losses.

    Attributes:
        name: Shown in the legend.
        train: Step and training loss, nats per supervised token.
        validation: Step and validation loss.

    """

    name: str
    train: Points
    validation: Points


@dataclass(frozen=True)
class Panel:
    """Curves that share axes, the most important first."""

    title: str
    curves: Sequence[Curve]
    train_label: str = "training loss, running mean over a twentieth of the steps"


def curve(name: str, metrics: Iterable[MetricsRow]) -> Curve:
    """A run's curve, its training loss as the running mean over a twentieth of its steps."""
    rows = [row.values for row in metrics]
    train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    return Curve(name, running_mean(train), [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row])


def running_mean(points: Points) -> Points:
    """The means of the twentieth of all points that ends with each, thinned to at most twice `TRAIN_POINTS`."""
    window, every = max(1, len(points) // 20), max(1, len(points) // TRAIN_POINTS)
    kept = range(len(points) - 1, -1, -every)[::-1]
    parts = [points[max(0, last + 1 - window) : last + 1] for last in kept]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Ends of the loss axis that keep a run that diverged from flattening the others; None where nothing sticks out."""
    losses = [loss for curve in curves for _, loss in (*curve.train, *curve.validation) if math.isfinite(loss)]
    if not losses:
        return None
    low, middle = min(losses), statistics.median(losses)
    if middle == low or max(losses) < middle + 6 * (middle - low):
        return None
    high = middle + 3 * (middle - low)
    return low - 0.05 * (high - low), high


def draw(panels: Sequence[Panel], *, narrow: bool = False) -> Figure:
    """Draw panels below each other, each with its legend beside it, or below it on a phone.

    Args:
        panels: What to draw.
        narrow: For 390 pixels.

    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        legends = [_labels(panel, 44 if narrow else 30) for panel in panels]
        lines = [sum(label.count("\n") + 1 for label in labels) for labels in legends]
        heights = [3.0 + LINE_INCHES * n if narrow else max(4.2, 0.6 + LINE_INCHES * n) for n in lines]
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(3.9 if narrow else 10, sum(heights)), layout=layout)
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, panel, labels in zip(parts, panels, legends, strict=True):
            axes = part.add_subplot()
            axes.set_title(textwrap.fill(panel.title, 48 if narrow else 120), loc="left", fontsize=9)
            handles = _draw_panel(axes, panel)
            if panel.curves:
                place = "outside lower left" if narrow else "outside right upper"
                part.legend(handles, labels, loc=place, frameon=False, fontsize=8, handlelength=3.2)
        return figure


def saved(figure: Figure, form: str) -> bytes:
    """A figure as ``svg``, letters as outlines so that it looks the same everywhere, or as ``png``."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run's name may have any letter
        figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def loss_curve(metrics: Iterable[MetricsRow], path: Path, title: str) -> None:
    """Write ``loss_curve.png``: training and validation loss over optimizer steps.

    Args:
        metrics: Rows of ``metrics.csv``.
        path: The file.
        title: The run's name.

    Raises:
        LabError: It cannot be written.

    """
    write_whole(path, saved(draw([Panel("", [curve(title, metrics)])]), "png"))


def _style(place: int) -> dict[str, Any]:
    """Colour, marker and line of the curve at a place; repeats after 140."""
    if place >= SHOWN:
        return {"color": GREY, "linewidth": 0.8}
    look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place], "linestyle": LINES[place % len(LINES)]}
    return {**look, "markersize": 5, "linewidth": 1.5}


def _draw_panel(axes: Any, panel: Panel) -> list[Any]:
    """Draw the curves; return a line for each entry of `_labels`."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if not any(curve.train or curve.validation for curve in panel.curves):
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center")
    thick = []
    for place, curve in enumerate(panel.curves):
        style, order = _style(place), 2.4 - 0.4 * place / len(panel.curves)  # the most important on top
        thin = {"color": style["color"], "linewidth": 0.7, "alpha": 0.55, "zorder": order}
        thin_dot, dot = ("." if len(points) == 1 else None for points in (curve.train, curve.validation))  # no line
        axes.plot(*_columns(curve.train), marker=thin_dot, **thin)
        every = max(1, len(curve.validation) // 25)
        thick += axes.plot(*_columns(curve.validation), **{"marker": dot, **style}, zorder=order, markevery=every)
    axes.set_ylim(limits(panel.curves))
    explained = (
        Line2D([], [], color="#555555", marker="o", markersize=4),
        Line2D([], [], color="#555555", linewidth=0.7),
    )
    return [*thick[: SHOWN + 1], *explained]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _labels(panel: Panel, width: int) -> list[str]:
    """The legend: the curves in order, those in grey as one, then what thick and thin lines are."""
    ends = limits(panel.curves)
    names = []
    for curve in panel.curves[:SHOWN]:
        losses = [loss for _, loss in curve.validation]
        hidden = ends is not None and bool(losses) and min(losses) > ends[1]
        # broken after underscores where possible
        name = textwrap.fill(curve.name.replace("_", "_ "), width, max_lines=3, placeholder=" …").replace("_ ", "_")
        names.append(name + "\n(above the axes)" * hidden)
    if len(panel.curves) > SHOWN:
        names.append(f"{len(panel.curves) - SHOWN} further runs")
    return [*names, "with markers: validation loss", textwrap.fill(f"thin: {panel.train_label}", width)]
