"""``samples.md``: the same few validation prompts answered before training and at each validation."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl
from typing_extensions import override

from lightning_lab.data.batching import PromptBatch
from lightning_lab.files import set_aside, write_whole, writing
from lightning_lab.rundir import SAMPLES
from lightning_lab.training.module import QLoRAModule


class Samples(pl.Callback):
    """Answers a few fixed prompts greedily, so that no random number is drawn.

    Args:
        run_dir: The run's directory.
        count: How many of the first validation conversations to answer; 0 for none.
        max_new_tokens: Longest answer.

    """

    def __init__(self, run_dir: Path, count: int, max_new_tokens: int) -> None:
        self.path = run_dir / SAMPLES
        self.count = count
        self.max_new_tokens = max_new_tokens
        self._prompts: PromptBatch | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        """On resume forget the answers after the checkpoint."""
        self._prompts, data = None, pl_module.chat_data
        if not trainer.is_global_zero or not self.count or not data:
            return
        if prompts := data.first_prompts("validation", self.count):
            self._prompts = data.prompt_batch(prompts)
        if not self.path.exists():
            return
        try:
            text = self.path.read_bytes().decode()
        except UnicodeDecodeError:
            set_aside(self.path, "is not UTF-8 text")
            return
        done = pl_module.completed_steps - pl_module.validation_pending
        for heading in re.finditer(r"(?m)^# (?:Step (\d+)|Before training)$", text):
            if not pl_module.completed_steps or int(heading[1] or 0) > done:
                text = text[: heading.start()]
                break
        write_whole(self.path, text)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        if pl_module.completed_steps == 0:
            self._write(pl_module, "Before training")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: QLoRAModule) -> None:  # type: ignore[override]
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(pl_module, f"Step {pl_module.completed_steps}")

    def _write(self, module: QLoRAModule, heading: str) -> None:
        if self._prompts is None:
            return
        answers = module.answer(self._prompts, self.max_new_tokens)
        lines = [f"# {heading}", ""]
        for prompt, answer in zip(self._prompts.prompts, answers, strict=True):
            last = prompt.conversation.messages[-1]
            lines += [f"**Row {prompt.row}, {last.role}:** {_quote(last.content)}", ""]
            lines += [f"**Answer:** {_quote(answer)}", "", f"**Reference:** {_quote(prompt.reference or '')}", ""]
        with writing(self.path), self.path.open("a") as file:
            file.write("\n".join(lines) + "\n")


def _quote(text: str) -> str:
    """Indent further lines, so that a heading inside an answer does not become a section of the file."""
    return text.strip().replace("\n", "\n    ")
