"""Answers of ``predict``, written as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_lab.data.conversation import Prompt
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.files import make_directory, write_whole, writing
from lightning_lab.training.callbacks.names import result_name, standing_to_run
from lightning_lab.training.module import QLoRAModule


class PredictionWriter(pl.Callback):
    """Writes one JSON object a conversation: ``row``, ``messages`` (the prompt), ``answer``, ``reference``.

    One that was trained on also has ``trained``, which is true.

    Args:
        run_dir: The run's directory.
        path: The JSONL file; replaced. None for one in the directory, named after what is answered, that does not
            replace answers to other prompts.

    """

    def __init__(self, run_dir: Path, path: Path | None) -> None:
        self.run_dir, self.given = run_dir, path
        self.path = path or run_dir / "predictions.jsonl"  # of loaders of another kind

    @override
    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        loader: Any = trainer.predict_dataloaders
        if pl_module.chat_data and not self.given:
            self.path = self.run_dir / f"{self._name(pl_module, pl_module.chat_data, loader.dataset)}.jsonl"
        make_directory(self.path.parent)
        write_whole(self.path, "")

    def _name(self, module: QLoRAModule, data: ChatDataModule, prompts: Sequence[Prompt]) -> str:
        asked = [_question(prompt) for prompt in prompts]

        def is_free(name: str) -> bool:
            """Whether a file is missing or answers these prompts, or the first of them where it ended early."""
            try:
                lines = (self.run_dir / f"{name}.jsonl").read_bytes().splitlines()
                there = [{key: json.loads(line)[key] for key in ("row", "messages")} for line in lines]
            except FileNotFoundError:
                return True
            except (OSError, ValueError, LookupError, TypeError):
                return False
            return there == asked[: len(there)]

        base = "-base" * module.evaluate_base
        if data.predict_source:
            return result_name(f"predictions{base}", data.predict_source, False, is_free)
        split = data.split_for("predict")
        stands = standing_to_run(self.run_dir, module, split)
        source = data.hparams.get(f"{split}_source") or data.source
        return result_name(f"predictions-{split}{base}", source, stands.is_own if stands else None, is_free)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: QLoRAModule, outputs: Any, *args: Any) -> None:  # type: ignore[override]
        with writing(self.path), self.path.open("a") as file:
            for prompt, answer in outputs:
                record = {**_question(prompt), "answer": answer, "reference": prompt.reference}
                if prompt.row in pl_module.trained_rows:
                    record["trained"] = True
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        if trained := len(pl_module.trained_rows):
            print(f"warning: {trained:,} conversations to answer were trained on; their lines say so", file=sys.stderr)
        print(f"written: {self.path}", file=sys.stderr)


def _question(prompt: Prompt) -> dict[str, Any]:
    return {"row": prompt.row, "messages": [message.as_turn() for message in prompt.conversation.messages]}
