"""DataLoaders that go on where a run stopped, and whose workers stay until it has stopped."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_lab.data.batching import StepBatch
from lightning_lab.errors import LabError


def loading_options(
    collate: Callable[..., Any], trainer: pl.Trainer | None, workers: int, batch_size: int | None = None
) -> dict[str, Any]:
    """Arguments of every DataLoader. Without a ``batch_size`` an item is a whole batch already."""
    on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
    return {
        "collate_fn": collate,
        "batch_size": batch_size,
        "num_workers": workers,
        "worker_init_fn": outlive_signals,
        "pin_memory": on_gpu,
        "generator": torch.Generator(),  # else each iterator draws from the RNG that dropout uses
    }


def do_without_validation(trainer: pl.Trainer | None) -> None:
    """Let `fit` train without a validation split, and say what that means.

    Raises:
        LabError: Something waits for validations.

    """
    if trainer is None:
        return
    if trainer.early_stopping_callbacks:
        raise LabError("early stopping needs a validation split; set data.split or data.validation_source")
    if trainer.is_global_zero:
        print("no validation split: there will be no best checkpoint, last.ckpt remains", file=sys.stderr)
    trainer.limit_val_batches = 0


class StepLoader:
    """The optimizer steps that remain in the epoch the run is in.

    Its position is Lightning's own count of steps, which the checkpoint holds. So there is nothing to keep in
    ``state_dict``, which Lightning asks for before it believes that a loader can be resumed.

    Args:
        steps: Steps of an epoch that nothing limits. Lightning applies ``limit_train_batches`` to this length itself.
        limited: Steps that an epoch really has.
        done: Asked, when an epoch begins, for the steps that have been done so far.
        options: Of the DataLoader, which is given steps numbered over all epochs.

    """

    def __init__(self, steps: int, limited: int, done: Callable[[], int], options: dict[str, Any]) -> None:
        self.steps, self.limited, self.done, self.options = steps, limited, done, options

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[StepBatch]:
        # Begins at the first `next`: Lightning makes the iterator before it has restored its count of steps.
        done = self.done()
        steps: Any = range(done, (done // self.limited + 1) * self.limited)
        yield from DataLoader(steps, **self.options)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see above."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see above."""


def outlive_signals(worker: int) -> None:
    """Keep a DataLoader's worker alive when its process group is told to stop: the run needs its steps to end well.

    SIGTERM is obeyed when it comes from the run itself, by which multiprocessing ends workers at exit.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
