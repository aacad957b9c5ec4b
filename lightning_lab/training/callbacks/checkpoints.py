"""``last.ckpt``, ``best.ckpt`` and ``best/``, and a clean end on SIGINT, SIGTERM and SIGHUP.

What has been trained is saved before anything slow begins: before the first step, before a validation, after it, and in
between at least once a minute. So whatever ends a run, at most a minute of training (or one step, if that is longer) is
repeated, and nothing when a validation or samples were cut short. Order within a step: train row, ``last.ckpt`` if a
validation follows, validation row, samples, ``best/``, ``best.ckpt``, ``last.ckpt``; Lightning calls callbacks of this
class after all others.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError
from typing_extensions import override

from lightning_lab.errors import LabError
from lightning_lab.files import sync_directory, write_sums
from lightning_lab.rundir import CHECKPOINTS
from lightning_lab.signals import listen
from lightning_lab.training.module import QLoRAModule
from lightning_lab.training.resume import CheckpointFile

SAVE_SECONDS = 60.0
OTHERS_SECONDS = 5.0  # until processes that this one has started are killed when it fails


class Checkpoints(Checkpoint):
    """Saves, and stops on a signal.

    The first signal lets the step in progress finish, saves and leaves with status 128 + its number; while nothing is
    unsaved, as during a validation or samples, it leaves at once, and a continued run begins with that validation. A
    second signal leaves at once in any case; ``last.ckpt`` is always whole.

    Args:
        run_dir: The run's directory.
        every_steps: Save every this many steps; None for once a minute.

    """

    def __init__(self, run_dir: Path, every_steps: int | None = None) -> None:
        self.directory = run_dir / CHECKPOINTS
        self.every_steps = every_steps
        self.best_loss = math.inf
        self._saved_at = 0.0  # time.monotonic()
        self._nothing_unsaved = False
        self._received: int | None = None
        self._listening = ExitStack()

    # -- the run -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = CheckpointFile()
        self._trainer = trainer
        self.best_loss, self._received = math.inf, None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        if not (self.directory / "best.ckpt").exists():  # the best so far stayed in the run it was taken from
            self.best_loss = math.inf
        # not earlier: Lightning puts a SIGTERM handler of its own in place after on_fit_start
        self._listening.callback(listen(self._on_signal))
        if pl_module.completed_steps == 0:
            self._save(trainer)
        self._saved_at, self._nothing_unsaved = time.monotonic(), True

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        self._nothing_unsaved = False

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: QLoRAModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = time.monotonic() - self._saved_at >= SAVE_SECONDS
        if self.every_steps:
            due = pl_module.completed_steps % self.every_steps == 0
        due = due or self._received is not None
        # one message and one read a step, on several processes alone
        if pl_module.validation_due or trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._nothing_unsaved = False
        assert pl_module.evaluation
        loss = pl_module.evaluation.loss
        if loss < self.best_loss:
            self.best_loss = loss
            if trainer.is_global_zero:
                self._export_best(pl_module)
            trainer.save_checkpoint(self.directory / "best.ckpt")
        self._save(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._nothing_unsaved:  # no validation followed the last step
            self._save(trainer)
        self._listening.close()  # not later: Lightning gives back next what it had replaced itself

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._listening.close()  # Lightning calls no on_train_end then
        for process in getattr(trainer.strategy.launcher, "procs", []):  # they may wait for this one without end
            try:
                process.wait(OTHERS_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    # -- saving --------------------------------------------------------------------------------------------------

    def _save(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``; leave if a signal has come to any process, also while it was written."""
        self._nothing_unsaved = False
        trainer.save_checkpoint(self.directory / "last.ckpt")
        self._saved_at, self._nothing_unsaved = time.monotonic(), True
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._leave()

    def _export_best(self, module: QLoRAModule) -> None:
        """Write ``best/``, an adapter that plain PEFT loads, with checksums; swapped in whole."""
        fresh, best, old = (self.directory / name for name in (".best.tmp", "best", ".best.old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        # save_embedding_layers=False: they are frozen, and "auto" may ask the Hub
        try:
            module.peft_model.save_pretrained(str(fresh), save_embedding_layers=False)
        except SafetensorError as error:  # its word for a full disk
            raise LabError(f"{fresh}: cannot be written ({error})") from error
        write_sums(fresh)
        if best.exists():
            best.rename(old)
        fresh.rename(best)
        sync_directory(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    # -- signals -------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._received is not None:
            self._say(f"{name} again: leaving at once; last.ckpt is whole")
            if "ipykernel" in sys.modules:  # a notebook's kernel is the user's
                raise KeyboardInterrupt
            self._end_others(signal.SIGKILL)
            os._exit(128 + number)
        self._received = number
        if self._nothing_unsaved:
            self._leave()
        self._say(f"{name}: finishing the step in progress, then saving; once more to leave at once")

    def _leave(self) -> NoReturn:
        self._end_others(signal.SIGTERM)  # they may wait in a validation for this process
        self._say("stopped; last.ckpt has all steps; continue with --ckpt_path last")
        raise SystemExit(128 + (self._received or signal.SIGINT))

    def _say(self, line: str) -> None:
        """On stderr, also from a signal's handler; that its reader is gone changes nothing."""
        if self._trainer.is_global_zero:
            with suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), f"\n{line}\n".encode())

    def _end_others(self, number: int) -> None:
        """End the processes that this one started, if it started any."""
        kill = getattr(self._trainer.strategy.launcher, "kill", None)
        if kill is not None:
            kill(number)
