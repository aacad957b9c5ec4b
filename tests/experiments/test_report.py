"""``report`` through the command line, on run directories written here by hand."""

import ast
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_lab.__main__ import main
from lightning_lab.errors import LabError
from lightning_lab.experiments.report import Report, read_report, write_report
from tests.experiments.test_runs import HEADER, locked, train_row, validation_row, write_run

ROOT = Path(__file__).parents[2]
# The lab's own numbers, typed from its README: step, then training and validation loss of each run.
BASELINE = [
    *((250, 0.9648, 0.879919), (500, 0.8951, 0.862609), (750, 0.8895, 0.850912)),
    *((1000, 0.8415, 0.843649), (1250, 0.8395, 0.838236), (1500, 0.8276, 0.835800)),
]
LR1E_4 = [
    *((250, 0.9706, 0.886649), (500, 0.9017, 0.870335), (750, 0.8985, 0.860288)),
    *((1000, 0.8526, 0.854131), (1250, 0.8518, 0.850037), (1500, 0.8362, 0.848186)),
]
LR3E_4 = [
    *((250, 0.9643, 0.878334), (500, 0.8931, 0.860638), (750, 0.8861, 0.847848)),
    *((1000, 0.8371, 0.839488), (1250, 0.8335, 0.832875), (1500, 0.8245, 0.829798)),
]
R32 = [
    *((250, 0.9636, 0.877421), (500, 0.8926, 0.859224), (750, 0.8833, 0.844791)),
    *((1000, 0.8301, 0.834480), (1250, 0.8257, 0.825617), (1500, 0.8177, 0.821687)),
]


def lab_rows(losses: Sequence[tuple[int, float, float]]) -> list[str]:
    """Two optimizer steps before each validation, whose mean is the training loss."""
    rows = []
    for step, train, validation in losses:
        rows += [train_row(step - 1, train - 0.25), train_row(step, train + 0.25), validation_row(step, validation)]
    return rows


def write_lab_run(path: Path, losses: Sequence[tuple[int, float, float]], **settings: Any) -> Path:
    return write_run(path, lab_rows(losses), total=1500, **settings)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The lab's four runs."""
    runs = tmp_path / "runs"
    write_lab_run(runs / "baseline", BASELINE)
    write_lab_run(runs / "lr1e-4_r16", LR1E_4, model__lr=1e-4)
    write_lab_run(runs / "lr3e-4_r16", LR3E_4, model__lr=3e-4)
    write_lab_run(runs / "lr3e-4_r32", R32, model__lr=3e-4, model__r=32, model__alpha=32)
    return runs


def write_test(
    path: Path, shift: float = 0.0, *, conversations: int = 30, split: str = "test", step: int = 1500, base: str = ""
) -> float:
    """An evaluation whose conversations lose ``shift`` more, give or take; return its loss."""
    rng = np.random.default_rng(0)
    losses = rng.gamma(4.0, 0.25, conversations) + shift * (1 + 0.1 * rng.standard_normal(conversations))
    tokens = rng.integers(5, 50, conversations)
    loss = float((losses * tokens).sum() / tokens.sum())
    record = {
        f"{split}_loss": loss,
        f"{split}_perplexity": math.exp(loss),
        f"{split}_token_accuracy": 0.75 - shift / 10,
        "conversations": conversations,
        "supervised_tokens": int(tokens.sum()),
        "checkpoint": "base" if base else "runs/a/checkpoints/best.ckpt",
        "step": step,
        "data_fingerprint": "f00d",
    }
    (path / f"{split}{base}.json").write_text(json.dumps(record))
    lines = [f"{row},{loss!r},{count}\n" for row, (loss, count) in enumerate(zip(losses.tolist(), tokens, strict=True))]
    (path / f"{split}{base}_examples.csv").write_text("row,loss,supervised_tokens\n" + "".join(lines))
    return loss


class Output:
    """What a call printed and returned."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def table(self, heading: str) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of the first table after a heading."""
        lines = self.out[self.out.index(f"# {heading}\n") :].splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("|"))
        table = []
        for line in lines[start:]:
            if not line.startswith("|"):
                break
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        return table[0], table[2:]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> Output:
        status = main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Output(status, captured.out, captured.err)

    return call


