"""lightning_lab through its own command line, on the conversations that the other tools get. Usage: SPEC RESULT."""

import csv
import importlib.metadata
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_lab.__main__ import main as lightning_lab


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(spec["threads"] or torch.get_num_threads())
    run = Path(spec["folder"]) / "run"
    status = lightning_lab(["fit", f"--run_dir={run}", *spec["arguments"]])
    if status:
        raise SystemExit(status)
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train_loss"]]
    cuda = torch.cuda.is_available()
    return {
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
