"""Keys of the command line: every number has a checked range, and whatever goes wrong is one line."""

import inspect
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lab import cli
from lightning_lab.__main__ import main
from lightning_lab.data import datamodule
from lightning_lab.errors import LabError
from lightning_lab.training import module, refusals
from tests.acceptance.conftest import ROOT
from tests.acceptance.test_errors import fails


def is_number(annotation: Any) -> bool:
    """Whether a value of this type can be a number: int, float, or a union, list or tuple that has them."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (typing.Union, list, tuple):
        return any(map(is_number, typing.get_args(annotation)))
    return annotation in (int, float)


def numeric_keys(function: Any) -> set[str]:
    hints = typing.get_type_hints(function)
    return {name for name in inspect.signature(function).parameters if is_number(hints.get(name))}


OWN = {"val_every_steps", "checkpoint_every_steps", "train_loss_window", "early_stopping", "samples", "sample_tokens"}
OWN |= {"seed_everything"}
MODEL = numeric_keys(module.QLoRAModule.__init__)
DATA = numeric_keys(datamodule.ChatDataModule.__init__)


def test_every_number_has_a_range() -> None:
    assert {"lr", "betas", "max_grad_norm", "warmup_steps", "seed"} <= MODEL
    assert set(refusals.RANGES) >= MODEL
    assert {"rows", "split_seed", "num_workers", "batch_size"} <= DATA
    assert DATA - {"split"} <= set(datamodule.RANGES)  # a split's sizes are checked together
    assert set(cli.RANGES) == OWN


def keys() -> list[str]:
    linked = {"model.seed", "data.seed"}
    return sorted({*OWN, *(f"model.{k}" for k in MODEL), *(f"data.{k}" for k in DATA)} - linked)


@pytest.mark.parametrize("key", keys())
def test_numbers_out_of_range_are_one_line(
    key: str, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def reached(*args: Any, **options: Any) -> None:
        raise LabError("it was taken")

    monkeypatch.setattr(datamodule.ChatDataModule, "prepare_data", reached)
    for value in ("-5", "1e300", "nan", "99999999999999999999999"):
        shown = f"[{value}, 0.5]" if key == "model.betas" else f"[{value}, 1, 1]" if key == "data.split" else value
        line = fails(capsys, "fit", *tiny_args, f"--{key}={shown}")
        if value in ("-5", "nan"):
            assert "it was taken" not in line
            assert key.rpartition(".")[2] in line


def test_a_key_of_a_megabyte_is_not_repeated_whole(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(fails(capsys, "fit", *tiny_args, f"--data.source={'x' * 10**6}")) < 2_000
    assert len(fails(capsys, "fit", *tiny_args, f"--model.{'y' * 10**6}=1")) < 2_000


@pytest.mark.parametrize("command", ["plan", "preview", "fit"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_one_line_in_any_command(
    command: str,
    error: BaseException,
    tiny_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datamodule.ChatDataModule, "prepare", full)
    assert "out of memory" in fails(capsys, command, *tiny_args)


def test_only_the_systems_own_errors_are_the_users(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    raised: list[OSError] = [OSError(28, "No space left on device", "some/file")]

    def broken(*args: Any, **options: Any) -> None:
        raise raised[0]

    monkeypatch.setattr(datamodule.ChatDataModule, "prepare", broken)
    assert fails(capsys, "fit", *tiny_args) == "error: some/file: No space left on device"
    raised[0] = OSError("a bug that looks like one")
    with pytest.raises(OSError, match="a bug"):
        main(["fit", *tiny_args])


def test_a_yaml_bomb_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(["x0: &x0 [1, 1]", *levels]))
    assert "bomb.yaml: has more than" in fails(capsys, "fit", f"--config={tmp_path / 'bomb.yaml'}")


@pytest.mark.parametrize("key", sorted(cli.REPLACED))
def test_trainer_settings_that_the_command_line_sets_itself(
    key: str, tiny_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    default = inspect.signature(pl.Trainer).parameters[key].default
    value = {"val_check_interval": "3", "check_val_every_n_epoch": "2"}.get(key, str(not default).lower())
    assert f"trainer.{key} is not used here" in fails(capsys, "fit", *tiny_args, f"--trainer.{key}={value}")


def test_help_of_each_command_and_no_network(tmp_path: Path) -> None:
    sweep = [f"--sweep.{key}" for key in ("grid", "settings", "search", "tie", "retry_failed", "storage")]
    for command, keys in (("fit", ["--samples", "--model.lr"]), ("report", ["--compare"]), ("sweep", sweep)):
        result = subprocess.run(
            [sys.executable, "-m", "lightning_lab", command, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        )
        assert result.returncode == 0, result.stderr
        assert re.search(r"usage:", result.stdout)
        assert [key for key in keys if key not in result.stdout] == []


def test_what_only_prints_stops_nothing(tiny_args: list[str], tmp_path: Path) -> None:
    """A reader that goes away at once, as `preview | head -0`."""
    command = [sys.executable, "-m", "lightning_lab", "preview", *tiny_args]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **piped)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0, error
    assert "Traceback" not in error
