"""The run directory's record: config, environment, metrics, the lab's loss table and the curve."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch

from lightning_lab.errors import LabError
from lightning_lab.training.evaluation import Evaluation
from lightning_lab.training.module import QLoRAModule

TRAIN_COLUMNS = (
    "epoch",
    "train_loss",
    "grad_norm",
    "lr",
    "tokens",
    "supervised_tokens",
    "padded_tokens",
    "tokens_per_second",
    "peak_memory_mib",
)
VALIDATION_COLUMNS = ("val_loss", "val_loss_hf", "val_token_accuracy", "val_perplexity")
COLUMNS = ("step", *TRAIN_COLUMNS, *VALIDATION_COLUMNS)
PACKAGES = ("lightning", "torch", "transformers", "peft", "bitsandbytes", "datasets", "torchmetrics", "lightning_lab")


class StepClock(pl.Callback):
    """Knows when the step in progress began. Must be the last callback, so that no other's work counts as the step's.

    A step begins when all that followed the step before has ended: validation, samples, saving. Fetching the batch is
    in it, and on a GPU what the optimizer still had queued after that step's one read.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def seconds(self) -> float:
        """Time since the step began."""
        return time.perf_counter() - self._began

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step begins."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next step begins, unless a validation comes first."""
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The next step begins."""
        self._began = time.perf_counter()


class RunRecord(pl.Callback):
    """Writes everything in the run directory but checkpoints and samples.

    Args:
        run_dir: The run's directory; made when training starts.
        config: The resolved config as YAML text, written by ``fit``.
        name: The run's name, for ``environment.json``.
        command: The command line, for ``environment.json``.
        checkpoint: What the run continues from, or None.
        clock: Of the steps.

    """

    def __init__(
        self, run_dir: Path, config: str, name: str, command: list[str], checkpoint: Path | None, clock: StepClock
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.name = name
        self.command = command
        self.checkpoint = checkpoint
        self.clock = clock
        self.metrics = MetricsFile(run_dir / "metrics.csv")
        self._lock: IO[str] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write config and environment; on resume forget the rows after the checkpoint.

        Raises:
            LabError: Another process trains this run.

        """
        assert isinstance(pl_module, QLoRAModule)
        if not trainer.is_global_zero:
            return
        # not earlier: a run that fails before it trains leaves nothing
        (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self.run_dir)
        in_place = self.checkpoint is not None and (self.run_dir / "config.yaml").exists()
        if not in_place:
            write_text(self.run_dir / "config.yaml", self.config)
        if self.checkpoint is not None and not in_place:  # another run's checkpoint: its first steps are this run's too
            for name in ("metrics.csv", "samples.md"):
                earlier = self.checkpoint.parent.parent / name
                if self.checkpoint.parent.name == "checkpoints" and earlier.is_file():  # else it lies in no run
                    write_text(self.run_dir / name, earlier.read_text())
            shutil.copyfile(self.checkpoint, self.run_dir / "checkpoints" / "last.ckpt")
        self.metrics.keep_until(pl_module.completed_steps)
        path = self.run_dir / "environment.json"
        record = {
            "name": self.name,
            "continued_from": str(self.checkpoint) if self.checkpoint else None,
            "completed_steps": pl_module.completed_steps,
            **environment(pl_module, self.command),
            "data": pl_module.chat_data.record(),
        }
        if in_place and path.exists():  # the parts of a run that was interrupted, oldest first
            before = json.loads(path.read_text())
            record["earlier"] = [*before.pop("earlier", []), {k: v for k, v in before.items() if k != "data"}]
        write_text(path, json.dumps(record, indent=2) + "\n")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the step's row."""
        outputs["tokens_per_second"] = outputs["tokens"] / self.clock.seconds()
        outputs["peak_memory_mib"] = peak_memory_mib(pl_module.device)
        if trainer.is_global_zero:
            self.metrics.append(outputs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the validation's row; redraw the table and the curve."""
        assert isinstance(pl_module, QLoRAModule)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        assert pl_module.evaluation is not None
        self.metrics.append({"step": pl_module.completed_steps, **validation_row(pl_module.evaluation)})
        write_loss_table(self.run_dir)
        draw_curve(self.metrics.read(), self.run_dir / "loss_curve.png", self.run_dir.name)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the run go."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class MetricsFile:
    """``metrics.csv``: one row per optimizer step, one per validation, each written whole and at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Append one row; columns that it lacks stay empty."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            if new:
                file.write(",".join(COLUMNS) + "\n")
            file.write(",".join("" if row.get(c) is None else repr(row[c]) for c in COLUMNS) + "\n")

    def read(self) -> list[dict[str, str]]:
        """Return all whole rows; one that a kill cut short is left out."""
        if not self.path.exists():
            return []
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        rows = list(csv.DictReader(lines))
        return [row for row in rows if None not in row.values() and None not in row]

    def keep_until(self, step: int) -> None:
        """Drop the rows of steps after ``step``, whole file at once."""
        if self.path.exists():
            kept = [",".join(row[c] for c in COLUMNS) for row in self.read() if int(row["step"]) <= step]
            write_text(self.path, "\n".join([",".join(COLUMNS), *kept]) + "\n")


def lock_run(run_dir: Path) -> IO[str]:
    """Hold a run for as long as the returned file is open and this process lives, which tells reports that it runs.

    Raises:
        LabError: Another process holds it.

    """
    file = (run_dir / ".lock").open("w")
    for _ in range(20):  # a report that looks whether the run is held has the lock itself for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks: the run is not guarded, and reports call it stopped
            return file
    file.close()
    raise LabError(f"{run_dir}: another process is training this run; wait for it, or stop it first")


def validation_row(result: Evaluation) -> dict[str, float]:
    """The validation columns of ``metrics.csv``."""
    return {
        "val_loss": result.loss,
        "val_loss_hf": result.loss_hf,
        "val_token_accuracy": result.token_accuracy,
        "val_perplexity": result.perplexity,
    }


def loss_table(rows: list[dict[str, str]], base: float | None = None) -> str:
    """Render the lab's table: step, training loss (mean over the steps since the row before), validation loss.

    Args:
        rows: Rows of ``metrics.csv``.
        base: Validation loss of the untouched base, where it has been measured; becomes row 0.

    """
    lines = ["| Step | Training Loss | Validation Loss |", "|---:|---:|---:|"]
    if base is not None:
        lines.append(f"| 0 (base) | | {base:.6f} |")
    since: list[float] = []
    for row in rows:
        if row["train_loss"]:
            since.append(float(row["train_loss"]))
        elif row["val_loss"]:
            mean = f"{sum(since) / len(since):.4f}" if since else ""
            lines.append(f"| {row['step']} | {mean} | {float(row['val_loss']):.6f} |")
            since = []
    return "\n".join(lines) + "\n"


def write_loss_table(run_dir: Path) -> None:
    """Write ``losses.md`` from ``metrics.csv`` and, where the base has been evaluated, ``validation-base.json``."""
    write_text(run_dir / "losses.md", loss_table(MetricsFile(run_dir / "metrics.csv").read(), base_loss(run_dir)))


def base_loss(run_dir: Path) -> float | None:
    """The base's validation loss from ``validation-base.json``, if it has been measured."""
    path = run_dir / "validation-base.json"
    return json.loads(path.read_text())["validation_loss"] if path.exists() else None


def draw_curve(rows: list[dict[str, str]], path: Path, title: str) -> None:
    """Draw training loss (each step and its running mean) and validation loss over optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(int(r["step"]), float(r["train_loss"])) for r in rows if r["train_loss"]]
    validation = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        dot = "." if len(losses) == 1 else None  # a line through one step shows nothing
        axes.plot(steps, losses, color="#9ec5e8", linewidth=0.8, marker=dot, label="training loss, each step")
        window = max(1, len(losses) // 20)
        means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axes.plot(
            steps, means, color="#1f6fb2", linewidth=1.6, marker=dot, label=f"training loss, mean of {window} steps"
        )
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d1495b", marker="o", linewidth=1.6, label="validation loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", title=title)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)


def environment(module: QLoRAModule, command: list[str]) -> dict[str, Any]:
    """Versions, device, git commit, seeds and command line."""
    device = module.device
    return {
        "command": command,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": module.trainer.world_size,
        "compute_dtype": str(module.compute_dtype).removeprefix("torch."),
        "checkpointing": module.checkpointing,
        "micro_batch_tokens": module.chat_data.micro_batch_tokens,
        "eval_micro_batch_tokens": module.chat_data.eval_micro_batch_tokens,
        "git_commit": _git_commit(),
        "seed": module.seed,
        "trainable_parameters": sum(weight.numel() for weight in module.trainable()),
        "total_steps": module.total_steps
        or module.chat_data.total_steps(module.trainer.max_epochs, module.trainer.max_steps),
    }


def peak_memory_mib(device: torch.device) -> float:
    """Most memory so far: reserved on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when it is installed."""
    checkout = Path(__file__).resolve().parents[3]
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
