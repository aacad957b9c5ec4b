"""Answers of ``predict``, written as they come."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class PredictionWriter(pl.Callback):
    """Writes one JSON object a conversation: ``row``, ``messages`` (the prompt), ``answer``, ``reference``.

    Args:
        path: The JSONL file; replaced.

    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an empty file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Append the batch's answers."""
        with self.path.open("a") as file:
            for prompt, answer in outputs:
                record = {
                    "row": prompt.row,
                    "messages": [{"role": m.role, "content": m.content} for m in prompt.prompt.messages],
                    "answer": answer,
                    "reference": prompt.reference,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the answers are."""
        print(f"written: {self.path}", file=sys.stderr)
