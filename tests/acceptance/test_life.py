"""A run's life: signals, kills, vanished readers, workers and damaged records never cost more than they must."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_lab.__main__ import main
from lightning_lab.rundir import is_locked, lock_run
from lightning_lab.training.callbacks import checkpoints
from lightning_lab.training.resume import KEY, read_checkpoint
from tests.acceptance.conftest import RESUMED, ROOT, assert_same, lab, metrics, start
from tests.acceptance.test_errors import fails
from tests.processes import processes_in

RUN = Path("runs/embedded")


class Slow(pl.Callback):
    """Says what is going on in a file, and takes its time there: a signal then comes while it lasts."""

    def slow(self, what: str, seconds: float = 30.0) -> None:
        if os.environ.get("SLOW") == what:
            Path("now").write_text(what)
            time.sleep(seconds)

    def state_dict(self) -> dict[str, Any]:  # which a save asks for
        if os.environ.get("SLOW") == "save 5" and reached(Path(), 5)():
            self.slow("save 5", 1.0)
        return {}

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.slow(f"validation {module.completed_steps}")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.slow(f"after validation {module.completed_steps}")  # as samples do

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.slow(f"step {module.completed_steps + 1}", 1.0)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.slow("samples before training")


SLOW = "--trainer.callbacks=tests.acceptance.test_life.Slow"


def begin(args: list[str], folder: Path, *options: str, slow: str = "", **popen: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads()), "SLOW": slow}
    command = [sys.executable, "-m", "lightning_lab", "fit", *args, *RESUMED, SLOW, *options]
    popen = {"stderr": subprocess.PIPE, "start_new_session": True} | popen
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **popen)


def wait_for(process: "subprocess.Popen[str]", done: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def reached(folder: Path, step: int) -> Any:
    rows = folder / RUN / "metrics.csv"
    return lambda: rows.exists() and f"\n{step}," in rows.read_text()


def position(folder: Path) -> int:
    return read_checkpoint(folder / RUN / "checkpoints" / "last.ckpt")[KEY]["completed_steps"]


def continued(args: list[str], *options: str) -> None:
    lab("fit", *args, *RESUMED, *options, "--ckpt_path=last")


class TestNothingIsLost:
    """What was trained is saved before anything slow begins; a validation that was cut short comes first on resume."""

    @pytest.mark.parametrize(
        ("slow", "step", "number"),
        [
            ("validation 5", 5, signal.SIGKILL),
            ("after validation 10", 10, signal.SIGTERM),  # as in samples
            pytest.param("validation 26", 26, signal.SIGTERM, marks=pytest.mark.slow),  # after the last step
            ("samples before training", 0, signal.SIGTERM),
            pytest.param("validation 5", 5, signal.SIGTERM, marks=pytest.mark.slow),
            pytest.param("after validation 10", 10, signal.SIGKILL, marks=pytest.mark.slow),
            pytest.param("validation 26", 26, signal.SIGKILL, marks=pytest.mark.slow),
            pytest.param("samples before training", 0, signal.SIGKILL, marks=pytest.mark.slow),
        ],
    )
    def test_in_a_validation_and_after_it(
        self,
        tiny_args: list[str],
        uninterrupted: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        slow: str,
        step: int,
        number: signal.Signals,
    ) -> None:
        process = begin(tiny_args, tmp_path, slow=slow)
        wait_for(process, (tmp_path / "now").exists)
        sent = time.monotonic()
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), error
        assert time.monotonic() - sent < 15  # and not the 30 seconds that what was going on takes
        assert position(tmp_path) == step
        monkeypatch.chdir(tmp_path)
        continued(tiny_args)
        assert_same(RUN, uninterrupted)

    def test_the_last_validation_of_a_run_that_ends_by_steps(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Lightning takes a run that has reached max_steps for finished."""
        steps = ("--trainer.max_steps=7", "--trainer.max_epochs=-1")
        process = begin(tiny_args, tmp_path, *steps, slow="validation 7")
        wait_for(process, (tmp_path / "now").exists)
        process.kill()
        process.communicate()
        monkeypatch.chdir(tmp_path)
        continued(tiny_args, *steps)
        assert [row["step"] for row in metrics(RUN) if row["val_loss"]] == ["5", "7"]
        assert position(Path()) == 7
        before = (RUN / "metrics.csv").read_bytes()
        continued(tiny_args, *steps)  # finished: nothing is repeated
        assert (RUN / "metrics.csv").read_bytes() == before

    def test_by_default_at_least_once_a_minute(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert checkpoints.SAVE_SECONDS == 60
        monkeypatch.setattr(checkpoints, "SAVE_SECONDS", 0.0)
        keep = "--trainer.callbacks=tests.acceptance.test_resume.KeepEach"
        options = ("--trainer.max_steps=5", "--val_every_steps=100", "--samples=0", keep)
        lab("fit", *tiny_args, *options)
        assert sorted(int(path.stem) for path in Path("kept").iterdir()) == [0, 1, 2, 3, 4]
        monkeypatch.setattr(checkpoints, "SAVE_SECONDS", 60.0)
        shutil.rmtree("kept")
        lab("fit", *tiny_args, *options)
        assert [path.stem for path in Path("kept").iterdir()] == ["0"]

    def test_a_run_that_ends_without_a_validation(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        lab("fit", *tiny_args, "--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--samples=0")
        assert position(Path()) == 3
        assert "best/" not in capsys.readouterr().err
        assert "trainer.limit_train_batches is 0" in fails(capsys, "fit", *tiny_args, "--trainer.limit_train_batches=0")

    @pytest.mark.slow
    def test_25_kills_at_any_moment(
        self, tiny_args: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = random.Random(5)
        arguments = ["--samples=1", "--sample_tokens=2"]
        began_training = lambda: (tmp_path / RUN / "checkpoints" / "last.ckpt").exists()  # noqa: E731
        kills = 0
        while kills < 25:
            again = ["--ckpt_path=last"] if began_training() else []
            if not again:
                shutil.rmtree(tmp_path / "runs", ignore_errors=True)
            process = begin(tiny_args, tmp_path, *arguments, *again)
            while not is_locked(tmp_path / RUN) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0.0, 1.2))
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate()
            if process.returncode == 0:  # it came through: from an earlier position, so that there is more to kill
                shutil.rmtree(tmp_path / "runs")
        monkeypatch.chdir(tmp_path)
        continued(tiny_args, *arguments)
        assert_same(RUN, uninterrupted)


class TestSignals:
    def test_the_reader_of_the_log_is_gone(self, tiny_args: list[str], tmp_path: Path) -> None:
        """Ctrl-C in `fit 2>&1 | tee log` ends `tee` too, and the run has nobody to talk to."""
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = begin(tiny_args, tmp_path, "--trainer.max_epochs=500", "--samples=0", **piped)
        wait_for(process, reached(tmp_path, 3))
        assert process.stdout
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert position(tmp_path) >= 3

    def test_a_run_outlives_its_reader(self, tiny_args: list[str], tmp_path: Path) -> None:
        """As `fit 2>&1 | head -1`."""
        process = begin(tiny_args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0
        assert position(tmp_path) == 26

    @pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
    def test_the_whole_group_with_workers(self, tiny_args: list[str], tmp_path: Path, number: signal.Signals) -> None:
        process = begin(tiny_args, tmp_path, "--trainer.max_epochs=500", "--samples=0", "--data.num_workers=2")
        wait_for(process, reached(tmp_path, 3))
        os.killpg(process.pid, number)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number, error
        assert "Traceback" not in error
        assert position(tmp_path) >= 3

    def test_a_killed_runs_workers_hold_nothing(self, tiny_args: list[str], tmp_path: Path) -> None:
        process = begin(tiny_args, tmp_path, "--trainer.max_epochs=500", "--samples=0", "--data.num_workers=2")
        wait_for(process, reached(tmp_path, 3))
        assert len(processes_in(tmp_path)) >= 3
        process.kill()
        process.wait()
        assert not is_locked(tmp_path / RUN)  # at once, whether its workers have gone or not
        process.communicate(timeout=60)

    def test_a_closed_terminal(self, tiny_args: list[str], tmp_path: Path) -> None:
        process = begin(tiny_args, tmp_path, "--trainer.max_epochs=500", "--samples=0")
        wait_for(process, reached(tmp_path, 3))
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
        assert process.returncode == 129
        assert position(tmp_path) >= 3

    def test_one_that_comes_while_a_checkpoint_is_saved(self, tiny_args: list[str], tmp_path: Path) -> None:
        """Before a validation: the run does not wait for that."""
        process = begin(tiny_args, tmp_path, slow="save 5", preexec_fn=None)
        wait_for(process, (tmp_path / "now").exists)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        assert position(tmp_path) == 5
        assert [row["step"] for row in metrics(tmp_path / RUN)] == ["1", "2", "3", "4", "5"]

    def test_under_nohup(self, tiny_args: list[str], tmp_path: Path) -> None:
        ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
        process = begin(tiny_args, tmp_path, "--samples=0", preexec_fn=ignore)
        wait_for(process, reached(tmp_path, 3))
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert position(tmp_path) == 26


class TestInOneProcess:
    """As a notebook does it: what a failed run held is free again."""

    def test_a_failed_fit_gives_lock_and_handlers_back(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.getsignal(number) for number in numbers]
        assert main(["fit", *tiny_args, "--trainer.callbacks=tests.acceptance.test_guards.Poison"]) == 2
        assert [signal.getsignal(number) for number in numbers] == before
        assert not is_locked(RUN)
        lock_run(RUN).close()

    def test_a_fit_that_fails_before_it_trains_leaves_nothing(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        lab("fit", *tiny_args, "--trainer.max_steps=1", "--samples=0")
        args = [arg for arg in tiny_args if "logger" not in arg]
        for wrong in ("--model.dropout=1.5", "--model.target_modules=[nonsense]", "--data.max_length=12"):
            fails(capsys, "fit", *args, wrong)
        lab("test", *args, "--ckpt_path=best")
        lab("fit", *tiny_args, "--trainer.max_steps=1", "--samples=0", "--ckpt_path=last")


class TestDamagedRecords:
    """What is only a record never stops a run."""

    @pytest.fixture(scope="class")
    def begun(self, tiny_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
        """A run at four of its six steps, with everything in its directory."""
        folder = tmp_path_factory.mktemp("stopped")
        args = [*tiny_args, "--trainer.max_steps=6", "--val_every_steps=3"]
        keep = "--trainer.callbacks=tests.acceptance.test_resume.KeepEach"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            lab("fit", *args, keep, "--checkpoint_every_steps=1")
            lab("validate", *args, "--ckpt_path=base")
            shutil.copyfile("kept/4.ckpt", RUN / "checkpoints" / "last.ckpt")
        return folder, args

    @pytest.fixture
    def stopped(self, begun: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        shutil.copytree(begun[0] / "runs", tmp_path / "runs")
        monkeypatch.chdir(tmp_path)
        return begun[1]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("environment.json", b""),
            ("environment.json", b'{"name": "emb'),
            ("environment.json", b"[]"),
            ("metrics.csv", b"step,epoch\n1,garbage,\xff\n"),
            ("samples.md", b"# Step 3\n\xff\xfe"),
            ("validation-base.json", b"{"),
            ("config.yaml", b"model: ["),
            ("losses.md", b"\xff"),
        ],
    )
    def test_it_is_set_aside_and_begun_anew(
        self, stopped: list[str], capsys: pytest.CaptureFixture[str], name: str, content: bytes
    ) -> None:
        (RUN / name).write_bytes(content)
        lab("fit", *stopped, "--ckpt_path=last")
        assert position(Path()) == 6
        aside = RUN / f"{name}.damaged"
        if name not in ("validation-base.json", "losses.md"):  # the one is the user's to repeat, the other is made anew
            assert aside.read_bytes() == content
            assert f"{name}: " in capsys.readouterr().err
        assert [row["step"] for row in metrics(RUN) if row["val_loss"]][-1] == "6"
        assert json.loads((RUN / "environment.json").read_text())["name"] == "embedded"
        assert yaml.safe_load((RUN / "config.yaml").read_text())["val_every_steps"] == 3
        lab("validate", *stopped, "--ckpt_path=base")

    def test_a_table_that_holds_a_damaged_result(self, stopped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        (RUN / "validation-base.json").write_text('{"checkpoint": 7}')
        lab("test", *stopped, "--ckpt_path=best")
        assert re.search(r"\| test +\| best", capsys.readouterr().out)

    def test_a_config_that_is_missing_is_written_anew(self, stopped: list[str]) -> None:
        (RUN / "config.yaml").unlink()
        lab("fit", *stopped, "--ckpt_path=last")
        assert yaml.safe_load((RUN / "config.yaml").read_text())["val_every_steps"] == 3

    def test_what_a_kill_left_half_written_goes(self, stopped: list[str]) -> None:
        leftovers = [RUN / ".losses.md.99.tmp", RUN / "checkpoints" / ".last.ckpt.99.tmp"]
        for path in leftovers:
            path.write_bytes(b"half")
        lab("fit", *stopped, "--ckpt_path=last")
        assert not any(path.exists() for path in leftovers)


class TestWhatARunIs:
    def test_a_continued_runs_config_says_what_ran(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        args = [*tiny_args, "--trainer.max_steps=6", "--samples=0"]
        keep = "--trainer.callbacks=tests.acceptance.test_resume.KeepEach"
        lab("fit", *args, keep, "--checkpoint_every_steps=1")
        shutil.copyfile("kept/2.ckpt", RUN / "checkpoints" / "last.ckpt")
        lab("fit", *args, "--ckpt_path=last", "--val_every_steps=1", "--early_stopping=3")
        config = yaml.safe_load((RUN / "config.yaml").read_text())
        assert (config["val_every_steps"], config["early_stopping"]) == (1, 3)
        assert [row["step"] for row in metrics(RUN) if row["val_loss"]] == ["3", "4", "5", "6"]
        (before,) = json.loads((RUN / "environment.json").read_text())["earlier"]
        assert before["config"]["val_every_steps"] == 5
        assert before["config"]["early_stopping"] is None

    def test_replaced_base_weights_are_noticed(
        self,
        tiny_args: list[str],
        tiny_base: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from safetensors.torch import load_file, save_file

        monkeypatch.chdir(tmp_path)
        shutil.copytree(tiny_base, "base")
        args = [*(a for a in tiny_args if "model.base" not in a), "--model.base=base", "--samples=0"]
        lab("fit", *args, "--trainer.max_steps=2")
        shutil.copytree("base", "moved")
        lab("test", *args, "--model.base=moved", "--ckpt_path=last")  # the same weights elsewhere are the same base
        weights = load_file("base/model.safetensors")
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, "base/model.safetensors", {"format": "pt"})
        for command in ("fit", "test", "predict"):
            line = fails(capsys, command, *args, "--trainer.max_steps=2", "--ckpt_path=last")
            assert "model.base base: the weights are not those it was trained on" in line

    def test_dropout_is_drawn_by_the_cut(
        self, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        args = [*tiny_args, "--trainer.max_steps=2", "--samples=0"]
        lab("fit", *args, "--model.dropout=0.1", "--run_dir=wet")
        lab("fit", *args, "--run_dir=dry")
        other = ("--data.micro_batch_tokens=512", "--ckpt_path=last")
        lab("fit", *args, "--run_dir=dry", *other)
        line = fails(capsys, "fit", *args, "--model.dropout=0.1", "--run_dir=wet", *other)
        assert "data.micro_batch_tokens is 512, was 256" in line

    def test_changed_rows_are_named(
        self,
        tiny_args: list[str],
        short_chats: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        lines = short_chats.read_text().splitlines(keepends=True)
        Path("chats.jsonl").write_text("".join(lines))
        args = [*tiny_args, "--data.source=chats.jsonl", "--trainer.max_steps=2", "--samples=0"]
        lab("fit", *args)
        lines[3] = lines[3].replace('"gpt", "value": "', '"gpt", "value": "Well, ')
        lines[17] = lines[18]
        Path("chats.jsonl").write_text("".join(lines))
        line = fails(capsys, "fit", *args, "--ckpt_path=last")
        assert "chats.jsonl" in line
        assert "rows 3 and 17 differ" in line


def test_one_process_of_two_fails(tiny_args: list[str], tmp_path: Path) -> None:
    """The other one lost its peer, which is no news worth a traceback."""
    callback = "--trainer.callbacks=tests.acceptance.test_life.FailsOnRank1"
    options = ("--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--samples=0")
    process = start("fit", *tiny_args, *options, callback, cwd=tmp_path, threads=1)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 2
    assert "Traceback" not in error, error
    assert "error: process 1: the bad step" in error


class FailsOnRank1(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        from lightning_lab.errors import LabError

        if trainer.global_rank == 1:
            raise LabError("the bad step")
