"""The run directory's record: config, environment, metrics, the loss table and the curve; and the run's lock."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

import lightning_lab
from lightning_lab import files, rundir
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.errors import LabError
from lightning_lab.training.module import QLoRAModule

PACKAGES = ("lightning", "torch", "transformers", "peft", "bitsandbytes", "datasets", "lightning_lab")


class RunRecord(pl.Callback):
    """Writes everything in the run directory but checkpoints, samples and results.

    Args:
        run_dir: The run's directory; made when training starts.
        name: The run's name, for ``environment.json``.
        config: The resolved config; None for the settings of module and data module.
        command: The command line, for ``environment.json``.

    """

    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any] | None, command: Sequence[str]) -> None:
        self.run_dir = run_dir
        self.name = name
        self.config = config
        self.command = list(command)
        self._lock: IO[str] | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write config and environment; on resume forget the rows after the checkpoint.

        Raises:
            LabError: Another process trains this run, or it is another one's directory.

        """
        assert isinstance(pl_module, QLoRAModule)
        if not trainer.is_global_zero:
            return
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        begun = (self.run_dir / rundir.CONFIG).exists()
        in_place = checkpoint is not None and checkpoint.resolve().parent.parent == self.run_dir.resolve()
        if begun and not in_place:
            raise LabError(
                f"{self.run_dir}: there is a run already; pass its checkpoints/last.ckpt to continue it, or another "
                "directory"
            )
        # not earlier: a run that fails before it trains leaves nothing
        files.make_directory(self.run_dir / rundir.CHECKPOINTS)
        self._lock = rundir.lock_run(self.run_dir)
        for folder in (self.run_dir, self.run_dir / rundir.CHECKPOINTS):
            for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink() if leftover.is_file() else None
        if checkpoint is not None:
            _take_over(checkpoint, self.run_dir, records=not in_place)
        rundir.keep_metrics(
            self.run_dir / rundir.METRICS, pl_module.completed_steps, validated=not pl_module.validation_pending
        )
        config = _config(self.config, pl_module, trainer, self.run_dir)
        earlier = self._earlier_parts(config) if in_place else []
        files.write_whole(
            self.run_dir / rundir.CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
        )
        record = {
            "name": self.name,
            "continued_from": str(checkpoint) if checkpoint else None,
            "completed_steps": pl_module.completed_steps,
            **environment(pl_module, self.command),
        }
        if isinstance(data := getattr(trainer, "datamodule", None), ChatDataModule):
            record["data"] = data.record()
        if earlier:
            record["earlier"] = earlier
        files.write_whole(self.run_dir / rundir.ENVIRONMENT, json.dumps(record, indent=2) + "\n")

    def _earlier_parts(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The parts of a run that was interrupted, oldest first, each with the settings that the next one changed."""
        path = self.run_dir / rundir.ENVIRONMENT
        before = files.read_json(path)
        if not before and path.exists():
            files.set_aside(path, "is damaged")
        path, old = self.run_dir / rundir.CONFIG, {}
        if path.exists():
            try:
                old = files.read_yaml(path)
            except LabError as error:
                files.set_aside(path, str(error).rpartition(": ")[2])
        was, now = files.flatten(old), files.flatten(config)
        changed = {key: was.get(key) for key in now if old and was.get(key) != now[key]}
        parts = before.pop("earlier", [])
        part = {key: value for key, value in before.items() if key != "data"}
        return [*parts, part | ({"settings_changed_after": changed} if changed else {})] if before else parts

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            rundir.append_metrics(self.run_dir / rundir.METRICS, outputs)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the validation's row; redraw the table and the curve."""
        assert isinstance(pl_module, QLoRAModule)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        assert pl_module.evaluation is not None
        row = {"step": pl_module.completed_steps, **pl_module.evaluation.figures("val")}
        rundir.append_metrics(self.run_dir / rundir.METRICS, row)
        write_losses(self.run_dir)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()  # Lightning calls no teardown then, and a notebook's next fit would find the run locked

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def write_losses(run_dir: Path) -> None:
    """Write ``losses.md`` and ``loss_curve.png`` from ``metrics.csv`` and the base's validation."""
    from lightning_lab.loss_table import lab_table, losses
    from lightning_lab.plots import loss_curve

    rows = rundir.read_metrics(run_dir / rundir.METRICS)[0]
    files.write_whole(run_dir / rundir.LOSSES, lab_table(losses(rows), rundir.base_loss(run_dir)).markdown() + "\n")
    try:
        loss_curve(rows, run_dir / rundir.CURVE, run_dir.name)
    except Exception as error:  # a picture never stops a run, whatever a plotting library makes of fonts and caches
        print(f"warning: {run_dir / rundir.CURVE} could not be drawn ({error})", file=sys.stderr)


def _take_over(checkpoint: Path, run_dir: Path, *, records: bool) -> None:
    """Make a checkpoint this run's last; with ``records`` its run's first steps are this run's too."""
    for name in (rundir.METRICS, rundir.SAMPLES) if records else ():
        earlier = checkpoint.parent.parent / name
        if checkpoint.parent.name == rundir.CHECKPOINTS and earlier.is_file():  # else it lies in no run
            shutil.copyfile(earlier, run_dir / name)
    last = run_dir / rundir.CHECKPOINTS / "last.ckpt"
    if checkpoint.resolve() != last.resolve():
        files.write_whole(last, checkpoint.read_bytes())


def _config(given: Mapping[str, Any] | None, module: QLoRAModule, trainer: pl.Trainer, run_dir: Path) -> dict[str, Any]:
    """What ``config.yaml`` says, with the numbers that ``auto`` stands for and the base's revision."""
    if given is None:
        data = getattr(trainer, "datamodule", None)
        own = {"model": dict(module.hparams), "data": dict(data.hparams) if data else {}}
        own["model"]["betas"] = list(module.settings.betas)
        for section, key in (("model", "seed"), ("data", "tokenizer"), ("data", "tokenizer_revision")):
            own[section].pop(key, None)  # linked to other keys on the command line
        given = {"seed_everything": module.settings.seed, **own, "run_dir": str(run_dir)}
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    for key, value in module.chosen.items():
        section, _, name = key.partition(".")
        if config[section].get(name) == "auto":
            config[section][name] = value
    config["model"]["revision"] = module.base_revision
    return config


def environment(module: QLoRAModule, command: Sequence[str]) -> dict[str, Any]:
    """Versions, device, git commit, seeds and command line."""
    device, world_size = module.device, module.trainer.world_size
    return {
        "command": list(command),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "compute_dtype": str(module.compute_dtype).removeprefix("torch."),
        **{key.rpartition(".")[2]: value for key, value in module.chosen.items()},
        "base_revision": module.base_revision,
        "base_weights": module.base_weights,
        "git_commit": _git_commit(),
        "seed": module.settings.seed,
        "trainable_parameters": sum(weight.numel() for weight in module.trainable()),
        "total_steps": module.total_steps,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when it is installed."""
    checkout = Path(lightning_lab.__file__).resolve().parent.parent
    try:
        result = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split("\n")
    # another top level: an environment that lies inside somebody else's repository
    return lines[1] if result.returncode == 0 and Path(lines[0]) == checkout else None


class Curves(TensorBoardLogger):
    """TensorBoard's curves, a record that never stops a run: what cannot be written is left out."""

    @override
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().log_metrics(*args, **kwargs)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().log_hyperparams(*args, **kwargs)

    @override
    def save(self) -> None:
        with suppress(OSError):
            super().save()

    @override
    def finalize(self, status: str) -> None:
        with suppress(OSError):
            super().finalize(status)
