"""Run directories in every state that ``fit`` can leave them in, and every damage."""

import json
import math
from pathlib import Path

import pytest

from lightning_lab.errors import LabError
from lightning_lab.experiments.runs import Run, differing_settings, read_sweep, run_directories
from lightning_lab.files import flatten
from lightning_lab.rundir import is_locked
from tests.experiments.directories import HEADER, locked, train_row, validation_row, write_run


class TestState:
    def test_finished(self, tmp_path: Path) -> None:
        run = Run(write_run(tmp_path / "a", [train_row(1, 2.0), train_row(2, 1.0), validation_row(2, 1.5)], total=2))
        assert (run.state, run.described_state, run.step, run.total_steps) == ("finished", "finished, 2 steps", 2, 2)
        assert run.name == "a"
        assert run.trainable_parameters == 9_768_960

    def test_without_its_last_validation_it_is_not_finished(self, tmp_path: Path) -> None:
        rows = [train_row(1, 2.0), validation_row(1, 1.5), train_row(2, 1.0)]
        assert Run(write_run(tmp_path / "a", rows, total=2)).described_state == "stopped at step 2 of 2"

    @pytest.mark.parametrize(
        ("losses", "state", "words"),
        [
            ([1.0, 0.9, 0.95, 0.92], "finished", "finished early at step 4 of 1,000"),
            ([1.0, 0.9, 0.9, 0.9], "finished", "finished early at step 4 of 1,000"),  # equal is not lower
            ([1.0, 0.9, 0.95, 0.89], "stopped", "stopped at step 4 of 1,000"),
            ([1.0, 0.9, 0.95], "stopped", "stopped at step 3 of 1,000"),
            ([math.nan, 0.9, 0.8], "stopped", "stopped at step 3 of 1,000"),
        ],
    )
    def test_early_stopping_after_two(self, tmp_path: Path, losses: list[float], state: str, words: str) -> None:
        rows = [validation_row(step, loss) for step, loss in enumerate(losses, start=1)]
        run = Run(write_run(tmp_path / "a", rows, total=1000, early_stopping=2))
        assert (run.state, run.described_state) == (state, words)

    def test_running_while_another_process_holds_it_and_stopped_when_that_is_killed(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "a", [train_row(1, 2.0), train_row(2, 2.0), train_row(3, 2.0)], total=10)
        with locked(path):
            run = Run(path)
            assert (run.state, run.described_state) == ("running", "running at step 3 of 10")
            assert Run(path).state == "running"
        run = Run(path)
        assert (run.state, run.described_state) == ("stopped", "stopped at step 3 of 10")
        with locked(path):  # looking took the lock from nobody
            assert is_locked(path)

    def test_a_lock_file_that_nobody_holds(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "a", [train_row(1, 2.0)], total=10)
        (path / ".lock").touch()
        assert not is_locked(path)
        assert not is_locked(path / "none")
        assert Run(path).state == "stopped"

    def test_empty(self, tmp_path: Path) -> None:
        assert Run(tmp_path).described_state == "empty: nothing recorded yet"
        (tmp_path / "checkpoints").mkdir()
        with locked(tmp_path):
            assert Run(tmp_path).described_state == "running at step 0"
        run = Run(tmp_path)
        assert run.state == "empty"
        assert (run.best, run.losses, run.seconds, run.tokens_per_second, run.peak_memory_mib) == (
            None,
            [],
            0,
            None,
            None,
        )

    def test_config_only(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {lr: 1.0e-4}\n")
        run = Run(tmp_path)
        assert (run.state, run.described_state, run.total_steps) == ("stopped", "stopped at step 0", None)
        assert run.config == {"model.lr": 1e-4}

    def test_a_header_alone(self, tmp_path: Path) -> None:
        assert Run(write_run(tmp_path / "a", [], total=5)).described_state == "stopped at step 0 of 5"


# 32 nested lists of two aliases: a kilobyte that stands for 4 billion values
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(32))


