"""Results of `validate` and `test`: ``<split>.json``, ``<split>_examples.csv``, and a table of all there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
from typing_extensions import override

from lightning_lab import files, rundir
from lightning_lab.data.batching import SPLITS
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.training.callbacks.record import write_losses
from lightning_lab.training.module import QLoRAModule


class Results(pl.Callback):
    """Writes what an evaluation found.

    Args:
        run_dir: Directory to write to; made if it is not there.

    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "validate")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        assert isinstance(module, QLoRAModule)
        found = module.evaluation
        if not trainer.is_global_zero or found is None:
            return
        data = getattr(trainer, "datamodule", None)
        data = data if isinstance(data, ChatDataModule) else None
        split = data.split_for(stage) if data else {"validate": "validation", "test": "test"}[stage]
        checkpoint = rundir.BASE if module.evaluate_base else str(trainer.ckpt_path or "the model as it was passed")
        record = {
            **found.figures(split),
            "conversations": len(found.rows),
            "supervised_tokens": int(found.tokens.sum()),
            "dropped_conversations": len(data.splits[split].dropped) if data else 0,
            "checkpoint": checkpoint,
            "step": 0 if module.evaluate_base else module.completed_steps,
            "data_fingerprint": data.tokenized.fingerprint if data else None,
        }
        if data and (left_out := len(data.splits[split].rows) - len(found.rows)):
            record["left_out_by_a_limit"] = left_out
        name = f"{split}-base" if module.evaluate_base else split
        files.make_directory(self.run_dir)
        files.write_whole(self.run_dir / f"{name}.json", json.dumps(record, indent=2) + "\n")
        examples = zip(found.rows.tolist(), found.nll.tolist(), found.tokens.tolist(), strict=True)
        lines = [f"{row},{nll / tokens!r},{tokens}\r\n" for row, nll, tokens in examples]
        files.write_whole(self.run_dir / f"{name}_examples.csv", "".join(["row,loss,supervised_tokens\r\n", *lines]))
        if name == "validation-base" and (self.run_dir / rundir.METRICS).exists():
            write_losses(self.run_dir)  # the base becomes its first row
        print(results_table(self.run_dir))
        print(f"written: {self.run_dir / name}.json, {name}_examples.csv", file=sys.stderr)


def results_table(run_dir: Path) -> str:
    """All evaluations that a run directory holds, as one table: the base beside the checkpoint, split by split."""
    lines = [
        "| split | model | loss | perplexity | token accuracy | conversations | tokens |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for split in SPLITS:
        for path in (run_dir / f"{split}-base.json", run_dir / f"{split}.json"):
            record = files.read_json(path)
            try:
                used = record["checkpoint"]
                model = used if used == rundir.BASE else f"{Path(used).stem}, step {record['step']}"
                lines.append(
                    f"| {split} | {model} | {record[f'{split}_loss']:.4f} | {record[f'{split}_perplexity']:.2f} | "
                    f"{record[f'{split}_token_accuracy']:.4f} | {record['conversations']:,} | "
                    f"{record['supervised_tokens']:,} |"
                )
            except (KeyError, TypeError, ValueError):  # not there, or damaged: the next evaluation writes it anew
                continue
    return "\n".join(lines)
