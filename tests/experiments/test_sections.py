"""Tables and rankings of ``report``, on run directories written by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from lightning_lab.experiments import reference as module
from lightning_lab.files import read_yaml
from tests.experiments.directories import (
    BASELINE,
    LR1E_4,
    LR3E_4,
    R32,
    lab_rows,
    locked,
    train_row,
    validation_row,
    write_lab_run,
    write_run,
    write_test,
)


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

    def test_the_training_loss_over_a_window(self, tmp_path: Path, report: Any) -> None:
        write_lab_run(tmp_path / "r" / "ten", BASELINE, train_loss_window=1)
        write_lab_run(tmp_path / "r" / "since", BASELINE, train_loss_window="?")
        out = report(tmp_path / "r").out
        # `lab_rows` has two steps, 0.25 below and above the loss
        last = "| 1500 | 1.0776 | 0.835800 |\n\nTraining loss: mean over the last 1 steps.\n"
        since = "| 1500 | 0.8276 | 0.835800 |\n\nTraining loss: mean over the steps since the row before.\n"
        assert (out.count(last), out.count(since)) == (1, 1)

    def test_the_untouched_base_is_row_0(self, lab: Path, report: Any) -> None:
        base = write_test(lab / "baseline", 1.0, split="validation", base="-base", step=0)
        assert f"| 0 (base) | | {base:.6f} |\n| 250 | 0.9648 | 0.879919 |\n" in report(lab / "baseline").out
        headings, rows = report(lab).table("All runs: training loss / validation loss")
        assert rows[0] == ["0 (base)", *(f"– / {base:.6f}" if name == "baseline" else "" for name in headings[1:])]

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
        _, tested = output.table("Training loss / test loss as Hugging Face prints it")
        assert tested[5] == [
            *("1500", "0.8276 / 0.819001", "0.8245 / 0.812596", "0.7045 / 0.695843"),  # the run was not tested
        ]
        assert " less lab" not in output.out  # nor is its base known
        assert "published by the lab (Llama 3.2, FineTome-100k, Unsloth; not measured here)" in output.out
        assert "published by the lab" not in report(lab / "lr3e-4_r32").out


@pytest.mark.usefixtures("_only_text")
class TestBesideTheLab:
    NOISE = "a repeated run differs by about 0.0001, another split by 0.017"
    VALIDATION, TEST = (f"Training loss / {split} loss as Hugging Face prints it" for split in ("validation", "test"))

    @staticmethod
    def lab_run(path: Path, rows: list[str], base: str = "unsloth/Llama-3.2-1B-Instruct", **settings: Any) -> Path:
        return write_run(path, rows, total=1500, model__base=base, model__lr=3e-4, **settings)

    def test_differences_are_of_like_figures_at_like_steps(self, tmp_path: Path, report: Any) -> None:
        rows = [train_row(step, 9.0 if step <= 1490 else 0.82) for step in range(1480, 1501)]  # the last ten: 0.82
        rows = [train_row(250, 1.0), validation_row(250, 7.0, 0.9), *rows, validation_row(1500, 7.0, 0.83)]
        run = self.lab_run(tmp_path / "mine", [*rows, validation_row(1501, 7.0, 0.5)])
        write_test(run, hf=0.81)
        output = report(run, "--reference", "seed")
        headings, cells = output.table(self.VALIDATION)
        assert headings[:3] == ["step", "mine", f"mine less lab: lr 3e-4, r 16, alpha 16 ({self.NOISE})"]
        # against 0.9643 / 0.878334 and 0.8245 / 0.829798; there is no published step 1,501
        assert [row[:3] for row in cells if row[1]] == [
            ["250", "1.0000 / 0.900000", "0.0357 / 0.021666"],
            ["1500", "0.8200 / 0.830000", "-0.0045 / 0.000202"],
            ["1501", "0.8200 / 0.500000", ""],
        ]
        headings, cells = output.table(self.TEST)
        assert headings[2].endswith(f"({self.NOISE})")
        assert [row[:3] for row in cells if row[1]] == [["1500", "0.8200 / 0.810000", "-0.0045 / -0.002596"]]

    def test_what_is_set_otherwise_is_named(self, tmp_path: Path, report: Any) -> None:
        settings = read_yaml(Path(module.__file__).with_name("published.yaml"))["settings"]
        as_the_lab = {key.replace(".", "__"): value for key, value in settings.items()}
        self.lab_run(tmp_path / "r" / "same", lab_rows(LR3E_4), **as_the_lab)
        self.lab_run(tmp_path / "r" / "other", lab_rows(LR3E_4), **as_the_lab | {"model__hf_eval_batch_size": 8})
        output = report(tmp_path / "r", "--reference", "seed")
        assert "* other is set otherwise than the lab: model.hf_eval_batch_size\n" in output.out
        assert "same is set otherwise" not in output.out

    @pytest.mark.parametrize(
        ("base", "like"),
        [
            ("/models/Llama-3.2-1B-Instruct/", "lab: lr 3e-4, r 16, alpha 16"),
            ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "lab: lr 3e-4, r 16, alpha 16"),
            ("meta-llama/Llama-3.2-3B-Instruct", "lab: Llama-3.2-3B, lr 3e-4, r 16"),
            *(("embedded", None), ("meta-llama/Llama-3.2-1B", None)),
        ],
    )
    def test_the_base_is_the_labs(self, tmp_path: Path, report: Any, base: str, like: str | None) -> None:
        run = self.lab_run(tmp_path / "mine", lab_rows(LR3E_4), base)
        write_test(run, hf=0.7)
        headings, _ = report(run, "--reference", "seed").table(self.TEST)
        assert [name.partition(" (")[0] for name in headings if " less " in name] == (
            [f"mine less {like}"] if like else []
        )


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

    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            *((2_975, "59.5 s"), (3_000, "1 min 0 s"), (57_420, "19 min 8 s"), (360_000, "2 h 0 min")),
            (math.inf, "nan h nan min"),
        ],
    )
    def test_times(self, tmp_path: Path, report: Any, tokens: float, words: str) -> None:
        row = train_row(1, 1.0).replace(",100,60,100,50.0,", f",{tokens},60,100,50.0,")
        write_run(tmp_path / "a", [row], total=1)
        headings, rows = report(tmp_path / "a").table("Result")
        assert rows[0][headings.index("time in steps")] == words

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

    def test_every_setting_in_which_runs_differ_is_a_column(self, tmp_path: Path, report: Any) -> None:
        write_lab_run(tmp_path / "a", BASELINE)
        other = dict(model__lr=1e-3, model__r=8, model__alpha=8, model__target_modules=["q_proj"])
        write_lab_run(tmp_path / "b", R32, **other, data__source="x", data__rows=5, seed_everything=1)
        (tmp_path / "c").mkdir()
        headings, rows = report(tmp_path / "a", tmp_path / "b", tmp_path / "c").table("Ranking")
        assert headings[2:10] == [
            *("seed_everything", "model.lr", "model.r", "model.alpha", "model.target_modules", "data.source"),
            *("data.rows", "best val loss"),
        ]
        assert [row[1:9] for row in rows] == [
            ["b", "1", "0.001", "8", "8", '["q_proj"]', "x", "5"],
            ["a", "3407", "0.0002", "16", "16", '["q_proj", "v_proj"]', "embedded", "null"],
            ["c", *["?"] * 7],
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
        assert "Not validated on the same tokens and weights as a: b. Such losses do not rank" in output.out
        assert "a was tested at step 250, not at step 1,500, where its validation loss is lowest." in output.out
        assert "The untouched base on the test split: loss " in output.out