@pytest.fixture
def _only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn or written: it takes half a second."""
    monkeypatch.setattr(Report, "write", lambda self, out: None)


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails on a tag that is not closed."""

    VOID = ("meta", "link", "img", "source", "wbr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.usefixtures("_only_text")
class TestTables:
    def test_one_run_prints_the_labs_table_to_the_letter(self, lab: Path, report: Any) -> None:
        output = report(lab / "baseline")
        assert output.status == 0
        assert (
            "### baseline\n"
            "\n"
            "| Step | Training Loss | Validation Loss |\n"
            "|---:|---:|---:|\n"
            "| 250 | 0.9648 | 0.879919 |\n"
            "| 500 | 0.8951 | 0.862609 |\n"
            "| 750 | 0.8895 | 0.850912 |\n"
            "| 1000 | 0.8415 | 0.843649 |\n"
            "| 1250 | 0.8395 | 0.838236 |\n"
            "| 1500 | 0.8276 | 0.835800 |\n"
        ) in output.out
        assert "* baseline: finished, 1,500 steps\n" in output.out
        assert "Comparisons" not in output.out
        assert "# Ranking" not in output.out

    def test_the_untouched_base_is_row_0(self, lab: Path, report: Any) -> None:
        base = write_test(lab / "baseline", 1.0, split="validation", base="-base", step=0)
        assert f"| 0 (base) | | {base:.6f} |\n| 250 | 0.9648 | 0.879919 |\n" in report(lab / "baseline").out
        headings, rows = report(lab).table("All runs: training loss / validation loss")
        assert rows[0] == ["0 (base)", *(f"{base:.6f}" if name == "baseline" else "" for name in headings[1:])]

    def test_the_combined_table(self, lab: Path, report: Any) -> None:
        headings, rows = report(lab).table("All runs: training loss / validation loss")
        assert headings == ["step", "lr3e-4_r32", "lr3e-4_r16", "baseline", "lr1e-4_r16"]
        assert rows[0] == [
            *("250", "0.9636 / 0.877421", "0.9643 / 0.878334", "0.9648 / 0.879919", "0.9706 / 0.886649"),
        ]
        assert rows[5] == [
            *("1500", "0.8177 / 0.821687", "0.8245 / 0.829798", "0.8276 / 0.835800", "0.8362 / 0.848186"),
        ]
        assert len(rows) == 6

    def test_runs_validated_at_other_steps_have_gaps(self, tmp_path: Path, report: Any) -> None:
        write_run(tmp_path / "r" / "a", [train_row(1, 1.0), validation_row(1, 0.5), validation_row(3, 0.4)], total=3)
        write_run(tmp_path / "r" / "b", [train_row(2, 2.0), validation_row(2, 0.9)], total=2)
        _, rows = report(tmp_path / "r").table("All runs: training loss / validation loss")
        assert rows == [["1", "1.0000 / 0.500000", ""], ["2", "", "2.0000 / 0.900000"], ["3", "– / 0.400000", ""]]

    def test_the_labs_published_numbers_beside(self, lab: Path, report: Any) -> None:
        output = report(lab / "lr3e-4_r32", "--reference", "seed")
        headings, rows = output.table("Training loss / validation loss as Hugging Face prints it")
        assert headings == [
            *("step", "lr3e-4_r32", "lab: lr 2e-4, r 16, alpha 16", "lab: lr 1e-4, r 16, alpha 16"),
            *("lab: lr 3e-4, r 16, alpha 16", "lab: lr 3e-4, r 32, alpha 32"),
        ]
        published = [BASELINE, LR1E_4, LR3E_4, R32]
        for place, row in enumerate(rows):
            # the run's own column is its val_loss_hf, which validation_row sets to 9
            assert row[:2] == [str(BASELINE[place][0]), f"{R32[place][1]:.4f} / 9.000000"]
            assert row[2:] == [f"{run[place][1]:.4f} / {run[place][2]:.6f}" for run in published]
        assert "published by the lab (Llama 3.2, FineTome-100k, Unsloth; not measured here)" in output.out
        assert "published by the lab" not in report(lab / "lr3e-4_r32").out


@pytest.mark.usefixtures("_only_text")
class TestRanking:
    def test_order_and_columns(self, lab: Path, report: Any) -> None:
        # the worst on validation is made the best on test, which must not move it
        losses = {name: write_test(lab / name, shift) for name, shift in (("baseline", 0.2), ("lr1e-4_r16", 0.0))}
        output = report(lab)
        headings, rows = output.table("Ranking")
        assert headings == [
            *("rank", "run", "model.lr", "model.r", "model.alpha", "best val loss", "at step", "test loss"),
            *("test perplexity", "test token accuracy", "trainable parameters", "time in steps", "real tokens/s"),
            *("peak memory (MiB)", "state"),
        ]
        # 12 steps of 100 tokens at 50 tokens/s are 24 s
        tail = ["9,768,960", "24.0 s", "50", "7", "finished, 1,500 steps"]
        perplexity = {name: f"{math.exp(loss):.3f}" for name, loss in losses.items()}
        assert rows == [
            ["1", "lr3e-4_r32", "0.0003", "32", "32", "0.821687", "1,500", "not tested", "–", "–", *tail],
            ["2", "lr3e-4_r16", "0.0003", "16", "16", "0.829798", "1,500", "not tested", "–", "–", *tail],
            [
                *("3", "baseline", "0.0002", "16", "16", "0.835800", "1,500", f"{losses['baseline']:.6f}"),
                *(perplexity["baseline"], "0.7300", *tail),
            ],
            [
                *("4", "lr1e-4_r16", "0.0001", "16", "16", "0.848186", "1,500", f"{losses['lr1e-4_r16']:.6f}"),
                *(perplexity["lr1e-4_r16"], "0.7500", *tail),
            ],
        ]
        assert "Ranked by the lowest validation loss; the test split takes no part in the choice." in output.out

    def test_every_state_in_one_report(self, tmp_path: Path, report: Any) -> None:
        runs = tmp_path / "runs"
        write_run(runs / "done", lab_rows(BASELINE), total=1500)
        write_run(runs / "starting", total=1500)
        write_run(runs / "half", lab_rows(BASELINE[:2]), total=1500)
        busy = write_run(runs / "busy", [train_row(1, 3.0), train_row(2, 2.5)], total=1500)
        write_run(runs / "early", [*lab_rows(BASELINE[:2]), validation_row(600, 0.9)], total=1500, early_stopping=1)
        (runs / "none").mkdir()
        with locked(busy):
            output = report(runs, runs / "none")
        assert output.status == 0
        for line in (
            "done: finished, 1,500 steps",
            "half: stopped at step 500 of 1,500",
            "busy: running at step 2 of 1,500",
            "early: finished early at step 600 of 1,500",
            "starting: stopped at step 0 of 1,500",
            "none: empty: nothing recorded yet",
        ):
            assert f"* {line}\n" in output.out
        _, rows = output.table("Ranking")
        assert [row[0] for row in rows] == ["1", "2", "3", "–", "–", "–"]
        assert [row[1] for row in rows[:3]] == ["done", "early", "half"]

    def test_the_last_line_may_be_half_written(self, lab: Path, report: Any) -> None:
        with (lab / "baseline" / "metrics.csv").open("a") as file:
            file.write("1501,1.0,0.8")
        assert "| 1500 | 0.8276 | 0.835800 |" in report(lab / "baseline").out

    def test_many_settings_get_a_table_of_their_own(self, tmp_path: Path, report: Any) -> None:
        write_lab_run(tmp_path / "a", BASELINE)
        other = dict(model__lr=1e-3, model__r=8, model__alpha=8, model__target_modules=["q_proj"])
        write_lab_run(tmp_path / "b", R32, **other, data__source="x", data__rows=5, seed_everything=1)
        output = report(tmp_path / "a", tmp_path / "b")
        assert output.table("Ranking")[0][2] == "best val loss"
        headings, rows = output.table("Settings in which the runs differ")
        assert headings == ["setting", "b", "a"]
        assert rows == [
            ["seed_everything", "1", "3407"],
            ["model.lr", "0.001", "0.0002"],
            ["model.r", "8", "16"],
            ["model.alpha", "8", "16"],
            ["model.target_modules", "[q_proj]", "[q_proj, v_proj]"],
            ["data.source", "x", "embedded"],
            ["data.rows", "5", "null"],
        ]

    def test_runs_of_one_name_are_told_apart_by_their_paths(self, tmp_path: Path, report: Any) -> None:
        first, second = write_lab_run(tmp_path / "x" / "a", BASELINE), write_lab_run(tmp_path / "y" / "a", R32)
        _, rows = report(first, second, first, "--out", tmp_path / "out").table("Ranking")
        assert [row[1] for row in rows] == [str(second), str(first)]

    def test_what_makes_the_ranking_doubtful_is_said(self, tmp_path: Path, report: Any) -> None:
        data = {"fingerprint": "a", "split_seed": 1, "splits": {"validation": {"conversations": 5}}}
        write_lab_run(tmp_path / "r" / "a", R32, environment={"data": data})
        write_lab_run(tmp_path / "r" / "b", BASELINE, environment={"data": data | {"split_seed": 2}})
        write_lab_run(tmp_path / "r" / "c", LR1E_4, environment={"data": data})
        write_test(tmp_path / "r" / "a", step=250)
        write_test(tmp_path / "r" / "a", 1.0, base="-base", step=0)
        output = report(tmp_path / "r")
        assert "Not validated on the same tokens as a: b. Such losses do not rank against each other." in output.out
        assert "a was tested at step 250, not at step 1,500, where its validation loss is lowest." in output.out
        assert "The untouched base on the test split: loss " in output.out


@pytest.mark.usefixtures("_only_text")
class TestSeeds:
    def test_mean_and_sample_standard_deviation_by_hand(self, tmp_path: Path, report: Any) -> None:
        runs = tmp_path / "runs"
        for seed, loss in ((1, 0.5), (2, 0.7), (3, 0.9)):
            rows = [validation_row(1500, loss)]
            write_run(runs / f"s{seed}", rows, total=1500, seed_everything=seed, run_dir=f"runs/s{seed}")
        write_run(runs / "other", [validation_row(1500, 0.6)], total=1500, model__lr=1e-4)
        write_run(runs / "half", [validation_row(250, 9.0)], total=1500, seed_everything=4)  # not finished: not in it
        tests = [write_test(runs / "s1"), write_test(runs / "s3", 0.25)]
        mean, difference = sum(tests) / 2, tests[1] - tests[0]
        headings, rows = report(runs).table("Over seeds")
        assert headings == [
            *("settings", "seeds", "n", "val loss, mean", "val loss, s.d.", "n tested", "test loss, mean"),
            "test loss, s.d.",
        ]
        # 0.5, 0.7, 0.9: mean 0.7, squares 0.04 + 0 + 0.04 over n - 1 = 2; of two values their distance over root 2
        assert rows == [
            [
                *("model.lr 0.0002", "1, 2, 3", "3", "0.700000", "0.200000"),
                *("2", f"{mean:.6f}", f"{difference / math.sqrt(2):.6f}"),
            ],
            ["model.lr 0.0001", "3407", "1", "0.600000", "–", "0", "–", "–"],
        ]

    def test_no_section_without_seeds(self, lab: Path, report: Any) -> None:
        assert "Over seeds" not in report(lab).out


@pytest.mark.usefixtures("_only_text")
class TestComparisons:
    def test_each_with_the_best_on_validation(self, lab: Path, report: Any) -> None:
        losses = {}
        for name, shift in (("lr3e-4_r32", 0.2), ("lr3e-4_r16", 0.0), ("baseline", 0.4)):
            losses[name] = write_test(lab / name, shift)
        output = report(lab)
        assert output.status == 0
        headings, rows = output.table("Comparisons on the test split")
        assert headings[3] == "97.5 % interval"  # two comparisons: 1 - 0.05 / 2
        assert [row[0] for row in rows] == ["lr3e-4_r32", "lr3e-4_r16", "baseline"]
        assert [row[1] for row in rows] == [f"{losses[row[0]]:.6f}" for row in rows]
        assert [row[2] for row in rows] == [
            "–",
            *(f"{losses[name] - losses['lr3e-4_r32']:+.6f}" for name in ("lr3e-4_r16", "baseline")),
        ]
        assert [row[-1] for row in rows] == ["–", "better", "worse"]
        assert "* lr3e-4_r16 is better than lr3e-4_r32 by 0." in output.out
        assert "* lr3e-4_r32 is better than baseline by 0." in output.out
        assert "corrected for 2 comparisons" in output.out
        assert "so that all 2 together hold at 95 %" in output.out
        assert "It does not cover another seed's run" in output.out
        assert (
            "* not compared: not evaluated on test: lr1e-4_r16; `python -m lightning_lab test --run_dir" in output.out
        )

    def test_without_a_test_of_the_best(self, lab: Path, report: Any) -> None:
        write_test(lab / "baseline")
        output = report(lab)
        assert "* not compared: lr3e-4_r32, the best on validation, has not been evaluated on test" in output.out
        assert output.out.count("not compared") == 1
        assert "python -m lightning_lab validate" in report(lab, "--split", "validation").out

    def test_refused_ones_are_named_and_do_not_count(self, lab: Path, report: Any) -> None:
        for name in ("lr3e-4_r32", "lr3e-4_r16"):
            write_test(lab / name)
        write_test(lab / "baseline", conversations=20)
        output = report(lab)
        headings, rows = output.table("Comparisons on the test split")
        assert headings[3] == "95 % interval"
        assert [row[0] for row in rows] == ["lr3e-4_r32", "lr3e-4_r16"]
        assert rows[1][-1] == "cannot be told"
        assert (
            "* not compared: lr3e-4_r32 and baseline cannot be compared on test: the conversations differ" in output.out
        )

    def test_runs_without_a_validation(self, tmp_path: Path, report: Any) -> None:
        for name in ("a", "b"):
            write_run(tmp_path / "r" / name, [train_row(1, 1.0)], total=5)
        output = report(tmp_path / "r")
        assert "Nothing to compare: fewer than two runs have a validation loss." in output.out
        assert "No run has a validation yet." in output.out

    def test_two_runs_by_path_and_by_name(self, lab: Path, report: Any) -> None:
        a, b = write_test(lab / "baseline"), write_test(lab / "lr3e-4_r32", -0.05)
        by_path = report("--compare", lab / "baseline", lab / "lr3e-4_r32")
        by_name = report(lab, "--compare", "baseline", "lr3e-4_r32")
        assert (by_path.status, by_path.err) == (0, "")
        assert by_path.out == by_name.out
        sentence, *_ = by_path.out.splitlines()
        assert sentence.startswith("lr3e-4_r32 is better than baseline by 0.0")
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in by_path.out.splitlines() if "|" in line
        ]
        assert rows[0] == ["run", "test loss (nats a token)", "95 % interval", "perplexity", "95 % interval"]
        assert [row[:2] for row in rows[2:]] == [
            *(["baseline", f"{a:.6f}"], ["lr3e-4_r32", f"{b:.6f}"], ["second - first", f"{b - a:.6f}"]),
        ]
        assert [row[3] for row in rows[2:]] == [
            *(f"{math.exp(a):.3f}", f"{math.exp(b):.3f}", f"{math.exp(b) - math.exp(a):.3f}")
        ]
        low, high = map(float, rows[2][2].split(" to "))
        assert low < a < high
        low_perplexity, high_perplexity = map(float, rows[2][4].split(" to "))
        assert math.exp(low) == pytest.approx(low_perplexity, abs=2e-3)
        assert math.exp(high) == pytest.approx(high_perplexity, abs=2e-3)
        assert "It does not cover another seed's run" in by_path.out
        assert not list(lab.rglob("report.*"))

    def test_as_json(self, lab: Path, report: Any) -> None:
        a, b = write_test(lab / "baseline"), write_test(lab / "lr3e-4_r32", -0.05)
        record = json.loads(report("--compare", lab / "baseline", lab / "lr3e-4_r32", "--json").out)
        assert record["loss_a"] == pytest.approx(a, rel=1e-12)
        assert record["difference"] == pytest.approx(b - a, rel=1e-9)
        assert record["interval"]["low"] < record["difference"] < record["interval"]["high"] < 0
        assert record["is_real"] is True

    def test_one_of_several(self, lab: Path, report: Any) -> None:
        write_test(lab / "baseline"), write_test(lab / "lr3e-4_r32", -0.05)
        pair = ("--compare", lab / "baseline", lab / "lr3e-4_r32")
        output = report(*pair, "--comparisons", 5).out
        assert ", corrected for 5 comparisons" in output
        assert "99 % interval" in output  # 1 - 0.05 / 5
        wide, narrow = (
            json.loads(report(*pair, *more, "--json").out)["interval"] for more in (("--comparisons", 5), ())
        )
        assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]

    def test_two_runs_of_one_name(self, tmp_path: Path, report: Any) -> None:
        paths = [write_lab_run(tmp_path / folder / "a", BASELINE) for folder in ("x", "y")]
        for path in paths:
            write_test(path)
        assert f"between {paths[0]} and {paths[1]}: 0.0000" in report("--compare", *paths).out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--compare", "RUNS/baseline", "RUNS/lr3e-4_r32"], "/test_examples.csv: not there; make it with"),
            (["--compare", "RUNS/baseline", "RUNS/none"], "--compare RUNS/none: no such run directory"),
            (
                ["RUNS", "--compare", "baseline", "none"],
                "no such run directory, and no run of that name; there are lr3e-4",
            ),
            (["--compare", "RUNS/baseline", "RUNS"], "RUNS: is not a run directory"),
            (["--compare", "RUNS/baseline"], "argument --compare: expected 2 arguments"),
            (["RUNS", "--comparisons", "3"], "--comparisons is for --compare"),
            (["--compare", "RUNS/baseline", "RUNS/lr3e-4_r32", "--comparisons", "0"], "comparisons be at least 1"),
            (["--compare", "a", "b", "--out", "x"], "--out is for a whole report"),
            (["--compare", "a", "b", "--reference", "seed"], "--reference is for a whole report"),
        ],
    )
    def test_refused(self, lab: Path, report: Any, arguments: list[str], message: str) -> None:
        output = report(*(argument.replace("RUNS", str(lab)) for argument in arguments))
        assert (output.status, output.out) == (2, "")
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        assert message.replace("RUNS", str(lab)) in output.err


