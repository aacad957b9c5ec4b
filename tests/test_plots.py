"""Plots of one run and of many."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_lab.plots import COLOURS, MARKERS, Curve, curve, draw, limits, loss_curve, running_mean, saved
from lightning_lab.rundir import MetricsRow, read_metrics
from tests.experiments.directories import HEADER, train_row, validation_row


def test_importing_it_draws_nothing() -> None:
    code = "import sys, lightning_lab.plots; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_running_mean_is_over_a_twentieth_of_the_steps() -> None:
    losses = np.random.default_rng(0).normal(2.0, 0.5, 100)
    points = running_mean(list(zip(range(1, 101), losses.tolist(), strict=True)))
    assert [step for step, _ in points] == list(range(1, 101))
    assert points[99][1] == pytest.approx(losses[95:].mean())
    assert points[50][1] == pytest.approx(losses[46:51].mean())
    assert points[1][1] == pytest.approx(losses[:2].mean())  # of those that there are
    few = [(1, 2.0), (2, 3.0)]
    assert running_mean(few) == few


def test_a_long_run_is_thinned_and_keeps_its_last_step() -> None:
    points = running_mean([(step, float(step)) for step in range(1, 10_001)])
    assert 400 <= len(points) <= 800
    assert points[-1] == (10_000, pytest.approx(np.arange(9501, 10_001).mean()))


def test_the_curve_of_metrics() -> None:
    rows = [{"step": 1.0, "train_loss": 2.0}, {"step": 1.0, "val_loss": 1.5}, {"step": 2.0, "train_loss": 1.0}]
    found = curve("a", [MetricsRow("", row) for row in rows])
    assert found == Curve("a", [(1, 2.0), (2, 1.0)], [(1, 1.5)])


def test_validation_is_thick_and_training_thin_and_the_first_run_lies_on_top() -> None:
    count = len(COLOURS) * len(MARKERS)
    curves = [Curve(f"run {i}", [(1, 3.0 + i), (2, 2.0)], [(1, 2.0 + i), (2, 1.0 + i)]) for i in range(count)]
    axes = draw({"": curves}).axes[0]
    train, validation = axes.lines[::2], axes.lines[1::2]
    assert all(line.get_linewidth() < 1 for line in train)
    assert all(line.get_linewidth() > 1 for line in validation)
    assert len({(line.get_color(), line.get_marker()) for line in validation}) == count  # all can be told apart
    assert [line.get_color() for line in train] == [line.get_color() for line in validation]
    assert [line.get_zorder() for line in validation] == sorted((v.get_zorder() for v in validation), reverse=True)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [curve.name for curve in curves]
    handles = [handle for handle in legend.legend_handles if handle is not None]
    assert [handle.get_color() for handle in handles] == [line.get_color() for line in validation]  # type: ignore[attr-defined]


def test_a_run_that_diverged_flattens_no_other() -> None:
    good = Curve("good", [], [(1, 1.0), (2, 0.9), (3, 0.8)])
    bad = Curve("bad", [], [(1, 5.0)])
    ends = limits([good, bad])
    assert ends is not None
    assert ends[0] < 0.8 < 1.0 < ends[1] < 2.0
    assert limits([good]) is limits([]) is None
    assert limits([Curve("nan", [], [(1, math.nan)])]) is None
    assert draw({"": [good, bad]}).axes[0].get_ylim() == pytest.approx(ends)


def test_legend_and_axes_do_not_overlap() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    curves = [
        Curve(f"a_long_name_of_a_run_with_many_settings_in_it_{'x' * 40}_{i}", [(1, 2.0)], [(1, 2.0), (2, 1.0 + i)])
        for i in range(12)
    ]
    figure = draw({"a title": curves, "another": curves[:4]})
    FigureCanvasAgg(figure).draw()
    boxes = []
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None
        boxes += [axes.get_window_extent(), legend.get_window_extent()]
    for place, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 + 1
        assert box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= box.y0 + 1
        assert not any(box.padded(-2).overlaps(other) for other in boxes[:place])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        *([], [train_row(1, 2.0)], [validation_row(1, 2.0)], [train_row(1, 2.0), validation_row(1, 2.0)]),
        [train_row(1, 2.0), validation_row(1, math.nan)],
        [train_row(1, 2.0), train_row(2, 90.0), train_row(3, 2.0), validation_row(3, 1e9)],
    ],
)
def test_a_runs_own_curve_with_little_or_odd_to_draw(tmp_path: Path, rows: list[str]) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + "\n" + "".join(rows))
    loss_curve(read_metrics(tmp_path / "metrics.csv")[0], tmp_path / "loss_curve.png", "a $run_1")
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss_curve.png").stat().st_size > 5000


def test_nothing_to_draw_and_the_same_bytes_twice() -> None:
    first, second = (saved(draw({"": []}), "svg") for _ in range(2))
    assert first == second
    assert first.startswith(b"<?xml")
