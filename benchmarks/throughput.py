"""Training speed and memory of lightning_lab, TRL and Unsloth side by side, on the same token ids in the same order.

    python benchmarks/throughput.py --python trl=TRL_ENV/bin/python --python unsloth=UNSLOTH_ENV/bin/python
    python benchmarks/throughput.py --preset lab-3b --python trl=... --python unsloth=...    # a GPU and the Hub

Each backend runs in processes of its own, in its own environment, one after another and in turns, so that a drift of
the machine falls on all alike. A backend that cannot run says why in its row. Results, raw logs and the specification
of each run go to --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.hub import locate
from lightning_lab.models.base import load_config, resolve_compute_dtype

HERE = Path(__file__).parent
# Backend -> worker, environment it runs in, and what differs from the common settings.
BACKENDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lightning_lab": ("lab.py", "lightning_lab", {}),
    "lightning_lab-full": ("lab.py", "lightning_lab", {"set": ["model.checkpointing=full"]}),
    "lightning_lab-eager": (
        "lab.py",
        "lightning_lab",
        {"set": ["model.checkpointing=none", "model.compile=false", "data.micro_batch_tokens=16384"]},
    ),
    "lightning_lab-best": (
        "lab.py",
        "lightning_lab",
        {"set": ["model.checkpointing=none", "model.compile=true", "data.micro_batch_tokens=16384"]},
    ),
    "lightning_lab-cache": ("lab.py", "lightning_lab", {"set": ["model.cache_dequantised=true"]}),
    "lightning_lab-compile": ("lab.py", "lightning_lab", {"set": ["model.compile=true"]}),
    "lightning_lab-selective": ("lab.py", "lightning_lab", {"set": ["model.checkpointing=selective"]}),
    "lightning_lab-selective-compile": (
        "lab.py",
        "lightning_lab",
        {"set": ["model.checkpointing=selective", "model.compile=true"]},
    ),
    "trl": ("trl_sft.py", "trl", {}),
    "trl-packing": ("trl_sft.py", "trl", {"packing": True, "micro_batch": 1}),
    "trl-8x1": ("trl_sft.py", "trl", {"micro_batch": 8}),
    "trl-8x1-none": ("trl_sft.py", "trl", {"micro_batch": 8, "checkpointing": "none"}),
    "unsloth": ("unsloth_sft.py", "unsloth", {}),
    "unsloth-shipped": ("unsloth_sft.py", "unsloth", {"exact_name": False}),
    "unsloth-packing": ("unsloth_sft.py", "unsloth", {"packing": True, "micro_batch": 1}),
    "unsloth-8x1": ("unsloth_sft.py", "unsloth", {"micro_batch": 8}),
    "unsloth-8x1-none": ("unsloth_sft.py", "unsloth", {"micro_batch": 8, "checkpointing": "none"}),
}
_FINETOME = {"source": "mlabonne/FineTome-100k", "steps": 60}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "base": "embedded",
        "source": "chitchat",
        "conversations": 400,
        "steps": 8,
        "checkpointing": "none",
        "micro_batch_tokens": 2048,
    },
    "lab-3b": {"base": "unsloth/Llama-3.2-3B-Instruct", **_FINETOME},
    "lab-1b": {"base": "unsloth/Llama-3.2-1B-Instruct", **_FINETOME, "r": 32, "lr": 3e-4},
}
EVALUATIONS = 2  # the first warms up, the second counts
# The lab's notebooks as they were published with their outputs, not measured by this script.
RECORDED = {
    "lab-3b": "| Unsloth 2024.10.0 on a T4, fp16, as recorded in the lab's notebook (60 steps in 446.5 s) | | | | "
    "7.44 | 6.531 GB reserved | | | |",
    "lab-1b": "| Unsloth 2025.11.6 on a T4, fp16, r 32, as recorded by the lab (3.23 conversations/s) | | | | "
    "2.48 | 3.018 GB reserved | | | 5.83 conversations/s |",
}


def timed(steps: list[Any]) -> list[Any]:
    """The steps that count: not the first, which warms up, nor the last, as loaders of packed rows run out there."""
    return steps[1:-1] or steps[1:]


@dataclass
class Result:
    """All repeats of one backend: either what its workers reported, or why there is nothing."""

    name: str
    repeats: list[dict[str, Any]]
    reason: str = ""

    def median(self, key: str) -> float:
        """Median over the timed steps of all repeats of a count per second."""
        return statistics.median(s[key] / s["seconds"] for r in self.repeats for s in timed(r["steps"]))

    def overall(self, key: str) -> float:
        """Counts over seconds, both summed over the timed steps of all repeats."""
        steps = [s for r in self.repeats for s in timed(r["steps"])]
        return sum(s[key] for s in steps) / sum(s["seconds"] for s in steps)

    @property
    def seconds(self) -> float:
        """Median seconds of a timed step."""
        return statistics.median(s["seconds"] for r in self.repeats for s in timed(r["steps"]))

    @property
    def evaluation(self) -> float | None:
        """Median real tokens/s of the evaluation."""
        seconds = [r["evaluation_seconds"] for r in self.repeats if r.get("evaluation_seconds")]
        return self.repeats[0]["evaluation_tokens"] / statistics.median(seconds) if seconds else None

    def peak(self, key: str) -> float | None:
        """Most memory of any repeat, in MiB."""
        values = [r[key] for r in self.repeats if r.get(key) is not None]
        return max(values) if values else None


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["lightning_lab", "trl", "unsloth"])
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a backend")
    parser.add_argument("--base", help="Hub id, folder, GGUF file or embedded")
    parser.add_argument("--source", help="as data.source")
    parser.add_argument("--template", default=None, help="as data.template")
    parser.add_argument("--conversations", type=int, default=None, help="use the first this many")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--evaluate", type=int, default=32, help="conversations to evaluate on afterwards; 0 for none")
    parser.add_argument("--eval_batch", type=int, default=8, help="conversations a batch of the peers' evaluation")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--checkpointing", choices=["none", "full"], default=None, help="of all; else ours is auto")
    parser.add_argument("--compute_dtype", default="auto")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=2, help="conversations a micro-batch, of the peers")
    parser.add_argument("--micro_batch_tokens", default=None, help="of lightning_lab: a number or auto")
    parser.add_argument("--r", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--attention", default="sdpa", help="of TRL: sdpa, flash_attention_2, ...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more keys for lightning_lab")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds a run may take")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "throughput")
    options = parser.parse_args()
    options.ours = options.checkpointing or PRESETS[options.preset].get("checkpointing", "auto")
    defaults = {"checkpointing": "full", "micro_batch_tokens": "auto", "conversations": 1000, "r": 16, "lr": 2e-4}
    defaults |= PRESETS[options.preset]
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenise once; write each step's conversations for the peers, and the arguments that make lightning_lab's."""
    template = options.template or ("tokenizer" if options.base == "embedded" else "llama-3.1")
    rows = options.conversations
    split = [rows - max(1, options.evaluate), max(1, options.evaluate), 0]
    data = ChatDataModule(
        source=options.source,
        rows=rows,
        split=split,
        tokenizer=options.base,
        template=template,
        max_length=options.max_length,
        on_bad_row="drop",
        batch_size=options.batch_size,
    )
    data.prepare(progress=True)

    def examples(rows: Iterable[int]) -> list[dict[str, list[int]]]:
        tokenized = data.tokenized
        return [{"input_ids": tokenized.input_ids(i).tolist(), "labels": tokenized.labels(i).tolist()} for i in rows]

    train = data.splits["train"].rows
    steps = [examples(int(train[d]) for d in data.step_documents(step)) for step in range(options.steps)]
    evaluated = examples(map(int, data.splits["validation"].rows)) if options.evaluate else []
    options.out.mkdir(parents=True, exist_ok=True)
    conversations = (options.out / "conversations.json").resolve()
    conversations.write_text(json.dumps({"steps": steps, "evaluated": evaluated}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(resolve_compute_dtype(options.compute_dtype, device)).removeprefix("torch.")
    ours = {
        "model.base": options.base,
        "model.compute_dtype": dtype,
        "model.lr": options.lr,
        "model.r": options.r,
        "model.alpha": options.r,
        "model.checkpointing": options.ours,
        "data.source": options.source,
        "data.rows": rows,
        "data.split": str(split).replace(" ", ""),
        "data.template": template,
        "data.max_length": options.max_length,
        "data.on_bad_row": "drop",
        "data.batch_size": options.batch_size,
        "data.micro_batch_tokens": options.micro_batch_tokens,
        "trainer.max_steps": options.steps,
        "val_every_steps": max(1, options.steps - 1) if options.evaluate else options.steps,  # EVALUATIONS in all
        "trainer.logger": "false",
        "samples": 0,
    }
    return {
        "base": locate(options.base),
        "conversations_file": str(conversations),
        "steps": options.steps,
        "lengths": [[len(example["input_ids"]) for example in step] for step in steps],
        "supervised": [sum(label != -100 for e in step for label in e["labels"][1:]) for step in steps],
        "evaluations": EVALUATIONS if options.evaluate else 0,
        "evaluation_tokens": sum(len(example["input_ids"]) for example in evaluated),
        "eval_batch": options.eval_batch,
        "batch_size": options.batch_size,
        "micro_batch": options.micro_batch,
        "max_length": options.max_length,
        "compute_dtype": dtype,
        "checkpointing": options.checkpointing,
        "packing": False,
        "exact_name": True,
        "attention": options.attention,
        "lr": options.lr,
        "r": options.r,
        "alpha": options.r,
        "threads": options.threads,
        "arguments": [f"--{key}={value}" for key, value in ours.items()],
        "set": options.set,
    }


def run(
    name: str,
    repeat: int,
    spec: dict[str, Any],
    python: dict[str, str],
    options: argparse.Namespace,
    within: Sequence[str] = (),
) -> Any:
    """Run one worker; return its report, or the reason why there is none.

    Args:
        name: The backend.
        repeat: Which of its runs.
        spec: What `prepare` returned.
        python: Environment -> interpreter.
        options: The command line's.
        within: A command that runs the worker's, as the null GPU's does; it brings an accelerator.

    """
    worker, environment, changes = BACKENDS[name]
    if environment == "unsloth" and not within and not torch.cuda.is_available():
        return "needs an accelerator (Unsloth refuses to import without one)"
    if environment not in python:
        return f"no environment given: --python {environment}=PATH"
    folder = (options.out / "raw" / f"{name}-{repeat}").resolve()
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    spec = spec | changes | {"folder": str(folder), "set": spec["set"] + changes.get("set", [])}
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    result = folder / "result.json"
    command = [*within, python[environment], str(HERE / "workers" / worker), str(folder / "spec.json"), str(result)]
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth")}
    if options.threads:
        variables["OMP_NUM_THREADS"] = str(options.threads)
    variables.pop("PYTHONPATH", None)
    if environment == "lightning_lab":
        variables["PYTHONPATH"] = str(HERE.parent)
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        try:
            status = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, timeout=options.timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not done within {options.timeout:.0f} s"
    print(f"{name}, repeat {repeat}: status {status} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    if status == -9:
        return "killed, most likely for memory"
    if status or not result.exists():
        lines = (folder / "log.txt").read_text().strip().splitlines()
        return f"failed: {lines[-1][:200] if lines else status}"
    reported = json.loads(result.read_text())
    tokens = [step["tokens"] for step in reported["steps"]]
    if not spec["packing"] and tokens != [sum(lengths) for lengths in spec["lengths"]]:
        return "failed: its steps were of other conversations"
    return reported | {"evaluation_tokens": spec["evaluation_tokens"]}


def matrix_rate(dtype: torch.dtype, threads: int | None) -> float:
    """Measured floating-point operations per second of a large matrix product.

    On a GPU the mean over 8 s after 4 s, as a card at its power limit does not keep up what it does in a burst; on a
    CPU the best of six. To be called in a process of its own, which frees what a GPU holds for it.
    """
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        size = 8192
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        for seconds in (4, 8):
            products, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                for _ in range(4):
                    a @ b
                torch.cuda.synchronize()
                products += 4
            taken = time.perf_counter() - started
        return products * 2 * size**3 / taken
    size, best = 2048, float("inf")
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _matrix_rate(dtype: str, threads: int | None) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(matrix_rate, getattr(torch, dtype), threads).result()


def useful_operations(spec: dict[str, Any], base: str) -> float:
    """Floating-point operations of the timed steps that the result needs, whoever computes it.

    Frozen linears: forward and input gradient. Adapters: also weight gradients. Causal attention: two products
    forward, four backward, over half of each document's square. Head: forward and input gradient at supervised tokens,
    which is all that lightning_lab and Unsloth project.
    """
    config = load_config(base)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    shapes = [(hidden, width), (hidden, narrow), (hidden, narrow), (width, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    frozen = layers * sum(i * o for i, o in shapes)
    adapters = layers * spec["r"] * sum(i + o for i, o in shapes)
    total = 0.0
    for lengths, supervised in zip(timed(spec["lengths"]), timed(spec["supervised"]), strict=True):
        total += sum(lengths) * (4 * frozen + 6 * adapters)
        total += layers * sum(6 * length * length * width for length in lengths)
        total += 4 * supervised * hidden * config.vocab_size
    return total


def report(results: list[Result], spec: dict[str, Any], options: argparse.Namespace, rate: float) -> str:
    """The table, the losses side by side, and what it was measured with."""
    work = useful_operations(spec, options.base)
    lines = [
        "| backend | real tok/s | supervised tok/s | with padding tok/s | s/step | peak MiB | MFU | first step s "
        "| evaluation, real tok/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        if result.reason:
            lines.append(f"| {result.name} | {result.reason} | | | | | | | |")
            continue
        tokens = sum(map(sum, timed(spec["lengths"])))
        done = [sum(s["tokens"] for s in timed(r["steps"])) for r in result.repeats]
        seconds = [sum(s["seconds"] for s in timed(r["steps"])) for r in result.repeats]
        # packing changes what a step holds: its operations are taken in proportion to the tokens
        mfu = statistics.median(work * d / tokens / s / rate for d, s in zip(done, seconds, strict=True))
        reserved = result.peak("peak_reserved_mib")
        memory = (
            f"{reserved:,.0f} reserved, {result.peak('peak_allocated_mib') or 0:,.0f} allocated"
            if reserved is not None
            else f"{result.peak('peak_rss_mib') or 0:,.0f} RSS"
        )
        first = statistics.median(r["steps"][0]["seconds"] for r in result.repeats)
        lines.append(
            f"| {result.name} | {result.median('tokens'):,.1f} | {result.median('supervised_tokens'):,.1f} | "
            f"{result.median('padded_tokens'):,.1f} | {result.seconds:.2f} | {memory} | {mfu:.1%} | {first:.2f} | "
            f"{format(result.evaluation, ',.1f') if result.evaluation else ''} |"
        )
    if options.preset in RECORDED:
        lines.append(RECORDED[options.preset])
    measured = [r for r in results if not r.reason]
    lines += [
        "",
        "Tokens/s and s/step: median over the steps but the first and the last of all repeats. Memory: after the last "
        "timed step, before any evaluation of the peers. Per repeat, real tokens/s:",
        "",
    ]
    for result in measured:
        each = [
            sum(s["tokens"] for s in timed(r["steps"])) / sum(s["seconds"] for s in timed(r["steps"]))
            for r in result.repeats
        ]
        lines.append(f"* {result.name}: {', '.join(f'{value:.1f}' for value in each)}")
    ours = next((r for r in measured if r.name == "lightning_lab"), None)
    if ours:
        lines += ["", "Ratios to lightning_lab (real tokens/s over all timed steps; peak memory):", ""]
        key = "peak_reserved_mib" if ours.peak("peak_reserved_mib") else "peak_rss_mib"
        for other in measured:
            if other is not ours:
                speed = ours.overall("tokens") / other.overall("tokens")
                memory_share = (ours.peak(key) or 0) / (other.peak(key) or 1)
                evaluation = (ours.evaluation or 0) / (other.evaluation or 1)
                also = f"; evaluation {evaluation:.2f} times" if evaluation else ""
                lines.append(f"* {speed:.2f} times {other.name}, in {memory_share:.0%} of its memory{also}")
    lines += ["", "Losses:", "", "| step | " + " | ".join(r.name for r in measured) + " |"]
    lines.append("|---:|" + "---:|" * len(measured))
    for step in range(options.steps):
        cells = [f"{r.repeats[0]['steps'][step].get('loss', float('nan')):.4f}" for r in measured]
        lines.append(f"| {step + 1} | " + " | ".join(cells) + " |")
    for other in measured:
        if ours and other is not ours and "packing" not in other.name:
            pairs = zip(ours.repeats[0]["steps"], other.repeats[0]["steps"], strict=True)
            largest = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
            lines.append("")
            lines.append(f"Largest difference between the losses of lightning_lab and {other.name}: {largest:.6f}")
    processor = platform.processor() or platform.machine()
    lines += [
        "",
        f"Device: {measured[0].repeats[0]['device'] if measured else 'none'} ({processor}), {torch.get_num_threads()} "
        f"threads; matrix rate measured at {rate / 1e9:,.0f} GF/s in {spec['compute_dtype']}.",
    ]
    for result in measured:
        versions = ", ".join(f"{k} {v}" for k, v in result.repeats[0]["versions"].items())
        lines.append(f"{result.name}: {versions}; {result.repeats[0]['trainable']:,} trainable parameters.")
    command = " ".join(["python", "benchmarks/throughput.py", *(_without_path(a) for a in sys.argv[1:])])
    lines += ["", f"Command: `{command}`"]
    return "\n".join(lines) + "\n"


def _without_path(argument: str) -> str:
    name, separator, path = argument.partition("=")
    return f"{name}=PATH" if separator and "/" in path else argument


def main() -> None:
    """Run every backend in turns and write the report."""
    options = arguments()
    python = {"lightning_lab": sys.executable} | dict(item.split("=", 1) for item in options.python)
    spec = prepare(options)
    results = [Result(name, []) for name in options.backends]
    rates = []
    for repeat in range(options.repeats):
        rates.append(_matrix_rate(spec["compute_dtype"], options.threads))
        for result in results if repeat % 2 == 0 else reversed(results):
            if result.reason:
                continue
            outcome = run(result.name, repeat, spec, python, options)
            if isinstance(outcome, str):
                result.reason, result.repeats = outcome, []
            else:
                result.repeats.append(outcome)
    text = report(results, spec, options, max(rates))
    (options.out / "report.md").write_text(text)
    record = {"spec": {k: v for k, v in spec.items() if k not in ("base", "conversations_file")}, "matrix_rates": rates}
    record["results"] = {r.name: r.reason or r.repeats for r in results}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
