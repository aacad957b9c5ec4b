"""Training steps of lightning_lab, Unsloth and TRL counted on a null GPU, and estimated by a roofline.

    python benchmarks/null_gpu.py --nullgpu DIR --models DIR --python lightning_lab=CUDA_ENV/bin/python \
        --python trl=TRL_ENV/bin/python --python unsloth=UNSLOTH_ENV/bin/python --cards h100 t4 --sizes 1b 3b

A null GPU is a CUDA driver that counts: PyTorch's CUDA build, Triton and bitsandbytes run on it unchanged, allocations,
checks and compiling are real, kernels are taken in and not executed. It is no part of this repository: DIR holds its
`run.sh`, and its libraries stand where NULLGPU_DIR says. `make null-gpu` builds the environments and runs this.

Every tool trains on the same conversations in the same steps. The first three warm up; of the next, counts and host
time are medians; the last three are traced for bytes (workers/counting.py), and the estimate is of them. Peak memory is
of all steps.

    GPU seconds  = sum over products of max(operations / sustained FLOP/s, bytes / sustained bytes/s)
                   + attention's operations / its own sustained FLOP/s + bytes of all other kernels / sustained bytes/s
    host seconds = the card's host factor * (host seconds here + launches * 2.2 us)
                   host seconds here: the clock's or the process's own, whichever are fewer, as other work may go on
                   beside; less the copies between host and GPU, which a null GPU makes there and then
    step         = max(GPU seconds, host seconds, bytes moved between host and card / the link's)
    real tokens/s = the traced steps' real tokens / seconds

The constants stand in cards.py. The estimate leaves out what no count shows: idle time at each wait, kernels too small
to fill a card, the L2 cache, a host that other work slows down.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from cards import CARDS
from throughput import BACKENDS, HERE, prepare, run
from workers.counting import TRACED, WARM_UP

from lightning_lab.models.base import load_config

SIZES = {"1b": 32, "3b": 16}  # model -> rank
# lightning_lab's run is said to be long, as its default compiles in a long run alone; it stops after the last step.
LONG = ["trainer.max_epochs=1000", "trainer.max_steps=1000", "val_every_steps=1000"]
OURS = ["lightning_lab", "lightning_lab-full", "lightning_lab-eager"]
PEERS = ["unsloth", "unsloth-8x1", "unsloth-8x1-none", "trl", "trl-8x1"]
HEADER = [
    "tool",
    "launches a step",
    "per layer and micro-batch",
    "waits",
    "host ms",
    "peak allocated MiB",
    "peak reserved MiB",
    "products TFLOP",
    "products GB",
    "other kernels GB (est.)",
    "GPU ms (est.)",
    "s/step (est.)",
    "real tok/s (est.)",
]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nullgpu", type=Path, required=True, metavar="DIR", help="folder of the null GPU's run.sh")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder of the models 1b and 3b")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a backend")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=["h100", "t4"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b"])
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=OURS + PEERS,
    )
    parser.add_argument("--steps", type=int, default=WARM_UP + 6 + TRACED)
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds a run may take")
    parser.add_argument("--note", default="", help="a line for the report, as on what else the machine was doing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "null_gpu")
    parser.add_argument("--again", action="store_true", help="run what --out holds already too")
    options = parser.parse_args()
    if options.steps <= WARM_UP + TRACED:
        parser.error(f"--steps: more than {WARM_UP + TRACED}")
    return options


def specification(options: argparse.Namespace, card: str, size: str) -> tuple[dict[str, Any], argparse.Namespace]:
    """What throughput.py's workers are given, and its options, for a card and a model."""
    given = argparse.Namespace(
        base=str((options.models / size).resolve()),
        source="chitchat",
        template="llama-3.1",
        conversations=options.conversations,
        steps=options.steps,
        evaluate=0,
        eval_batch=8,
        max_length=2048,
        batch_size=8,
        micro_batch=2,
        micro_batch_tokens="auto",
        checkpointing="full",
        ours="auto",
        compute_dtype=CARDS[card].dtype,
        r=SIZES[size],
        lr=2e-4,
        threads=None,
        attention="sdpa",
        set=LONG,
        timeout=options.timeout,
        out=options.out / f"{card}-{size}",
    )
    return prepare(given), given


