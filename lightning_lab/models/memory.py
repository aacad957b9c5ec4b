"""Shapes -> bytes: the peak of a step, part by part, and what `auto` chooses.

Counted from the model's shapes, the largest micro-batch and what each operation keeps for the backward pass, before any
weight is loaded. ``benchmarks/plan.py`` sets the predictions beside measured peaks.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import nn

from lightning_lab.errors import LabError
from lightning_lab.models.base import resolve_compute_dtype
from lightning_lab.models.loss import chunk_rows
from lightning_lab.models.qlora import CHECKPOINTING, check_targets, uses_fused_linear

if TYPE_CHECKING:
    from transformers import LlamaConfig

MIB = 2**20
MEMORY_SHARE = 0.85  # of the free memory is what `auto` takes: predictions are within 10 % of the measured peaks
MMAP_THRESHOLD = 2**25  # glibc returns freed blocks from this size on (M_MMAP_THRESHOLD_MAX); the heap keeps others


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of the seven linears of a decoder layer."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with torch.device("meta"):
        linears = [(name, m) for name, m in LlamaDecoderLayer(config, 0).named_modules() if isinstance(m, nn.Linear)]
    return {name.rpartition(".")[2]: (linear.in_features, linear.out_features) for name, linear in linears}


def trainable_parameters(config: LlamaConfig, settings: Any) -> int:
    """Parameters of the LoRA (or DoRA) adapters: rank ``r`` on the named linears of every layer.

    Args:
        config: The base model's.
        settings: `QLoRAModule`'s ``hparams``.

    Raises:
        LabError: A name that is none of them.

    """
    check_targets(settings.target_modules)
    shapes = [linear_shapes(config)[name] for name in settings.target_modules]
    return config.num_hidden_layers * sum(settings.r * (i + o) + settings.dora * o for i, o in shapes)


def peak_parts(
    config: LlamaConfig,
    settings: Any,
    device: torch.device,
    tokens: int,
    supervised: int,
    *,
    checkpointing: str | None = None,
    training: bool = True,
) -> dict[str, int]:
    """Bytes at the peak of a step, by what they are for; 0 where there is nothing.

    Args:
        config: The base model's.
        settings: `QLoRAModule`'s ``hparams``.
        device: CUDA or a CPU.
        tokens: Of the largest micro-batch.
        supervised: Most supervised tokens of a micro-batch.
        checkpointing: A mode in place of the one in ``settings``.
        training: False for evaluation by itself: no gradients, no optimizer, nothing kept for a backward pass.

    Returns:
        ``program`` and its libraries, which a CPU's memory holds too; ``tables``: embeddings, head and norms;
        ``linears`` of the decoder as they are stored, and their ``quantisation_state``; ``dequantised``: what is kept
        of them in the compute dtype besides; ``adapters`` in float32, and in 16 bits for the fused linear; their
        ``gradients`` in float32; ``optimizer_state``;
        ``activations``: what waits for the backward pass, or is made again in it, at its most; ``temporaries`` of one
        layer's pass and of a chunk of logits; and of a CPU's heap, which does not shrink, what is
        ``left_by_quantising`` and ``heap_holes``.

    """
    c = resolve_compute_dtype(settings.compute_dtype, device).itemsize
    bits, on_cpu = settings.bits, device.type == "cpu"
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = [i * o for i, o in linear_shapes(config).values()]  # of one layer
    linear = layers * sum(weights)
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + (2 * layers + 1) * hidden
    adapters = trainable_parameters(config, settings)
    fused = uses_fused_linear(settings)
    kept = 0
    if training:
        kept = tokens * _kept_of_a_token(config, settings, c, checkpointing or settings.checkpointing, on_cpu)
        layer = tokens * c * (3 * inner + 2 * hidden)  # gradients of three inner tensors and of two hidden ones
    else:  # the residual, a norm's float32 copy and its result; gate, silu(gate), up and their product
        layer = tokens * (c * (2 * hidden + 4 * inner) + 4 * hidden)
    if settings.cache_dequantised is not True:
        layer += c * max(weights)
    # logits, in training their softmax, and if not compiled a float32 copy
    chunk = c * (1 + training) if settings.compile is True else 4 if c == 4 else 4 + c * (1 + training)
    rows = min(supervised, chunk_rows(config.vocab_size, device))
    logits = rows * config.vocab_size * chunk + 2 * supervised * hidden * c
    # a GPU has the chunk's memory back when the layers' backward pass begins; a heap that has grown stays as it is
    temporaries = layer + logits if on_cpu else max(layer, logits)
    left = holes = 0
    if on_cpu and bits != 16:  # all weights are in the compute dtype until the last is quantised
        left = layers * sum(c * weight for weight in weights if c * weight < MMAP_THRESHOLD)
    if on_cpu and training:
        # Holes between live blocks of glibc's heap that the next pass's tensors do not fit into; the one fitted model.
        # Micro-batches differ in length, and what one pass frees is cut up by small blocks that stay. With SmolLM2 and
        # 2,048 tokens, mallinfo2 counted 165 MiB of holes in a run's first pass, 770 more in its second, beside 1,336
        # MiB of live activations (bfloat16, checkpointing none). Half of the activations meets the peaks of six runs of
        # 60 steps in bfloat16 within 8 %; in float32 0.9 of them was measured. Compiled layers make fewer temporary
        # tensors among those that stay. What a layer's pass and a chunk of logits take leaves twice its size, which is
        # most of it where little is kept.
        holes = int((0.2 if settings.compile is True else 0.25 * c) * kept) + 2 * temporaries
    return {
        "program": program_bytes() if on_cpu else 0,
        "tables": tables * c,
        # NF4: half a byte a weight; a one-byte scale for 64 weights, and for the fused linear the same in float32; a
        # float32 scale for 256 scales
        "linears": {4: linear // 2, 8: linear, 16: linear * c}[bits],
        "quantisation_state": {
            4: (5 if fused else 1) * linear // 64 + 4 * linear // (64 * 256),
            8: 4 * linear // hidden,
            16: 0,
        }[bits],
        "dequantised": linear * c if settings.cache_dequantised is True else 0,
        "adapters": (6 if fused and c == 2 else 4) * adapters,
        "gradients": 4 * adapters if training else 0,
        "optimizer_state": adapters * (8 if settings.optimizer == "adamw" else 2) if training else 0,  # two moments
        "activations": kept,
        "temporaries": temporaries,
        "left_by_quantising": left,
        "heap_holes": holes,
    }


def _kept_of_a_token(config: LlamaConfig, settings: Any, c: int, checkpointing: str, on_cpu: bool) -> int:
    """Bytes for each token that wait for the backward pass, or are made again in it, at their most."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shapes = linear_shapes(config)
    targets = settings.target_modules
    width, narrow = shapes["q_proj"][1], shapes["k_proj"][1]
    result = c * width + 4 * config.num_attention_heads  # of attention, and its log-sum-exp
    layer = result + c * (width + 2 * narrow) + c * settings.r * len(targets)  # query, key, value; adapters' products
    if settings.compile is True:
        # Elementwise work is done again where it is needed. Kept are a layer's input and the sum after attention, what
        # both norms give to the linears, gate, up and their product.
        layer += c * (4 * hidden + 3 * inner)
    else:
        # The float32 input of both norms, what they give to the linears, gate, silu(gate), up and their product.
        layer += 2 * 4 * hidden + c * (2 * hidden + 4 * inner)
    # On a GPU bitsandbytes' 8-bit product holds its 16-bit input outside autograd: no checkpoint frees it.
    held = c * (2 * hidden + width + inner) if settings.bits == 8 and not on_cpu else 0
    if not uses_fused_linear(settings) and c == 2:  # PEFT's own layers each keep a float32 copy of their input instead
        layer += sum(4 * shapes[name][0] + 2 * settings.r for name in targets)
        layer -= 0 if held else c * (2 * hidden + inner)
    # Beside the layer at hand, which a checkpoint makes again: the other layers; or each layer's input, of which
    # offload has one at a time in device memory.
    others = {
        "none": (layers - 1) * layer,
        "selective": layers * (c * hidden + result + held),
        "full": layers * (c * hidden + held),
        "offload": c * hidden + layers * held,
    }
    return others[checkpointing] + layer + 4 * hidden  # and the last norm's float32 input


