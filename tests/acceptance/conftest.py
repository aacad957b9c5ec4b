"""A tiny Llama and short real conversations: the whole program in seconds, through its command line."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lab.__main__ import main
from lightning_lab.models.base import locate

ROOT = Path(__file__).parents[2]
# Columns of metrics.csv that a clock or the operating system decides.
UNREPEATABLE = ("tokens_per_second", "peak_memory_mib")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers under SmolLM2's tokenizer; r 32 gives adapters of 4,096 values, enough for 8-bit state."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = AutoTokenizer.from_pretrained(locate("embedded"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def short_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 real questions with answers cut to between 1 and 40 words: supervised counts differ a lot within a step."""
    from lightning_lab.data.conversation import parse_conversation
    from lightning_lab.data.sources import load_rows

    rows = load_rows("embedded", 80)
    lines = []
    for i in range(80):
        question, answer = parse_conversation(rows.rows[i]).messages[-2:]
        words = answer.content.split()[: 1 + (i * 7) % 40]
        lines.append(
            {
                "conversations": [
                    {"from": "human", "value": question.content},
                    {"from": "gpt", "value": " ".join(words)},
                ]
            }
        )
    path = tmp_path_factory.mktemp("chats") / "short.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def tiny_args(tiny_base: Path, short_chats: Path) -> list[str]:
    """Arguments of a run on the tiny base: float32, 50 training rows in steps of 4 (the last of an epoch has 2)."""
    return arguments(
        **{
            "config": "embedded.yaml",
            "model.base": tiny_base,
            "model.compute_dtype": "float32",
            "model.r": 32,
            "model.lr": 3e-3,
            "data.source": short_chats,
            "data.split": "[50,17,13]",
            "data.batch_size": 4,
            "data.micro_batch_tokens": 256,
            "val_every_steps": 5,
            "samples": 1,
            "sample_tokens": 4,
            "trainer.logger": "false",
        }
    )


def arguments(**options: Any) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def lab(*args: str) -> None:
    """Run a command in this process and expect it to succeed."""
    assert main(list(args)) == 0


def start(*args: str, cwd: Path, stderr: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Start a command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_lab", *args], cwd=cwd, env=environment, text=True, stderr=stderr
    )


def metrics(run: Path, drop: tuple[str, ...] = UNREPEATABLE) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(file)]


def train_column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(run, ()) if row["train_loss"]]


def validations(run: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["val_loss"]) for row in metrics(run) if row["val_loss"]}


def adapter(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def close(a: list[float], b: list[float], tolerance: float) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=0, abs_tol=tolerance) for x, y in zip(a, b, strict=True))