class TestDamage:
    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("config.yaml", "lr: 1\nmodel: [", r"config\.yaml line 2: is not YAML"),
            ("config.yaml", "- 1\n", r"config\.yaml: holds no settings"),
            ("config.yaml", b"\xff\xfe\x00", r"config\.yaml: is not UTF-8 text"),
            ("config.yaml", BOMB, r"config\.yaml: has more than 100,000 values"),
            ("config.yaml", "a: " + "[" * 5000, r"config\.yaml: is nested too deep"),
            ("config.yaml", "a: &a [*a]", r"config\.yaml: has more than 100,000 values"),
            ("environment.json", "", r"environment\.json: is not a JSON object"),
            ("environment.json", "[" * 5000, r"environment\.json: is not a JSON object"),
            (
                "environment.json",
                '{"trainable_parameters": "many"}',
                r"environment\.json: trainable_parameters is 'many'",
            ),
            (
                "environment.json",
                f'{{"trainable_parameters": {"9" * 400}}}',
                r"environment\.json: trainable_parameters is 9{400}, not a number of them",
            ),
            ("environment.json", '{"total', r"environment\.json: is not a JSON object"),
            ("environment.json", "[]", r"environment\.json: is not a JSON object"),
            ("environment.json", b"\xff", r"environment\.json: is not a JSON object"),
            ("environment.json", '{"total_steps": "all"}', r"environment\.json: total_steps is 'all'"),
            ("metrics.csv", b"\xff\xfe\n", r"metrics\.csv line 1: lacks the columns step, train_loss and val_loss"),
            ("metrics.csv", f"{HEADER}\n".encode() + b"\xff\n", r"metrics\.csv line 2: is not a row of numbers"),
            (
                "metrics.csv",
                "step,loss\n1,2\n",
                r"metrics\.csv line 1: lacks the columns step, train_loss and val_loss",
            ),
            ("metrics.csv", f"{HEADER}\n1,2,3\n", r"metrics\.csv line 2: is not a row of numbers"),
            (
                "metrics.csv",
                f"{HEADER}\n{train_row(1, 2.0)}{train_row(2, 2.0)[:9]}\n{train_row(3, 2.0)}",
                r"metrics\.csv line 3: is not a row of numbers",
            ),
            (
                "metrics.csv",
                f"{HEADER}\n{train_row(1, 2.0).replace('2.0', 'two')}",
                r"metrics\.csv line 2: is not a row",
            ),
            (
                "metrics.csv",
                f"{HEADER}\n{train_row(1, 2.0)}\n{train_row(2, 2.0)}",
                r"metrics\.csv line 3: is not a row",
            ),
            ("metrics.csv", f"{HEADER}\n{train_row(1, 2.0)[1:]}", r"metrics\.csv line 2: is not a row of numbers"),
            ("metrics.csv", f"{HEADER}\n1{',' * 13}\n", r"metrics\.csv line 2: is not a row of numbers"),
            (
                "metrics.csv",
                f"{HEADER}\n{train_row(1, 2.0)}{train_row(2, 2.0)}{train_row(2, 2.0)}",
                r"metrics\.csv line 4: is not a row of numbers, or its step comes twice",
            ),
            ("test.json", '{"test_loss": 1.0}', r"test\.json: lacks one of test_loss, test_perplexity, test_token_acc"),
            ("test.json", '{"test_loss": 1', r"test\.json: is not a JSON object"),
            ("validation-base.json", "{}", r"validation-base\.json: is not a JSON object"),
            (
                "validation-base.json",
                '{"validation_loss": "x"}',
                r"validation-base\.json: lacks one of validation_loss",
            ),
            (
                "test.json",
                f'{{"test_loss": {"9" * 400}, "test_perplexity": 1, "test_token_accuracy": 1}}',
                r"test\.json: lacks one of test_loss, test_perplexity, test_token_accuracy, or it is no number",
            ),
        ],
    )
    def test_is_named_with_file_and_line(self, tmp_path: Path, file: str, content: str | bytes, message: str) -> None:
        path = write_run(tmp_path / "a", [train_row(1, 2.0)], total=5)
        (path / file).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(LabError, match=rf"^{path}/{message}"):
            Run(path)

    def test_killed_while_it_wrote_its_first_file(self, tmp_path: Path) -> None:
        (tmp_path / ".config.yaml.123.tmp").touch()
        assert Run(tmp_path).state == "empty"

    def test_not_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(LabError, match=rf"^{tmp_path}/none: no such run directory"):
            Run(tmp_path / "none")
        (tmp_path / "notes.txt").touch()
        with pytest.raises(LabError, match=rf"^{tmp_path}: is not a run directory"):
            Run(tmp_path)


