"""Numbers that are not finite stop a run, or in float16 are skipped and counted."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_lab.__main__ import main
from tests.acceptance.conftest import lab, train_column


class Poison(pl.Callback):
    """Makes one adapter weight infinite before the third step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, step: int
    ) -> None:
        if step == 2:
            with torch.no_grad():
                pl_module.trainable()[1].fill_(float("inf"))  # type: ignore[operator]


def test_a_loss_that_is_not_finite_names_its_step_and_rows(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *tiny_args, "--trainer.callbacks=tests.acceptance.test_guards.Poison"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 3: " in line
    assert "rows " in line
    assert len(train_column(Path("runs/embedded"), "train_loss")) == 2


def test_float16_trains_with_loss_scaling(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [*tiny_args, "--samples=0", "--trainer.max_steps=6"]
    lab("fit", *args, "--run_dir=wide")
    lab("fit", *args, "--run_dir=half", "--model.compute_dtype=float16")
    wide, half = (train_column(Path(name), "train_loss") for name in ("wide", "half"))
    assert half == pytest.approx(wide, abs=0.02)
    norms = [train_column(Path(name), "grad_norm") for name in ("wide", "half")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
