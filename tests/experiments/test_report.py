"""``report`` through the command line, on run directories written by hand."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_lab import plots
from tests.experiments.directories import (
    BASELINE,
    HEADER,
    train_row,
    validation_row,
    write_lab_run,
    write_run,
    write_test,
)
from tests.experiments.test_page import Page
from tests.experiments.test_runs import BOMB

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("_only_text")
class TestComparisons:
    def test_each_with_the_best_on_validation(self, lab: Path, report: Any) -> None:
        losses = {}
        for name, shift in (("lr3e-4_r32", 0.2), ("lr3e-4_r16", 0.0), ("baseline", 0.4)):
            losses[name] = write_test(lab / name, shift)
        output = report(lab)
        assert output.status == 0
        headings, rows = output.table("Comparisons on the test split")
        assert headings[2] == headings[4] == headings[6] == "97.5 % interval"  # two comparisons: 1 - 0.05 / 2
        assert [row[0] for row in rows] == ["lr3e-4_r32", "lr3e-4_r16", "baseline"]
        assert [row[1] for row in rows] == [f"{losses[row[0]]:.6f}" for row in rows]
        assert [row[5] for row in rows] == [
            "–",
            *(f"{losses[name] - losses['lr3e-4_r32']:+.6f}" for name in ("lr3e-4_r16", "baseline")),
        ]
        assert [row[-1] for row in rows] == ["–", "better", "worse"]
        assert "* lr3e-4_r16 is better than lr3e-4_r32 by 0." in output.out
        assert "* lr3e-4_r32 is better than baseline by 0." in output.out
        assert "corrected for 2 comparisons" in output.out
        assert "so that all 2 together hold at 95 %" in output.out
        assert "It does not cover another seed's run" in output.out
        how = f"`python -m lightning_lab test --run_dir {lab}/lr1e-4_r16 --ckpt_path best`"
        assert f"* not compared: {lab}/lr1e-4_r16/test_examples.csv: not there; make it with {how}\n" in output.out

    def test_without_a_test_of_the_best(self, lab: Path, report: Any) -> None:
        write_test(lab / "baseline")
        output = report(lab)
        assert f"* not compared: {lab}/lr3e-4_r32/test_examples.csv: not there; make it with" in output.out
        assert output.out.count("not compared") == 1
        assert "python -m lightning_lab validate" in report(lab, "--split", "validation").out

    def test_refused_ones_are_named_and_do_not_count(self, lab: Path, report: Any) -> None:
        for name in ("lr3e-4_r32", "lr3e-4_r16"):
            write_test(lab / name)
        write_test(lab / "baseline", conversations=20)
        output = report(lab)
        headings, rows = output.table("Comparisons on the test split")
        assert headings[2] == "95 % interval"
        assert [row[0] for row in rows] == ["lr3e-4_r32", "lr3e-4_r16"]
        assert rows[1][-1] == "cannot be told"
        assert "* not compared: lr3e-4_r32 and baseline cannot be compared on test: their conversations" in output.out

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
        assert rows[0] == [
            *("run", "test loss", "95 % interval", "perplexity", "95 % interval", "difference in loss"),
            *("95 % interval", "real?"),
        ]
        assert [row[:2] + row[3:4] for row in rows[2:]] == [
            *(["baseline", f"{a:.6f}", f"{math.exp(a):.3f}"], ["lr3e-4_r32", f"{b:.6f}", f"{math.exp(b):.3f}"]),
        ]
        assert [rows[2][5:], rows[3][5], rows[3][7]] == [["–", "–", "–"], f"{b - a:+.6f}", "better"]
        for row, loss in ((rows[2], a), (rows[3], b)):
            low, high = map(float, row[2].split(" to "))
            assert low < loss < high
            assert list(map(float, row[4].split(" to "))) == pytest.approx([math.exp(low), math.exp(high)], abs=2e-3)
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
        assert f"between {paths[0]} and {paths[1]}: 0.00," in report("--compare", *paths).out

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
            (["--compare", "RUNS/baseline", "RUNS/lr3e-4_r32", "--comparisons", "0"], "comparisons must be at least 1"),
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
        what = "line 2: is not a row of numbers, or its step comes twice; the run directory is damaged"
        message = f"{lab}/baseline/metrics.csv {what}"
        assert output.err.splitlines()[0] == f"error: {message}"
        assert f"* damaged: {message}\n" in output.out
        assert [row[1] for row in output.table("Ranking")[1]] == ["lr3e-4_r32", "lr3e-4_r16", "lr1e-4_r16"]
        assert message in "".join(Page((lab / "report" / "report.html").read_text()).text)
        assert json.loads(report(lab, "--json").out)["damaged"] == [message]

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("config.yaml", BOMB, "config.yaml: has more than 100,000 values"),
            ("config.yaml", "a: " + "[" * 5000, "config.yaml: is nested too deep"),
            ("config.yaml", "a: 1\n b: 2\n", "config.yaml line 2: is not YAML"),
            ("environment.json", "{", "environment.json: is not a JSON object"),
            ("metrics.csv", f"{HEADER}\n\xff\n", "metrics.csv line 2: is not a row of numbers"),
            ("validation-base.json", '{"validation_loss"', "validation-base.json: is not a JSON object"),
            (
                "test.json",
                f'{{"test_loss": {"9" * 400}, "test_perplexity": 1, "test_token_accuracy": 1}}',
                "test.json: lacks one of test_loss",
            ),
        ],
    )
    def test_each_file_is_one_line(self, lab: Path, report: Any, file: str, content: str, message: str) -> None:
        (lab / "baseline" / file).write_bytes(content.encode("latin-1"))
        output = report(lab)
        assert output.status == 2
        first, *rest = output.err.splitlines()
        assert first.startswith(f"error: {lab}/baseline/{message}")
        assert [line.split(":")[0] for line in rest] == ["written"]
        assert [row[1] for row in output.table("Ranking")[1]] == ["lr3e-4_r32", "lr3e-4_r16", "lr1e-4_r16"]

    def test_what_no_report_reads_damages_none(self, lab: Path, report: Any) -> None:
        (lab / "baseline" / "samples.md").write_bytes(b"\xff\x00")
        (lab / "baseline" / "losses.md").write_bytes(b"\xff\x00")
        assert report(lab).status == 0

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.yaml", "early_stopping: often\nmodel: {1: {b: 2}, c: [{1: 2, a: 3}], lr: .nan}\n"),
            ("environment.json", '{"data": [], "total_steps": null}'),
            ("environment.json", '{"data": {"fingerprint": 1, "splits": 3}}'),
        ],
    )
    def test_odd_values_that_nobody_needs_stop_no_report(self, lab: Path, report: Any, file: str, content: str) -> None:
        (lab / "baseline" / file).write_text(content)
        output = report(lab)
        assert output.status == 0
        assert len(output.table("Ranking")[1]) == 4
        json.loads(report(lab, "--json").out)

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

    @pytest.mark.parametrize(
        "rows",
        [
            *(None, [], [train_row(1, 2.0)], [validation_row(1, 2.0)], [train_row(1, 2.0), validation_row(1, 2.0)]),
            [train_row(1, 2.0), validation_row(1, math.nan)],
            [train_row(1, 2.0), train_row(2, 90.0), train_row(3, 2.0), validation_row(3, 1e9)],
            [train_row(1, 1e308), train_row(2, 1e308), validation_row(2, -1.7e308), validation_row(3, 1e308)],
        ],
    )
    @pytest.mark.filterwarnings("error")
    def test_little_or_odd_to_draw(self, tmp_path: Path, report: Any, rows: list[str] | None) -> None:
        write_run(tmp_path / "a", rows, total=5)
        assert report(tmp_path / "a").status == 0
        assert (tmp_path / "a" / "losses.png").stat().st_size > 5000

    @pytest.mark.usefixtures("_only_text")
    def test_no_loss_is_too_large_for_means(self, tmp_path: Path, report: Any) -> None:
        for seed, loss in enumerate((1e308, 1e308, math.inf)):
            rows = [train_row(1, 1e308), validation_row(1, 1e308)]
            path = write_run(tmp_path / "r" / f"{seed}", rows, total=1, seed_everything=seed)
            record = {"test_loss": loss, "test_perplexity": loss, "test_token_accuracy": 0.0}
            (path / "test.json").write_text(json.dumps(record))
        output = report(tmp_path / "r")
        assert output.status == 0
        assert output.table("Over seeds")[1][0][2:] == ["3", "inf", "0.000000", "2", "inf", "0.000000"]

    def test_what_cannot_be_drawn_stops_no_report(
        self, lab: Path, report: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plots, "MARKERS", ["no marker"])
        output = report(lab)
        assert output.status == 0
        warning, written = output.err.splitlines()
        assert warning.startswith(f"warning: {lab}/report/losses.png is empty: it could not be drawn (")
        assert written.startswith("written: ")
        assert (lab / "report" / "losses.png").read_bytes() == b""
        assert "0.835800" in (lab / "report" / "report.html").read_text()


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
        for path in set(folder.glob("*.py")) - {folder / "plan.py"}:  # which looks ahead, at what training will choose
            imported = []
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    imported.append(node.module or "")
            assert not [name for name in imported if name.startswith("lightning_lab.training")], path
