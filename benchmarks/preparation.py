"""Data preparation of lightning_lab beside TRL's: the same conversations, from one JSON Lines file to masked token ids.

    python benchmarks/preparation.py --python trl=TRL_ENV/bin/python
    python benchmarks/preparation.py --rows 10000 100000 --backends lightning_lab lightning_lab-cached --repeats 1

Each backend runs in processes of its own, in its own environment, in turns. The time is that of the preparation alone,
once tokenizer and source are open: TRL's map steps without a cache, lightning_lab's tokenize_rows into an empty cache.
`lightning_lab-cached` is the whole of ChatDataModule.prepare in a new process, from what the run before it wrote.
More rows than chitchat has are its conversations over again, each time under another first line. Raw results and the
memory over time go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning_lab.data.sources import load_rows
from lightning_lab.hub import locate

HERE = Path(__file__).parent
# Backend -> worker, environment it runs in, and its processes (None: the tool's default).
BACKENDS: dict[str, tuple[str, str, int | None]] = {
    "trl": ("trl_preparation.py", "trl", None),
    "trl-2-processes": ("trl_preparation.py", "trl", 2),
    "lightning_lab": ("lab_preparation.py", "lightning_lab", None),
    "lightning_lab-cached": ("lab_preparation.py", "lightning_lab", None),
}
SAMPLE_SECONDS = 0.1  # between two looks at the memory


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a backend")
    parser.add_argument("--base", default="embedded", help="whose tokenizer and chat template; TRL needs SmolLM2's")
    parser.add_argument("--rows", type=int, nargs="+", default=[4017], help="conversations; several sizes in turn")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "preparation")
    return parser.parse_args()


def write_rows(path: Path, rows: int) -> None:
    """Write so many conversations, no two with the same beginning once chitchat's own are used up."""
    conversations = load_rows("chitchat")
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            first, *others = conversations[number % len(conversations)]["messages"]
            again = number // len(conversations)
            if again:
                first = {**first, "content": f"Conversation {number}, take {again}.\n{first['content']}"}
                others = [{**turn, "content": f"{number}: {turn['content']}"} for turn in others]
            file.write(json.dumps({"messages": [first, *others]}, ensure_ascii=False) + "\n")


def run(name: str, label: str, spec: dict[str, Any], python: dict[str, str], options: argparse.Namespace) -> Any:
    """Run one worker; return its report, or the reason why there is none."""
    worker, environment, processes = BACKENDS[name]
    if environment not in python:
        return f"no environment given: --python {environment}=PATH"
    folder = (options.out / "work" / f"{name}-{label}").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(
        json.dumps({**spec, "folder": str(folder), "processes": processes, "cached": name.endswith("-cached")})
    )
    cache = (options.out / "work" / "cache").resolve()
    if name == "lightning_lab":
        shutil.rmtree(cache, ignore_errors=True)
    result = folder / "result.json"
    variables = {**os.environ, "LIGHTNING_LAB_CACHE": str(cache)}
    variables.pop("PYTHONPATH", None)
    if environment == "lightning_lab":
        variables["PYTHONPATH"] = str(HERE.parent)
    command = [python[environment], str(HERE / "workers" / worker), str(folder / "spec.json"), str(result)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)
        memory = watch(process, options.timeout)
    print(f"{name}, {label}: status {process.returncode}", file=sys.stderr)
    if process.returncode or not result.exists():
        lines = (folder / "log.txt").read_text().strip().splitlines()
        return f"failed: {lines[-1][:200] if lines else process.returncode}"
    report = {**json.loads(result.read_text()), "memory": memory}
    if environment == "trl":
        shutil.rmtree(folder / "source", ignore_errors=True)
    return report


def watch(process: subprocess.Popen[bytes], timeout: float) -> list[tuple[float, float, float]]:
    """Wait for a process; return (seconds, MiB, MiB of them not backed by files) of it and its children over time.

    Pages that several processes share are counted once.
    """
    started = time.perf_counter()
    samples = []
    while process.poll() is None:
        seconds = time.perf_counter() - started
        if seconds > timeout:
            process.kill()
        total, anonymous = map(sum, zip(*(memory_of(pid) for pid in family(process.pid)), strict=True))
        samples.append((round(seconds, 2), round(total / 1024, 1), round(anonymous / 1024, 1)))
        time.sleep(SAMPLE_SECONDS)
    return samples


