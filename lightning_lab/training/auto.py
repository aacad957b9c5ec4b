"""What ``auto`` stands for: compiled layers on a GPU, the fastest checkpointing and the largest micro-batch that fit.

`models.memory` chooses; here every process gets to know what.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import AttributeDict

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.errors import LabError
from lightning_lab.files import flatten
from lightning_lab.models import memory
from lightning_lab.models.base import load_config
from lightning_lab.models.qlora import uses_fused_linear

KEYS = (
    *("model.checkpointing", "data.micro_batch_tokens", "model.compile", "model.cache_dequantised"),
    "data.eval_micro_batch_tokens",
)
# A run of fewer steps is over before the minute or two that compiling takes have come back.
LEAST_STEPS_TO_COMPILE = 50


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
            raise LabError(f"{asked[0]}: auto needs a ChatDataModule to choose for; name a value")
        chosen: Any = None
        if trainer.is_global_zero:
            chosen = _choose(trainer, module.hparams, data, asked, training)
            print(f"auto: {', '.join(f'{key} {str(chosen[key]).lower()}' for key in asked)}", file=sys.stderr)
        chosen = trainer.strategy.broadcast(chosen)
        put(module, data, {key: chosen[key] for key in asked})
    return asked


def put(module: Any, data: ChatDataModule | None, values: Mapping[str, Any]) -> None:
    """Put values, by config key, in module and data, where they are read, and in their ``hparams``, which are kept."""
    for key, value in values.items():
        section, name = key.split(".")
        part: Any = module if section == "model" else data
        part.hparams[name] = value
        if section == "data" or name == "checkpointing":  # the others are read from there
            setattr(part, name, value)


def _choose(
    trainer: pl.Trainer, model: Any, data_module: ChatDataModule, asked: list[str], training: bool
) -> dict[str, Any]:
    data: Any = data_module.hparams
    device = trainer.strategy.root_device
    available = memory.available_memory(device, trainer.num_devices)
    choose = partial(
        memory.choose,
        load_config(model.base, model.revision),
        device=device,
        available=available,
        max_length=data.max_length,
        batch_size=data.batch_size,
    )
    mode, tokens = model.checkpointing, data.micro_batch_tokens
    pays = training and model.compile == "auto" and _compiling_pays(trainer, model, data_module)
    budget = None if tokens == "auto" else tokens
    try:
        found = choose(model, micro_batch_tokens=budget, training=training, may_compile=pays)
    except LabError:
        if "auto" in (mode, tokens):
            raise
        found = memory.Choice(mode, tokens, pays and mode != "offload", False)  # what was named is tried all the same
    settled = {key: value for key, value in found._asdict().items() if model.get(key) == "auto"}
    chosen = {"data.micro_batch_tokens": found.micro_batch_tokens, **{f"model.{k}": v for k, v in settled.items()}}
    if "data.eval_micro_batch_tokens" in asked:
        for_evaluation = choose(AttributeDict({**model, **settled}), training=False)
        chosen["data.eval_micro_batch_tokens"] = for_evaluation.micro_batch_tokens
    return chosen


def _compiling_pays(trainer: pl.Trainer, model: Any, data: ChatDataModule) -> bool:
    """Whether layers that can be compiled are worth it: on a GPU, in a run that is long enough."""
    if trainer.strategy.root_device.type != "cuda" or not uses_fused_linear(model):
        return False
    epochs = trainer.max_epochs
    steps = data.steps_per_epoch * epochs if epochs is not None and epochs >= 0 else math.inf
    if min(steps, trainer.max_steps if trainer.max_steps >= 0 else math.inf) < LEAST_STEPS_TO_COMPILE:
        return False
    missing = None if find_spec("triton") else "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        missing = missing or "there is no C compiler, which Triton needs"
    if missing:
        print(f"auto: model.compile false, as {missing}: training will be slower", file=sys.stderr)
    return not missing
