"""The whole program in seconds on a tiny Llama and short real conversations, through its command line."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lab.__main__ import main

ROOT = Path(__file__).parents[2]
# Columns of metrics.csv that a clock or the operating system decides.
UNREPEATABLE = ("tokens_per_second", "peak_memory_mib")

# Two epochs of 13 steps, validations at 5, 10, ... and 26; dropout and 8-bit state, so that RNG and optimizer count.
RESUMED = ("--trainer.max_epochs=2", "--model.dropout=0.1", "--model.optimizer=adamw_8bit", "--samples=0")


@pytest.fixture(scope="session")
def tiny_args(tiny_base: Path, short_chats: Path) -> list[str]:
    """Arguments of a run on the tiny base: float32, 50 training rows in steps of 4 (the last of an epoch has 2)."""
    return arguments(
        **{
            "config": "embedded.yaml",
            "model.base": tiny_base,
            "model.compute_dtype": "float32",
            "model.r": 32,
            "model.lr": 3e-3,
            "data.source": short_chats,
            "data.split": "[50,17,13]",
            "data.batch_size": 4,
            "data.micro_batch_tokens": 256,
            "val_every_steps": 5,
            "samples": 1,
            "sample_tokens": 4,
            "trainer.logger": "false",
        }
    )


def arguments(**options: Any) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def lab(*args: str) -> None:
    """Run a command in this process and expect it to succeed."""
    assert main(list(args)) == 0


def start(*args: str, cwd: Path, stderr: Any = subprocess.PIPE, threads: int | None = None) -> "subprocess.Popen[str]":
    """Start a command in a process of its own."""
    # as many threads as here: sums over other numbers of threads differ in the last bit
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_lab", *args], cwd=cwd, env=environment, text=True, stderr=stderr
    )


def metrics(run: Path, drop: tuple[str, ...] = UNREPEATABLE) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(file)]


def train_column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(run, ()) if row["train_loss"]]


def validations(run: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["val_loss"]) for row in metrics(run) if row["val_loss"]}


def adapter(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def close(a: list[float], b: list[float], tolerance: float) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=0, abs_tol=tolerance) for x, y in zip(a, b, strict=True))


def assert_same(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    for name in ("last", "best"):
        ours, theirs = adapter(run, name), adapter(whole, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (run / "losses.md").read_text() == (whole / "losses.md").read_text()
    best, expected = (r / "checkpoints" / "best" / "adapter_model.safetensors" for r in (run, whole))
    assert best.read_bytes() == expected.read_bytes()


@pytest.fixture(scope="session")
def uninterrupted(tiny_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lab("fit", *tiny_args, *RESUMED)
    return folder / "runs" / "embedded"
