"""The run directory's record: config, environment, metrics, the loss table and the curve; and the run's lock."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

import lightning_lab
from lightning_lab import files, rundir
from lightning_lab.data.summary import data_record
from lightning_lab.errors import LabError
from lightning_lab.training import held_out
from lightning_lab.training.module import QLoRAModule

PACKAGES = ("lightning", "torch", "transformers", "peft", "bitsandbytes", "datasets")


class RunRecord(pl.Callback):
    """Writes everything in the run directory but checkpoints, samples and results.

    Args:
        run_dir: The run's directory; made when training starts.
        name: The run's name, for ``environment.json``.
        config: The resolved config; None for the settings of module and data module.
        command: The command line, for ``environment.json``.
        window: Steps behind a training loss of ``losses.md``; None for those since the row before.

    """

    def __init__(
        self, run_dir: Path, name: str, config: Mapping[str, Any] | None, command: Sequence[str], window: int | None
    ) -> None:
        self.run_dir, self.window = run_dir, window
        self.name = name
        self.config = config
        self.command = list(command)
        self._held = ExitStack()  # the run's lock

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        """Write config and environment; on resume forget the rows after the checkpoint.

        Raises:
            LabError: Another process trains this run, or it is another one's directory.

        """
        if not trainer.is_global_zero:
            return
        run_dir, checkpoints = self.run_dir, self.run_dir / rundir.CHECKPOINTS
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        in_place = checkpoint is not None and checkpoint.resolve().parent.parent == run_dir.resolve()
        if (run_dir / rundir.CONFIG).exists() and not in_place:
            raise LabError(
                f"{run_dir}: there is a run already; pass its checkpoints/last.ckpt to continue it, or name another one"
            )
        # not earlier: a run that fails before it trains leaves nothing
        files.make_directory(checkpoints)
        self._held.enter_context(rundir.lock_run(run_dir))
        for leftover in [*run_dir.glob(".*.tmp"), *checkpoints.glob(".*.tmp")]:  # of a run killed while it wrote
            if leftover.is_file():
                leftover.unlink()
        if pl_module.dealt is not None:
            held_out.write_rows(pl_module.dealt, checkpoints)
        if checkpoint is not None:
            # the first steps of another run are this one's too
            if not in_place and checkpoint.parent.name == rundir.CHECKPOINTS:
                for name in (rundir.METRICS, rundir.SAMPLES):
                    if (earlier := checkpoint.parent.parent / name).is_file():
                        shutil.copyfile(earlier, run_dir / name)
            if checkpoint.resolve() != (last := checkpoints / "last.ckpt").resolve():
                files.write_whole(last, checkpoint.read_bytes())
        rundir.keep_metrics(
            run_dir / rundir.METRICS, pl_module.completed_steps, validated=not pl_module.validation_pending
        )
        record = {
            "name": self.name,
            "continued_from": str(checkpoint) if checkpoint else None,
            "completed_steps": pl_module.completed_steps,
            **environment(pl_module, self.command),
        }
        if pl_module.chat_data:
            record["data"] = data_record(pl_module.chat_data)
        if in_place and (parts := self._earlier_parts()):
            record["earlier"] = parts
        config = yaml.safe_dump(self._config(pl_module), sort_keys=False, allow_unicode=True, width=120)
        files.write_whole(run_dir / rundir.CONFIG, config)
        files.write_whole(run_dir / rundir.ENVIRONMENT, json.dumps(record, indent=2) + "\n")

    def _earlier_parts(self) -> list[dict[str, Any]]:
        """The parts of a run that was interrupted, oldest first, each with the config that it ran under."""
        environment, config = self.run_dir / rundir.ENVIRONMENT, self.run_dir / rundir.CONFIG
        before, settings = files.read_json(environment), {}
        if not before and environment.exists():
            files.set_aside(environment, "is damaged")
        if config.exists():
            try:
                settings = files.read_yaml(config)
            except LabError as error:
                files.set_aside(config, str(error).rpartition(": ")[2])
        before.pop("data", None)
        parts = before.pop("earlier", [])
        return [*parts, {**before, "config": settings}] if before else parts

    def _config(self, module: QLoRAModule) -> dict[str, Any]:
        """What ``config.yaml`` says: numbers in the place of ``auto``, and the base's revision."""
        data = module.chat_data
        own = {"model": dict(module.hparams), "data": dict(data.hparams) if data else {}}
        own["model"]["betas"] = list(module.settings.betas)
        given = self.config
        if given is None:
            linked = {"seed", "tokenizer", "tokenizer_revision"}  # to other keys of the command line
            sections = {name: {key: own[name][key] for key in own[name] if key not in linked} for name in own}
            given = {"seed_everything": module.settings.seed, **sections, "run_dir": str(self.run_dir)}
            given["train_loss_window"] = self.window
        return {
            key: {name: own[key].get(name, was) for name, was in value.items()} if key in own else value
            for key, value in given.items()
        }

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            rundir.append_metrics(self.run_dir / rundir.METRICS, outputs)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        """Append the validation's row; redraw the table and the curve."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            assert pl_module.evaluation
            row = {"step": pl_module.completed_steps, **pl_module.evaluation.figures("val")}
            rundir.append_metrics(self.run_dir / rundir.METRICS, row)
            write_losses(self.run_dir, self.window)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.enable_validation:
            write_losses(self.run_dir, self.window)

    @override
    def teardown(self, *args: Any, **options: Any) -> None:
        self._held.close()

    on_exception = teardown  # Lightning calls no teardown then: else a notebook's next fit would find the run locked


def write_losses(run_dir: Path, window: int | None) -> None:
    """Write ``losses.md`` and ``loss_curve.png`` from ``metrics.csv`` and the base's validation."""
    from lightning_lab.loss_table import Loss, lab_table, losses, window_note
    from lightning_lab.plots import loss_curve

    rows = rundir.read_metrics(run_dir / rundir.METRICS)[0]
    found = losses(rows, window)
    if rows and not found:  # of a run without validations
        recent = [row.values["train_loss"] for row in rows][-(window or 0) :]
        found = [Loss(len(rows), sum(recent) / len(recent), None)]
    table = lab_table(found, rundir.base_loss(run_dir)).markdown()
    files.write_whole(run_dir / rundir.LOSSES, f"{table}\n\n{window_note(window)}\n")
    try:
        loss_curve(rows, run_dir / rundir.CURVE, run_dir.name)
    except Exception as error:  # a picture never stops a run, whatever a plotting library makes of fonts and caches
        print(f"warning: {run_dir / rundir.CURVE} could not be drawn ({error})", file=sys.stderr)


