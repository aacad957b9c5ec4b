"""``last.ckpt``, ``best.ckpt`` and ``best/``, and a clean end on SIGINT and SIGTERM.

Lightning's ModelCheckpoint warns at every save under manual optimisation and would save before the validation of the
same step; here the order within a step is train row, validation row, checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_lab.errors import LabError
from lightning_lab.training.module import QLoRAModule

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Checkpoints(pl.Callback):
    """Decides when to validate for the last time, saves, and stops on a signal.

    ``last.ckpt`` is written before step 1, after each validation and every ``every_steps``. When a validation is the
    best so far, ``best.ckpt`` becomes a copy of it and ``best/`` a PEFT adapter. Every file is replaced at once, and
    ``last.ckpt`` goes first: a kill between the two is put right when the run is resumed.

    Args:
        directory: ``checkpoints`` of the run directory.
        val_every_steps: Optimizer steps between validations.
        every_steps: Also save every this many steps; None for only at validations.

    """

    def __init__(self, directory: Path, val_every_steps: int, every_steps: int | None) -> None:
        self.directory = directory
        self.val_every_steps = val_every_steps
        self.every_steps = every_steps
        self.best_step: int | None = None
        self.best_loss = math.inf
        self._received: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    # -- the run -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume finish a best checkpoint that a kill interrupted, or see that all is done."""
        module = _qlora(pl_module)
        best = self.directory / "best.ckpt"
        is_best = module.completed_steps and self.best_step == module.completed_steps
        if is_best and trainer.is_global_zero and not self._best_is_whole():
            self._export_best(module)
        trainer.strategy.barrier("best")
        if not best.exists():  # the best so far stayed in the other run
            self.best_step, self.best_loss = None, math.inf
        if self._finished(trainer, module):
            trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals; save before step 1, so that a run killed before its first validation can be resumed."""
        self._listen()  # not earlier: Lightning puts a SIGTERM handler of its own in place after on_fit_start
        if _qlora(pl_module).completed_steps == 0:
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step without validation, if it is time or a signal came; ask for the last validation."""
        module = _qlora(pl_module)
        step = module.completed_steps
        if step == module.total_steps:
            trainer.should_stop = True  # makes Lightning validate once more, unless a validation is due anyway
        if step == module.total_steps or step % self.val_every_steps == 0:
            return  # on_validation_end follows
        stop = self._signalled(trainer)
        if stop or (self.every_steps and step % self.every_steps == 0):
            self._save(trainer)
        if stop:
            self._leave(step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation, as best too if it is."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        module = _qlora(pl_module)
        assert module.evaluation is not None
        better = module.evaluation.loss < self.best_loss
        if better:
            self.best_step, self.best_loss = module.completed_steps, module.evaluation.loss
        self._save(trainer)
        if better and trainer.is_global_zero:
            self._export_best(module)
        trainer.strategy.barrier("best")
        if self._signalled(trainer):
            self._leave(module.completed_steps)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def state_dict(self) -> dict[str, Any]:
        """Which validation was the best."""
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    # -- saving --------------------------------------------------------------------------------------------------

    def _save(self, trainer: pl.Trainer) -> None:
        temporary = self.directory / ".last.ckpt.tmp"
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.directory / "last.ckpt")

    def _best_is_whole(self) -> bool:
        best = self.directory / "best.ckpt"
        return best.exists() and _step_of(best) == self.best_step and (self.directory / "best").is_dir()

    def _export_best(self, module: QLoRAModule) -> None:
        """Write ``best/``, then ``best.ckpt``: its step tells a resumed run whether both are done."""
        fresh, best, old = (self.directory / name for name in (".best.tmp", "best", ".best.old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        # save_embedding_layers=False: they are frozen, and "auto" may ask the Hub
        module.peft_model.save_pretrained(str(fresh), save_embedding_layers=False)
        if best.exists():
            best.rename(old)
        fresh.rename(best)
        shutil.rmtree(old, ignore_errors=True)
        temporary = self.directory / ".best.ckpt.tmp"
        shutil.copyfile(self.directory / "last.ckpt", temporary)
        os.replace(temporary, self.directory / "best.ckpt")

    @staticmethod
    def _finished(trainer: pl.Trainer, module: QLoRAModule) -> bool:
        total = module.chat_data.total_steps(trainer.max_epochs, trainer.max_steps)
        stopped_early = any(
            isinstance(c, pl.callbacks.EarlyStopping) and c.wait_count >= c.patience
            for c in trainer.early_stopping_callbacks
        )
        return module.completed_steps >= total or stopped_early

    # -- signals -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for number in SIGNALS:
            self._previous_handlers[number] = signal.getsignal(number)
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._received is not None:
            os.write(2, f"\n{name} again: leaving at once; last.ckpt is whole\n".encode())
            os._exit(128 + number)
        self._received = number
        os.write(2, f"\n{name}: finishing the step in progress, then saving; once more to leave at once\n".encode())

    def _signalled(self, trainer: pl.Trainer) -> bool:
        """Whether any process has had a signal; all leave together."""
        received = self._received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        return received

    def _leave(self, step: int) -> None:
        print(f"stopped after step {step}; continue with --ckpt_path last", file=sys.stderr)
        raise SystemExit(128 + (self._received or signal.SIGINT))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and numbers, nothing that could run code.

    Raises:
        LabError: The file is missing, cut short, or not one of ours.

    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LabError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many types for a corrupt file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LabError(f"{path}: cannot be read as a checkpoint ({reason[:120]}); use another one") from None
    if not isinstance(checkpoint, dict) or "lightning_lab" not in checkpoint:
        raise LabError(f"{path}: is not a checkpoint of this program")
    return checkpoint


def _step_of(path: Path) -> int | None:
    try:
        return read_checkpoint(path)["lightning_lab"]["completed_steps"]
    except LabError:
        return None


def _qlora(module: pl.LightningModule) -> QLoRAModule:
    assert isinstance(module, QLoRAModule)
    return module
