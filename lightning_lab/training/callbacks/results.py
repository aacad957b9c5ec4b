"""Results of `validate` and `test`: ``<split>.json``, losses by conversation and token, and a table of all there are.

Those of other conversations than the run's own, whatever file they are in, are ``<split>@<source>.json`` and so on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from typing_extensions import override

from lightning_lab import files, rundir
from lightning_lab.data.batching import SPLITS
from lightning_lab.tables import NONE, Table, numbers
from lightning_lab.training.callbacks.diary import write_diary
from lightning_lab.training.callbacks.names import result_name, standing_to_run
from lightning_lab.training.callbacks.record import write_losses
from lightning_lab.training.module import QLoRAModule

SETTINGS = ("max_length", "template", "mask", "truncation", rundir.WEIGHTED)  # which a loss depends on


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
        stands = standing_to_run(self.run_dir, pl_module, split)
        record: dict[str, Any] = {
            **found.figures(split),
            "conversations": len(found.rows),
            "supervised_tokens": int(found.tokens.sum()),
            "dropped_conversations": len(data.splits[split].dropped) if data else 0,
            "checkpoint": checkpoint,
            "step": 0 if pl_module.evaluate_base else pl_module.completed_steps,
            "data_fingerprint": data.tokenized.fingerprint if data else None,
            "split": split,
        }
        if data:
            contents = np.sort(data.tokenized.contents[data.splits[split].rows])
            record["contents"] = hashlib.sha256(contents.tobytes()).hexdigest()[:16]
            record["source"] = data.hparams.get(f"{split}_source") or data.source
            settings = {**data.hparams, rundir.WEIGHTED: pl_module.settings.weighted_eval}
            record["settings"] = {key: settings[key] for key in SETTINGS}
        if found.trained:
            record["trained"] = {"conversations": len(found.trained.rows), "loss": found.trained.loss}
        for kind in rundir.LEAKED:
            if rows := getattr(stands, kind, None):
                others, those = found.apart(rows)
                loss = others.loss if len(others.rows) else None
                record |= {kind: len(those.rows), f"{split}_loss_without_{kind}": loss}
        evaluated = len(found.rows) + (len(found.trained.rows) if found.trained else 0)
        if data and (left_out := len(data.splits[split].rows) - evaluated):
            record["left_out_by_a_limit"] = left_out
        name = f"{split}-base" if pl_module.evaluate_base else split
        is_own = stands.is_own if stands else None
        name = result_name(name, record.get("source"), is_own, lambda free: self._is_free(free, record))
        files.make_directory(self.run_dir)
        files.write_whole(self.run_dir / f"{name}.json", json.dumps(record, indent=2) + "\n")
        columns = {"row": found.rows, "loss": found.nll / found.weight, "supervised_tokens": found.tokens}
        if pl_module.settings.weighted_eval:
            columns["weight"] = found.weight
        lines = [",".join(map(repr, line)) for line in zip(*(c.tolist() for c in columns.values()), strict=True)]
        written = [f"{name}.json", f"{name}{rundir.EXAMPLES}"]
        files.write_whole(self.run_dir / written[1], "\r\n".join([",".join(columns), *lines, ""]))
        if data and write_diary(self.run_dir, name, record, found, data):
            written.append(f"{name}{rundir.TOKENS}")
        if name == "validation-base" and (self.run_dir / rundir.METRICS).exists():
            write_losses(self.run_dir, self.window)  # the base becomes its first row
        print(results_table(self.run_dir).markdown())
        print(f"written: {self.run_dir}/{', '.join(written)}", file=sys.stderr)

    def _is_free(self, name: str, record: Mapping[str, Any]) -> bool:
        there = files.read_json(self.run_dir / f"{name}.json")
        key = "contents" if "contents" in there else "data_fingerprint"  # results of 0.1 have the latter alone
        return not there or there.get(key) == record.get(key)

    on_test_end = on_validation_end  # type: ignore[assignment]


def results_table(run_dir: Path) -> Table:
    """All evaluations that a run directory holds, as one table: the base beside the checkpoint, split by split."""
    rows: list[tuple[str, ...]] = []
    for split in SPLITS:
        others = sorted((*run_dir.glob(f"{split}@*.json"), *run_dir.glob(f"{split}-base@*.json")))
        for path in (run_dir / f"{split}-base.json", run_dir / f"{split}.json", *others):
            record, name = files.read_json(path), split + path.stem[len(path.stem.partition("@")[0]) :]
            try:
                used = record["checkpoint"]
                model = used if used == rundir.BASE else f"{Path(used).stem}, step {record['step']}"
                model += ", weighted" * rundir.is_weighted(record)
                figures = (
                    f"{record[f'{split}_loss']:.4f}",
                    f"{record[f'{split}_perplexity']:.2f}",
                    f"{record[f'{split}_token_accuracy']:.4f}",
                    f"{record['conversations']:,}",
                    f"{record['supervised_tokens']:,}",
                )
                beside = []
                if trained := record.get("trained"):
                    beside.append(("trained on", trained["loss"], trained["conversations"]))
                for kind in rundir.LEAKED:
                    if some := record.get(kind):
                        what, left = f"without {kind.replace('_', '-')}", record["conversations"] - some
                        beside.append((what, record[f"{split}_loss_without_{kind}"], left))
                more = [
                    (f"{name}, {what}", model, *numbers([loss], ".4f"), NONE, NONE, f"{count:,}", NONE)
                    for what, loss, count in beside
                ]
            except (KeyError, TypeError, ValueError):  # not there, or damaged: the next evaluation writes it anew
                continue
            rows += [(name, model, *figures), *more]
    columns = ("split", "model", "loss", "perplexity", "token accuracy", "conversations", "tokens")
    return Table(columns, rows, text=("split", "model"))
