"""What a checkpoint holds besides the adapter, what it must agree with, and how its file is kept whole."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from typing_extensions import override

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.tokenized import changed_rows
from lightning_lab.errors import LabError
from lightning_lab.files import flatten, write_whole

# Of the checkpoint's own part; raised when a reader must know. Version 2 had optimizer state tensor by tensor: such a
# checkpoint can be evaluated, not continued.
VERSION = 3
READABLE = (2, 3)
KEY = "lightning_lab"

# What an adapter's values mean something under; its shapes alone would not tell another alpha.
ADAPTER = {"model.r", "model.alpha", "model.rslora", "model.dora", "model.target_modules"}
# What decides which rows are held out.
SPLIT = {"data.rows", "data.split", "data.split_method", "data.split_seed", "data.group_duplicates"}
PROCESSES = "the number of processes (trainer.devices)"
# What matters to a continued run with dropout alone, which is drawn micro-batch by micro-batch in each process.
DRAWN = {"data.micro_batch_tokens", PROCESSES}
# What does not matter to a continued run: where things lie, memory, and what training does not read. The base is
# compared by its weights, the data by their fingerprint.
FREE = {
    "model.base",
    "model.revision",
    "model.seed",
    "model.checkpointing",
    "model.cache_dequantised",
    "model.hf_eval_batch_size",
    "model.max_new_tokens",
    "model.temperature",
    "data.source",
    "data.source_config",
    "data.source_split",
    "data.validation_source",
    "data.test_source",
    "data.revision",
    "data.tokenizer",
    "data.tokenizer_revision",
    "data.eval_split",
    "data.allow_trained",
    "data.predict_source",
    "data.num_workers",
    "data.on_bad_row",
    "data.max_dropped",
    "data.eval_micro_batch_tokens",
}


def check_settings(checkpoint: Mapping[str, Any], now: Mapping[str, Any], weights: str, command: str | None) -> None:
    """See that an adapter is used as it was trained, rows that were trained on are not evaluated, and a run goes on.

    Args:
        checkpoint: As Lightning saves it.
        now: Settings of module and data by config key, and further facts by their names, as the module saves them.
        weights: Fingerprint of the base's weights now.
        command: ``fit``, ``validate``, ``test`` or ``predict``; None for a module by itself.

    Raises:
        LabError: Names each setting that differs.

    """
    state = checkpoint[KEY]
    before = flatten(
        {"model": checkpoint["hyper_parameters"], "data": checkpoint.get("datamodule_hyper_parameters", {})}
    )
    before |= {**state["chosen"], **state["facts"], PROCESSES: len(state["rng"])}
    keys = ADAPTER
    if command == "fit":
        keys = before.keys() - FREE - (set() if now["model.dropout"] else DRAWN)
    elif command in ("validate", "test") and before.get("data.source") == now.get("data.source"):
        keys = ADAPTER | SPLIT
    different = differences(before, now, keys)
    if state["weights"] != weights:
        was, is_ = before["model.base"], now["model.base"]
        there = is_ if is_ == was else f"is {is_}, was {was}"
        different.append(f"model.base {there}: the weights are not those it was trained on")
    refuse(different)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Name what differs among ``keys`` that both sides have, with both values; lists and tuples are the same."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    both = sorted(before.keys() & now.keys() & set(keys))
    return [f"{key} is {now[key]}, was {before[key]}" for key in both if plain(before[key]) != plain(now[key])]


def refuse(different: Sequence[str]) -> None:
    """Refuse a checkpoint for what differs.

    Raises:
        LabError: Something does.

    """
    if different:
        raise LabError(f"the checkpoint was made under other settings: {'; '.join(different)}; set them as they were")


def check_lengths(resumed: Mapping[str, Any], **now: float) -> None:
    """See that a continued run and its epochs are as long as they were to be: schedule and order depend on that.

    Args:
        resumed: This program's part of the checkpoint; empty for a new run.
        now: ``total_steps`` and ``steps_per_epoch``.

    Raises:
        LabError: Names what differs.

    """
    words = {"total_steps": "optimizer steps in all", "steps_per_epoch": "optimizer steps of an epoch"}
    refuse([f"{words[k]} are {v:.0f}, were {resumed[k]:.0f}" for k, v in now.items() if resumed and v != resumed[k]])


def check_data(known: Mapping[str, Any] | None, data: ChatDataModule | None) -> None:
    """See that a run is continued on the data it was begun with.

    Args:
        known: What the checkpoint's run knew its data by; see `data_identity`.
        data: The data module; None for loaders of another kind, of which nothing is known.

    Raises:
        LabError: Names the rows that have changed, or the splits that have other rows.

    """
    if data is None or not known or known["fingerprint"] == data.tokenized.fingerprint:
        return
    # a fingerprint is also another one where nothing but the cache's format has changed
    if changes := changed_rows(known["row_hashes"].tolist(), data.tokenized.row_hashes.tolist()):
        raise LabError(f"the data is not what the run was trained on: {data.rows.name}: {changes}")
    splits = known.get("splits", {})  # the first checkpoints of this format have none
    if moved := [name for name, rows in splits.items() if rows.tolist() != data.splits[name].rows.tolist()]:
        keys = "data.source, data.validation_source and data.test_source"
        raise LabError(f"the rows are the same, but not those of the split {', '.join(moved)}; set {keys} as they were")


def data_identity(data: ChatDataModule | None) -> dict[str, Any] | None:
    """What the data is known by: its fingerprint, a hash of each row to tell which ones have changed, the splits."""
    if data is None:
        return None
    return {
        "fingerprint": data.tokenized.fingerprint,
        "row_hashes": torch.from_numpy(data.tokenized.row_hashes.astype("int64")),
        "splits": {name: torch.from_numpy(split.rows) for name, split in data.splits.items()},
    }


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
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise LabError(f"{path}: cannot be read as a checkpoint ({reason[:120]}); use another one") from None
    own_part(checkpoint, path)
    return checkpoint


def own_part(checkpoint: Any, name: object = "the checkpoint") -> dict[str, Any]:
    """What this program put in a checkpoint.

    Raises:
        LabError: Nothing, or another version of it.

    """
    state = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise LabError(f"{name}: is not a checkpoint of this program")
    if state.get("version") not in READABLE:
        raise LabError(
            f"{name}: was saved by another version of this program (format {state.get('version')}, this one reads "
            f"{' and '.join(map(str, READABLE))}); evaluate it with the version that wrote it"
        )
    return state


def check_version(state: Mapping[str, Any]) -> None:
    """See that a run can be continued, of whose checkpoint `own_part` has been read.

    Raises:
        LabError: It was saved by a version that keeps the optimizer's state in another form.

    """
    if state["version"] != VERSION:
        raise LabError(
            f"the checkpoint was saved by an earlier version of this program (format {state['version']}), whose "
            "optimizer state this one cannot continue: finish the run with that version, or begin one from its adapter "
            "(model.adapter: the run's checkpoints/best)"
        )
