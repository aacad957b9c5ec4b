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


class EvaluationClock(pl.Callback):
    """Writes the seconds of each validation, the reading of its metrics included, to a file, one a line."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._started = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop it."""
        with open(self.path, "a") as file:
            file.write(f"{time.perf_counter() - self._started}\n")


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(spec["threads"] or torch.get_num_threads())
    run = Path(spec["folder"]) / "run"
    clock = Path(spec["folder"]) / "evaluations.txt"
    callback = json.dumps({"class_path": "lab.EvaluationClock", "init_args": {"path": str(clock)}})
    changes = [f"--{item}" for item in spec["set"]]
    status = lightning_lab(["fit", f"--run_dir={run}", *spec["arguments"], f"--trainer.callbacks={callback}", *changes])
    if status:
        raise SystemExit(status)
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train_loss"]]
    cuda = torch.cuda.is_available()
    seconds = [float(line) for line in clock.read_text().split()]
    return {
        "evaluation_seconds": seconds[-1] if spec["evaluations"] else None,
        "steps": [
            {
                "loss": float(row["train_loss"]),
                "seconds": int(row["tokens"]) / float(row["tokens_per_second"]),
                "tokens": int(row["tokens"]),
                "supervised_tokens": int(row["supervised_tokens"]),
                "padded_tokens": int(row["padded_tokens"]),
            }
            for row in rows
        ],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if cuda else None,
        "peak_allocated_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "trainable": json.loads((run / "environment.json").read_text())["trainable_parameters"],
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("lightning_lab", "lightning", "transformers", "peft", "bitsandbytes", "torch")
        },
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
