"""``samples.md``: the same few validation prompts answered before training and at each validation."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl

from lightning_lab.data.conversation import Conversation, parse_conversation
from lightning_lab.data.datamodule import ChatDataModule, Prompt
from lightning_lab.models.generation import generate
from lightning_lab.training.callbacks.record import write_text
from lightning_lab.training.module import QLoRAModule


class Samples(pl.Callback):
    """Answers a few fixed prompts greedily, so that no random number is drawn.

    Args:
        path: ``samples.md`` of the run directory.
        count: How many of the first validation conversations to answer; 0 for none.
        max_new_tokens: Longest answer.

    """

    def __init__(self, path: Path, count: int, max_new_tokens: int) -> None:
        self.path = path
        self.count = count
        self.max_new_tokens = max_new_tokens
        self._prompts: list[Prompt] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume forget the answers after the checkpoint."""
        assert isinstance(pl_module, QLoRAModule)
        if trainer.is_global_zero and self.path.exists():
            sections = re.split(r"(?m)^(?=# (?:Step \d+|Before training)$)", self.path.read_text())
            kept = [s for s in sections if pl_module.completed_steps and _step(s) <= pl_module.completed_steps]
            write_text(self.path, "".join(kept))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer before step 1."""
        assert isinstance(pl_module, QLoRAModule)
        if pl_module.completed_steps == 0:
            self._write(trainer, pl_module, "Before training")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer after a validation."""
        assert isinstance(pl_module, QLoRAModule)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module, f"Step {pl_module.completed_steps}")

    def _write(self, trainer: pl.Trainer, module: QLoRAModule, heading: str) -> None:
        if not self.count or not trainer.is_global_zero:
            return
        data = module.chat_data
        if self._prompts is None:
            self._prompts = _first_prompts(data, self.count)
        if not self._prompts:
            return
        answers = generate(
            module.peft_model,
            data.renderer,
            data.tokenizer,
            [prompt.prompt for prompt in self._prompts],
            max_new_tokens=self.max_new_tokens,
        )
        lines = [f"# {heading}", ""]
        for prompt, answer in zip(self._prompts, answers, strict=True):
            lines += [f"**Row {prompt.row}, {prompt.prompt.messages[-1].role}:** {_quote(_last(prompt.prompt))}", ""]
            lines += [f"**Answer:** {_quote(answer)}", "", f"**Reference:** {_quote(prompt.reference or '')}", ""]
        with self.path.open("a") as file:
            file.write("\n".join(lines) + "\n")


def _first_prompts(data: ChatDataModule, count: int) -> list[Prompt]:
    prompts: list[Prompt] = []
    for row in data.splits["validation"].rows:
        if len(prompts) == count:
            break
        prompt = Prompt.of(int(row), parse_conversation(data.rows.rows[int(row)]))
        if prompt is not None:
            prompts.append(prompt)
    return prompts


def _step(section: str) -> int:
    match = re.match(r"# Step (\d+)", section)
    return int(match.group(1)) if match else 0


def _last(prompt: Conversation) -> str:
    return prompt.messages[-1].content


def _quote(text: str) -> str:
    """Indent further lines, so that a heading inside an answer does not become a section of the file."""
    return text.strip().replace("\n", "\n    ")
