"""lightning_lab through its own command line, on the conversations that the other tools get. Usage: SPEC RESULT."""

import csv
import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_lab.__main__ import main as lightning_lab

sys.path.insert(0, str(Path(__file__).parent))
import counting


class Measured(pl.Callback):
    """Writes a line of JSON to a file for each validation, its metrics' reading included, and for each step.

    Args:
        path: The file.
        spec: Of the specification.

    """

    def __init__(self, path: str, spec: str) -> None:
        self.path, self.spec = path, json.loads(Path(spec).read_text())
        self._counter, self._steps, self._started = counting.Counter(self.spec), 0, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop it."""
        self._write({"evaluation": time.perf_counter() - self._started})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        self._counter.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take what a null GPU counted, and memory after the last step but one; stop where the specification says."""
        self._steps += 1
        counted = self._counter.end(len(batch.micro_batches))
        cuda = torch.cuda.is_available()
        if counted:
            self._write({"counted": counted})
        if self._steps == self.spec["steps"] - 1:
            memory = {
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
                "peak_reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if cuda else None,
                "peak_allocated_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            }
            self._write({"memory": memory})
        if self._steps == self.spec["steps"] < trainer.max_steps:
            trainer.should_stop = True
        self._counter.begin()

    def _write(self, event: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(event) + "\n")


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(spec["threads"] or torch.get_num_threads())
    run = Path(spec["folder"]) / "run"
    file = Path(spec["folder"]) / "measured.jsonl"
    given = {"path": str(file), "spec": sys.argv[1]}
    callback = json.dumps({"class_path": "lab.Measured", "init_args": given})
    changes = [f"--{item}" for item in spec["set"]]
    status = lightning_lab(["fit", f"--run_dir={run}", *spec["arguments"], f"--trainer.callbacks={callback}", *changes])
    if status:
        raise SystemExit(status)
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train_loss"]]
    cuda = torch.cuda.is_available()
    events = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = [event["evaluation"] for event in events if "evaluation" in event]
    counted = [{"counted": event["counted"]} for event in events if "counted" in event] or [{}] * len(rows)
    return {
        "evaluation_seconds": seconds[-1] if spec["evaluations"] else None,
        "steps": [
            {
                "loss": float(row["train_loss"]),
                "seconds": int(row["tokens"]) / float(row["tokens_per_second"]),
                "tokens": int(row["tokens"]),
                "supervised_tokens": int(row["supervised_tokens"]),
                "padded_tokens": int(row["padded_tokens"]),
                **extra,
            }
            for row, extra in zip(rows, counted, strict=True)
        ],
        **next(event["memory"] for event in events if "memory" in event),
        "trainable": json.loads((run / "environment.json").read_text())["trainable_parameters"],
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("lightning_lab", "lightning", "transformers", "peft", "bitsandbytes", "torch")
        },
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
