"""Peak memory that `plan` predicts, beside what runs of two steps took.

Every setting is trained in a fresh process, whose ``ru_maxrss`` (on CUDA: ``peak_memory_mib`` of ``metrics.csv``) is
the measured peak: loading, training, one validation. Results of single settings are merged into the file that is there.

    python benchmarks/plan.py [SETTING ...] [--out benchmarks/results/plan/plan.json]
"""

import argparse
import csv
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

COMMON = ("--config", "lr3e-4_r32.yaml", "--config", "chitchat.yaml", "--data.rows", "400", "--data.on_bad_row", "drop")
COMMON += ("--data.split", "[0.97,0.01,0.02]", "--trainer.max_steps", "2")
# checkpointing, most tokens of a conversation and of a micro-batch, compute dtype, compiled
SETTINGS = {
    "none-2048": ("none", 2048, "bfloat16", "false"),
    "selective-2048": ("selective", 2048, "bfloat16", "false"),
    "full-2048": ("full", 2048, "bfloat16", "false"),
    "none-1024": ("none", 1024, "bfloat16", "false"),
    "none-2048-compiled": ("none", 2048, "bfloat16", "true"),
    "none-2048-float32": ("none", 2048, "float32", "false"),
}
LAB = [sys.executable, "-m", "lightning_lab"]
PROGRAM = """
import resource, sys
from lightning_lab.__main__ import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def measure(name: str) -> dict[str, Any]:
    """Predict and train one setting."""
    mode, tokens, dtype, compiled = SETTINGS[name]
    arguments = [*COMMON, f"--model.checkpointing={mode}", f"--data.max_length={tokens}"]
    arguments += [
        f"--data.micro_batch_tokens={tokens}",
        f"--model.compute_dtype={dtype}",
        f"--model.compile={compiled}",
    ]
    planned = json.loads(
        subprocess.run([*LAB, "plan", *arguments, "--json"], check=True, capture_output=True, text=True).stdout
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        options = [f"--run_dir={run}", "--samples=0", "--trainer.logger=false"]
        fit = [sys.executable, "-c", PROGRAM, "fit", *arguments, *options]
        output = subprocess.run(fit, check=True, capture_output=True, text=True).stdout
        with (run / "metrics.csv").open() as file:
            peaks = [float(row["peak_memory_mib"]) for row in csv.DictReader(file) if row["train_loss"]]
    return {
        "arguments": arguments,
        "predicted_mib": planned["peak memory in all"] / 2**20,
        "measured_mib": peaks[-1] if torch.cuda.is_available() else int(output.split()[-1]) / 2**10,
        "after_each_step_mib": peaks,
        "parts_mib": {part: size / 2**20 for part, size in planned["peak memory"].items()},
    }


def table(results: dict[str, Any]) -> str:
    """The settings as Markdown."""
    lines = ["| setting | predicted MiB | measured MiB | difference |", "|---|---:|---:|---:|"]
    for name, result in results.items():
        predicted, measured = result["predicted_mib"], result["measured_mib"]
        lines.append(f"| {name} | {predicted:,.0f} | {measured:,.0f} | {predicted / measured - 1:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"some of {', '.join(SETTINGS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan" / "plan.json")
    chosen = parser.parse_args()
    found = json.loads(chosen.out.read_text())["settings"] if chosen.out.exists() else {}
    for setting in chosen.settings or SETTINGS:
        found[setting] = measure(setting)
        versions = {name: importlib.metadata.version(name) for name in ("lightning_lab", "torch", "bitsandbytes")}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
        ordered = {name: found[name] for name in SETTINGS if name in found}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(
            json.dumps({"device": device, "versions": versions, "settings": ordered}, indent=2) + "\n"
        )
    print(table(ordered))
