"""What follows from runs: seeds, notes, trials of sweeps, damage, and all of it as JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_lab.errors import LabError
from lightning_lab.experiments.report import write_report
from lightning_lab.experiments.sections import ranking_table
from lightning_lab.experiments.summary import Summary
from tests.experiments.directories import (
    LR1E_4,
    LR3E_4,
    R32,
    lab_rows,
    train_row,
    validation_row,
    write_lab_run,
    write_run,
    write_test,
)


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

    def test_a_repeated_run_is_no_second_seed(self, tmp_path: Path, report: Any) -> None:
        runs = tmp_path / "runs"
        for name, seed, loss in (("a", 1, 0.5), ("b", 1, 0.51), ("c", 1, 0.49)):
            write_run(
                runs / name, [validation_row(1500, loss)], total=1500, seed_everything=seed, run_dir=f"runs/{name}"
            )
        assert "Over seeds" not in report(runs).out
        write_run(runs / "d", [validation_row(1500, 0.7)], total=1500, seed_everything=2, run_dir="runs/d")
        (row,) = report(runs).table("Over seeds")[1]
        assert row[:5] == ["all the same", "1, 2", "2", "0.600000", f"{0.2 / math.sqrt(2):.6f}"]

    def test_no_section_without_seeds(self, lab: Path, report: Any) -> None:
        assert "Over seeds" not in report(lab).out


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
        assert "* r64 failed: the GPU is out of memory | lower data.micro_batch_tokens\n" in output.out
        assert {path.name for path in sweep.iterdir()} == {
            *("trials", "sweep.json", "report.md", "report.html", "losses.png")
        }

    def test_a_sweep_that_is_named_twice_is_one(self, sweep: Path, report: Any) -> None:
        output = report(sweep, sweep.parent)
        assert "* trials of sweeps: 1 complete, 1 pruned, 1 failed, 1 waiting\n" in output.out
        assert output.out.count("r64 failed") == 1

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
        summary = Summary([sweep])
        write_report(summary, tmp_path / "out")
        ranking = ranking_table(summary).markdown()
        assert ranking.splitlines()[0].startswith("| rank | run |")
        assert len(ranking.splitlines()) == 4
        assert ranking in (tmp_path / "out" / "report.md").read_text()
        with pytest.raises(LabError, match="no such run directory"):
            Summary([tmp_path / "none"])


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
        first = {"step": 250, "train_loss": 0, "val_loss": 0.879919, "val_loss_hf": 9.0}
        assert run["losses"][0] | {"train_loss": 0} == first
        assert (run["seconds"], run["tokens_per_second"], run["peak_memory_mib"]) == (24.0, 50.0, 7.0)
        assert [(c["a"], c["b"], c["is_real"]) for c in record["comparisons"]] == [("lr3e-4_r32", "baseline", True)]
        assert len(record["not_compared"]) == 2
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
