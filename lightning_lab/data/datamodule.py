"""ChatDataModule: chat rows in, one packed batch per optimizer step out."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lab.data import batching
from lightning_lab.data.batching import MicroBatch, PromptBatch, SplitData, StepBatch
from lightning_lab.data.conversation import Prompt, parse_conversation
from lightning_lab.data.encoding import Renderer, load_tokenizer
from lightning_lab.data.loading import EpochSteps, StepLoader, loading_options
from lightning_lab.data.sources import Rows, load_prompts, load_rows
from lightning_lab.data.tokenized import TokenizedRows, tokenize_rows
from lightning_lab.errors import LabError, Range, check_ranges

SplitName = Literal["train", "validation", "test"]
PREDICT_BATCH_SIZE = 8

_COUNT: Range = (1, 1e9)
_SEED: Range = (0, 2**32 - 1)  # what numpy, torch and Lightning all take
RANGES: dict[str, Range] = {
    "rows": _COUNT,
    "split": (0, 1e9),
    "split_seed": _SEED,
    "max_length": (2, 1e9),  # the first token is never predicted
    "batch_size": _COUNT,
    "micro_batch_tokens": _COUNT,
    "eval_micro_batch_tokens": _COUNT,
    "num_workers": (0, 1000),
    "seed": _SEED,
}


class ChatDataModule(pl.LightningDataModule):
    """Chat data for completion-only fine-tuning, split, tokenised once and packed.

    Args:
        source: Hub id (``owner/name``), a ``.json``, ``.jsonl`` or ``.parquet`` file, or a sample that needs no
            network: ``embedded`` (503 short questions and answers) or ``chitchat`` (4,017 long conversations).
        rows: Use the first this many rows; null for all.
        split: Sizes of train, validation and test, as counts or as fractions of the rows.
        split_seed: Seed of the split. Not the run's seed, so that runs with different seeds share their splits.
        eval_split: The split that `validate`, `test` and `predict` read; null for validation, test and test.
        revision: Commit of a Hub data set; null for its newest.
        tokenizer: Where the tokenizer comes from: Hub id, folder, GGUF file or ``embedded``. Set from ``model.base``.
        tokenizer_revision: Commit of the tokenizer's Hub repository; null for its newest.
        template: ``llama-3.1`` (packaged, dates pinned), ``tokenizer`` (the tokenizer's own) or a ``.jinja`` file.
        mask: ``assistant`` supervises each answer and its end-of-turn token.
        control_tokens: ``text`` encodes control tokens quoted inside a message as plain text; ``control`` parses them.
        max_length: Most tokens of a conversation.
        truncation: What happens to longer ones: ``tokens`` cuts, ``turns`` keeps the complete turns that fit, ``drop``
            drops the row, ``error`` stops.
        on_bad_row: ``error`` stops at the first malformed row or row with nothing to learn; ``drop`` drops and counts.
        batch_size: Conversations per optimizer step, over all devices.
        micro_batch_tokens: Most tokens that are worked on at once. Decides memory and speed, never the result.
            ``auto``: as many as fit.
        eval_micro_batch_tokens: The same in evaluation; null for ``micro_batch_tokens``.
        predict_source: Another file or Hub id for `predict` to answer, in place of a split. Its rows need no answers:
            conversations that end with a user turn, or ``{"prompt": "..."}``, will do.
        num_workers: Processes that build batches beside the training loop.
        seed: Seed of the order of examples. Set from ``seed_everything``.

    Attributes:
        tokenizer: Of the base, with a padding token.
        renderer: Tokenises conversations and prompts.
        rows: The source's rows.
        tokenized: Their tokens.
        micro_batch_tokens, eval_micro_batch_tokens: QLoRAModule replaces ``auto`` before there are loaders.

    Raises:
        LabError: A number is out of its range.

    """

    tokenizer: Any
    renderer: Renderer
    rows: Rows
    tokenized: TokenizedRows

    def __init__(
        self,
        source: str = "mlabonne/FineTome-100k",
        rows: int | None = None,
        split: list[int | float] = [0.8, 0.1, 0.1],  # noqa: B006  (read only; shown as the default in --help)
        split_seed: int = 3407,
        eval_split: SplitName | None = None,
        revision: str | None = None,
        tokenizer: str = "unsloth/Llama-3.2-1B-Instruct",
        tokenizer_revision: str | None = None,
        template: str = "llama-3.1",
        mask: Literal["assistant"] = "assistant",
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
        self.save_hyperparameters(ignore=["seed"])
        check_ranges("data", {**self.hparams, "seed": seed}, RANGES)
        self.source, self.predict_source, self.eval_split = source, predict_source, eval_split
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.micro_batch_tokens, self.eval_micro_batch_tokens = micro_batch_tokens, eval_micro_batch_tokens
        self._splits: dict[str, SplitData] | None = None

    # -- preparation ---------------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        if self.predict_source is None or self.trainer is None or self.trainer.state.fn != "predict":
            self.prepare(progress=True)

    @override
    def setup(self, stage: str | None = None) -> None:
        if stage == "predict" and self.predict_source:
            self._open_tokenizer()
            return
        if self._splits is None:
            self.prepare(progress=False)
        needed = [] if stage is None else [self.split_for(stage)]
        for name in ["train", *needed] if stage == "fit" else needed:
            if not len(self.splits[name].rows):
                raise LabError(
                    f"the {name} split of {self.source} has no usable conversation; change data.split or data.rows"
                )

    def prepare(self, progress: bool) -> None:
        """Load the rows, tokenise them once and split them; ``progress`` says on stderr what is worth knowing.

        Raises:
            LabError: The source cannot be read, a row is bad under ``on_bad_row: error``, or the split does not fit.

        """
        options = self.hparams
        self._open_tokenizer()
        self.rows = rows = load_rows(self.source, options["rows"], options["revision"])
        sizes = batching.split_sizes(options["split"], len(rows), self.source)
        if progress and not self.renderer.end_of_turn:
            print(
                f"warning: data.template {options['template']} writes no control token after an answer, so the model "
                "does not learn to end one",
                file=sys.stderr,
            )
        if progress and len(rows) < rows.total:
            print(f"data.rows: the first {len(rows):,} of {rows.total:,} rows are used", file=sys.stderr)
        self.tokenized = tokenize_rows(rows, self.renderer, on_bad_row=options["on_bad_row"], progress=progress)
        self._splits = batching.split_rows(sizes, len(rows), options["split_seed"], self.tokenized.dropped)

    def _open_tokenizer(self) -> None:
        options = self.hparams
        self.tokenizer = load_tokenizer(options["tokenizer"], options["tokenizer_revision"])
        rules = ("template", "control_tokens", "mask", "max_length", "truncation")
        self.renderer = Renderer(self.tokenizer, **{key: options[key] for key in rules})

    @property
    def splits(self) -> dict[str, SplitData]:
        """The three splits by name."""
        if self._splits is None:
            self.setup()
        assert self._splits is not None
        return self._splits

    def split_for(self, stage: str) -> str:
        """Name of the split that ``validate``, ``test`` or ``predict`` reads; ``fit`` always reads validation."""
        if stage == "fit":
            return "validation"
        return self.eval_split or ("validation" if stage == "validate" else "test")

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def _whole_epoch(self) -> int:
        return math.ceil(len(self.splits["train"].rows) / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, as many as ``trainer.limit_train_batches`` lets through.

        The last step of the training split may hold fewer conversations.
        """
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(limit, self._whole_epoch) if isinstance(limit, int) else int(limit * self._whole_epoch)

    def _steps_done(self) -> int:
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total  # its declared type lacks `processed`
        return int(total.processed)

    def step_documents(self, step: int) -> list[int]:
        """Conversations (numbers in the train split) of optimizer step ``step``, from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = batching.epoch_order(len(self.splits["train"].rows), self.seed, epoch).tolist()
        return order[within * self.batch_size : (within + 1) * self.batch_size]

    def step_batch(self, step: int, rank: int = 0, world_size: int = 1) -> StepBatch:
        """Build the packed batch of an optimizer step, a pure function of (seed, step).

        Args:
            step: From 0 over all epochs.
            rank: This process, which takes an even share of the step's tokens.
            world_size: Number of processes.

        Raises:
            LabError: ``micro_batch_tokens`` is still ``auto``.

        """
        train = self.splits["train"]
        documents = self.step_documents(step)
        rows = train.rows[documents].tolist()
        lengths = self.tokenized.lengths[rows].tolist()
        mine = batching.share(lengths, world_size)[rank]
        bins = batching.pack([lengths[i] for i in mine], self._budget(self.micro_batch_tokens))
        return StepBatch(
            micro_batches=tuple(self._micro_batch(train, [documents[mine[i]] for i in bin_]) for bin_ in bins),
            rows=tuple(rows),
            tokens=sum(lengths),
            supervised_tokens=int(self.tokenized.supervised[rows].sum()),
            padded_tokens=sum(lengths),  # documents are laid end to end: nothing is padded
        )

    @override
    def train_dataloader(self) -> StepLoader:
        rank, world_size = self._process()
        steps: Any = range(sys.maxsize)  # of all epochs
        return StepLoader(
            steps,
            sampler=EpochSteps(self._whole_epoch, self.steps_per_epoch, self._steps_done),
            collate_fn=partial(self.step_batch, rank=rank, world_size=world_size),
            **loading_options(self.num_workers),
        )

    # -- evaluation ----------------------------------------------------------------------------------------------

    def micro_batches(self, split: str, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """Take this process's share of a split and cut it into micro-batches of conversation numbers.

        Raises:
            LabError: Fewer conversations than processes: Lightning evaluates nothing on one without any. Or ``auto``.

        """
        rows = self.splits[split].rows
        lengths = self.tokenized.lengths[rows].tolist()
        if len(lengths) < world_size:
            raise LabError(f"the {split} split has {len(lengths)} conversations for {world_size} processes; use fewer")
        mine = batching.share(lengths, world_size)[rank]
        budget = self._budget(self.eval_micro_batch_tokens or self.micro_batch_tokens)
        return [[mine[i] for i in bin_] for bin_ in batching.pack([lengths[i] for i in mine], budget)]

    @override
    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.trainer.state.fn.value if self.trainer and self.trainer.state.fn else "fit")

    @override
    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def _eval_loader(self, stage: str) -> DataLoader:
        split = self.split_for(stage)
        bins: Any = self.micro_batches(split, *self._process())
        return DataLoader(
            bins, collate_fn=partial(self._micro_batch, self.splits[split]), **loading_options(self.num_workers)
        )

    def _micro_batch(self, split: SplitData, documents: Sequence[int]) -> MicroBatch:
        rows = split.rows[list(documents)].tolist()
        examples = [(self.tokenized.input_ids(row), self.tokenized.labels(row)) for row in rows]
        return batching.collate(examples, documents, rows)

    def _budget(self, tokens: int | Literal["auto"]) -> int:
        if tokens == "auto":
            raise LabError("data.micro_batch_tokens is still auto: QLoRAModule chooses it; without one, give a number")
        return tokens

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    # -- prompts -------------------------------------------------------------------------------------------------

    def first_prompts(self, split: str, count: int | None) -> list[Prompt]:
        """The first conversations of a split (None: all), each cut before its last answer; less those it begins."""
        rows = self.splits[split].rows.tolist()
        prompts = (Prompt.of(row, parse_conversation(self.rows.rows[row])) for row in rows)
        return list(islice((prompt for prompt in prompts if prompt is not None), count))

    def prompt_batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Tokenise prompts as in training; a template that refuses one raises `RowError`."""
        stop_ids = {self.tokenizer.eos_token_id}
        if self.renderer.end_of_turn:
            stop_ids.add(self.tokenizer.convert_tokens_to_ids(self.renderer.end_of_turn.strip()))
        return PromptBatch(
            prompts=list(prompts),
            input_ids=[self.renderer.encode_prompt(prompt.conversation) for prompt in prompts],
            pad_id=self.tokenizer.pad_token_id,
            stop_ids=sorted(i for i in stop_ids if i is not None),
            tokenizer=self.tokenizer,
        )

    @override
    def predict_dataloader(self) -> DataLoader:
        own = self.predict_source
        prompts: Any = load_prompts(own) if own else self.first_prompts(self.split_for("predict"), None)
        return DataLoader(prompts, collate_fn=self.prompt_batch, **loading_options(0, batch_size=PREDICT_BATCH_SIZE))

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device) if isinstance(batch, MicroBatch | StepBatch) else batch

    def packing_statistics(self) -> dict[str, Any]:
        """How the first epoch's steps are cut into micro-batches, for `preview`."""
        lengths = self.tokenized.lengths[self.splits["train"].rows]
        steps = [lengths[self.step_documents(step)].tolist() for step in range(self.steps_per_epoch)]
        figures = batching.packing_figures(steps, self._budget(self.micro_batch_tokens))
        return {"optimizer steps an epoch": len(steps), "conversations a step": self.batch_size, **figures}

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
                    "truncated": len(truncated.intersection(split.rows.tolist())),
                    "dropped": {str(row): reason for row, reason in sorted(split.dropped.items())},
                }
                for name, split in self.splits.items()
            },
            "split_seed": self.hparams["split_seed"],
        }
