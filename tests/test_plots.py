"""Plots of one run and of many."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_lab.plots import SHOWN, Curve, Panel, _style, curve, draw, limits, loss_curve, running_mean, saved
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


def test_colours_markers_and_lines_tell_ten_runs_apart() -> None:
    styles = [_style(place) for place in range(SHOWN)]
    assert len({style["marker"] for style in styles}) == SHOWN
    assert len({(style["color"], style["linestyle"]) for style in styles}) == SHOWN


def test_a_run_that_diverged_flattens_no_other() -> None:
    good = Curve("good", [], [(1, 1.0), (2, 0.9), (3, 0.8)])
    bad = Curve("bad", [], [(1, 5.0)])
    ends = limits([good, bad])
    assert ends is not None
    assert ends[0] < 0.8 < 1.0 < ends[1] < 2.0
    assert limits([good]) is None
    assert limits([Curve("nan", [], [(1, math.nan)])]) is None
    part = draw([Panel("", [good, bad])]).subfigs[0]
    assert [text.get_text() for text in part.legends[0].get_texts()][:2] == ["good", "bad\n(above the axes)"]
    assert part.axes[0].get_ylim() == pytest.approx(ends)


def test_further_runs_are_grey_and_one_line_of_the_legend() -> None:
    curves = [Curve(f"run {i}", [], [(1, 2.0 + i), (2, 1.0 + i)]) for i in range(13)]
    part = draw([Panel("", curves)]).subfigs[0]
    labels = [text.get_text() for text in part.legends[0].get_texts()]
    assert labels[9:12] == ["run 9", "3 further runs", "with markers: validation loss"]
    assert len(part.legends[0].legend_handles) == len(labels)
    lines = [line for line in part.axes[0].lines if len(line.get_xdata())]
    assert len(lines) == 13
    assert len({line.get_color() for line in lines[10:]}) == 1
    assert [line.get_zorder() for line in lines] == sorted((line.get_zorder() for line in lines), reverse=True)


def test_legend_and_axes_do_not_overlap() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    curves = [
        Curve(f"a_long_name_of_a_run_with_many_settings_in_it_{'x' * 40}_{i}", [(1, 2.0)], [(1, 2.0), (2, 1.0 + i)])
        for i in range(12)
    ]
    for narrow in (False, True):
        figure = draw([Panel("", curves), Panel("a title", curves[:4])], narrow=narrow)
        FigureCanvasAgg(figure).draw()
        boxes = []
        for part in figure.subfigs:
            boxes += [part.axes[0].get_tightbbox(), part.legends[0].get_window_extent()]
        for place, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 + 1
            assert box.x1 <= figure.bbox.x1 + 1
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
    first, second = (saved(draw([Panel("", [])]), "svg") for _ in range(2))
    assert first == second
    assert first.startswith(b"<?xml")
