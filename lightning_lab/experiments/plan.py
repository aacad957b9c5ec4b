"""What a run will take, before any weight is loaded: steps, tokens, parameters, and peak memory part by part.

Memory is counted from the model's shapes, the longest micro-batch and what each operation keeps for the backward pass;
nothing is fitted. ``benchmarks/README.md`` sets the predictions beside measured peaks.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_lab.data.batching import pack
from lightning_lab.errors import LabError
from lightning_lab.models.loss import CHUNK_ELEMENTS

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from lightning_lab.data.datamodule import ChatDataModule

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What of the model's settings decides memory.

    Attributes:
        bits: 4, 8 or 16.
        dtype_bytes: Of the compute dtype: 2 or 4.
        r: Rank of the adapters.
        target_modules: Linear layers that get one.
        optimizer: ``adamw_8bit`` or ``adamw``.
        checkpointing: ``none`` or ``full``.
        fused_linear: Training runs through the fused linear.
        dora: Adapters learn a magnitude for each output as well.

    """

    bits: int
    dtype_bytes: int
    r: int
    target_modules: Sequence[str]
    optimizer: str
    checkpointing: str
    fused_linear: bool = True
    dora: bool = False


@dataclass(frozen=True)
class Work:
    """How much a run does, and its largest micro-batch.

    Attributes:
        steps: Optimizer steps.
        tokens: Real tokens of the run.
        supervised_tokens: Of them supervised.
        largest_tokens: Tokens of the largest training micro-batch.
        largest_supervised: Most supervised tokens of a training micro-batch.

    """

    steps: int
    tokens: int
    supervised_tokens: int
    largest_tokens: int
    largest_supervised: int


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of the seven linears of a decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (hidden, width),
        "k_proj": (hidden, narrow),
        "v_proj": (hidden, narrow),
        "o_proj": (width, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def trainable_parameters(config: LlamaConfig, r: int, target_modules: Sequence[str], dora: bool = False) -> int:
    """Parameters of LoRA (or DoRA) adapters of rank ``r`` on the named linears of every layer.

    Raises:
        LabError: A name that is none of them.

    """
    shapes = linear_shapes(config)
    unknown = [name for name in target_modules if name not in shapes]
    if unknown:
        raise LabError(f"model.target_modules: no layer of a Llama is {unknown[0]}; use some of {', '.join(shapes)}")
    return config.num_hidden_layers * sum(r * sum(shapes[name]) + dora * shapes[name][1] for name in target_modules)


def work_of(data: ChatDataModule, max_epochs: int | None, max_steps: int) -> Work:
    """Count a run's work from the lengths of its conversations. The largest micro-batch is that of its first epoch."""
    steps = data.total_steps(max_epochs, max_steps)
    rows = data.splits["train"].rows
    lengths, supervised = data.tokenized.lengths[rows], data.tokenized.supervised[rows]
    tokens = targets = largest = most = 0
    for step in range(steps):
        documents = data.step_documents(step)
        tokens += int(lengths[documents].sum())
        targets += int(supervised[documents].sum())
        if step < data.steps_per_epoch:
            for bin_ in pack(lengths[documents].tolist(), data.micro_batch_tokens):
                chosen = [documents[i] for i in bin_]
                largest = max(largest, int(lengths[chosen].sum()))
                most = max(most, int(supervised[chosen].sum()))
    return Work(steps, tokens, targets, largest, most)


def memory(config: LlamaConfig, settings: Settings, tokens: int, supervised: int) -> dict[str, int]:
    """Bytes at the peak of a training step, part by part.

    Args:
        config: The base model's.
        settings: Of the run.
        tokens: Of the largest micro-batch.
        supervised: Most supervised tokens of a micro-batch.

    """
    c, layers, hidden, inner = (
        settings.dtype_bytes,
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
    )
    shapes = linear_shapes(config)
    linear = layers * sum(i * o for i, o in shapes.values())
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    norms = (2 * layers + 1) * hidden
    # NF4: half a byte a weight; a one-byte scale for 64 weights; a float32 scale for 256 of those
    quantised = {4: linear // 2, 8: linear, 16: linear * c}[settings.bits]
    state = {4: linear // 64 + 4 * linear // (64 * 256), 8: 4 * linear // hidden, 16: 0}[settings.bits]
    adapters = trainable_parameters(config, settings.r, settings.target_modules, settings.dora)

    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    # A layer keeps, for each token: the float32 input of both norms, what they give to the linears, query, key, value,
    # attention's output, gate, silu(gate), up and their product, and the adapters' inner products; the last norm keeps
    # its float32 input.
    layer = (
        2 * 4 * hidden
        + c * (2 * hidden + 2 * width + 2 * narrow + 4 * inner)
        + c * settings.r * len(settings.target_modules)
        + 4 * config.num_attention_heads
    )
    if not settings.fused_linear and c == 2:  # PEFT's own layers each keep a float32 copy of their input instead
        layer += sum(4 * shapes[name][0] + 2 * settings.r for name in settings.target_modules)
        layer -= c * (2 * hidden + inner)
    kept = 4 * hidden + (layers * layer if settings.checkpointing == "none" else layers * c * hidden + layer)
    # In the backward pass of a layer: gradients of three inner tensors, the dequantised weight.
    passing = tokens * c * (3 * inner + 2 * hidden) + c * max(i * o for i, o in shapes.values())
    rows = min(supervised, max(1, CHUNK_ELEMENTS // config.vocab_size))
    logits = rows * config.vocab_size * (4 if c == 4 else 4 + c) + 2 * supervised * hidden * c
    parts = {
        "embeddings, head and norms": (tables + norms) * c,
        f"linear layers, {settings.bits} bits": quantised,
        "their quantisation state": state,
        "adapters, float32": 4 * adapters,
        "gradients, float32": 4 * adapters,
        "optimizer state": adapters * (8 if settings.optimizer == "adamw" else 2),
        f"activations of {tokens:,} tokens, checkpointing {settings.checkpointing}": tokens * kept,
    }
    # the head's chunk is gone when the layers' backward pass begins
    if logits > passing:
        parts[f"a chunk of logits, {rows:,} positions"] = logits
    else:
        parts["backward pass of one layer"] = passing
    return parts


def program_bytes() -> int:
    """Memory that this process holds with all libraries loaded and no model, on a CPU part of a run's peak."""
    import bitsandbytes  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def known_speed(rows: Sequence[dict[str, str]]) -> float | None:
    """Median real tokens/s of the training rows of a ``metrics.csv``, or None."""
    speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    return statistics.median(speeds) if speeds else None


def plan(
    config: LlamaConfig,
    settings: Settings,
    work: Work,
    device: torch.device,
    speed: float | None = None,
) -> dict[str, Any]:
    """Everything `plan` shows, in bytes and counts.

    Args:
        config: The base model's.
        settings: Of the run.
        work: See :func:`work_of`.
        device: On a CPU the program itself counts as well.
        speed: Real tokens/s measured before, for the predicted time.

    """
    parts = memory(config, settings, work.largest_tokens, work.largest_supervised)
    if device.type == "cpu" and sys.platform == "linux":
        parts = {"program and libraries": program_bytes(), **parts}
    return {
        "optimizer steps": work.steps,
        "tokens": work.tokens,
        "supervised tokens": work.supervised_tokens,
        "tokens of the largest micro-batch": work.largest_tokens,
        "trainable parameters": trainable_parameters(config, settings.r, settings.target_modules, settings.dora),
        "peak memory": parts,
        "peak memory in all": sum(parts.values()),
        "tokens per second, measured before": speed,
        "seconds of training": work.tokens / speed if speed else None,
    }


def show(planned: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{name}: {planned[name]:,}" for name in list(planned)[:5]]
    lines.append(f"peak memory, predicted: {planned['peak memory in all'] / MIB:,.0f} MiB")
    lines += [f"  {size / MIB:>10,.1f} MiB  {part}" for part, size in planned["peak memory"].items()]
    speed, seconds = planned["tokens per second, measured before"], planned["seconds of training"]
    if speed:
        lines.append(f"training at {speed:,.0f} tokens/s (the last run of this name): {seconds / 3600:.1f} hours")
    else:
        lines.append("time: no run of this name has been measured yet")
    return "\n".join(lines)