def family(pid: int) -> list[int]:
    """Return a process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(below for child in children for below in family(int(child)))]


def memory_of(pid: int) -> tuple[int, int]:
    """Return proportional set size and its anonymous part, in KiB; zeros where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return values.get("Pss", 0), values.get("Pss_Anon", 0)


def report(results: dict[tuple[int, str], Any], options: argparse.Namespace) -> str:
    """The table, each repeat's seconds, and what it was measured with."""
    lines = [
        "| rows | backend | seconds | conversations/s | tokens/s | peak MiB | of it anonymous | times as fast as TRL |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    each = []
    for (rows, name), repeats in results.items():
        if isinstance(repeats, str):
            lines.append(f"| {rows:,} | {name} | {repeats} | | | | | |")
            continue
        seconds = statistics.median(r["seconds"] for r in repeats)
        kept, tokens = repeats[0]["kept"], repeats[0]["tokens"]
        total, anonymous = (max(sample[i] for r in repeats for sample in r["memory"]) for i in (1, 2))
        trl = results.get((rows, "trl"))
        ratio = statistics.median(r["seconds"] for r in trl) / seconds if isinstance(trl, list) else None
        lines.append(
            f"| {rows:,} | {name} | {seconds:.2f} | {kept / seconds:,.0f} | {tokens / seconds:,.0f} | {total:,.0f} | "
            f"{anonymous:,.0f} | {'' if ratio is None else f'{ratio:.2f}'} |"
        )
        every = ", ".join(f"{r['seconds']:.2f}" for r in repeats)
        whole = (
            f" ({statistics.median(r['whole_seconds'] for r in repeats):.2f} with opening)"
            if name == "lightning_lab"
            else ""
        )
        each.append(f"* {rows:,} rows, {name}: {every} s{whole}; {kept:,} conversations, {tokens:,} tokens kept")
    versions = {
        name: version for r in results.values() if isinstance(r, list) for name, version in r[0]["versions"].items()
    }
    lines += [
        "",
        "Seconds: median of the repeats. Memory: the most of any repeat, of the process and its children.",
        "",
    ]
    lines += each
    lines += [
        "",
        f"Device: {platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores. Versions: "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "",
        "Command: `python benchmarks/preparation.py "
        + " ".join(_without_path(argument) for argument in sys.argv[1:])
        + "`",
    ]
    return "\n".join(lines) + "\n"


def _without_path(argument: str) -> str:
    name, separator, path = argument.rpartition("=")
    return f"{name}{separator}PATH" if "/" in path else argument


def main() -> None:
    """Run every backend in turns and write the report."""
    options = arguments()
    python = {"lightning_lab": sys.executable} | dict(item.split("=", 1) for item in options.python)
    (options.out / "work").mkdir(parents=True, exist_ok=True)
    base = locate(options.base)
    results: dict[tuple[int, str], Any] = {}
    for rows in options.rows:
        source = (options.out / "work" / f"{rows}.jsonl").resolve()
        write_rows(source, rows)
        spec = {"source": str(source), "base": base, "max_length": options.max_length}
        for repeat in range(options.repeats):
            for name in options.backends:
                known = results.setdefault((rows, name), [])
                outcome = known if isinstance(known, str) else run(name, f"{rows}-{repeat}", spec, python, options)
                if isinstance(outcome, str):
                    results[rows, name] = outcome
                else:
                    known.append(outcome)
        source.unlink()
    text = report(results, options)
    (options.out / "report.md").write_text(text)
    record = [{"rows": rows, "backend": name, "repeats": repeats} for (rows, name), repeats in results.items()]
    (options.out / "results.json").write_text(json.dumps(record) + "\n")
    shutil.rmtree(options.out / "work")
    print(text)


if __name__ == "__main__":
    main()
