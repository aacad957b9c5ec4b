"""Runs without a validation split, and runs that begin from an adapter."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.acceptance.conftest import adapter, lab, largest_difference, metrics
from tests.acceptance.test_errors import fails


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_without_a_validation_split(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    split = ("--data.split=[60,0,20]", "--run_dir=runs/none")
    lab("fit", *tiny_args, *split, "--trainer.max_steps=2")
    said = capsys.readouterr().err
    assert "no validation split: there will be no best checkpoint, last.ckpt remains" in said
    assert sum(line.startswith("80 rows of") for line in said.splitlines()) == 1
    run = Path("runs/none")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "rows.parquet"}
    assert [row["step"] for row in metrics(run)] == ["1", "2"]
    losses = [float(row["train_loss"]) for row in metrics(run)]
    assert f"| 2 | {sum(losses) / 2:.4f} |" in (run / "losses.md").read_text()
    assert "has no best.ckpt, as it has no validation split" in fails(
        capsys, "test", *tiny_args, *split, "--ckpt_path=best"
    )
    lab("test", *tiny_args, *split, "--ckpt_path=last")
    assert json.loads((run / "test.json").read_text())["conversations"] == 20
    lab("report", "runs/none")
    assert "finished, 2 steps" in capsys.readouterr().out
    assert "early stopping needs a validation split" in fails(
        capsys, "fit", *tiny_args, "--data.split=[60,0,20]", "--early_stopping=1"
    )


def test_a_run_begins_from_an_adapter(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--samples=0", "--data.rows=40", "--data.split=[8,16,16]")
    lab("fit", *tiny_args, *short, "--run_dir=first")
    best = Path("first/checkpoints/best")
    lab("fit", *tiny_args, *short, f"--model.adapter={best}", "--model.lr=1e-30", "--trainer.max_steps=99")
    said = capsys.readouterr().err
    assert "trainer.max_epochs 1 ends the run after 2 steps, before trainer.max_steps 99" in said
    assert "was trained on" not in said
    run = Path("runs/embedded")
    assert largest_difference(adapter(run), adapter(Path("first"), "best")) < 1e-6
    weights = (best / "adapter_model.safetensors").read_bytes()
    shutil.rmtree("first")  # what has begun needs it no more
    lab("test", *tiny_args, *short, f"--model.adapter={best}", "--ckpt_path=runs/embedded/checkpoints/best/")
    assert json.loads((run / "test.json").read_text())["checkpoint"].endswith("checkpoints/best.ckpt")
    recorded = [json.loads((run / "environment.json").read_text())]
    lab("fit", *tiny_args, *short, f"--model.adapter={best}", "--model.lr=1e-30", "--ckpt_path=last")
    recorded.append(json.loads((run / "environment.json").read_text()))
    assert [record["adapter_weights"] for record in recorded] == [hashlib.sha256(weights).hexdigest()] * 2
    assert [record["completed_steps"] for record in recorded] == [0, 2]


def test_a_logger_without_its_package(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "fit", *tiny_args, "--trainer.logger=WandbLogger")
    assert "WandbLogger" in line
    assert "pip install -U 'wandb" in line
