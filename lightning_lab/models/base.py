"""A model's folder becomes a frozen, quantised Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_lab.errors import LabError
from lightning_lab.files import read_json
from lightning_lab.hub import locate, model_folder, quiet_progress_bars
from lightning_lab.models import cpu

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def load_config(source: str, revision: str | None = None) -> LlamaConfig:
    """Read the configuration of a base model; at most a few small files are downloaded.

    Args:
        source: As for `lightning_lab.hub.locate`.
        revision: Commit of a Hub repository; None for its newest.

    Raises:
        LabError: The folder cannot be had, or the model is not a Llama.

    """
    path = model_folder(source, weights=False, revision=revision) / "config.json"
    model_type = read_json(path).get("model_type")
    if model_type != "llama":
        raise LabError(
            f"model.base: {path} has model type {model_type!r}, only 'llama' is supported; use a Llama, or download or "
            "convert it again"
        )
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
    if device.type == "cpu":
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
    if device.type == "cpu":  # each weight that loading did not convert keeps the whole file mapped into memory
        for weight in model.parameters():
            weight.data = weight.data.clone()
    model.config.use_cache = False
    model.name_or_path = model.config.name_or_path = locate(source)
    return model.train()


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for ``model.compute_dtype``: ``auto``, ``bfloat16``, ``float16`` or ``float32``.

    ``auto`` is bfloat16 where the device has it (GPUs from compute capability 8.0, CPUs with instructions for it), else
    float16 on a GPU. A CPU without those instructions has float16 no more than bfloat16, so there it is float32: on one
    with AVX2 alone, PyTorch multiplies matrices 8 to 80 times slower in either half than in float32.

    Raises:
        LabError: bfloat16 is asked of a GPU that only emulates it.

    """
    if name in ("float16", "float32"):
        return getattr(torch, name)
    on_gpu = device.type == "cuda"
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0) if on_gpu else cpu.has_bfloat16()
    if name == "auto" and not has_bfloat16:
        return torch.float16 if on_gpu else torch.float32
    if on_gpu and not has_bfloat16:
        raise LabError("model.compute_dtype: this GPU has no bfloat16; use auto or float16")
    return torch.bfloat16


def _quantisation(source: str, config: LlamaConfig, bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what to quantise with: None for 16 bits, and for a folder already quantised as asked."""
    from transformers import BitsAndBytesConfig

    stored = getattr(config, "quantization_config", None)
    if stored is None and bits != 16:
        return BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if stored is None:
        return None
    kind = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else stored.get("load_in_8bit") and "int8"
    if stored.get("quant_method") != "bitsandbytes" or kind not in ("nf4", "int8"):
        raise LabError(
            f"model.base: {source} is quantised by {stored.get('quant_method')!r} as {kind!r}; use an unquantised "
            "model, or one in bitsandbytes' nf4 or int8"
        )
    asked = [("bits", 4 if kind == "nf4" else 8, bits), ("compute_dtype", config.dtype, compute_dtype)]
    if kind == "nf4":
        asked.append(("compute_dtype", stored.get("bnb_4bit_compute_dtype", "float32"), compute_dtype))
    for key, *values in asked:
        there, here = (str(value).removeprefix("torch.") for value in values)
        if there not in (here, "None"):
            raise LabError(
                f"model.{key} is {here} here but {source} is stored with {there}; set model.{key}: {there} or name an "
                "unquantised model.base"
            )
    return None
