"""Progress in plain lines, for logs and pipes; on a terminal Lightning's RichProgressBar takes its place."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from lightning_lab.training.module import QLoRAModule

SECONDS = 10.0  # between two lines


class PlainProgress(ProgressBar):
    """A line at the first and the last step, every ten seconds, and for each validation; on stderr.

    Tokens/s are real tokens, without padding.
    """

    _shown = 0.0  # time.monotonic() of the last line

    @override
    def disable(self) -> None:
        """Called on all processes but the first, on which nothing is printed anyway."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        self._began, self._first_step = time.monotonic(), pl_module.completed_steps

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: QLoRAModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = pl_module.completed_steps, pl_module.total_steps
        now = time.monotonic()
        if step not in (1, total) and now - self._shown < SECONDS:
            return
        self._shown = now
        left = (now - self._began) / max(1, step - self._first_step) * (total - step)
        self._line(
            f"step {step}/{total}  loss {outputs['train_loss']:.4f}  lr {outputs['lr']:.2e}  "
            f"{outputs['tokens_per_second']:,.0f} tok/s  {timedelta(seconds=int(left))} left",
        )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            figures = trainer.callback_metrics
            self._line(
                f"validation at step {pl_module.completed_steps}: loss {figures['val_loss']:.6f}  "
                f"perplexity {figures['val_perplexity']:.3f}  token accuracy {figures['val_token_accuracy']:.4f}",
            )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert trainer.state.fn
        command = trainer.state.fn.value
        if command != "fit":
            self._line(f"{command}: {sum(getattr(trainer, f'{command}_loop').max_batches):.0f} batches")

    on_test_start = on_predict_start = on_validation_start

    def _line(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text, file=sys.stderr, flush=True)