def test_a_last_line_that_is_being_written_is_left_out_wherever_it_is_cut(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", [], total=5)
    whole = HEADER + "\n" + train_row(1, 2.0)
    last = validation_row(1, 1.25)
    for cut in range(len(last)):
        (path / "metrics.csv").write_text(whole + last[:cut])
        run = Run(path)
        assert [row.values["step"] for row in run.metrics] == [1]
        assert not run.losses
    (path / "metrics.csv").write_text(whole + last)
    assert [loss.val_loss for loss in Run(path).losses] == [1.25]


class TestNumbers:
    def test_losses_by_hand(self, tmp_path: Path) -> None:
        rows = [
            *(train_row(1, 4.0), train_row(2, 2.0), validation_row(2, 3.5)),
            *(train_row(3, 1.0), train_row(4, 2.0), train_row(5, 6.0), validation_row(5, 2.5)),
            *(validation_row(6, 2.75), train_row(7, 9.0)),
        ]
        run = Run(write_run(tmp_path / "a", rows, total=9))
        assert [loss[:3] for loss in run.losses] == [(2, 3.0, 3.5), (5, 3.0, 2.5), (6, None, 2.75)]
        assert run.step == 7

    def test_the_best_is_the_first_of_equal_ones_and_finite(self, tmp_path: Path) -> None:
        losses = [math.nan, 2.0, 1.5, 1.5, 1.75]
        rows = [validation_row(step, loss) for step, loss in enumerate(losses, start=1)]
        best = Run(write_run(tmp_path / "a", rows)).best
        assert best is not None
        assert (best["step"], best["val_loss"]) == (3, 1.5)
        assert Run(write_run(tmp_path / "b", [validation_row(1, math.inf)])).best is None

    def test_time_speed_and_memory_by_hand(self, tmp_path: Path) -> None:
        # 100 tokens at 50/s are 2 s, 300 at 100/s are 3 s: 400 tokens in 5 s
        rows = [train_row(1, 2.0, 100, 50.0, 700.0), train_row(2, 2.0, 300, 100.0, 900.5), validation_row(2, 1.0)]
        run = Run(write_run(tmp_path / "a", rows))
        assert (run.seconds, run.tokens_per_second, run.peak_memory_mib) == (5.0, 80.0, 900.5)

    def test_evaluations(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "a", [])
        for split, name in (("test", "test"), ("validation", "validation-base")):
            record = {f"{split}_loss": 1.0, f"{split}_perplexity": 2.7, f"{split}_token_accuracy": 0.5}
            (path / f"{name}.json").write_text(json.dumps(record))
        (path / "other.json").write_text("nonsense")
        assert set(Run(path).evaluations) == {"test", "validation-base"}


class TestExamples:
    @staticmethod
    def write(path: Path, content: str | bytes, loss: object = 3.875, tokens: object = 100) -> Path:
        write_run(path, [])
        record = {"test_loss": loss, "test_perplexity": 48.0, "test_token_accuracy": 0.5, "supervised_tokens": tokens}
        (path / "test.json").write_text(json.dumps(record))
        (path / "test_examples.csv").write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def test_in_the_order_of_the_rows(self, tmp_path: Path) -> None:
        content = "row,loss,supervised_tokens\r\n257,3.5,50\r\n148,4.25,50\r\n"
        examples = Run(self.write(tmp_path / "a", content)).examples("test")
        assert examples == [(148, 4.25, 50, 50, None), (257, 3.5, 50, 50, None)]

    def test_beside_the_base(self, tmp_path: Path) -> None:
        header = "row,loss,supervised_tokens,base_loss,loss_minus_base\r\n"
        content = f"{header}257,3.5,50,5.0,-1.5\r\n148,4.25,25,,\r\n149,4.25,25,nan,nan\r\n"
        examples = Run(self.write(tmp_path / "a", content)).examples("test")
        assert [(e.row, e.base_loss, e.loss_minus_base) for e in examples] == [
            *((148, None, None), (149, None, None), (257, 5.0, -1.5)),
        ]

    @pytest.mark.parametrize(
        ("rows", "line"),
        [
            ("row,loss,supervised_tokens\n1,2.0,3\n2,x,3\n", 3),
            ("row,loss,supervised_tokens\n1,2.0\n", 2),
            ("row,loss\n1,2.0\n", 2),
            (b"row,loss,supervised_tokens\n\xff", 2),
            ("row,loss,supervised_tokens,base_loss\n1,3.875,100,x\n", 2),
            (f"row,loss,supervised_tokens\n{2**63},3.875,100\n", 2),
        ],
    )
    def test_damage(self, tmp_path: Path, rows: str | bytes, line: int) -> None:
        run = Run(self.write(tmp_path / "a", rows))
        message = rf"^{run.path}/test_examples\.csv line {line}: needs row, loss and supervised_tokens; evaluate again"
        with pytest.raises(LabError, match=message):
            run.examples("test")

    @pytest.mark.parametrize(
        ("rows", "found"),
        [
            ("", "nan over 0"),
            ("1,3.5,50\n1,4.25,50\n", "4.250000 over 50"),  # a conversation that comes twice
            ("1,3.5,50\n2,4.25,0\n", "3.500000 over 50"),
            ("1,3.5,50\n2,nan,50\n", "nan over 100"),
            ("1,3.5,50\n2,inf,50\n", "inf over 100"),
            (f"1,3.5,50\n2,4.25,{'9' * 400}\n", "nan over inf"),
        ],
    )
    def test_what_contradicts_its_evaluation(self, tmp_path: Path, rows: str, found: str) -> None:
        run = Run(self.write(tmp_path / "a", "row,loss,supervised_tokens\n" + rows))
        said = f"has a loss of {found} supervised tokens, test.json says 3.875000 over 100; train or evaluate a again"
        with pytest.raises(LabError) as error:
            run.examples("test")
        assert str(error.value) == f"{run.path}/test_examples.csv: {said}"

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_in_both(self, tmp_path: Path, loss: float) -> None:
        run = Run(self.write(tmp_path / "a", f"row,loss,supervised_tokens\n1,{loss},100\n", loss))
        with pytest.raises(LabError, match=rf"test_examples\.csv: has a loss of {loss} over 100 .* evaluate a again"):
            run.examples("test")

    def test_another_evaluation_than_the_one_recorded(self, tmp_path: Path) -> None:
        content = "row,loss,supervised_tokens\n1,3.5,50\n2,4.25,50\n"
        for number, (loss, tokens) in enumerate(((1.5, 100), (3.875, 12), (3.875, None))):
            run = Run(self.write(tmp_path / str(number), content, loss, tokens))
            said = f"3.875000 over 100 supervised tokens, test.json says {loss:.6f} over {tokens}; train or evaluate"
            with pytest.raises(LabError, match=said):
                run.examples("test")
        (run.path / "test.json").unlink()
        with pytest.raises(LabError, match="test.json says nan over None; train or evaluate 2 again"):
            Run(run.path).examples("test")

    @pytest.mark.parametrize(
        ("split", "command"),
        [
            ("test", "test --run_dir RUN --ckpt_path best"),
            ("test-base", "test --run_dir RUN --ckpt_path base"),
            ("validation", "validate --run_dir RUN --ckpt_path best"),
        ],
    )
    def test_a_split_without_evaluation_is_named_with_the_command(
        self, tmp_path: Path, split: str, command: str
    ) -> None:
        path = write_run(tmp_path / "a", [])
        with pytest.raises(LabError, match=command.replace("RUN", str(path))):
            Run(path).examples(split)


class TestSettings:
    def test_flatten(self) -> None:
        nested = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}], "f": {}}, "g": None}
        assert flatten(nested) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "a.f": {}, "g": None}

    def test_those_that_differ_in_the_configs_order(self, tmp_path: Path) -> None:
        runs = [
            Run(write_run(tmp_path / "a", run_dir="runs/a")),
            Run(write_run(tmp_path / "b", run_dir="runs/b", model__r=32, seed_everything=1)),
            Run(write_run(tmp_path / "c", run_dir="runs/c", model__target_modules=["q_proj"])),
        ]
        assert differing_settings(runs) == ["seed_everything", "model.r", "model.target_modules"]
        assert differing_settings(runs[:1]) == []
        assert differing_settings([]) == []

    def test_a_run_without_config_differs_in_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        assert differing_settings([Run(write_run(tmp_path / "a")), Run(tmp_path / "b")]) == []


