"""ChatDataModule: chat rows in, one packed batch per optimizer step out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_lab.cache import cache_dir
from lightning_lab.data.batching import MicroBatch, StepBatch, collate, epoch_order, pack, share
from lightning_lab.data.conversation import Conversation, parse_conversation, parse_prompt
from lightning_lab.data.rendering import Renderer
from lightning_lab.data.sources import Rows, load_rows
from lightning_lab.data.tokenized import TokenizedRows, tokenize_rows
from lightning_lab.errors import LabError

SPLITS = ("train", "validation", "test")
SplitName = Literal["train", "validation", "test"]
PREDICT_BATCH_SIZE = 8


class ChatDataModule(pl.LightningDataModule):
    """Chat data for completion-only fine-tuning, split, tokenised once and packed.

    Args:
        source: Hub id (``owner/name``), a ``.json``, ``.jsonl`` or ``.parquet`` file, or a sample that needs no
            network: ``embedded`` (503 short questions and answers) or ``chitchat`` (4,017 long conversations).
        rows: Use the first this many rows; null for all.
        split: Sizes of train, validation and test, as counts or as fractions of the rows.
        split_seed: Seed of the split. Not the run's seed, so that runs with different seeds share their splits.
        eval_split: The split that `validate`, `test` and `predict` read; null for validation, test and test.
        tokenizer: Where the tokenizer comes from: Hub id, folder, GGUF file or ``embedded``. Set from ``model.base``.
        template: ``llama-3.1`` (packaged, dates pinned), ``tokenizer`` (the tokenizer's own) or a ``.jinja`` file.
        mask: ``assistant`` trains each answer and its end-of-turn token; ``unsloth-2024`` also the newline token after
            the assistant header, as Unsloth did in late 2024.
        control_tokens: ``text`` encodes control tokens quoted inside a message as plain text; ``control`` parses them.
        max_length: Most tokens of a conversation.
        truncation: What happens to longer ones: ``tokens`` cuts, ``turns`` keeps the complete turns that fit, ``drop``
            drops the row, ``error`` stops.
        on_bad_row: ``error`` stops at the first malformed row or row with nothing to learn; ``drop`` drops and counts.
        batch_size: Conversations per optimizer step, over all devices.
        micro_batch_tokens: Most tokens that are worked on at once. Decides memory and speed, never the result. ``auto``
            (on the command line): as many as fit.
        eval_micro_batch_tokens: The same in evaluation; null for ``micro_batch_tokens``.
        predict_source: Another file or Hub id for `predict` to answer, in place of a split. Its rows need no answers:
            conversations that end with a user turn, or ``{"prompt": "..."}``, will do.
        num_workers: Processes that build batches beside the training loop.
        seed: Seed of the order of examples. Set from ``seed_everything``.

    """

    def __init__(
        self,
        source: str = "mlabonne/FineTome-100k",
        rows: int | None = 15_000,
        split: list[int | float] = [12_000, 1_500, 1_500],  # noqa: B006  (read only; shown as the default in --help)
        split_seed: int = 3407,
        eval_split: SplitName | None = None,
        tokenizer: str = "unsloth/Llama-3.2-1B-Instruct",
        template: str = "llama-3.1",
        mask: Literal["assistant", "unsloth-2024"] = "assistant",
        control_tokens: Literal["text", "control"] = "text",
        max_length: int = 2048,
        truncation: Literal["tokens", "turns", "drop", "error"] = "tokens",
        on_bad_row: Literal["error", "drop"] = "error",
        batch_size: int = 8,
        micro_batch_tokens: int | Literal["auto"] = 4096,
        eval_micro_batch_tokens: int | Literal["auto"] | None = None,
        predict_source: str | None = None,
        num_workers: int = 0,
        seed: int = 3407,
    ) -> None:
        super().__init__()
        self.source = source
        self.row_limit = rows
        self.split = split
        self.split_seed = split_seed
        self.eval_split = eval_split
        self.tokenizer_source = tokenizer
        self.template = template
        self.mask = mask
        self.control_tokens = control_tokens
        self.max_length = max_length
        self.truncation = truncation
        self.on_bad_row = on_bad_row
        self.batch_size = batch_size
        if micro_batch_tokens == "auto" or eval_micro_batch_tokens == "auto":
            raise LabError("data.micro_batch_tokens: auto is for the command line, which chooses; here, give a number")
        self.micro_batch_tokens: int = micro_batch_tokens
        self.eval_micro_batch_tokens = (
            micro_batch_tokens if eval_micro_batch_tokens is None else eval_micro_batch_tokens
        )
        self.predict_source = predict_source
        self.num_workers = num_workers
        self.seed = seed
        for key in ("batch_size", "micro_batch_tokens", "eval_micro_batch_tokens", "max_length"):
            if getattr(self, key) < 1:
                raise LabError(f"data.{key} is {getattr(self, key)}; it must be at least 1")
        if rows is not None and rows < 1:
            raise LabError(f"data.rows is {rows}; it must be at least 1, or null for all")
        if num_workers < 0:
            raise LabError(f"data.num_workers is {num_workers}; it must be at least 0")
        self.completed_steps = 0  # the module counts here, so that a resumed run starts at the right step
        self._splits: dict[str, SplitData] | None = None

    # -- preparation ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download and tokenise into the cache, on one process."""
        if self.predict_source is None or self.trainer is None or self.trainer.state.fn != "predict":
            self.prepare(progress=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the cache and split, on every process."""
        if stage == "predict" and self.predict_source:
            self._open_tokenizer()
            return
        if self._splits is None:
            self.prepare(progress=False)
        for name in self._splits_needed(stage):
            if not len(self.splits[name].rows):
                raise LabError(
                    f"the {name} split of {self.source} has no usable conversation; change data.split or data.rows"
                )

    def prepare(self, progress: bool) -> None:
        """Load the rows, tokenise them once and split them.

        Raises:
            LabError: The source cannot be read, a row is bad under ``on_bad_row: error``, or the split does not fit.

        """
        self._open_tokenizer()
        if progress and not self.renderer.end_of_turn:
            print(
                f"warning: data.template {self.template} writes no control token after an answer, so the model does "
                "not learn to end one",
                file=sys.stderr,
            )
        self.rows: Rows = load_rows(self.source, self.row_limit)
        sizes = split_sizes(self.split, len(self.rows), self.source)
        self.tokenized: TokenizedRows = tokenize_rows(
            self.rows, self.renderer, on_bad_row=self.on_bad_row, cache_dir=cache_dir(), progress=progress
        )
        order = np.random.default_rng(self.split_seed).permutation(len(self.rows))
        ends = np.cumsum(sizes)
        dropped = self.tokenized.dropped
        self._splits = {
            name: SplitData(
                name=name,
                rows=np.array([row for row in order[end - size : end] if int(row) not in dropped], dtype=np.int64),
                dropped={int(row): dropped[int(row)] for row in order[end - size : end] if int(row) in dropped},
            )
            for name, size, end in zip(SPLITS, sizes, ends, strict=True)
        }

    def _open_tokenizer(self) -> None:
        from lightning_lab.models.base import load_tokenizer

        self.tokenizer = load_tokenizer(self.tokenizer_source)
        self.renderer = Renderer(
            self.tokenizer,
            template=self.template,
            control_tokens=self.control_tokens,
            mask=self.mask,
            max_length=self.max_length,
            truncation=self.truncation,
        )

    @property
    def splits(self) -> dict[str, SplitData]:
        """The three splits by name; rows are dropped within a split, so a dropped one moves no other."""
        if self._splits is None:
            self.setup()
        assert self._splits is not None
        return self._splits

    def split_for(self, stage: str) -> str:
        """Name of the split that ``validate``, ``test`` or ``predict`` reads; ``fit`` always reads validation."""
        if stage == "fit":
            return "validation"
        return self.eval_split or ("validation" if stage == "validate" else "test")

    def _splits_needed(self, stage: str | None) -> list[str]:
        if stage == "fit":
            return ["train", "validation"]
        if stage is None:
            return []
        return [self.split_for(stage)]

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may hold fewer conversations."""
        return math.ceil(len(self.splits["train"].rows) / self.batch_size)

    def total_steps(self, max_epochs: int | None, max_steps: int) -> int:
        """Optimizer steps of the run: all epochs, or ``max_steps`` where that is less (-1: no bound)."""
        bounds = [max_steps] if max_steps >= 0 else []
        if max_epochs is not None and max_epochs >= 0:
            bounds.append(max_epochs * self.steps_per_epoch)
        if not bounds:
            raise LabError("the run has no end: set trainer.max_epochs or trainer.max_steps")
        return min(bounds)

    def step_documents(self, step: int) -> list[int]:
        """Conversations (numbers in the train split) of optimizer step ``step``, from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.splits["train"].rows), self.seed, epoch)
        return order[within * self.batch_size : (within + 1) * self.batch_size].tolist()

    def step_batch(self, step: int, rank: int = 0, world_size: int = 1) -> StepBatch:
        """Build the packed batch of optimizer step ``step``, a pure function of (seed, step)."""
        train = self.splits["train"]
        documents = self.step_documents(step)
        rows = [int(train.rows[d]) for d in documents]
        lengths = [int(self.tokenized.lengths[row]) for row in rows]
        mine = share(lengths, world_size)[rank]
        bins = pack([lengths[i] for i in mine], self.micro_batch_tokens)
        micro_batches = tuple(self._micro_batch([documents[mine[i]] for i in bin_], train) for bin_ in bins)
        return StepBatch(
            micro_batches=micro_batches,
            rows=tuple(rows),
            tokens=sum(lengths),
            supervised_tokens=sum(int(self.tokenized.supervised[row]) for row in rows),
            padded_tokens=sum(lengths),  # documents are laid end to end: nothing is padded
        )

    def train_dataloader(self) -> StepLoader:
        """One item a step, from the step after the last completed one."""
        rank, world_size = self._process()
        return StepLoader(
            _Steps(self, rank, world_size),
            sampler=_EpochSteps(self),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each iterator draws from the RNG that dropout uses
        )

    # -- evaluation ----------------------------------------------------------------------------------------------

    def micro_batches(self, split: str, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """Take this process's share of a split and cut it into packed micro-batches of conversation numbers.

        Raises:
            LabError: There are fewer conversations than processes; Lightning evaluates nothing on one without any.

        """
        lengths = [int(self.tokenized.lengths[row]) for row in self.splits[split].rows]
        if len(lengths) < world_size:
            raise LabError(f"the {split} split has {len(lengths)} conversations for {world_size} processes; use fewer")
        mine = share(lengths, world_size)[rank]
        return [[mine[i] for i in bin_] for bin_ in pack([lengths[i] for i in mine], self.eval_micro_batch_tokens)]

    def val_dataloader(self) -> DataLoader:
        """Packed micro-batches of the split that this stage evaluates."""
        stage = self.trainer.state.fn.value if self.trainer and self.trainer.state.fn else "fit"
        return self._eval_loader(self.split_for(stage))

    def test_dataloader(self) -> DataLoader:
        """Packed micro-batches of the test split, or of ``eval_split``."""
        return self._eval_loader(self.split_for("test"))

    def predict_dataloader(self) -> DataLoader:
        """Batches of prompts: each conversation up to its last answer."""
        if self.predict_source:
            source = load_rows(self.predict_source, None)
            prompts = [_prompt(source, row) for row in range(len(source))]
        else:
            rows = [int(row) for row in self.splits[self.split_for("predict")].rows]
            held_out = (Prompt.of(row, parse_conversation(self.rows.rows[row])) for row in rows)
            prompts = [prompt for prompt in held_out if prompt is not None]
        return DataLoader(
            _Prompts(prompts), batch_size=PREDICT_BATCH_SIZE, collate_fn=list, generator=torch.Generator()
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move packed batches; leave prompts alone."""
        return batch.to(device) if isinstance(batch, MicroBatch | StepBatch) else batch

    def packing_statistics(self) -> dict[str, Any]:
        """How the first epoch's steps are cut into micro-batches, for `preview`."""
        lengths = self.tokenized.lengths[self.splits["train"].rows]
        steps = [
            [int(lengths[d]) for d in self.step_documents(step)]
            for step in range(self.steps_per_epoch)  # the first epoch
        ]
        bins = [sum(step[i] for i in documents) for step in steps for documents in pack(step, self.micro_batch_tokens)]
        tokens = sum(map(sum, steps))
        padded = sum(len(step) * max(step) for step in steps)
        return {
            "optimizer steps an epoch": len(steps),
            "conversations a step": self.batch_size,
            "tokens a step (mean)": round(tokens / max(1, len(steps))),
            "micro-batches a step (mean)": round(len(bins) / max(1, len(steps)), 2),
            "fill of a micro-batch (mean)": f"{tokens / max(1, len(bins) * self.micro_batch_tokens):.0%}",
            "tokens that padding each step to its longest would add": f"{padded / max(1, tokens) - 1:.0%}",
        }

    def _eval_loader(self, split: str) -> DataLoader:
        rank, world_size = self._process()
        data = self.splits[split]
        return DataLoader(
            _MicroBatches(self, data, self.micro_batches(split, rank, world_size)),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def _micro_batch(self, documents: Sequence[int], split: SplitData) -> MicroBatch:
        rows = [int(split.rows[d]) for d in documents]
        return collate([(self.tokenized.input_ids(row), self.tokenized.labels(row)) for row in rows], documents, rows)

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    # -- record --------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What ``environment.json`` says of the data: fingerprint, split sizes, rows dropped and truncated."""
        truncated = set(self.tokenized.truncated)
        return {
            "source": self.rows.name,
            "fingerprint": self.tokenized.fingerprint,
            "splits": {
                name: {
                    "conversations": len(split.rows),
                    "tokens": int(self.tokenized.lengths[split.rows].sum()),
                    "supervised_tokens": int(self.tokenized.supervised[split.rows].sum()),
                    "truncated": sum(int(row) in truncated for row in split.rows),
                    "dropped": {str(row): reason for row, reason in sorted(split.dropped.items())},
                }
                for name, split in self.splits.items()
            },
            "split_seed": self.split_seed,
        }


@dataclass(frozen=True)
class SplitData:
    """One split: the source rows it keeps, in split order, and those it dropped with the reason."""

    name: str
    rows: np.ndarray
    dropped: dict[int, str]

    @property
    def all_rows(self) -> list[int]:
        """The split's rows, those dropped too, in source order."""
        return sorted([*self.rows.tolist(), *self.dropped])


class Prompt:
    """A conversation up to its last answer, and that answer (None where nobody has given one).

    Not a dataclass: Lightning looks for tensors inside those of a batch, and refuses frozen ones like Conversation.
    """

    def __init__(self, row: int, prompt: Conversation, reference: str | None) -> None:
        self.row, self.prompt, self.reference = row, prompt, reference

    @classmethod
    def of(cls, row: int, conversation: Conversation) -> Prompt | None:
        """Cut before the last assistant turn; None when the conversation begins with it."""
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        return cls(row, Conversation(messages[:last]), messages[last].content) if last else None


class StepLoader(DataLoader):
    """A DataLoader of optimizer steps that can be resumed in the middle of an epoch.

    The position is the run's own count of completed steps, which the checkpoint holds, so there is nothing to keep
    here; Lightning asks for these two methods before it believes that a loader can be resumed.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see above."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see above."""


class _EpochSteps(Sampler[int]):
    """The steps that remain in the epoch the run is in."""

    def __init__(self, data: ChatDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[int]:
        start = self.data.completed_steps
        per_epoch = self.data.steps_per_epoch
        return iter(range(start, (start // per_epoch + 1) * per_epoch))


class _Steps(Dataset[StepBatch]):
    def __init__(self, data: ChatDataModule, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size

    def __getitem__(self, step: int) -> StepBatch:
        return self.data.step_batch(step, self.rank, self.world_size)


class _MicroBatches(Dataset[MicroBatch]):
    def __init__(self, data: ChatDataModule, split: SplitData, bins: list[list[int]]) -> None:
        self.data, self.split, self.bins = data, split, bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> MicroBatch:
        return self.data._micro_batch(self.bins[index], self.split)


class _Prompts(Dataset[Prompt]):
    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def split_sizes(split: Sequence[int | float], rows: int, source: str) -> list[int]:
    """Turn counts or fractions into the sizes of train, validation and test.

    Fractions (a sum of at most 1) round validation and test to the nearest whole row and give the rest of their
    share to train.

    Raises:
        LabError: Not three numbers, a negative one, or more rows asked for than there are.

    """
    shown = "/".join(f"{part:g}" for part in split)
    if len(split) != 3 or not all(0 <= part < math.inf for part in split) or not sum(split):
        raise LabError(f"data.split is {shown}; give three sizes or three fractions: train, validation, test")
    if sum(split) <= 1 + 1e-9:
        used = round(sum(split) * rows)
        validation = min(round(split[1] * rows), used)
        test = min(round(split[2] * rows), used - validation)
        return [used - validation - test, validation, test]
    if any(part != int(part) for part in split):
        raise LabError(f"data.split is {shown}; counts must be whole numbers, and fractions add up to at most 1")
    sizes = [int(part) for part in split]
    if sum(sizes) > rows:
        raise LabError(
            f"data.split asks for {sum(sizes):,} rows ({shown}), but {source} gives {rows:,}; "
            "lower data.split, raise data.rows, or use fractions such as [0.8, 0.1, 0.1]"
        )
    return sizes


def _prompt(rows: Rows, index: int) -> Prompt:
    try:
        return Prompt(index, *parse_prompt(rows.rows[index]))
    except LabError as error:
        raise LabError(f"{rows.where(index)}: {error}") from None
