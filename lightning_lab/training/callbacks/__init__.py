"""What a run leaves behind: its directory, checkpoints, samples, results and progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from lightning_lab.training.callbacks.checkpoints import Checkpoints
from lightning_lab.training.callbacks.predictions import PredictionWriter
from lightning_lab.training.callbacks.progress import PlainProgress
from lightning_lab.training.callbacks.record import RunRecord
from lightning_lab.training.callbacks.results import Results
from lightning_lab.training.callbacks.samples import Samples


def run_directory(
    run_dir: str | Path,
    *,
    checkpoint_every_steps: int | None = None,
    train_loss_window: int | None = None,
    samples: int = 3,
    sample_tokens: int = 64,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    command: list[str] | None = None,
    predictions: str | Path | None = None,
) -> list[pl.Callback]:
    """The callbacks that keep a run directory: ``Trainer(callbacks=run_directory("runs/mine"), ...)``.

    `fit` writes config, environment, metrics, loss table and curve, samples and checkpoints, and leaves on signals with
    ``last.ckpt`` saved; to continue, pass ``ckpt_path="runs/mine/checkpoints/last.ckpt"`` to `fit`. `validate` and
    `test` write their results, `predict` its answers.

    Args:
        run_dir: The directory.
        checkpoint_every_steps: Save last.ckpt every this many optimizer steps; null for at least once a minute. It is
            also saved before the first step and around each validation.
        train_loss_window: ``losses.md`` shows the mean training loss over this many steps before each row; null for all
            steps since the row before.
        samples: Validation prompts answered at each validation.
        sample_tokens: Longest of these answers.
        name: The run's name; that of the directory by default.
        config: What ``config.yaml`` says; by default the settings of module and data module.
        command: The command line, for ``environment.json``; by default this process's.
        predictions: File of `predict`'s answers, replaced; by default one in the directory, named after what is
            answered.

    """
    path = Path(run_dir).expanduser()
    return [
        RunRecord(path, name or path.name, config, command or sys.argv, train_loss_window),
        Results(path, train_loss_window),
        Samples(path, samples, sample_tokens),
        PredictionWriter(path, Path(predictions).expanduser() if predictions else None),
        Checkpoints(path, checkpoint_every_steps),
    ]


def progress() -> pl.Callback:
    """A bar on a terminal, plain lines elsewhere; both on stderr."""
    if sys.stderr.isatty():
        return RichProgressBar(leave=True, console_kwargs={"stderr": True})
    return PlainProgress()
