"""The losses of many runs in one plot, wide for a page and narrow for a phone."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_lab.experiments.runs import Run

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
        train: Step and training loss, nats per supervised token, smoothed.
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
    train_label: str


def curve_of(run: Run, name: str) -> Curve:
    """A run's curve, its training loss as the running mean over a twentieth of its steps."""
    steps = [row["step"] for row in run.train]
    losses = [row["train_loss"] for row in run.train]
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    every = max(1, len(means) // TRAIN_POINTS)
    train = list(zip(steps, means, strict=True))
    return Curve(name, train[::-every][::-1], [(row["step"], row["val_loss"]) for row in run.validation])


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


def draw(panels: Sequence[Panel], *, narrow: bool) -> Figure:
    """Draw panels below each other, each with its legend beside it, or below it on a phone.

    Args:
        panels: What to draw.
        narrow: For 390 pixels.

    """
    with matplotlib.rc_context(STYLE):
        wrap = 44 if narrow else 30
        legends = [_legend(panel, wrap) for panel in panels]
        lines = [sum(label.count("\n") + 1 for _, label in legend) for legend in legends]
        heights = [3.0 + LINE_INCHES * n if narrow else max(4.2, 0.6 + LINE_INCHES * n) for n in lines]
        figure = Figure(
            figsize=(3.9 if narrow else 10, sum(heights)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        )
        subfigures = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for subfigure, panel, legend in zip(subfigures, panels, legends, strict=True):
            axes = subfigure.add_subplot()
            _draw_panel(axes, panel)
            axes.set_title(textwrap.fill(panel.title, 48 if narrow else 120), loc="left", fontsize=9)
            if legend:
                place = "outside lower left" if narrow else "outside right upper"
                handles, labels = zip(*legend, strict=True)
                subfigure.legend(handles, labels, loc=place, frameon=False, fontsize=8, handlelength=3.2)
        return figure


def svg(figure: Figure) -> str:
    """A figure as SVG text, letters as outlines so that it looks the same everywhere."""
    return _saved(figure, format="svg", metadata={"Date": None}).decode()


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    return _saved(figure, format="png", dpi=150)


def _saved(figure: Figure, **options: Any) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run's name may have any letter
        figure.savefig(file, **options)
    return file.getvalue()


def _style(place: int) -> dict[str, Any]:
    """Colour, marker and line of the curve at a place; repeats after 140."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if not any(curve.train or curve.validation for curve in panel.curves):
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center")
        return
    for place, curve in reversed(list(enumerate(panel.curves))):  # the most important on top
        shown = place < SHOWN
        style = _style(place) if shown else {"color": GREY, "linewidth": 0.8}
        if curve.train:
            dot = "." if len(curve.train) == 1 else None  # a line through one step shows nothing
            axes.plot(*zip(*curve.train, strict=True), color=style["color"], linewidth=0.7, alpha=0.55, marker=dot)
        if curve.validation:
            every = max(1, len(curve.validation) // 25)
            lone = {"marker": "."} if len(curve.validation) == 1 else {}
            axes.plot(*zip(*curve.validation, strict=True), **{**lone, **style}, markevery=every if shown else None)
    axes.set_ylim(limits(panel.curves))


def _legend(panel: Panel, wrap: int) -> list[tuple[Line2D, str]]:
    """Handles and labels: the curves in order, then what thick and thin lines are."""
    if not panel.curves:
        return []
    ends = limits(panel.curves)
    entries = []
    for place, curve in enumerate(panel.curves[:SHOWN]):
        losses = [loss for _, loss in curve.validation]
        hidden = ends is not None and bool(losses) and min(losses) > ends[1]
        entries.append((Line2D([], [], **_style(place)), _wrap(curve.name, wrap) + "\n(above the axes)" * hidden))
    if len(panel.curves) > SHOWN:
        entries.append((Line2D([], [], color=GREY), f"{len(panel.curves) - SHOWN} further runs"))
    entries.append((Line2D([], [], color="#555555", marker="o", markersize=4), "with markers: validation loss"))
    entries.append((Line2D([], [], color="#555555", linewidth=0.7), textwrap.fill(panel.train_label, wrap)))
    return entries


def _wrap(name: str, width: int) -> str:
    """Lines of a name, broken after its underscores where possible."""
    return textwrap.fill(name.replace("_", "_ "), width, max_lines=3, placeholder=" …").replace("_ ", "_")
