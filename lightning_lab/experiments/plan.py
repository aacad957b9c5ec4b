"""What a run will take, before any weight is loaded: steps, tokens, parameters, peak memory part by part, and time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_lab.data.batching import pack
from lightning_lab.errors import LabError
from lightning_lab.models.base import load_config
from lightning_lab.models.memory import MIB, peak_parts, trainable_parameters
from lightning_lab.models.qlora import CHECKPOINTING
from lightning_lab.rundir import METRICS, MetricsRow, newest_run, read_metrics
from lightning_lab.training.auto import settle_auto

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from lightning_lab.data.datamodule import ChatDataModule

PARTS = {
    "program": "program and libraries",
    "tables": "embeddings, head and norms",
    "linears": "linear layers",
    "quantisation_state": "their quantisation state",
    "dequantised": "dequantised weights, kept",
    "adapters": "adapters, float32",
    "gradients": "gradients, float32",
    "optimizer_state": "optimizer state",
    "activations": "activations of the largest micro-batch",
    "temporaries": "a layer's pass, a chunk of logits",
    "left_by_quantising": "left by quantising",
    "heap_holes": "holes in the heap",
}


def plan_command(cli: Any) -> None:
    """Print the plan of a command line.

    Args:
        cli: Has the parsed ``settings``, their ``model``, ``datamodule`` and ``trainer``, and the config's ``name``.

    Raises:
        LabError: Something that `fit` would refuse before it loads a weight.

    """
    data, trainer, settings = cli.datamodule, cli.settings.trainer, cli.model.hparams
    settle_auto(cli.trainer, cli.model, data, training=True)
    data.prepare(progress=not cli.settings.json)
    earlier = newest_run(cli.name)
    planned = plan(
        load_config(settings.base, settings.revision),
        settings,
        work_of(data, trainer.max_epochs, trainer.max_steps),
        cli.trainer.strategy.root_device,
        known_speed(read_metrics(earlier / METRICS)[0]) if earlier else None,
    )
    print(json.dumps(planned, indent=2) if cli.settings.json else show(planned))


def work_of(data: ChatDataModule, max_epochs: int | None, max_steps: int) -> dict[str, int]:
    """Count a run's work from the lengths of its conversations; the largest micro-batch is that of its first epoch.

    Raises:
        LabError: The run has no end.

    """
    epochs = [max_epochs * data.steps_per_epoch] if max_epochs is not None and max_epochs >= 0 else []
    bounds = [*epochs, *([max_steps] if max_steps >= 0 else [])]
    if not bounds:
        raise LabError("the run has no end: set trainer.max_epochs or trainer.max_steps")
    rows = data.splits["train"].rows
    lengths, supervised = data.tokenized.lengths[rows], data.tokenized.supervised[rows]
    tokens = targets = largest = most = 0
    for step in range(min(bounds)):
        documents = np.array(data.step_documents(step))
        tokens += int(lengths[documents].sum())
        targets += int(supervised[documents].sum())
        if step < data.steps_per_epoch:
            for bin_ in pack(lengths[documents].tolist(), int(data.micro_batch_tokens)):
                largest = max(largest, int(lengths[documents[bin_]].sum()))
                most = max(most, int(supervised[documents[bin_]].sum()))
    return {
        "optimizer steps": min(bounds),
        "tokens": tokens,
        "supervised tokens": targets,
        "tokens of the largest micro-batch": largest,
        "most supervised tokens of a micro-batch": most,
    }


def known_speed(rows: Sequence[MetricsRow]) -> float | None:
    """Median real tokens/s of the training rows of a ``metrics.csv``, or None."""
    speeds = [row.values["tokens_per_second"] for row in rows if "tokens_per_second" in row.values]
    return statistics.median(speeds) if speeds else None


def plan(
    config: LlamaConfig, settings: Any, work: Mapping[str, int], device: torch.device, speed: float | None = None
) -> dict[str, Any]:
    """Everything `plan` shows, in bytes and counts.

    Args:
        config: The base model's.
        settings: `QLoRAModule`'s ``hparams``.
        work: See :func:`work_of`.
        device: On a CPU the program itself counts as well.
        speed: Real tokens/s measured before, for the predicted time.

    """
    micro_batch = work["tokens of the largest micro-batch"], work["most supervised tokens of a micro-batch"]
    largest = (config, settings, device, *micro_batch)
    peak = peak_parts(*largest)
    modes = [mode for mode in CHECKPOINTING if mode != "offload" or (device.type == "cuda" and not settings.compile)]
    return {
        **work,
        "trainable parameters": trainable_parameters(config, settings),
        "peak memory": {name: size for name in PARTS if (size := getattr(peak, name))},
        "peak memory in all": peak.total,
        "peak memory by checkpointing": {mode: peak_parts(*largest, checkpointing=mode).total for mode in modes},
        "peak memory of validate and test": peak_parts(*largest, training=False).total,
        "tokens per second, measured before": speed,
        "seconds of training": work["tokens"] / speed if speed else None,
    }


def show(planned: Mapping[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{name}: {planned[name]:,}" for name in list(planned)[:6]]
    lines.append(f"peak memory, predicted: {planned['peak memory in all'] / MIB:,.0f} MiB")
    lines += [f"  {size / MIB:>10,.1f} MiB  {PARTS[part]}" for part, size in planned["peak memory"].items()]
    modes = (f"{mode} {size / MIB:,.0f}" for mode, size in planned["peak memory by checkpointing"].items())
    lines.append(f"by model.checkpointing, in MiB: {', '.join(modes)}")
    lines.append(f"validate and test: {planned['peak memory of validate and test'] / MIB:,.0f} MiB")
    speed, seconds = planned["tokens per second, measured before"], planned["seconds of training"]
    if speed:
        lines.append(f"training at {speed:,.0f} tokens/s (the last run of this name): {seconds / 3600:.1f} hours")
    else:
        lines.append("time: no run of this name has been measured yet")
    return "\n".join(lines)
