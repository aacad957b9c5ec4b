"""Results of `validate` and `test`: ``<split>.json``, ``<split>_examples.csv``, and a table of all there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
from typing_extensions import override

from lightning_lab import files, rundir
from lightning_lab.data.batching import SPLITS
from lightning_lab.tables import Table
from lightning_lab.training.callbacks.record import write_losses
from lightning_lab.training.module import QLoRAModule


class Results(pl.Callback):
    """Writes what an evaluation found.

    Args:
        run_dir: Directory to write to; made if it is not there.
        window: As of `RunRecord`, to whose table the base's row is added.

    """

    def __init__(self, run_dir: Path, window: int | None) -> None:
        self.run_dir, self.window = run_dir, window

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        assert trainer.state.fn
        stage = trainer.state.fn.value
        if stage not in ("validate", "test") or not trainer.is_global_zero:
            return
        found, data = pl_module.evaluation, pl_module.chat_data
        assert found
        split = data.split_for(stage) if data else {"validate": "validation"}.get(stage, stage)
        checkpoint = rundir.BASE if pl_module.evaluate_base else str(trainer.ckpt_path or "the model as it was passed")
        record = {
            **found.figures(split),
            "conversations": len(found.rows),
            "supervised_tokens": int(found.tokens.sum()),
            "dropped_conversations": len(data.splits[split].dropped) if data else 0,
            "checkpoint": checkpoint,
            "step": 0 if pl_module.evaluate_base else pl_module.completed_steps,
            "data_fingerprint": data.tokenized.fingerprint if data else None,
        }
        if data and (left_out := len(data.splits[split].rows) - len(found.rows)):
            record["left_out_by_a_limit"] = left_out
        name = f"{split}-base" if pl_module.evaluate_base else split
        files.make_directory(self.run_dir)
        files.write_whole(self.run_dir / f"{name}.json", json.dumps(record, indent=2) + "\n")
        examples = zip(found.rows.tolist(), found.nll.tolist(), found.tokens.tolist(), strict=True)
        lines = [f"{row},{nll / tokens!r},{tokens}\r\n" for row, nll, tokens in examples]
        files.write_whole(self.run_dir / f"{name}_examples.csv", "".join(["row,loss,supervised_tokens\r\n", *lines]))
        if name == "validation-base" and (self.run_dir / rundir.METRICS).exists():
            write_losses(self.run_dir, self.window)  # the base becomes its first row
        print(results_table(self.run_dir).markdown())
        print(f"written: {self.run_dir / name}.json, {name}_examples.csv", file=sys.stderr)

    on_test_end = on_validation_end  # type: ignore[assignment]


def results_table(run_dir: Path) -> Table:
    """All evaluations that a run directory holds, as one table: the base beside the checkpoint, split by split."""
    rows = []
    for split in SPLITS:
        for path in (run_dir / f"{split}-base.json", run_dir / f"{split}.json"):
            record = files.read_json(path)
            try:
                used = record["checkpoint"]
                model = used if used == rundir.BASE else f"{Path(used).stem}, step {record['step']}"
                figures = (
                    f"{record[f'{split}_loss']:.4f}",
                    f"{record[f'{split}_perplexity']:.2f}",
                    f"{record[f'{split}_token_accuracy']:.4f}",
                    f"{record['conversations']:,}",
                    f"{record['supervised_tokens']:,}",
                )
            except (KeyError, TypeError, ValueError):  # not there, or damaged: the next evaluation writes it anew
                continue
            rows.append((split, model, *figures))
    columns = ("split", "model", "loss", "perplexity", "token accuracy", "conversations", "tokens")
    return Table(columns, rows, text=("split", "model"))
