"""Optimizer, learning-rate schedule and float16 loss scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def adamw(
    weights: Sequence[Tensor], name: str, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> Optimizer:
    """AdamW (arXiv:1711.05101) with float32 state, or as ``adamw_8bit`` with blockwise 8-bit state (2110.02861)."""
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, **options)
    return torch.optim.AdamW(weights, **options)


def linear_schedule(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate after ``step`` optimizer steps, as transformers' linear schedule with warm-up.

    Optimizer step k (from 1) uses ``step = k - 1``: with any warm-up, the first step has factor 0.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


@dataclass
class LossScale:
    """Dynamic loss scaling for float16, with the constants of ``torch.amp.GradScaler``.

    GradScaler reads from the device for itself; here the step's one read has said already whether it overflowed.
    """

    value: float = 2.0**16
    good_steps: int = 0
    overflows: int = 0
    overflows_in_a_row: int = 0

    def succeeded(self) -> None:
        """Count a finite step; double the scale after 2,000 in a row."""
        self.overflows_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == 2_000:
            self.value, self.good_steps = self.value * 2, 0

    def overflowed(self) -> None:
        """Count a skipped step and halve the scale."""
        self.overflows += 1
        self.overflows_in_a_row += 1
        self.value, self.good_steps = self.value / 2, 0