class TestDamage:
    def test_one_among_others(self, lab: Path, report: Any) -> None:
        (lab / "baseline" / "metrics.csv").write_text(f"{HEADER}\nx\n")
        output = report(lab)
        assert output.status == 2
        message = f"{lab}/baseline/metrics.csv line 2: is not a row of numbers; the run directory is damaged"
        assert output.err.splitlines()[0] == f"error: {message}"
        assert f"* damaged: {message}\n" in output.out
        assert [row[1] for row in output.table("Ranking")[1]] == ["lr3e-4_r32", "lr3e-4_r16", "lr1e-4_r16"]
        assert message in "".join(Page(lab / "report" / "report.html").text)
        assert json.loads(report(lab, "--json").out)["damaged"] == [message]

    def test_a_missing_path_among_others(self, lab: Path, report: Any) -> None:
        output = report(lab / "none", lab / "baseline", "--out", lab / "x")
        assert output.status == 2
        assert output.err.startswith(f"error: {lab}/none: no such run directory\n")
        assert "0.835800" in output.out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "report needs a RUN: a run directory, a sweep's directory or a folder of runs"),
            (["RUNS/none"], "RUNS/none: no such run directory"),
            (["RUNS/none", "RUNS/neither"], "RUNS/none: no such run directory; RUNS/neither: no such run directory"),
            (["RUNS/.."], "RUNS/..: is not a run directory"),
            (["RUNS", "--split", "train"], "argument --split: invalid choice: 'train'"),
            (["RUNS", "--reference", "x"], "argument --reference: invalid choice: 'x'"),
            (["RUNS", "--tables"], "unrecognized arguments: --tables"),
        ],
    )
    def test_bad_input_is_one_line(self, lab: Path, report: Any, arguments: list[str], message: str) -> None:
        output = report(*(argument.replace("RUNS", str(lab)) for argument in arguments))
        assert (output.status, output.out) == (2, "")
        assert output.err.startswith(f"error: {message.replace('RUNS', str(lab))}")
        assert output.err.count("\n") == 1

    def test_an_output_that_cannot_be_written(self, lab: Path, report: Any) -> None:
        (lab / "file").touch()
        output = report(lab / "baseline", "--out", lab / "file")
        assert output.status == 2
        assert output.err.startswith(f"error: {lab}/file: cannot be written (File exists)")
        assert "| 1500 | 0.8276 | 0.835800 |" in output.out


