"""What a checkpoint holds besides the adapter, what it must agree with, and how its file is kept whole."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from typing_extensions import override

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.tokenized import changed_rows
from lightning_lab.errors import LabError
from lightning_lab.files import write_whole

VERSION = 2  # of the checkpoint's own part; raised when a reader must know
KEY = "lightning_lab"

# What an adapter's values mean something under; its shapes alone would not tell another alpha.
ADAPTER = ("r", "alpha", "rslora", "dora", "target_modules")
# What decides which rows are held out.
SPLIT = ("rows", "split", "split_seed")
# What is not compared by itself when a run is continued: where things lie, memory, and what training does not read.
# The base is compared by its weights; the seed and the dtype that ``compute_dtype`` came to are among the facts.
FREE_MODEL = {
    "base",
    "revision",
    "seed",
    "compute_dtype",
    "checkpointing",
    "cache_dequantised",
    "max_new_tokens",
    "temperature",
}
FREE_DATA = {"source", "revision", "tokenizer", "tokenizer_revision", "eval_split", "predict_source", "num_workers"}
FREE_DATA |= {"on_bad_row", "eval_micro_batch_tokens"}


def check_adapter(checkpoint: Mapping[str, Any], hparams: Mapping[str, Any], weights: str) -> None:
    """See that a checkpoint's adapter is used as it was trained.

    Args:
        checkpoint: As Lightning saves it.
        hparams: The module's now.
        weights: Fingerprint of the base's weights now.

    Raises:
        LabError: Names each setting that differs.

    """
    if not isinstance(checkpoint.get(KEY), dict):
        raise LabError("the checkpoint is not a checkpoint of this program")
    saved = checkpoint["hyper_parameters"]
    different = _differences("model", saved, hparams, ADAPTER)
    if checkpoint[KEY]["weights"] != weights:
        there = f"is {hparams['base']}, was {saved['base']}" if hparams["base"] != saved["base"] else hparams["base"]
        different.append(f"model.base {there}: the weights are not those it was trained on")
    _refuse(different)


def check_split(saved: Mapping[str, Any], hparams: Mapping[str, Any]) -> None:
    """See that a split is the one that was held out, where the source is the same; else trained rows may be in it.

    Raises:
        LabError: Names each setting that differs.

    """
    if saved.get("source") == hparams["source"]:
        _refuse(_differences("data", saved, hparams, SPLIT))


def check_run(
    checkpoint: Mapping[str, Any], hparams: Mapping[str, Any], data: ChatDataModule | None, now: Mapping[str, Any]
) -> None:
    """See that a run is continued under the settings it was begun with.

    Args:
        checkpoint: As Lightning saves it.
        hparams: The module's now.
        data: The data module; None for loaders of another kind.
        now: Further facts by their name in messages, as `QLoRAModule` saves them under ``facts``.

    Raises:
        LabError: Names each setting that differs.

    """
    saved = checkpoint["hyper_parameters"]
    different = _differences("model", saved, hparams, sorted(saved.keys() - FREE_MODEL))
    if data is not None and (before := checkpoint.get("datamodule_hyper_parameters")):
        free = FREE_DATA if hparams["dropout"] else FREE_DATA | {"micro_batch_tokens"}  # dropout is drawn by the cut
        different += _differences("data", before, data.hparams, sorted(before.keys() - free))
    facts = checkpoint[KEY]["facts"]
    different += [f"{name} is {now[name]}, was {facts[name]}" for name in facts if facts[name] != now.get(name)]
    _refuse(different)
    known = checkpoint[KEY]["data"]
    if data is not None and known and known["fingerprint"] != data.tokenized.fingerprint:
        changes = changed_rows(known["row_hashes"].tolist(), data.tokenized.row_hashes.tolist())
        raise LabError(f"the data is not what the run was trained on: {data.hparams['source']}: {changes}")


def check_steps(resumed: Mapping[str, Any], total: int, per_epoch: float) -> None:
    """See that a continued run and its epochs are as long as they were to be: schedule and order depend on that.

    Raises:
        LabError: It is not.

    """
    if resumed and resumed["total_steps"] != total:
        _refuse([f"optimizer steps in all are {total}, were {resumed['total_steps']}"])
    if resumed and resumed["steps_per_epoch"] != per_epoch:
        _refuse([f"optimizer steps of an epoch are {per_epoch:g}, were {resumed['steps_per_epoch']:g}"])


def check_processes(rng: Sequence[Any], world_size: int, dropout: float) -> None:
    """See that a run with dropout, which each process draws for itself, is continued on as many processes.

    Raises:
        LabError: It is not.

    """
    if dropout and len(rng) != world_size:
        raise LabError(
            f"the checkpoint is of {len(rng)} processes, this run has {world_size}; with model.dropout a run continues "
            "exactly only on as many: set trainer.devices as it was"
        )


def data_identity(data: ChatDataModule | None) -> dict[str, Any] | None:
    """What the tokenised data is known by: its fingerprint, and a hash of each row to tell which ones have changed."""
    if data is None:
        return None
    return {
        "fingerprint": data.tokenized.fingerprint,
        "row_hashes": torch.from_numpy(data.tokenized.row_hashes.astype("int64")),
    }


def _differences(section: str, saved: Mapping[str, Any], now: Mapping[str, Any], keys: Any) -> list[str]:
    def plain(value: Any) -> Any:
        return (
            [float(v) if isinstance(v, int | float) else v for v in value] if isinstance(value, list | tuple) else value
        )

    return [
        f"{section}.{key} is {now.get(key)}, was {saved[key]}"
        for key in keys
        if key in saved and plain(saved[key]) != plain(now.get(key))
    ]


def _refuse(different: list[str]) -> None:
    if different:
        raise LabError(f"the checkpoint was made under other settings: {'; '.join(different)}; set them as they were")


def rng_states(module: pl.LightningModule) -> list[dict[str, Any]]:
    """The state of each process's random generators, by rank: dropout draws from them."""
    own = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(module.device) if module.device.type == "cuda" else None,
    }
    world_size = module.trainer.world_size
    if world_size == 1:
        return [own]
    states: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(states, own)
    return states


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put this process's random generators back."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