def program_bytes() -> int:
    """Memory that this process holds with all libraries loaded and no model: a part of a run's peak."""
    import bitsandbytes  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    return _resident()


def _resident() -> int:
    return psutil.Process().memory_info().rss


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a run can have on its device: what is free of a GPU; of a CPU each process's share.

    That is of the free memory, of no more than the control group's limit, and what this process holds already.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # versions 2 and 1
        try:
            free = min(free, int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free // processes + _resident()


def peak_so_far(device: torch.device) -> int:
    """Most bytes that this process has had: reserved on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10  # bytes on macOS, KiB on Linux


def possible_modes(device: torch.device, compiled: bool) -> list[str]:
    """Values of ``model.checkpointing`` that the device allows, from the fastest to the least memory.

    Not ``selective`` on a GPU where layers are not compiled: it watches every operator from Python, which takes longer
    than ``full`` recomputes (counted: 179 to 189 against 114 to 118 ms of the host for a micro-batch of a 1B).
    """
    left_out = "offload" if device.type == "cpu" or compiled else "selective"
    return [mode for mode in CHECKPOINTING if mode != left_out]


class Choice(NamedTuple):
    """Values of the keys of these names, in ``model`` and ``data``."""

    checkpointing: str
    micro_batch_tokens: int
    compile: bool
    cache_dequantised: bool


def choose(
    config: LlamaConfig,
    settings: Any,
    device: torch.device,
    available: int,
    *,
    max_length: int,
    batch_size: int,
    micro_batch_tokens: int | None = None,
    training: bool = True,
    may_compile: bool = False,
) -> Choice:
    """Compiled layers if they may be, the checkpointing that recomputes least and fits, the largest micro-batch.

    ``cache_dequantised: auto`` is true where nothing is recomputed and it fits beside what is chosen without it, on a
    GPU alone: on a CPU it gains 1 to 2 % of a pass.

    A conversation of ``max_length`` tokens is a micro-batch of its own whatever the budget, so it must fit.

    Args:
        config: The base model's.
        settings: `QLoRAModule`'s ``hparams``; ``checkpointing``, ``compile`` and ``cache_dequantised``
            may be ``auto``.
        device: CUDA or a CPU.
        available: Bytes; `MEMORY_SHARE` of them is used.
        max_length: ``data.max_length``.
        batch_size: ``data.batch_size``; no micro-batch is larger than a step.
        micro_batch_tokens: ``data.micro_batch_tokens``; None to choose it.
        training: False for evaluation by itself.
        may_compile: Whether ``compile: auto`` may be true.

    Raises:
        LabError: Nothing fits.

    """
    asked, compiling = settings.checkpointing, [settings.compile]
    if settings.compile == "auto":
        compiling = [True, False] if may_compile and asked != "offload" else [False]
    budgets = [micro_batch_tokens] if micro_batch_tokens else _budgets(batch_size * max_length, device)
    may_cache = training and device.type == "cuda" and settings.bits == 4 and uses_fused_linear(settings)

    def needs(mode: str, budget: int, compiled: bool, cached: bool) -> int:
        known = SimpleNamespace(**{**settings, "compile": compiled, "cache_dequantised": cached})
        tokens = max(budget, max_length)
        return sum(peak_parts(config, known, device, tokens, tokens, checkpointing=mode, training=training).values())

    for compiled in compiling:
        for mode in possible_modes(device, compiled) if asked == "auto" else [asked]:
            cached = settings.cache_dequantised is True
            for budget in budgets:
                needed = needs(mode, budget, compiled, cached)
                if needed <= MEMORY_SHARE * available:
                    if settings.cache_dequantised == "auto" and may_cache and mode == "none":
                        cached = needs(mode, budget, compiled, True) <= MEMORY_SHARE * available
                    return Choice(mode, budget, compiled, cached)
    raise LabError(
        f"auto: {needed / MIB:,.0f} MiB are needed for {max(budget, max_length):,} tokens with model.checkpointing "
        f"{mode}, and {MEMORY_SHARE:.0%} of the {available / MIB:,.0f} MiB available may be used; lower "
        "data.max_length, data.micro_batch_tokens or model.r, set model.bits to 4, or use a smaller model.base"
    )


def _budgets(step_tokens: int, device: torch.device) -> list[int]:
    """Powers of two from a whole step down to 1,024."""
    # a CPU's cores are busy with far fewer tokens than a GPU's; more of them at once only take memory
    most = min(step_tokens, 4096) if device.type == "cpu" else step_tokens
    return [2**i for i in reversed(range(10, most.bit_length()))] or [most]