class TestSweep:
    @pytest.fixture
    def sweep(self, tmp_path: Path) -> Path:
        sweep = tmp_path / "grid"
        write_lab_run(sweep / "trials" / "r16", LR3E_4)
        write_run(sweep / "trials" / "r32", lab_rows(R32[:3]), total=1500, model__r=32)
        (sweep / "trials" / "r64").mkdir()
        trials = [
            ("r16", "complete", 0.829798, None),
            ("r32", "pruned", None, None),
            ("r64", "failed", None, "the GPU is out of memory | lower data.micro_batch_tokens"),
            ("r128", "waiting", None, None),
        ]
        self.write(sweep, trials)
        return sweep

    @staticmethod
    def write(sweep: Path, trials: Sequence[tuple[str, str, float | None, str | None]]) -> None:
        record = [
            {
                "number": number,
                "name": name,
                "run": f"trials/{name}",
                "state": state,
                "settings": {"model.r": int(name[1:])},
                "value": value,
                "error": error,
            }
            for number, (name, state, value, error) in enumerate(trials)
        ]
        (sweep / "sweep.json").write_text(json.dumps({"name": "grid", "kind": "grid", "trials": record}))

    def test_failed_and_pruned_trials(self, sweep: Path, report: Any) -> None:
        output = report(sweep)
        assert (output.status, output.err) == (0, f"written: {sweep}/report.md, report.html, losses.png\n")
        assert output.out.startswith("# Report: grid, 2 runs\n")
        assert "* trials of sweeps: 1 complete, 1 pruned, 1 failed, 1 waiting\n" in output.out
        assert [row[1:3] + row[-1:] for row in output.table("Ranking")[1]] == [
            ["r16", "16", "finished, 1,500 steps"],
            ["r32", "32", "pruned: stopped at step 750 of 1,500"],
        ]
        part = output.out[output.out.index("## Trials that failed or were pruned") :]
        assert "| r32   | pruned | model.r 32 | –  " in part
        assert "| r64   | failed | model.r 64 | the GPU is out of memory \\| lower data.micro_batch_tokens |" in part
        assert {path.name for path in sweep.iterdir()} == {
            *("trials", "sweep.json", "report.md", "report.html", "losses.png")
        }

    def test_all_trials_failed(self, tmp_path: Path, report: Any) -> None:
        (tmp_path / "trials").mkdir()
        self.write(tmp_path, [("r16", "failed", None, "no such data")])
        output = report(tmp_path)
        assert output.status == 0
        assert "no such data" in output.out
        assert (tmp_path / "report.html").is_file()

    def test_one_that_has_not_begun(self, tmp_path: Path, report: Any) -> None:
        (tmp_path / "trials").mkdir()
        self.write(tmp_path, [("r16", "waiting", None, None)])
        output = report(tmp_path)
        assert (output.status, output.err) == (2, f"error: {tmp_path}: no run has begun yet\n")

    def test_a_damaged_record_of_the_sweep(self, sweep: Path, report: Any) -> None:
        (sweep / "sweep.json").write_text("{")
        output = report(sweep)
        assert output.status == 2
        assert "sweep.json: is not a JSON object" in output.err
        assert "0.829798" in output.out

    def test_in_a_folder_beside_runs(self, sweep: Path, report: Any) -> None:
        write_lab_run(sweep.parent / "alone", LR1E_4)
        output = report(sweep.parent)
        assert output.status == 0
        assert [row[1] for row in output.table("Ranking")[1]] == ["r16", "r32", "alone"]
        assert "the GPU is out of memory" in output.out

    def test_written_for_the_sweep_command(self, sweep: Path, tmp_path: Path) -> None:
        written = write_report([sweep], tmp_path / "out")
        assert written.ranking.splitlines()[0].startswith("| rank | run |")
        assert len(written.ranking.splitlines()) == 4
        assert written.ranking in (tmp_path / "out" / "report.md").read_text()
        with pytest.raises(LabError, match="no such run directory"):
            write_report([tmp_path / "none"], tmp_path / "out")


