"""What a run will take, before any weight is loaded: steps, tokens, parameters, and peak memory part by part.

Memory is counted from the model's shapes, the longest micro-batch and what each operation keeps for the backward pass.
Nothing is fitted but `HEAP_HOLES` and `HEAP_TRANSIENTS`, on a CPU. ``benchmarks/plan.py`` sets the predictions beside
measured peaks.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_lab.data.batching import pack
from lightning_lab.errors import LabError
from lightning_lab.models.loss import chunk_rows
from lightning_lab.models.qlora import CHECKPOINTING

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from lightning_lab.data.datamodule import ChatDataModule

MIB = 2**20
# On a CPU: free memory between live blocks of glibc's heap, as a share of the activations. Micro-batches differ in
# length, and what one pass frees is cut up by small blocks that stay, so the next pass's tensors do not fit into it.
# With SmolLM2 and 2,048 tokens, mallinfo2 counted 165 MiB of such holes in a run's first pass, 770 more in its second,
# beside 1,336 MiB of live activations (bfloat16, checkpointing none; as many with gradients allocated beforehand). In
# bfloat16, 0.5 meets the peaks of six runs of 60 steps within 8 % (kernels bounded, see models/cpu_attention.py); in
# float32 it was 0.9. Compiled layers make fewer temporary tensors among those that stay: 0.2. What one layer's pass and
# a chunk of logits take leaves holes as well, which is most of them where little is kept: twice that.
HEAP_HOLES = {"16 bits": 0.5, "float32": 0.9, "compiled": 0.2}
HEAP_TRANSIENTS = 2
MMAP_THRESHOLD = 32 * MIB  # glibc returns freed blocks from this size on (M_MMAP_THRESHOLD_MAX); the heap keeps others
MEMORY_SHARE = 0.85  # of the free memory is what `auto` takes: predictions are within 10 % of the measured peaks


@dataclass(frozen=True)
class Settings:
    """What of the model's settings decides memory.

    Attributes:
        bits: 4, 8 or 16.
        dtype_bytes: Of the compute dtype: 2 or 4.
        r: Rank of the adapters.
        target_modules: Linear layers that get one.
        optimizer: ``adamw_8bit`` or ``adamw``.
        checkpointing: ``none``, ``selective``, ``full`` or ``offload``.
        fused_linear: Training runs through the fused linear.
        dora: Adapters learn a magnitude for each output as well.
        compiled: Decoder layers are compiled.
        cached: Dequantised weights are kept.

    """

    bits: int
    dtype_bytes: int
    r: int
    target_modules: Sequence[str]
    optimizer: str
    checkpointing: str
    fused_linear: bool = True
    dora: bool = False
    compiled: bool = False
    cached: bool = False


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


def memory(
    config: LlamaConfig, settings: Settings, tokens: int, supervised: int, *, cpu: bool = False, training: bool = True
) -> dict[str, int]:
    """Bytes at the peak of a step, part by part.

    Args:
        config: The base model's.
        settings: Of the run.
        tokens: Of the largest micro-batch.
        supervised: Most supervised tokens of a micro-batch.
        cpu: Count what the heap of a CPU's process holds besides; see `HEAP_HOLES`.
        training: False for evaluation by itself: no gradients, no optimizer, nothing kept for a backward pass.

    """
    c, hidden, inner = settings.dtype_bytes, config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers
    shapes = linear_shapes(config)
    linear = layers * sum(i * o for i, o in shapes.values())
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    norms = (2 * layers + 1) * hidden
    # NF4: half a byte a weight; a one-byte scale for 64 weights; a float32 scale for 256 of those
    quantised = {4: linear // 2, 8: linear, 16: linear * c}[settings.bits]
    state = {4: linear // 64 + 4 * linear // (64 * 256), 8: 4 * linear // hidden, 16: 0}[settings.bits]
    adapters = trainable_parameters(config, settings.r, settings.target_modules, settings.dora)
    parts = {
        "embeddings, head and norms": (tables + norms) * c,
        f"linear layers, {settings.bits} bits": quantised,
        "their quantisation state": state,
        "adapters, float32": 4 * adapters,
    }
    largest = 0 if settings.cached else c * max(i * o for i, o in shapes.values())
    if settings.cached:
        parts["dequantised weights, kept"] = linear * c
    rows = min(supervised, chunk_rows(config.vocab_size, "cpu" if cpu else "cuda"))
    # logits, in training their softmax, and if not compiled a float32 copy
    chunk = c * (1 + training) if settings.compiled else 4 if c == 4 else 4 + c * (1 + training)
    logits = rows * config.vocab_size * chunk + 2 * supervised * hidden * c
    kept = 0
    if training:
        kept = tokens * _kept_of_a_token(config, settings)
        parts["gradients, float32"] = 4 * adapters
        parts["optimizer state"] = adapters * (8 if settings.optimizer == "adamw" else 2)
        parts[f"activations of {tokens:,} tokens, checkpointing {settings.checkpointing}"] = kept
        # gradients of three inner tensors, the dequantised weight
        layer, passing = "backward pass of one layer", tokens * c * (3 * inner + 2 * hidden) + largest
    else:
        # the residual, a norm's float32 copy and its result; gate, silu(gate), up and their product
        layer, passing = "forward pass of one layer", tokens * (c * (2 * hidden + 4 * inner) + 4 * hidden) + largest
    # the head's chunk is gone when the layers' backward pass begins; but a heap that has grown does not shrink for it
    if cpu or logits <= passing:
        parts[layer] = passing
    if cpu or logits > passing:
        parts[f"a chunk of logits, {rows:,} positions"] = logits
    if cpu:
        if settings.bits != 16:  # all are in the compute dtype until the last is quantised; the heap keeps the space
            sizes = [c * i * o for i, o in shapes.values()]
            parts["left by quantising"] = layers * sum(size for size in sizes if size < MMAP_THRESHOLD)
        if kept:
            share = HEAP_HOLES["compiled" if settings.compiled else "16 bits" if c == 2 else "float32"]
            parts["holes in the heap"] = int(share * kept) + HEAP_TRANSIENTS * (passing + logits)
    return parts


def _kept_of_a_token(config: LlamaConfig, settings: Settings) -> int:
    """Bytes for each token that wait for the backward pass, or are made again in it, at their most."""
    c, hidden, inner = settings.dtype_bytes, config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers
    shapes = linear_shapes(config)
    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    attention = c * (2 * width + 2 * narrow) + 4 * config.num_attention_heads  # query, key, value, result, log-sum-exp
    products = c * settings.r * len(settings.target_modules)  # of the adapters
    if settings.compiled:
        # A layer's elementwise work is done again where it is needed: its input and the sum after attention, what both
        # norms give to the linears, gate, up and their product are kept.
        layer = c * (4 * hidden + 3 * inner) + attention + products
    else:
        # A layer keeps the float32 input of both norms, what they give to the linears, gate, silu(gate), up and their
        # product.
        layer = 2 * 4 * hidden + c * (2 * hidden + 4 * inner) + attention + products
    if not settings.fused_linear and c == 2:  # PEFT's own layers each keep a float32 copy of their input instead
        layer += sum(4 * shapes[name][0] + 2 * settings.r for name in settings.target_modules)
        layer -= c * (2 * hidden + inner)
    last_norm = 4 * hidden  # its float32 input
    if settings.checkpointing == "none":
        return layers * layer + last_norm
    # one hidden state for each layer, in device memory but for the one in use under offload
    inputs = c * hidden * (1 if settings.checkpointing == "offload" else layers)
    results = layers * _kept_of_attention(config, c) if settings.checkpointing == "selective" else 0
    return inputs + results + layer + last_norm  # and what the layer at hand made again


def _kept_of_attention(config: LlamaConfig, dtype_bytes: int) -> int:
    """Bytes a token of one layer's attention under ``selective``: its result and the scores' log-sum-exp."""
    return dtype_bytes * config.num_attention_heads * config.head_dim + 4 * config.num_attention_heads


def program_bytes() -> int:
    """Memory that this process holds with all libraries loaded and no model, on a CPU part of a run's peak."""
    import bitsandbytes  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    return _resident()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def known_speed(rows: Sequence[dict[str, str]]) -> float | None:
    """Median real tokens/s of the training rows of a ``metrics.csv``, or None."""
    speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    return statistics.median(speeds) if speeds else None


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a run can have on its device.

    On CUDA what is free on the first GPU; the others are taken to be like it. On a CPU, each process's share of what is
    available, no more than the limit of the control group, and what this process holds already.

    Raises:
        LabError: A CPU whose operating system does not say.

    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        raise LabError(
            "auto needs to know the free memory, which only Linux and CUDA tell: set model.checkpointing and "
            "data.micro_batch_tokens"
        ) from None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # versions 2 and 1
        try:
            with open(f"/sys/fs/cgroup/{name}") as file:
                limit = file.read().strip()
        except OSError:
            continue
        if limit.isdigit():  # else "max"
            free = min(free, int(limit))
    return free // processes + _resident()


