"""Run directories in every state, written by hand: what `fit`, `test` and another process that trains leave behind."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HEADER = (
    "step,epoch,train_loss,grad_norm,lr,tokens,supervised_tokens,padded_tokens,tokens_per_second,peak_memory_mib,"
    "val_loss,val_loss_hf,val_token_accuracy,val_perplexity"
)
CONFIG: dict[str, Any] = {
    "seed_everything": 3407,
    "trainer": {"max_epochs": 1, "default_root_dir": "somewhere"},
    "model": {"lr": 2e-4, "r": 16, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "data": {"source": "embedded", "rows": None},
    "early_stopping": None,
    "run_dir": "runs/a",
}


def train_row(step: int, loss: float, tokens: int = 100, speed: float = 50.0, memory: float = 7.0) -> str:
    return f"{step},0.5,{loss!r},0.4,0.0001,{tokens},60,{tokens},{speed!r},{memory!r},,,,\n"


def validation_row(step: int, loss: float, hf: float = 9.0) -> str:
    return f"{step},,,,,,,,,,{loss!r},{hf!r},0.5,{math.exp(min(loss, 700))!r}\n"


def write_run(
    path: Path, rows: list[str] | None = None, *, total: int | None = None, environment: Any = None, **settings: Any
) -> Path:
    """A run directory with a config (settings by dotted key, ``__`` for the dot), the rows and ``total`` steps."""
    path.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    for key, value in settings.items():
        *groups, last = key.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if rows is not None:
        (path / "metrics.csv").write_text(HEADER + "\n" + "".join(rows))
    record = {"trainable_parameters": 9_768_960, "total_steps": total, **(environment or {})}
    (path / "environment.json").write_text(json.dumps(record))
    return path


@contextmanager
def locked(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the run, as ``fit`` does."""
    code = (
        "import fcntl, sys\n"
        f"file = open({str(path / '.lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# The lab's own numbers, typed from its README: step, then training and validation loss of each run.
BASELINE = [
    *((250, 0.9648, 0.879919), (500, 0.8951, 0.862609), (750, 0.8895, 0.850912)),
    *((1000, 0.8415, 0.843649), (1250, 0.8395, 0.838236), (1500, 0.8276, 0.835800)),
]
LR1E_4 = [
    *((250, 0.9706, 0.886649), (500, 0.9017, 0.870335), (750, 0.8985, 0.860288)),
    *((1000, 0.8526, 0.854131), (1250, 0.8518, 0.850037), (1500, 0.8362, 0.848186)),
]
LR3E_4 = [
    *((250, 0.9643, 0.878334), (500, 0.8931, 0.860638), (750, 0.8861, 0.847848)),
    *((1000, 0.8371, 0.839488), (1250, 0.8335, 0.832875), (1500, 0.8245, 0.829798)),
]
R32 = [
    *((250, 0.9636, 0.877421), (500, 0.8926, 0.859224), (750, 0.8833, 0.844791)),
    *((1000, 0.8301, 0.834480), (1250, 0.8257, 0.825617), (1500, 0.8177, 0.821687)),
]


def lab_rows(losses: Sequence[tuple[int, float, float]]) -> list[str]:
    """Two optimizer steps before each validation, whose mean is the training loss."""
    rows = []
    for step, train, validation in losses:
        rows += [train_row(step - 1, train - 0.25), train_row(step, train + 0.25), validation_row(step, validation)]
    return rows


def write_lab_run(path: Path, losses: Sequence[tuple[int, float, float]], **settings: Any) -> Path:
    return write_run(path, lab_rows(losses), total=1500, **settings)


def write_test(
    path: Path,
    shift: float = 0.0,
    *,
    conversations: int = 30,
    split: str = "test",
    step: int = 1500,
    base: str = "",
    hf: float = 9.0,
) -> float:
    """An evaluation whose conversations lose ``shift`` more, give or take; return its loss."""
    rng = np.random.default_rng(0)
    losses = rng.gamma(4.0, 0.25, conversations) + shift * (1 + 0.1 * rng.standard_normal(conversations))
    tokens = rng.integers(5, 50, conversations)
    loss = float((losses * tokens).sum() / tokens.sum())
    record = {
        f"{split}_loss": loss,
        f"{split}_loss_hf": hf,
        f"{split}_perplexity": math.exp(loss),
        f"{split}_token_accuracy": 0.75 - shift / 10,
        "conversations": conversations,
        "supervised_tokens": int(tokens.sum()),
        "checkpoint": "base" if base else "runs/a/checkpoints/best.ckpt",
        "step": step,
        "data_fingerprint": "f00d",
    }
    (path / f"{split}{base}.json").write_text(json.dumps(record))
    lines = [f"{row},{loss!r},{count}\n" for row, (loss, count) in enumerate(zip(losses.tolist(), tokens, strict=True))]
    (path / f"{split}{base}_examples.csv").write_text("row,loss,supervised_tokens\n" + "".join(lines))
    return loss