class TestJson:
    def test_everything_unrounded(self, lab: Path, report: Any) -> None:
        loss = write_test(lab / "baseline")
        write_test(lab / "lr3e-4_r32", 0.3)
        output = report(lab, "--json", "--reference", "seed")
        assert (output.status, output.err) == (0, "")
        assert not (lab / "report").exists()
        record = json.loads(output.out)
        assert [run["name"] for run in record["runs"]] == ["lr3e-4_r32", "lr3e-4_r16", "baseline", "lr1e-4_r16"]
        run = record["runs"][2]
        assert (run["rank"], run["state"], run["step"], run["total_steps"]) == (3, "finished", 1500, 1500)
        assert run["settings"] == {"model.lr": 2e-4, "model.r": 16, "model.alpha": 16}
        assert run["best"]["val_loss"] == 0.8358
        assert run["evaluations"]["test"]["test_loss"] == loss
        assert run["losses"][0]["train_loss"] == pytest.approx(0.9648, abs=1e-12)
        assert run["losses"][0] | {"train_loss": 0} == {"step": 250, "train_loss": 0, "val_loss": 0.879919}
        assert (run["seconds"], run["tokens_per_second"], run["peak_memory_mib"]) == (24.0, 50.0, 7.0)
        assert [(c["a"], c["b"], c["is_real"]) for c in record["comparisons"]] == [("lr3e-4_r32", "baseline", True)]
        assert len(record["not_compared"]) == 1
        assert record["reference"]["runs"][0]["validation"][0] == 0.879919

    def test_nan_is_null_and_out_is_written(self, tmp_path: Path, report: Any) -> None:
        path = write_run(
            tmp_path / "a", [train_row(1, 1.0), validation_row(1, math.nan), validation_row(2, 0.5)], total=2
        )
        output = report(path, "--json", "--out", tmp_path / "out")
        record = json.loads(output.out, parse_constant=pytest.fail)
        assert [row["val_loss"] for row in record["runs"][0]["losses"]] == [None, 0.5]
        assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.md", "report.html", "losses.png"}
        assert not (path / "report.md").exists()


