"""Two processes (gloo, CPU) make the same run as one, and each conversation is seen once."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_lab.__main__ import main
from tests.acceptance.conftest import adapter, close, lab, largest_difference, metrics, start, train_column, validations

# Steps of three conversations over two processes: unequal shares, and a last step of an epoch with two.
OPTIONS = ("--trainer.max_epochs=1", "--model.optimizer=adamw", "--data.batch_size=3", "--val_every_steps=6")
PROCESSES = ("--trainer.accelerator=cpu", "--trainer.strategy=ddp")


def finish(folder: Path, *args: str) -> None:
    process = start(*args, cwd=folder, threads=1)  # two processes of two threads each on two cores crawl
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error


def test_two_processes_are_one(tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lab("fit", *tiny_args, *OPTIONS, "--run_dir=one")
    finish(tmp_path, "fit", *tiny_args, *OPTIONS, *PROCESSES, "--trainer.devices=2", "--run_dir=two")
    one, two = tmp_path / "one", tmp_path / "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert len(metrics(two)) == len(metrics(one)) == 17 + 3
    assert close(train_column(two, "train_loss"), train_column(one, "train_loss"), 1e-5)
    assert close(train_column(two, "grad_norm"), train_column(one, "grad_norm"), 1e-5)
    for column in ("lr", "tokens", "supervised_tokens", "padded_tokens"):
        assert train_column(two, column) == train_column(one, column)
    assert close(list(validations(two).values()), list(validations(one).values()), 1e-5)
    assert largest_difference(adapter(two), adapter(one)) <= 1e-5

    lab("test", "--run_dir=one", "--ckpt_path=last")
    finish(tmp_path, "test", "--run_dir=two", "--ckpt_path=last", "--trainer.accelerator=cpu", "--trainer.devices=2")
    alone, together = (json.loads((run / "test.json").read_text()) for run in (one, two))
    assert together["conversations"] == alone["conversations"] == 13
    assert together["supervised_tokens"] == alone["supervised_tokens"]
    assert abs(together["test_loss"] - alone["test_loss"]) <= 1e-5


def test_two_processes_continue_exactly(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout, which draws from each process's own generator."""
    options = (*tiny_args, *OPTIONS, *PROCESSES, "--trainer.devices=2", "--model.dropout=0.2", "--samples=0")
    callback = "--trainer.callbacks=tests.acceptance.test_resume.KeepEach"
    finish(tmp_path, "fit", *options, "--run_dir=whole", "--checkpoint_every_steps=4", callback)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.copyfile(tmp_path / "kept" / "4.ckpt", tmp_path / "part" / "checkpoints" / "last.ckpt")
    finish(tmp_path, "fit", *options, "--run_dir=part", "--checkpoint_every_steps=4", "--ckpt_path=last")
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    assert largest_difference(adapter(tmp_path / "part"), adapter(tmp_path / "whole")) == 0.0

    monkeypatch.chdir(tmp_path)
    assert main(["fit", *tiny_args, *OPTIONS, "--model.dropout=0.2", "--run_dir=part", "--ckpt_path=last"]) == 2
    assert "the number of processes (trainer.devices) is 1, was 2" in capsys.readouterr().err
