"""Progress in plain lines, for logs and pipes; on a terminal Lightning's RichProgressBar takes its place."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

SECONDS = 10.0  # between two lines


class PlainProgress(ProgressBar):
    """A line at the first and the last step, every ten seconds, and for each validation; on stderr.

    Tokens/s are real tokens, without padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self._began = self._shown = 0.0
        self._first_step = 0

    @override
    def disable(self) -> None:
        self._shown = float("inf")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first_step = time.monotonic(), _steps(pl_module)[0]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = _steps(pl_module)
        now = time.monotonic()
        if step not in (1, total) and now - self._shown < SECONDS:
            return
        self._shown = now
        left = (now - self._began) / max(1, step - self._first_step) * (total - step)
        self._line(
            trainer,
            f"step {step}/{total}  loss {outputs['train_loss']:.4f}  lr {outputs['lr']:.2e}  "
            f"{outputs['tokens_per_second']:,.0f} tok/s  {timedelta(seconds=int(left))} left",
        )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            figures = trainer.callback_metrics
            self._line(
                trainer,
                f"validation at step {_steps(pl_module)[0]}: loss {figures['val_loss']:.6f}  "
                f"perplexity {figures['val_perplexity']:.3f}  token accuracy {figures['val_token_accuracy']:.4f}",
            )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._line(trainer, f"validate: {sum(trainer.num_val_batches):.0f} batches")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer, f"test: {sum(trainer.num_test_batches):.0f} batches")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer, f"predict: {sum(trainer.num_predict_batches):.0f} batches")

    def _line(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(text, file=sys.stderr, flush=True)


def _steps(module: Any) -> tuple[int, int]:
    """Completed steps, and those of the whole run."""
    return module.completed_steps, module.total_steps
