"""What a run will take, before any weight is loaded: steps, tokens, parameters, peak memory part by part, and time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_lab.data.batching import pack
from lightning_lab.data.summary import print_summary
from lightning_lab.experiments.reference import lab_peak_gib
from lightning_lab.files import flatten
from lightning_lab.models.base import load_config
from lightning_lab.models.memory import MIB, peak_parts, possible_modes, trainable_parameters
from lightning_lab.rundir import METRICS, MetricsRow, newest_run, read_metrics
from lightning_lab.training.auto import settle_auto

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from lightning_lab.data.datamodule import ChatDataModule


def plan_command(cli: Any) -> None:
    """Print the plan of a command line.

    Args:
        cli: Has the parsed ``settings``, their ``model``, ``datamodule`` and ``trainer``, and the config's ``name``.

    Raises:
        LabError: Something that `fit` would refuse before it loads a weight.

    """
    data, trainer, settings = cli.datamodule, cli.settings.trainer, cli.model.hparams
    data.prepare(progress=not cli.settings.json)
    print_summary(data)
    settle_auto(cli.trainer, cli.model, data, training=True)
    earlier = newest_run(cli.name)
    planned = plan(
        load_config(settings.base, settings.revision),
        settings,
        work_of(data, trainer.max_epochs, trainer.max_steps),
        cli.trainer.strategy.root_device,
        read_metrics(earlier / METRICS)[0] if earlier else (),
    )
    if gib := lab_peak_gib(flatten({"model": settings, "data": data.hparams})):
        planned[f"peak memory that the lab's T4 reserved, as it published: {gib} GB"] = gib * 2**30
    print(json.dumps(planned, indent=2) if cli.settings.json else show(planned))


def work_of(data: ChatDataModule, max_epochs: int | None, max_steps: int) -> dict[str, int]:
    """Count a run's work from the lengths of its conversations; the largest micro-batch is that of its first epoch."""
    bounds = [max_epochs * data.steps_per_epoch] if max_epochs is not None and max_epochs >= 0 else []
    steps = min([*bounds, *([max_steps] if max_steps >= 0 else [])])
    rows = data.splits["train"].rows
    lengths, supervised = data.tokenized.lengths[rows], data.tokenized.supervised[rows]
    tokens = targets = largest = most = 0
    for step in range(steps):
        documents = np.array(data.step_documents(step))
        tokens += int(lengths[documents].sum())
        targets += int(supervised[documents].sum())
        if step < data.steps_per_epoch:
            for bin_ in pack(lengths[documents].tolist(), int(data.micro_batch_tokens)):
                largest = max(largest, int(lengths[documents[bin_]].sum()))
                most = max(most, int(supervised[documents[bin_]].sum()))
    return {
        "optimizer steps": steps,
        "tokens": tokens,
        "supervised tokens": targets,
        "tokens of the largest micro-batch": largest,
        "most supervised tokens of a micro-batch": most,
    }


def plan(
    config: LlamaConfig,
    settings: Any,
    work: Mapping[str, int],
    device: torch.device,
    measured: Sequence[MetricsRow] = (),
) -> dict[str, Any]:
    """Everything `plan` shows, in bytes, counts and seconds.

    Args:
        config: The base model's.
        settings: `QLoRAModule`'s ``hparams``.
        work: See :func:`work_of`.
        device: On a CPU the program itself counts as well.
        measured: Rows of an earlier run's ``metrics.csv``, for the predicted time.

    """
    micro_batch = work["tokens of the largest micro-batch"], work["most supervised tokens of a micro-batch"]
    peak = partial(peak_parts, config, settings, device, *micro_batch)
    modes = possible_modes(device, settings.compile)
    speeds = [row.values["tokens_per_second"] for row in measured if "tokens_per_second" in row.values]
    speed = statistics.median(speeds) if speeds else None
    parts = peak()  # once: what the program itself holds grows meanwhile
    return {
        **work,
        "trainable parameters": trainable_parameters(config, settings),
        "peak memory": {part: size for part, size in parts.items() if size},
        "peak memory in all": sum(parts.values()),
        "peak memory by checkpointing": {mode: sum(peak(checkpointing=mode).values()) for mode in modes},
        "peak memory of validate and test": sum(peak(training=False).values()),
        "tokens per second, measured before": speed,
        "seconds of training": work["tokens"] / speed if speed else None,
    }


def show(planned: Mapping[str, Any]) -> str:
    """The plan as text: sizes in MiB, counts and seconds as they are."""
    lines = []
    for name, value in planned.items():
        if isinstance(value, dict):
            parts = (f"  {size / MIB:>10,.1f} MiB  {part.replace('_', ' ')}" for part, size in value.items())
            lines += [f"{name}:", *parts]
        elif value is None:
            lines.append(f"{name}: not known, no run of this name has been measured yet")
        elif name.startswith("seconds"):
            lines.append(f"{name}: {value:,.0f} ({timedelta(seconds=round(value))})")
        else:
            lines.append(f"{name}: {value / MIB:,.0f} MiB" if "memory" in name else f"{name}: {value:,.0f}")
    return "\n".join(lines)