class TestDirectories:
    def test_a_run_a_folder_and_a_sweep(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            write_run(tmp_path / "runs" / name)
        (tmp_path / "runs" / "report").mkdir()
        (tmp_path / "runs" / "notes.txt").touch()
        for name in ("y", "x"):
            write_run(tmp_path / "sweep" / "trials" / name)
        (tmp_path / "sweep" / "sweep.json").write_text("{}")
        runs, sweep = tmp_path / "runs", tmp_path / "sweep"
        assert run_directories(runs) == [runs / "a", runs / "b"]
        assert run_directories(runs / "b") == [runs / "b"]
        assert run_directories(sweep) == [sweep / "trials" / "x", sweep / "trials" / "y"]
        assert run_directories(tmp_path) == [sweep / "trials" / "x", sweep / "trials" / "y"]

    def test_a_sweep_that_has_not_begun_and_an_empty_run(self, tmp_path: Path) -> None:
        (tmp_path / "sweep").mkdir()
        (tmp_path / "sweep" / "sweep.json").write_text("{}")
        (tmp_path / "empty").mkdir()
        assert run_directories(tmp_path / "sweep") == []
        assert run_directories(tmp_path / "empty") == [tmp_path / "empty"]

    def test_a_path_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(LabError, match=r"/none: no such run directory"):
            run_directories(tmp_path / "none")


TRIAL = {"number": 0, "name": "lr1e-4", "run": "trials/lr1e-4", "state": "complete", "value": 0.5, "error": None}


class TestSweep:
    def test_trials(self, tmp_path: Path) -> None:
        failed = {"number": 1, "name": "b", "run": "trials/b", "state": "failed", "error": "the GPU is out of memory"}
        trials = [TRIAL | {"settings": {"model.lr": 1e-4}}, failed]
        (tmp_path / "sweep.json").write_text(json.dumps({"name": "s", "kind": "grid", "trials": trials}))
        first, second = read_sweep(tmp_path)
        assert first == TRIAL | {"run": tmp_path / "trials" / "lr1e-4", "settings": {"model.lr": 1e-4}}
        assert second == failed | {"run": tmp_path / "trials" / "b", "settings": {}}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", r"sweep\.json: is not a JSON object"),
            ('{"name": "s"}', r"sweep\.json: lists no trials"),
            (
                json.dumps({"trials": [TRIAL, {"number": 1}]}),
                r"sweep\.json trial 1: needs name, run, state",
            ),
            (json.dumps({"trials": ["a"]}), r"sweep\.json trial 0: needs name"),
            (json.dumps({"trials": [TRIAL | {"run": None}]}), r"sweep\.json trial 0: needs name, run, state"),
        ],
    )
    def test_damage(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(LabError, match=message):
            read_sweep(tmp_path)
