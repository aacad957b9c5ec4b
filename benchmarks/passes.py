"""Single passes: each lever on against off, the cost of long documents, and a 4-bit step of a random Llama-3.2-1B.

    python benchmarks/passes.py levers      # SmolLM2, 2,048 tokens: what each setting changes
    python benchmarks/passes.py lengths     # SmolLM2: the same number of tokens in documents of 512 to 8,192
    python benchmarks/passes.py llama-1b    # random weights of its shapes go to a temporary folder first: 2.5 GB

Each measurement runs in a process of its own, so that peak memory is its own. Prints Markdown; --out takes the numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# Published with the model; https://huggingface.co/unsloth/Llama-3.2-1B-Instruct/blob/main/config.json
LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
TOKENS = 8192  # in all, however they are cut into documents
LENGTHS = (512, 1024, 2048, 4096, 8192)
PASSES = 3
TWO = [1365, 683]  # documents of the levers' micro-batch
LEVERS: dict[str, dict[str, Any]] = {
    "as shipped, without checkpointing": {},
    "`model.fused_linear: false` (PEFT's own layers)": {"fused": False},
    "`model.compile: true`": {"compiled": True},
    "`model.cache_dequantised: true`": {"cached": True},
    "loss over all positions": {"every": 1},
    "`model.checkpointing: selective`": {"checkpointing": "selective"},
    "`model.checkpointing: full`": {"checkpointing": "full"},
    "`model.checkpointing: full`, `model.compile: true`": {"checkpointing": "full", "compiled": True},
    "`model.compute_dtype: float32`": {"dtype": "float32"},
    "evaluation": {"evaluate": True},
    "evaluation, `model.compile: true`": {"evaluate": True, "compiled": True},
}


def write_llama_1b(folder: Path) -> None:
    """Save random weights of Llama-3.2-1B's shapes, and SmolLM2's tokenizer, whose ids all lie in its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_lab.data.encoding import load_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).save_pretrained(folder)
    load_tokenizer("embedded").save_pretrained(folder)