def choose(
    config: LlamaConfig,
    settings: Settings,
    device: torch.device,
    available: int,
    *,
    max_length: int,
    batch_size: int,
    micro_batch_tokens: int | None = None,
    training: bool = True,
) -> tuple[str, int]:
    """The fastest checkpointing that fits, and under it the largest micro-batch.

    A conversation of ``max_length`` tokens is a micro-batch of its own whatever the budget, so it must fit.

    Args:
        config: The base model's.
        settings: Of the run; ``checkpointing`` may be ``auto``.
        device: CUDA or a CPU.
        available: Bytes; `MEMORY_SHARE` of them is used.
        max_length: ``data.max_length``.
        batch_size: ``data.batch_size``; no micro-batch is larger than a step.
        micro_batch_tokens: ``data.micro_batch_tokens``; None to choose it.
        training: False for evaluation by itself.

    Returns:
        ``model.checkpointing`` and ``data.micro_batch_tokens``.

    Raises:
        LabError: Nothing fits.

    """
    modes = [settings.checkpointing]
    if settings.checkpointing == "auto":
        modes = [m for m in CHECKPOINTING if m != "offload" or (device.type == "cuda" and not settings.compiled)]
    budgets = [micro_batch_tokens] if micro_batch_tokens else _budgets(batch_size * max_length, device)
    for mode in modes:
        for budget in reversed(budgets):
            tokens = max(budget, max_length)
            needed = peak(config, replace(settings, checkpointing=mode), tokens, tokens, device, training)
            if needed <= MEMORY_SHARE * available:
                return mode, budget
    raise LabError(
        f"auto: {needed / MIB:,.0f} MiB are needed for {tokens:,} tokens with model.checkpointing {mode}, and "
        f"{MEMORY_SHARE:.0%} of the {available / MIB:,.0f} MiB available may be used; lower data.max_length, "
        "data.micro_batch_tokens or model.r, set model.bits to 4, or use a smaller model.base"
    )


