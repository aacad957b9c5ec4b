"""Progress of a run: a bar with loss, learning rate, tokens/s and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightning_lab.training.module import QLoRAModule

PLAIN_SECONDS = 10.0


class RunProgress(pl.Callback):
    """Shows training, evaluation and prediction on stderr. Tokens/s are real tokens, without padding."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown = 0.0
        self._started = 0.0
        self._first_step = 0
        self._eval_task: TaskID | None = None

    # -- training ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the bar."""
        assert isinstance(pl_module, QLoRAModule)
        self._started, self._first_step = time.monotonic(), pl_module.completed_steps
        if trainer.is_global_zero and self._console.is_terminal:
            self._start_bar()
            assert self._bar is not None
            self._task = self._bar.add_task(
                "training", total=pl_module.total_steps, completed=pl_module.completed_steps, text=""
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        assert isinstance(pl_module, QLoRAModule)
        if not trainer.is_global_zero:
            return
        step, total = pl_module.completed_steps, pl_module.total_steps
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, step - self._first_step) * (total - step)
        text = (
            f"loss {outputs['train_loss']:.4f}  lr {outputs['lr']:.2e}  "
            f"{outputs['tokens_per_second']:,.0f} tok/s  {_clock(left)} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step in (1, total) or time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._line(f"step {step}/{total}  {text}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the bar."""
        self._stop_bar()

    # -- evaluation and prediction -------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show that a validation began."""
        self._begin(trainer, "validation", sum(n for n in trainer.num_val_batches if n != float("inf")))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show that a test began."""
        self._begin(trainer, "test", sum(n for n in trainer.num_test_batches if n != float("inf")))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show that a prediction began."""
        self._begin(trainer, "predict", sum(n for n in trainer.num_predict_batches if n != float("inf")))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Advance."""
        self._advance()

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Advance."""
        self._advance()

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Advance."""
        self._advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation's result."""
        assert isinstance(pl_module, QLoRAModule)
        self._end()
        if trainer.is_global_zero and trainer.state.fn == "fit" and pl_module.evaluation is not None:
            result = pl_module.evaluation
            self._line(
                f"validation at step {pl_module.completed_steps}: loss {result.loss:.6f}  "
                f"perplexity {result.perplexity:.3f}  token accuracy {result.token_accuracy:.4f}"
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the bar."""
        self._end()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the bar."""
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop_bar()

    def _begin(self, trainer: pl.Trainer, what: str, total: float) -> None:
        if not trainer.is_global_zero:
            return
        if self._console.is_terminal:
            if self._bar is None:
                self._start_bar()
            assert self._bar is not None
            self._eval_task = self._bar.add_task(what, total=total, text="")
        elif trainer.state.fn != "fit":
            self._line(f"{what}: {total:.0f} batches")

    def _advance(self) -> None:
        if self._bar is not None and self._eval_task is not None:
            self._bar.advance(self._eval_task)

    def _end(self) -> None:
        if self._bar is not None and self._eval_task is not None:
            self._bar.remove_task(self._eval_task)
            self._eval_task = None
        if self._task is None:
            self._stop_bar()

    def _start_bar(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
        )
        self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._eval_task = None

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