def llama_1b(folder: Path, checkpointing: str) -> dict[str, Any]:
    """Three optimizer steps of one conversation of 2,048 tokens each, through the command line."""
    import csv

    from lightning_lab.__main__ import main as lightning_lab

    answers = [f"Number {i} comes after number {i - 1}." for i in range(1, 400)]
    row = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": " ".join(answers)}]}
    (folder / "long.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    run = folder / f"run-{checkpointing}"
    settings = {
        "model.base": folder / "model",
        "model.checkpointing": checkpointing,
        "data.source": folder / "long.jsonl",
        "data.rows": 8,
        "data.split": "[6,1,1]",
        "data.template": "tokenizer",
        "data.batch_size": 1,
        "trainer.max_steps": 3,
        "trainer.logger": "false",
        "samples": 0,
        "run_dir": run,
    }
    if status := lightning_lab(["fit", *(f"--{key}={value}" for key, value in settings.items())]):
        raise SystemExit(status)
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train_loss"]]
    return {
        "checkpointing": checkpointing,
        "tokens": int(rows[0]["tokens"]),
        "losses": [float(row["train_loss"]) for row in rows],
        "tokens_per_second": [float(row["tokens_per_second"]) for row in rows],
        "trainable": json.loads((run / "environment.json").read_text())["trainable_parameters"],
    }


def passes(
    documents: list[int],
    checkpointing: str = "none",
    fused: bool = True,
    compiled: bool = False,
    dtype: str = "auto",
    every: float = 2.5,
    evaluate: bool = False,
    cached: bool = False,
) -> dict[str, Any]:
    """Passes over one packed row of SmolLM2 in NF4: forward and backward, or an evaluation.

    Args:
        documents: Their lengths.
        checkpointing: As ``model.checkpointing``.
        fused: As ``model.fused_linear``.
        compiled: As ``model.compile``.
        dtype: As ``model.compute_dtype``.
        every: One position in this many is supervised; 1 is what a loss over all positions computes.
        evaluate: Forward only, without a graph.
        cached: As ``model.cache_dequantised``.

    """
    from lightning_lab.models import qlora
    from lightning_lab.models.attention import attention_arguments, register_document_attention
    from lightning_lab.models.base import load_base, resolve_compute_dtype
    from lightning_lab.models.fused_linear import KeptTensors
    from lightning_lab.models.loss import supervised_nll, supervised_nll_sum

    cpu = torch.device("cpu")
    compute = resolve_compute_dtype(dtype, cpu)
    attention = register_document_attention()
    base = load_base("embedded", bits=4, compute_dtype=compute, device=cpu, attn_implementation=attention)
    targets = qlora.DEFAULT_TARGETS
    model = qlora.add_adapters(
        base, r=16, alpha=16, dropout=0.0, target_modules=targets, rslora=False, dora=False, seed=1, fused=fused
    )
    qlora.enable_checkpointing(model, checkpointing)
    if fused:
        KeptTensors(model, compute, cached)
    if compiled:
        qlora.compile_layers(model)
    model.train()
    if evaluate:
        qlora.evaluation_mode(model)
    tokens = sum(documents)
    ids = torch.randint(100, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    borders = torch.tensor([0, *documents]).cumsum(0).int()
    predicting = torch.arange(0, tokens - 1, every).long()
    arguments = attention_arguments(borders, documents, kernel="cpu")
    decoder, head = model.get_base_model().model, model.get_base_model().lm_head.weight
    seconds = []
    for _ in range(PASSES + 1):  # the first warms up
        started = time.perf_counter()
        with torch.inference_mode(evaluate):
            hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False, **arguments).last_hidden_state[0]
            loss = supervised_nll if evaluate else supervised_nll_sum
            result = loss(hidden[predicting], head, ids[0][predicting + 1], compiled=compiled)
        if isinstance(result, torch.Tensor):
            result.backward()
            model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return {"tokens": tokens, "dtype": str(compute), "first": seconds[0], "seconds": seconds[1:]}


def measured(*arguments: str) -> dict[str, Any]:
    """Run this script in a new process and take its result and its peak memory."""
    with tempfile.NamedTemporaryFile() as result:
        subprocess.run([sys.executable, __file__, *arguments, f"--result={result.name}"], check=True)
        return json.loads(Path(result.name).read_text())  # type: ignore[no-any-return]


def one(name: str, folder: Path | None) -> dict[str, Any]:
    """Measure one thing in this process."""
    if name in LEVERS:
        return passes(TWO, **LEVERS[name])
    if name.isdigit():
        return passes([int(name)] * (TOKENS // int(name)), checkpointing="full")
    assert folder is not None
    if name == "write":
        write_llama_1b(folder / "model")
        return {}
    return llama_1b(folder, name)


def spread(values: list[float]) -> str:
    """Median and extremes."""
    return f"{statistics.median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f}"


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["levers", "lengths", "llama-1b"])
    parser.add_argument("--repeats", type=int, default=2, help="processes a lever, in turns")
    parser.add_argument("--only", nargs="+", metavar="LEVER", help="levers whose names contain one of these texts")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        result = one(options.one, options.folder)
        result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        Path(options.result).write_text(json.dumps(result))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    if options.what == "llama-1b":
        with tempfile.TemporaryDirectory() as folder:
            measured("llama-1b", "--one=write", f"--folder={folder}")
            results = {m: [measured("llama-1b", f"--one={m}", f"--folder={folder}")] for m in ("full", "none")}
        print("| checkpointing | tokens a step | tok/s | peak RSS MiB | losses |\n|---|---:|---:|---:|---|")
        for mode, (r,) in results.items():
            speed = statistics.median(r["tokens_per_second"][1:])
            losses = ", ".join(f"{loss:.3f}" for loss in r["losses"])
            print(f"| {mode} | {r['tokens']:,} | {speed:.0f} | {r['peak_rss_mib']:,.0f} | {losses} |")
    else:
        names = list(LEVERS) if options.what == "levers" else [str(length) for length in LENGTHS]
        if options.only:
            names = [name for name in names if any(text in name for text in options.only)]
        results = {name: [] for name in names}
        for _ in range(options.repeats):
            for name, of_name in results.items():
                of_name.append(measured(options.what, f"--one={name}"))
        print("| | real tok/s, median | lowest to highest | first pass s | peak RSS MiB |\n|---|---:|---:|---:|---:|")
        for name, runs in results.items():
            speeds = [r["tokens"] / seconds for r in runs for seconds in r["seconds"]]
            first, peak = (statistics.median(r[key] for r in runs) for key in ("first", "peak_rss_mib"))
            print(f"| {name} | {spread(speeds)} | {first:.1f} | {peak:,.0f} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