def summarise(outcome: dict[str, Any], spec: dict[str, Any], card: str, layers: int) -> dict[str, Any]:
    """The table's figures from a worker's report.

    Args:
        outcome: The report.
        spec: Its specification.
        card: The card that was stood in for.
        layers: Of the model.

    """
    rows = [step["counted"] for step in outcome["steps"]]
    timed, traced = rows[WARM_UP:-TRACED], rows[-TRACED:]
    for row in rows:
        row["launches"] = row["kernels"] + row["triton"] + row["products"]
    a_byte = rows[-1]["seconds_a_byte_moved"]
    host = statistics.median(min(row["wall_ms"], row["cpu_ms"]) / 1e3 - a_byte * row["moved"] for row in timed)
    gpu, steps = [], []
    for row in traced:
        row["other_bytes"] = sum(size for _, size in row["bytes"].values())
        gpu.append(CARDS[card].gpu_seconds(row["product_shapes"].values(), row["attention"], row["other_bytes"]))
        steps.append(max(gpu[-1], CARDS[card].host_seconds(host, row["launches"]), row["moved"] / CARDS[card].link))

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in traced)

    return {
        "micro_batches": statistics.median(row["micro_batches"] for row in timed),
        "launches": statistics.median(row["launches"] for row in timed),
        "launches_traced": [row["launches"] for row in traced],
        "per_layer": statistics.median(row["launches"] / row["micro_batches"] / layers for row in timed),
        "waits": statistics.median(row["syncs"] for row in timed),
        "host_ms": 1e3 * host,
        "moved_gb": mean("moved") / 1e9,
        "allocated_mib": max(row["allocated"] for row in rows) / 2**20,
        "reserved_mib": max(row["reserved"] for row in rows) / 2**20,
        "tflop": mean("flop") / 1e12,
        "product_gb": mean("product_bytes") / 1e9,
        "attention_tflop": mean("attention") / 1e12,
        "other_gb": mean("other_bytes") / 1e9,
        "gpu_ms": 1e3 * statistics.fmean(gpu),
        "step_seconds": statistics.fmean(steps),
        "tokens_per_second": sum(map(sum, spec["lengths"][-TRACED:])) / sum(steps),
        "host_bound_steps": sum(a > b for a, b in zip(steps, gpu, strict=True)),
    }


def table(results: dict[str, Any]) -> list[str]:
    """A Markdown table of one card and model."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    for name, result in results.items():
        if "reason" in result:
            lines.append(f"| {name} | {result['reason']} |" + " |" * (len(HEADER) - 2))
            continue
        f = result["summary"]
        bound = {0: "GPU", TRACED: "host"}.get(f["host_bound_steps"], "both")
        cells = [f"{f['launches']:,.0f}", f"{f['per_layer']:.0f}", f"{f['waits']:.0f}", f"{f['host_ms']:.0f}"]
        cells += [f"{f['allocated_mib']:,.0f}", f"{f['reserved_mib']:,.0f}", f"{f['tflop']:.1f}"]
        cells += [f"{f['product_gb']:.0f}", f"{f['other_gb']:.0f}", f"{f['gpu_ms']:.0f}"]
        cells += [f"{f['step_seconds']:.3f} ({bound})", f"{f['tokens_per_second']:,.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(out: Path, note: str) -> str:
    """The report of all that a folder holds."""
    parts = ["Counted on a null GPU, estimated by the roofline of cards.py: nothing here was measured on a GPU.", ""]
    parts += [note, ""] if note else []
    versions: dict[str, str] = {}
    for file in sorted(out.glob("*-*.json")):
        record = json.loads(file.read_text())
        parts += [
            f"**{record['card']}, Llama-3.2-{record['size'].upper()}, r {SIZES[record['size']]}, {record['dtype']}**; "
        ]
        parts[-1] += f"{record['tokens']:,} real tokens in the traced steps"
        parts += ["", *table(record["results"]), ""]
        for name, result in record["results"].items():
            if "versions" in result:
                versions[BACKENDS[name][1]] = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts += [f"{name}: {given}." for name, given in versions.items()]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run every tool for every card and model, one at a time, and write the report."""
    options = arguments()
    python = dict(item.split("=", 1) for item in options.python)
    os.environ.setdefault("NULLGPU_DIR", str(options.nullgpu.resolve() / "build"))
    # A null GPU has no virtual memory: nobody gets expandable segments, which Unsloth asks for.
    os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
    options.out.mkdir(parents=True, exist_ok=True)
    for card, size in ((card, size) for size in options.sizes for card in options.cards):
        spec, given = specification(options, card, size)
        layers = load_config(given.base).num_hidden_layers
        within = [str(options.nullgpu.resolve() / "run.sh"), str(CARDS[card].capability), str(CARDS[card].mib)]
        file = options.out / f"{card}-{size}.json"
        record = {
            "card": card,
            "size": size,
            "dtype": spec["compute_dtype"],
            "tokens": sum(map(sum, spec["lengths"][-TRACED:])),
        }
        record |= {"lengths": spec["lengths"], "results": {}}
        if file.exists():
            record["results"] = json.loads(file.read_text())["results"]
        for name in options.backends:
            if name in record["results"] and not options.again:
                continue
            outcome = run(name, 0, spec, python, given, within)
            if isinstance(outcome, str):
                record["results"][name] = {"reason": outcome}
            else:
                summary = summarise(outcome, spec, card, layers)
                record["results"][name] = {"summary": summary} | {k: outcome[k] for k in ("versions", "steps")}
            file.write_text(json.dumps(record) + "\n")
        print(f"{card} {size}", *table(record["results"]), "", sep="\n", file=sys.stderr)
    text = report(options.out, options.note)
    (options.out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
