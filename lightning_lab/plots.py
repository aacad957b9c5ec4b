"""The losses of one run or of many in one plot."""

from __future__ import annotations

import io
import statistics
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_lab.files import write_whole
from lightning_lab.rundir import MetricsRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness, without the yellow that white swallows. With
# the markers, whose number has no divisor in common with theirs, 70 curves differ.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX*<>"
TRAIN_POINTS = 400  # of a training curve; more than a plot has pixels to show
LARGEST = 1e300  # of a loss that is drawn: matplotlib's arithmetic overflows beyond
LINE_INCHES = 0.17  # a legend's line at 8 points, with the space between entries
OF_RUNS = "thick: validation loss; thin: training loss, running mean over a twentieth of the steps"
# Names are text, not formulas; a fixed salt gives the same file for the same runs.
STYLE = {
    "font.size": 9,
    "text.parse_math": False,
    "svg.hashsalt": "lightning_lab",
    "axes.grid": True,
    "grid.alpha": 0.3,
}

Points = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    """One run's losses.

    Attributes:
        name: Shown in the legend.
        train: Step and training loss, nats per supervised token.
        validation: Step and validation loss.

    """

    name: str
    train: Points
    validation: Points


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
    losses = [loss for curve in curves for _, loss in (*curve.train, *curve.validation) if abs(loss) < LARGEST]
    low, middle = min(losses, default=0.0), statistics.median(losses or [0.0])
    high = middle + 5 * (middle - low)
    return (low - 0.05 * (high - low), high) if low < high < max(losses, default=0.0) else None


def draw(panels: Mapping[str, Sequence[Curve]]) -> Figure:
    """Draw panels below each other, by title, with legends beside them; a panel's first curve lies on top."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        labels = [[textwrap.fill(curve.name, 32) for curve in curves] for curves in panels.values()]
        heights = [max(4.2, 1 + LINE_INCHES * len("\n".join(names).splitlines())) for names in labels]
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, curves), names in zip(grid, panels.items(), labels, strict=True):
            axes.set_title(title, loc="left", fontsize=9)
            axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            thick = []
            for place, curve in enumerate(curves):
                colour, order = COLOURS[place % len(COLOURS)], 3 - place / len(curves)
                lines = (np.reshape(points, (-1, 2)).T for points in (curve.train, curve.validation))
                train, validation = (np.where(np.abs(line) < LARGEST, line, np.nan) for line in lines)
                axes.plot(*train, color=colour, zorder=order, linewidth=0.7, alpha=0.55)
                look = {"marker": MARKERS[place % len(MARKERS)], "markersize": 5, "linewidth": 1.5}
                every = max(1, len(curve.validation) // 25)
                thick += axes.plot(*validation, color=colour, zorder=order, markevery=every, **look)
            axes.set_ylim(limits(curves))
            axes.legend(thick, names, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
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
    write_whole(path, saved(draw({OF_RUNS: [curve(title, metrics)]}), "png"))
