"""Whole runs whose numbers are kept: a change that is not meant to change results must reproduce them.

On the machine that wrote `golden.json` (same processor, same torch) every number and every bit of the adapters is
compared, elsewhere the numbers within 1e-4: kernels differ between processors. After a change of results that is meant,
write it anew with ``OMP_NUM_THREADS=1 python -m pytest tests/acceptance/test_golden.py --golden``, and say why.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.acceptance.conftest import adapter, arguments, lab, metrics, start

GOLDEN = Path(__file__).parent / "golden.json"
RUNS = {
    "plain": ("--trainer.max_epochs=1", "--model.optimizer=adamw"),
    "two epochs, dropout, 8-bit state": (
        *("--trainer.max_epochs=2", "--model.dropout=0.1", "--model.optimizer=adamw_8bit", "--val_every_steps=6"),
        *("--data.truncation=turns", "--data.max_length=128", "--data.on_bad_row=drop", "--data.split_seed=5"),
    ),
    "16 bits, full checkpointing": ("--trainer.max_steps=7", "--model.bits=16", "--model.checkpointing=full"),
}


def machine() -> str:
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = processor.group(1) if processor else "unknown"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def run(folder: Path, *args: str) -> None:
    if torch.get_num_threads() == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return lab(*args)
    process = start(*args, cwd=folder, threads=1)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error


def results(folder: Path, args: list[str], options: tuple[str, ...]) -> dict[str, Any]:
    """What a run, its test and the base's validation leave."""
    run(folder, "fit", *args, *options, "--run_dir=run")
    run(folder, "validate", "--run_dir=run", "--ckpt_path=base")
    run(folder, "test", "--run_dir=run", "--ckpt_path=best")
    made = folder / "run"
    return {
        "metrics": [{k: v for k, v in row.items() if v} for row in metrics(made)],
        "losses": [line for line in (made / "losses.md").read_text().splitlines() if line.startswith("|")],
        "samples": hashlib.sha256((made / "samples.md").read_bytes()).hexdigest(),
        "adapters": {name: digest(adapter(made, name)) for name in ("last", "best")},
        "test": {k: v for k, v in json.loads((made / "test.json").read_text()).items() if isinstance(v, int | float)},
        "examples": (made / "test_examples.csv").read_text().splitlines(),
    }


def digest(state: dict[str, torch.Tensor]) -> str:
    """Of names, shapes and bits."""
    content = hashlib.sha256()
    for name in sorted(state):
        content.update(f"{name} {tuple(state[name].shape)}".encode() + state[name].numpy().tobytes())
    return content.hexdigest()


def numbers(value: Any) -> list[float]:
    """All numbers, in order, also those within text; hashes have none."""
    if isinstance(value, dict):
        return [n for key in sorted(value) if key not in ("adapters", "samples") for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", str(value))]


@pytest.mark.parametrize("name", [*list(RUNS)[:2], pytest.param(list(RUNS)[2], marks=pytest.mark.slow)])
def test_golden_runs(name: str, tiny_args: list[str], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    found = results(tmp_path, tiny_args, RUNS[name])
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if pytestconfig.getoption("--golden"):
        if kept.get("machine") != machine():
            kept = {"machine": machine(), "runs": {}}
        kept["runs"][name] = found
        GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")
        return
    expected = kept["runs"][name]
    if kept["machine"] == machine():
        assert found == expected
    ours, theirs = numbers(found), numbers(expected)
    assert len(ours) == len(theirs)
    assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_golden_smollm2(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Six steps of the real model in 4 bits and the processor's own dtype."""
    args = arguments(
        **{
            "config": "lr3e-4_r32.yaml",
            "data.split": "[48,16,16]",
            "data.max_length": 256,
            "trainer.max_steps": 6,
            "val_every_steps": 3,
            "trainer.logger": "false",
        }
    )
    args.insert(1, "--config=embedded.yaml")
    found = results(tmp_path, args, ())
    kept = json.loads(GOLDEN.read_text())
    if pytestconfig.getoption("--golden"):
        kept["runs"]["smollm2"] = found
        GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")
    elif kept["machine"] == machine():
        assert found == kept["runs"]["smollm2"]
    else:
        pytest.skip("its numbers are of another processor")