class TestFiles:
    def test_where_they_go(self, lab: Path, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(lab.parent)
        for arguments, out in (
            (["runs/baseline"], "runs/baseline"),
            (["runs"], "runs/report"),
            (["runs/baseline", "runs/lr1e-4_r16"], "runs/report"),
            (["runs/baseline", "--out", "elsewhere/deep"], "elsewhere/deep"),
        ):
            output = report(*arguments)
            assert output.err == f"written: {out}/report.md, report.html, losses.png\n"
            assert Path(out, "report.md").read_text() == output.out
            assert Path(out, "losses.png").read_bytes().startswith(b"\x89PNG")
        assert not list(lab.parent.rglob("*.tmp"))
        assert report("runs").status == 0  # its own report is no run

    def test_a_run_that_has_not_begun_can_be_reported_again(self, tmp_path: Path, report: Any) -> None:
        for _ in range(2):
            assert "empty: nothing recorded yet" in report(tmp_path).out
        assert (tmp_path / "report.html").is_file()

    @pytest.mark.parametrize("count", [1, 10, 12])
    def test_the_page_loads_nothing_and_shows_every_run(self, tmp_path: Path, report: Any, count: int) -> None:
        for i in range(count):
            rows = lab_rows([(step, train + i / 100, loss + i / 100) for step, train, loss in R32])
            write_run(tmp_path / "r" / f"run-{i}", rows, total=1500, seed_everything=i)
        report(tmp_path / "r", "--reference", "seed", "--out", tmp_path)
        page = Page(tmp_path / "report.html")
        tags = [tag for tag, _ in page.tags]
        for tag, attributes in page.tags:
            for name in ("src", "href", "srcset", "data", "action"):
                assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, name)
            if tag == "img":
                assert attributes["alt"]
        assert "script" not in tags
        assert "url(" not in (tmp_path / "report.html").read_text()
        assert tags.count("h1") == tags.count("title") == 1
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
        sources = [attributes for tag, attributes in page.tags if tag == "source"]
        assert [source["media"] for source in sources] == ["(max-width: 640px)"]
        text = "".join(page.text)
        for i in range(count):
            assert f"run-{i}" in text
        for table in (i for i, tag in enumerate(tags) if tag == "table"):  # each scrolls within its own box
            assert page.tags[table - 1][1]["class"] == "box"

    def test_names_errors_and_settings_are_escaped(self, tmp_path: Path, report: Any) -> None:
        name = "<b>$x_1$ & \"q\" | 'p'"
        write_lab_run(tmp_path / "r" / name, R32)
        write_lab_run(tmp_path / "r" / "_plain", BASELINE, data__source="<script>alert(1)</script>")
        output = report(tmp_path / "r", "--out", tmp_path)
        assert output.status == 0
        page = Page(tmp_path / "report.html")
        assert not {"b", "script"} & {tag for tag, _ in page.tags}
        assert name in "".join(page.text)
        assert "<script>alert(1)</script>" in "".join(page.text)
        assert "\\|" in output.out

    def test_best_values_are_marked(self, lab: Path, report: Any) -> None:
        report(lab, "--out", lab)
        text = (lab / "report.html").read_text()
        assert '<td class="best">0.821687<span class="only-read"> (best)</span></td>' in text
        assert '<td class="best">0.848186' in text  # lowest of its own run's table
        assert '<td class="best">0.850037' not in text

    @pytest.mark.parametrize(
        "rows",
        [
            *(None, [], [train_row(1, 2.0)], [validation_row(1, 2.0)], [train_row(1, 2.0), validation_row(1, 2.0)]),
            [train_row(1, 2.0), validation_row(1, math.nan)],
            [train_row(1, 2.0), train_row(2, 90.0), train_row(3, 2.0), validation_row(3, 1e9)],
        ],
    )
    @pytest.mark.filterwarnings("error")
    def test_little_or_odd_to_draw(self, tmp_path: Path, report: Any, rows: list[str] | None) -> None:
        write_run(tmp_path / "a", rows, total=5)
        assert report(tmp_path / "a").status == 0
        assert (tmp_path / "a" / "losses.png").stat().st_size > 5000


