"""Settings that cannot be honoured: an error that names the key and the remedy, never a warning."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_lab.errors import LabError
from lightning_lab.models.qlora import uses_fused_linear

RANGES = {
    "lr": (1e-30, 1e3),
    "r": (1, 65_536),
    "alpha": (1, 1_000_000),
    "dropout": (0.0, 0.999),
    "weight_decay": (0.0, 1e3),
    "betas": (0.0, 1 - 1e-9),
    "eps": (1e-30, 1.0),
    "warmup_steps": (0, 10**9),
    "max_grad_norm": (1e-12, 1e12),
    "hf_eval_batch_size": (1, 10**9),
    "max_new_tokens": (1, 1_000_000),
    "temperature": (0.0, 1e3),
    "seed": (0, 2**32 - 1),
}
NO_END = "the run has no end: set trainer.max_epochs or trainer.max_steps"

Replaced = Mapping[str, tuple[tuple[Any, ...], str]]
# Trainer settings that something here replaces: the values that change nothing, and what to set instead. Those that the
# command line sets itself are in `cli`.
REPLACED: Replaced = {
    "precision": ((None, 32, "32", "32-true"), "model.compute_dtype alone decides the precision"),
    "accumulate_grad_batches": (
        (None, 1),
        "a batch is one optimizer step: set data.batch_size (and data.micro_batch_tokens)",
    ),
    "gradient_clip_val": ((None, 0), "set model.max_grad_norm"),
    "min_epochs": ((None, 0, 1), "set trainer.max_epochs or early_stopping"),
    "min_steps": ((None, 0), "set trainer.max_steps or early_stopping"),
    "overfit_batches": ((None, 0), "set data.rows, or trainer.limit_train_batches"),
}


# Where Linux shows that there is an NVIDIA GPU, and which driver it has.
NVIDIA_DEVICE, NVIDIA_DRIVER = Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version")


def unusable_gpu() -> str | None:
    """Say what is wrong where there is an NVIDIA GPU and PyTorch cannot use it; None where there is none, or it can."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not NVIDIA_DEVICE.exists():
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone"
    version = re.search(r"\d+\.\d+[.\d]*", NVIDIA_DRIVER.read_text()) if NVIDIA_DRIVER.exists() else None
    driver = f"driver {version.group()}" if version else "a driver that does not answer"
    return (
        f"there is an NVIDIA GPU with {driver}, which this PyTorch ({torch.__version__}, built {built}) cannot use: "
        "update the driver (CUDA 13 needs 580 or newer), or install a PyTorch for it, with pip's option --index-url "
        "https://download.pytorch.org/whl/cu126 for instance"
    )


def refuse_replaced(settings: Any, replaced: Replaced) -> None:
    """Refuse settings of a trainer, or a trainer that has them, where something else replaces them.

    Raises:
        LabError: Names the setting and what to set instead.

    """
    for key, (neutral, instead) in replaced.items():
        if getattr(settings, key, None) not in neutral:
            raise LabError(f"trainer.{key} is not used here: {instead}")


def refuse_trainer(trainer: pl.Trainer, *, training: bool = True) -> None:
    """Refuse a trainer whose settings would be ignored or would break a definition.

    Args:
        trainer: The trainer.
        training: Whether it is to train.

    Raises:
        LabError: Names the setting and what to set instead.

    """
    refuse_replaced(trainer, REPLACED)
    if training:
        steps, epochs = trainer.max_steps, trainer.max_epochs
        if steps == -1 and epochs in (None, -1):
            raise LabError(NO_END)
        if steps == 0 or epochs == 0:
            raise LabError("trainer.max_steps and trainer.max_epochs must be at least 1")
        if trainer.limit_train_batches == 0:
            raise LabError("trainer.limit_train_batches is 0, which leaves nothing to train on")
    if trainer.world_size > 1 and getattr(trainer._accelerator_connector, "use_distributed_sampler", False):
        raise LabError(
            "several processes need Trainer(use_distributed_sampler=False): the data module shares out each step itself"
        )
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise LabError(f"trainer.strategy {type(strategy).__name__} is not supported; use auto or ddp")
    if strategy.root_device.type not in ("cpu", "cuda"):  # bitsandbytes and this package are tried on nothing else
        raise LabError(f"trainer.accelerator {strategy.root_device.type} is not supported; use cpu or cuda")


def total_steps(trainer: pl.Trainer) -> int:
    """Count the optimizer steps of a run; say where ``max_steps`` is more than its epochs have.

    Raises:
        LabError: It has no end.

    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise LabError(NO_END)
    if trainer.max_steps > steps and trainer.is_global_zero:
        ends = f"trainer.max_epochs {trainer.max_epochs} ends the run after {steps:,.0f} steps"
        print(f"{ends}, before trainer.max_steps {trainer.max_steps:,}; raise trainer.max_epochs", file=sys.stderr)
    return int(steps)


def refuse_combinations(settings: Any) -> None:
    """Refuse the module's settings that exclude each other.

    Raises:
        LabError: Names the keys.

    """
    fused = "set model.fused_linear to true, model.dropout to 0 and model.dora to false"
    if settings.compile is True and not uses_fused_linear(settings):
        raise LabError(
            f"model.compile needs the fused linear: {fused}, model.bits to 4 or 16, or model.compile to false"
        )
    if settings.cache_dequantised is True and not (settings.bits == 4 and uses_fused_linear(settings)):
        raise LabError(
            f"model.cache_dequantised is for the fused linear on a 4-bit base: {fused}, model.bits to 4, or "
            "model.cache_dequantised to false"
        )
    if settings.compile is True and settings.checkpointing == "offload":
        raise LabError(
            "model.checkpointing: offload cannot be compiled; set model.compile to false, or use full or selective"
        )


def refuse_on_device(checkpointing: str, device: torch.device) -> None:
    """Refuse a mode of checkpointing that the device cannot honour.

    Raises:
        LabError: Names the key.

    """
    if checkpointing == "offload" and device.type != "cuda":
        raise LabError(
            "model.checkpointing: offload moves activations from a GPU to the host; this run is on a CPU, use full"
        )
