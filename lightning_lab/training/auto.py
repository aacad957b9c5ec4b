"""What ``auto`` stands for: the fastest checkpointing and the largest micro-batch that fit a device's free memory."""

from __future__ import annotations

from typing import Any

import torch

from lightning_lab.models import memory
from lightning_lab.models.base import load_config


def choose(model: Any, data: Any, device: torch.device, processes: int, *, training: bool) -> dict[str, Any]:
    """Put numbers in the place of ``auto``; other values stay as they are.

    Args:
        model: Settings of the module.
        data: Settings of the data module.
        device: Where the model goes.
        processes: How many share a CPU's memory.
        training: False for evaluation by itself.

    Returns:
        ``model.checkpointing``, ``data.micro_batch_tokens`` and ``data.eval_micro_batch_tokens``.

    Raises:
        LabError: Nothing fits, or the free memory is not known.

    """
    mode, tokens, eval_tokens = model.checkpointing, data.micro_batch_tokens, data.eval_micro_batch_tokens
    shared = {
        "available": memory.available_memory(device, processes),
        "max_length": data.max_length,
        "batch_size": data.batch_size,
    }
    config = load_config(model.base, model.revision)
    if mode == "auto" or tokens == "auto":
        given = None if tokens == "auto" else tokens
        mode, tokens = memory.choose(config, model, device, **shared, micro_batch_tokens=given, training=training)
    if eval_tokens == "auto":
        eval_tokens = memory.choose(config, model, device, **shared, training=False)[1]
    return {
        "model.checkpointing": mode,
        "data.micro_batch_tokens": tokens,
        "data.eval_micro_batch_tokens": tokens if eval_tokens is None else eval_tokens,
    }