def environment(module: QLoRAModule, command: Sequence[str]) -> dict[str, Any]:
    """Versions, device, git commit, seeds and command line."""
    device, world_size = module.device, module.trainer.world_size
    return {
        "command": list(command),
        "packages": {name: version(name) for name in PACKAGES} | {"lightning_lab": lightning_lab.__version__},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "compute_dtype": str(module.compute_dtype).removeprefix("torch."),
        **{key.rpartition(".")[2]: value for key, value in module.chosen.items()},
        "base_revision": module.settings.revision,
        "base_weights": module.base_weights,
        "adapter_weights": module.adapter_weights,
        "git_commit": _git_commit(),
        "seed": module.settings.seed,
        rundir.WEIGHTED: module.settings.weighted_eval,
        "trainable_parameters": sum(weight.numel() for weight in module.trainable()),
        "total_steps": module.total_steps,
    }


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when it is installed."""
    checkout = Path(lightning_lab.__file__).resolve().parent.parent
    # no search upwards: an environment may lie inside somebody else's repository
    command = ["git", f"--git-dir={checkout / '.git'}", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def _if_it_can_be_written() -> Iterator[None]:
    with suppress(OSError):
        yield


class Curves(TensorBoardLogger):
    """TensorBoard's curves, a record that never stops a run: what cannot be written is left out."""

    log_metrics = _if_it_can_be_written()(TensorBoardLogger.log_metrics)
    log_hyperparams = _if_it_can_be_written()(TensorBoardLogger.log_hyperparams)
    save = _if_it_can_be_written()(TensorBoardLogger.save)
    finalize = _if_it_can_be_written()(TensorBoardLogger.finalize)