class TestPlot:
    def test_colours_markers_and_lines_tell_ten_runs_apart(self) -> None:
        from lightning_lab.experiments.plots import SHOWN, _style

        styles = [_style(place) for place in range(SHOWN)]
        assert len({style["marker"] for style in styles}) == SHOWN
        assert len({(style["color"], style["linestyle"]) for style in styles}) == SHOWN

    def test_a_run_that_diverged_flattens_no_other(self) -> None:
        from lightning_lab.experiments.plots import Curve, Panel, draw, limits

        good = Curve("good", [], [(1, 1.0), (2, 0.9), (3, 0.8)])
        bad = Curve("bad", [], [(1, 5.0)])
        ends = limits([good, bad])
        assert ends is not None
        assert ends[0] < 0.8 < 1.0 < ends[1] < 2.0
        assert limits([good]) is None
        assert limits([Curve("nan", [], [(1, math.nan)])]) is None
        (legend,) = draw([Panel("", [good, bad], "thin")], narrow=False).subfigs[0].legends
        assert [text.get_text() for text in legend.get_texts()][:2] == ["good", "bad\n(above the axes)"]

    def test_legend_and_axes_do_not_overlap(self, lab: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from lightning_lab.experiments.plots import draw

        for i in range(8):
            write_lab_run(lab / f"a_long_name_of_a_run_with_many_settings_in_it_{'x' * 40}_{i}", BASELINE)
        for narrow in (False, True):
            figure = draw(read_report([lab], reference=True).panels(), narrow=narrow)
            FigureCanvasAgg(figure).draw()
            boxes = []
            for part in figure.subfigs:
                boxes += [part.axes[0].get_tightbbox(), part.legends[0].get_window_extent()]
            for place, box in enumerate(boxes):
                assert figure.bbox.x0 <= box.x0 + 1
                assert box.x1 <= figure.bbox.x1 + 1
                assert not any(box.padded(-2).overlaps(other) for other in boxes[:place])


class TestImports:
    def test_neither_torch_nor_lightning(self, lab: Path) -> None:
        write_test(lab / "baseline")
        write_test(lab / "lr3e-4_r32")
        code = (
            "import sys\n"
            "from lightning_lab.__main__ import main\n"
            f"assert main(['report', {str(lab)!r}]) == 0\n"
            "assert 'scipy.stats' in sys.modules\n"
            "assert not {'torch', 'lightning', 'transformers', 'optuna', 'pandas'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

    def test_help_is_complete_and_light(self) -> None:
        code = (
            "import sys\n"
            "from lightning_lab.__main__ import main\n"
            "try:\n"
            "    main(['report', '--help'])\n"
            "except SystemExit as stop:\n"
            "    assert stop.code == 0\n"
            "assert not {'torch', 'lightning', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
        for word in ("RUN", "--json", "--reference", "--compare A B", "--split", "--out", "exit status"):
            assert word in result.stdout

    def test_a_reader_that_stops_early(self, lab: Path) -> None:
        command = f"{sys.executable} -m lightning_lab report {lab} | head -1"
        result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert result.stdout == "# Report: runs, 4 runs\n"
        assert "Broken" not in result.stderr
        assert (lab / "report" / "report.html").is_file()

    def test_experiments_read_runs_by_their_files_alone(self) -> None:
        folder = ROOT / "lightning_lab" / "experiments"
        for path in folder.glob("*.py"):
            imported = []
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    imported.append(node.module or "")
            assert not [name for name in imported if name.startswith("lightning_lab.training")], path
