"""A model's folder becomes a frozen, quantised Llama."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from lightning_lab.errors import LabError
from lightning_lab.hub import locate, model_folder, quiet_progress_bars
from lightning_lab.models import cpu

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_config(source: str, revision: str | None = None) -> LlamaConfig:
    """Read the configuration of a base model; at most a few small files are downloaded.

    Args:
        source: As for `lightning_lab.hub.locate`.
        revision: Commit of a Hub repository; None for its newest.

    Raises:
        LabError: The folder cannot be had, or the model is not a Llama.

    """
    path = model_folder(source, weights=False, revision=revision) / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise LabError(f"{path}: cannot be read ({error}); download or convert it again") from error
    if model_type != "llama":
        raise LabError(f"model.base: {source} has model type {model_type!r}, only 'llama' is supported; use a Llama")
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(path.parent)


def load_base(
    source: str,
    *,
    bits: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
) -> LlamaForCausalLM:
    """Load the frozen base model onto one device, in training mode and without a key-value cache.

    Training mode, because transformers returns evaluation mode, in which activation checkpointing is silently off.
    ``name_or_path`` is what `lightning_lab.hub.locate` returns, so that an adapter records the Hub id and not a cache
    folder.

    Args:
        source: As for `lightning_lab.hub.locate`.
        bits: 4 (NF4 with double quantisation, block size 64, arXiv:2305.14314), 8 (LLM.int8, arXiv:2208.07339), both by
            bitsandbytes on every linear layer but the head; or 16 (not quantised).
        compute_dtype: Dtype of matrix products, and of every weight that is not quantised.
        device: Where the weights go.
        attn_implementation: A name that transformers' attention registry knows.
        revision: Commit of a Hub repository; None for its newest.

    Raises:
        LabError: As `load_config`; the folder is already quantised and its settings differ from these; weights are not
            safetensors, damaged or incomplete.

    """
    if bits not in (4, 8, 16):
        raise LabError(f"model.bits: {bits} is not supported; use 4, 8 or 16")
    on_cpu = device.type == "cpu"
    if on_cpu:
        cpu.bound_kernel_caches()
    config = load_config(source, revision)
    folder = model_folder(source, weights=True, revision=revision)
    quiet_progress_bars()
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    try:
        model, report = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=compute_dtype,
            quantization_config=_quantisation(source, config, bits, compute_dtype),
            device_map={"": device},
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise LabError(
            f"model.base: the weights of {source} in {folder} cannot be read ({error}); "
            "they must be complete .safetensors files: download or convert them again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random values
        raise LabError(f"model.base: {source} lacks {len(missing)} weights, e.g. {missing[0]}; use a complete model")
    model.requires_grad_(False)
    if on_cpu:
        cpu.unmap_weights(model)
    model.config.use_cache = False
    model.name_or_path = model.config.name_or_path = locate(source)
    return model.train()


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for ``model.compute_dtype``: ``auto``, ``bfloat16``, ``float16`` or ``float32``.

    ``auto`` is bfloat16 where the device has it (GPUs from compute capability 8.0, CPUs with instructions for it), else
    float16 on a GPU. A CPU without those instructions has float16 no more than bfloat16, so there it is float32: on one
    with AVX2 alone, PyTorch multiplies matrices 8 to 80 times slower in either half than in float32.

    Raises:
        LabError: The name is unknown, or bfloat16 is asked of a GPU that only emulates it.

    """
    if name not in ("auto", *DTYPES):
        raise LabError(f"model.compute_dtype: {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    on_gpu = device.type == "cuda"
    if name == "auto":
        has_bfloat16 = _gpu_has_bfloat16(device) if on_gpu else cpu.has_bfloat16()
        return torch.bfloat16 if has_bfloat16 else torch.float16 if on_gpu else torch.float32
    if name == "bfloat16" and on_gpu and not _gpu_has_bfloat16(device):
        raise LabError("model.compute_dtype: this GPU has no bfloat16; use auto or float16")
    return DTYPES[name]


def _gpu_has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _quantisation(source: str, config: LlamaConfig, bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what to quantise with: None for 16 bits, and for a folder already quantised as asked."""
    from transformers import BitsAndBytesConfig

    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        _check_stored(source, stored, config.dtype, bits, compute_dtype)
        return None
    if bits == 16:
        return None
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _check_stored(
    source: str, stored: dict, stored_dtype: torch.dtype | None, bits: int, compute_dtype: torch.dtype
) -> None:
    """Refuse a quantised folder whose settings are not those asked for."""
    method, kind = stored.get("quant_method"), stored.get("bnb_4bit_quant_type")
    stored_bits = 4 if stored.get("load_in_4bit") else 8 if stored.get("load_in_8bit") else None
    if method != "bitsandbytes" or stored_bits is None:
        raise LabError(f"model.base: {source} is quantised by {method!r}; use an unquantised or bitsandbytes model")
    if stored_bits != bits:
        raise LabError(
            f"model.bits is {bits} but {source} is stored in {stored_bits} bits; "
            f"set model.bits: {stored_bits} or name an unquantised model.base"
        )
    if bits == 4 and kind != "nf4":
        raise LabError(f"model.base: {source} is stored as {kind}, not nf4; use another base")
    dtypes = [stored_dtype] + ([stored.get("bnb_4bit_compute_dtype", "float32")] if bits == 4 else [])
    wanted = str(compute_dtype).removeprefix("torch.")
    for dtype in (str(dtype).removeprefix("torch.") for dtype in dtypes if dtype is not None):
        if dtype != wanted:
            raise LabError(
                f"model.compute_dtype is {wanted} here but {source} was quantised for {dtype}; "
                f"set model.compute_dtype: {dtype} or name an unquantised model.base"
            )