# --- the file -------------------------------------------------------------------------------------------------------

# The checksum is the zip file's comment, so that torch.load reads the file as any other: the end record's last two
# bytes give its length, and it is the file's end. torch.load checks no checksum of its own.
_PREFIX = b"sha256:"
_LENGTH = len(_PREFIX) + 64
_EMPTY_END = b"PK\x05\x06"


class CheckpointFile(CheckpointIO):
    """Checkpoints with a checksum, replaced whole, never by way of ``$TMPDIR``."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with buffer.getbuffer() as content:  # in place: a checkpoint is held once
            content[-2:] = _LENGTH.to_bytes(2, "little")
            comment = _PREFIX + hashlib.sha256(content).hexdigest().encode()
        buffer.seek(0, io.SEEK_END)
        buffer.write(comment)
        write_whole(Path(path), buffer.getbuffer())

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and numbers, nothing that could run code, after comparing it with its checksum.

    Raises:
        LabError: The file is missing, damaged, or not one of ours.

    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise LabError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise LabError(f"{path}: cannot be read ({error.strerror})") from None
    comment = content[-_LENGTH:]
    # A file without a comment was saved by Lightning itself, under a plain Trainer; one with another is no checkpoint.
    plain = content[-22:-18] == _EMPTY_END and content[-2:] == b"\0\0"
    if not plain and comment != _PREFIX + hashlib.sha256(content[:-_LENGTH]).hexdigest().encode():
        raise LabError(f"{path}: is damaged (its checksum does not match); use another checkpoint")
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a corrupt file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LabError(f"{path}: cannot be read as a checkpoint ({reason[:120]}); use another one") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise LabError(f"{path}: is not a checkpoint of this program")
    if checkpoint[KEY].get("version") != VERSION:
        raise LabError(
            f"{path}: was saved by another version of this program (format {checkpoint[KEY].get('version')}, this one "
            f"reads {VERSION}); evaluate it with the version that wrote it"
        )
    return checkpoint
