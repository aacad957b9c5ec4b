"""Answers of ``predict``, written as they come."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_lab.files import make_directory, write_whole, writing
from lightning_lab.training.module import QLoRAModule


class PredictionWriter(pl.Callback):
    """Writes one JSON object a conversation: ``row``, ``messages`` (the prompt), ``answer``, ``reference``.

    One that was trained on also has ``trained``, which is true.

    Args:
        path: The JSONL file; replaced.

    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        make_directory(self.path.parent)
        write_whole(self.path, "")

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: QLoRAModule, outputs: Any, *args: Any) -> None:  # type: ignore[override]
        with writing(self.path), self.path.open("a") as file:
            for prompt, answer in outputs:
                record = {
                    "row": prompt.row,
                    "messages": [message.as_turn() for message in prompt.conversation.messages],
                    "answer": answer,
                    "reference": prompt.reference,
                }
                if prompt.row in pl_module.trained_rows:
                    record["trained"] = True
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print(f"written: {self.path}", file=sys.stderr)
