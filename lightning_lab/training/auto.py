"""What ``auto`` stands for: the fastest checkpointing and the largest micro-batch that fit a device's free memory.

`models.memory` chooses; here every process gets to know what.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.errors import LabError
from lightning_lab.files import flatten
from lightning_lab.models import memory
from lightning_lab.models.base import load_config

KEYS = ("model.checkpointing", "data.micro_batch_tokens", "data.eval_micro_batch_tokens")


def settle_auto(trainer: pl.Trainer, module: Any, data: ChatDataModule | None, *, training: bool) -> list[str]:
    """Put numbers in the place of ``auto``, before any weight is loaded; rank 0 chooses for all.

    Args:
        trainer: Of the run, or of a plan of it.
        module: The `QLoRAModule`.
        data: Its data module, if it has one.
        training: False for evaluation by itself.

    Returns:
        The keys that were ``auto``.

    Raises:
        LabError: Nothing fits, or the free memory is not known.

    """
    settings = flatten({"model": module.hparams, "data": data.hparams if data else {}})
    asked = [key for key in KEYS if settings.get(key) == "auto"]
    if asked:
        if data is None:
            raise LabError("model.checkpointing: auto needs a ChatDataModule to choose for; name a mode")
        chosen: Any = None
        if trainer.is_global_zero:
            chosen = _choose(trainer, module.hparams, data.hparams, asked, training)
            print(f"auto: {', '.join(f'{key} {chosen[key]}' for key in asked)}", file=sys.stderr)
        chosen = trainer.strategy.broadcast(chosen)
        put(module, data, {key: chosen[key] for key in asked})
    return asked


def put(module: Any, data: ChatDataModule | None, values: Mapping[str, Any]) -> None:
    """Put values, by config key, in module and data, where they are read, and in their ``hparams``, which are kept."""
    for key, value in values.items():
        section, name = key.split(".")
        part: Any = module if section == "model" else data
        part.hparams[name] = value
        setattr(part, name, value)


def _choose(trainer: pl.Trainer, model: Any, data: Any, asked: list[str], training: bool) -> dict[str, Any]:
    device = trainer.strategy.root_device
    available = memory.available_memory(device, trainer.num_devices)
    choose = partial(
        memory.choose,
        load_config(model.base, model.revision),
        model,
        device,
        available,
        max_length=data.max_length,
        batch_size=data.batch_size,
    )
    mode, tokens = model.checkpointing, data.micro_batch_tokens
    if "auto" in (mode, tokens):
        mode, tokens = choose(micro_batch_tokens=None if tokens == "auto" else tokens, training=training)
    chosen = {"model.checkpointing": mode, "data.micro_batch_tokens": tokens}
    if "data.eval_micro_batch_tokens" in asked:
        chosen["data.eval_micro_batch_tokens"] = choose(training=False)[1]
    return chosen