def _budgets(step_tokens: int, device: torch.device) -> list[int]:
    """Powers of two from 1,024 to a whole step, ascending."""
    # a CPU's cores are busy with far fewer tokens than a GPU's; more of them at once only take memory
    most = min(step_tokens, 4096) if device.type == "cpu" else step_tokens
    return [2**i for i in range(10, most.bit_length()) if 2**i <= most] or [most]


def peak(
    config: LlamaConfig,
    settings: Settings,
    tokens: int,
    supervised: int,
    device: torch.device,
    training: bool = True,
) -> int:
    """Bytes at the peak, in all; see :func:`peak_parts`."""
    return sum(peak_parts(config, settings, tokens, supervised, device, training).values())


def peak_parts(
    config: LlamaConfig,
    settings: Settings,
    tokens: int,
    supervised: int,
    device: torch.device,
    training: bool = True,
) -> dict[str, int]:
    """:func:`memory` on a device: on a CPU the program itself counts as well."""
    cpu = device.type == "cpu"
    parts = memory(config, settings, tokens, supervised, cpu=cpu, training=training)
    return {"program and libraries": program_bytes(), **parts} if cpu and sys.platform == "linux" else parts


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
    largest = (work.largest_tokens, work.largest_supervised, device)
    parts = peak_parts(config, settings, *largest)
    modes = CHECKPOINTING if device.type == "cuda" else CHECKPOINTING[:-1]
    return {
        "optimizer steps": work.steps,
        "tokens": work.tokens,
        "supervised tokens": work.supervised_tokens,
        "tokens of the largest micro-batch": work.largest_tokens,
        "trainable parameters": trainable_parameters(config, settings.r, settings.target_modules, settings.dora),
        "peak memory": parts,
        "peak memory in all": sum(parts.values()),
        "peak memory by checkpointing": {
            mode: peak(config, replace(settings, checkpointing=mode), *largest) for mode in modes
        },
        "peak memory of validate and test": peak(config, settings, *largest, training=False),
        "tokens per second, measured before": speed,
        "seconds of training": work.tokens / speed if speed else None,
    }


def show(planned: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{name}: {planned[name]:,}" for name in list(planned)[:5]]
    lines.append(f"peak memory, predicted: {planned['peak memory in all'] / MIB:,.0f} MiB")
    lines += [f"  {size / MIB:>10,.1f} MiB  {part}" for part, size in planned["peak memory"].items()]
    modes = (f"{mode} {size / MIB:,.0f}" for mode, size in planned["peak memory by checkpointing"].items())
    lines.append(f"by model.checkpointing, in MiB: {', '.join(modes)}")
    lines.append(f"validate and test: {planned['peak memory of validate and test'] / MIB:,.0f} MiB")
    speed, seconds = planned["tokens per second, measured before"], planned["seconds of training"]
    if speed:
        lines.append(f"training at {speed:,.0f} tokens/s (the last run of this name): {seconds / 3600:.1f} hours")
    else:
        lines.append("time: no run of this name has been measured yet")
    return "\n".join(lines)
