"""ChatDataModule: chat rows in, one packed batch per optimizer step out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lab.data import batching
from lightning_lab.data.batching import MicroBatch, PromptBatch, SplitData, SplitMethod, SplitName, StepBatch
from lightning_lab.data.conversation import EmptyAnswers, Prompt, RowFormat
from lightning_lab.data.duplicates import Duplicates, try_find
from lightning_lab.data.encoding import ControlTokens, ConversationEncoder, Mask, Truncation, load_tokenizer
from lightning_lab.data.loading import StepLoader, do_without_validation, loading_options
from lightning_lab.data.preparation import prepare_rows
from lightning_lab.data.prompts import read_prompts, tokenize_prompts
from lightning_lab.data.rows import Rows
from lightning_lab.data.summary import print_summary
from lightning_lab.data.tokenized import OnBadRow, TokenizedRows
from lightning_lab.errors import LabError, Range, check_arguments

PREDICT_BATCH_SIZE = 8

_COUNT: Range = (1, 1e9)
_SEED: Range = (0, 2**32 - 1)  # what numpy, torch and Lightning all take
RANGES: dict[str, Range] = {
    "rows": _COUNT,
    "split": (0, 1e9),
    "split_seed": _SEED,
    "max_dropped": (0, 1),
    "max_length": (2, 1e9),  # the first token is never predicted
    "batch_size": _COUNT,
    "micro_mean": _COUNT,
    "micro_batch_tokens": _COUNT,
    "eval_micro_batch_tokens": _COUNT,
    "num_workers": (0, 1000),
    "seed": _SEED,
}


class ChatDataModule(pl.LightningDataModule):
    """Chat data for completion-only fine-tuning, split, tokenised once and packed.

    Args:
        source: Hub id (``owner/name`` or ``owner/name:split``), a ``.json``, ``.jsonl``, ``.parquet`` or ``.arrow``
            file (``.gz`` and ``.zst`` too), a folder or pattern of files, a sample that needs no network, ``embedded``
            (503 short questions and answers) or ``chitchat`` (4,017 long conversations); or a list of these.
        source_config: Configuration (subset) of a Hub data set; null for its only or default one.
        source_split: Split of a Hub data set, where its id names none.
        rows: Use the first this many rows of ``source``; null for all.
        split: Sizes of train, validation and test, as counts or as fractions; without validation there is no ``best``.
        validation_source: Where the validation split comes from, all of it, written as ``source``; null for rows of
            ``source``. Its fraction of ``split`` then goes to train; a count must be 0. Of a Hub data set, with the
            configuration and revision of ``source`` if it is the same, the split ``validation`` unless one is named.
        test_source: The same for the test split.
        split_method: ``permutation`` deals a permutation of the rows out to train, validation and test; ``lab`` splits
            as the lab did, by ``datasets``' ``train_test_split`` twice with ``split_seed``.
        split_seed: Seed of the split. Not the run's seed, so that runs with different seeds share their splits.
        group_duplicates: Keep rows of ``source`` that nearly repeat each other in one split, under ``permutation``.
            Those that nearly repeat a row of ``validation_source`` or ``test_source`` are not moved.
        eval_split: The split that `validate`, `test` and `predict` read; null for validation, test and test.
        allow_trained: Evaluate conversations that the checkpoint was trained on too, apart from the others, whose
            figures are the result; false refuses them. ``eval_split: train`` needs no permission.
        revision: Commit of a Hub data set; null for its newest.
        tokenizer: Where the tokenizer comes from: Hub id, folder, GGUF file or ``embedded``. Set from ``model.base``.
        tokenizer_revision: Commit of the tokenizer's Hub repository; null for its newest.
        template: ``llama-3.1`` (packaged, dates pinned), ``tokenizer`` (the tokenizer's own) or a ``.jinja`` file.
        mask: ``assistant`` supervises each answer and its end-of-turn token, ``last`` the last answer alone.
        micro_mean: null: a step's loss is the mean over its supervised tokens. A number: the mean over groups of so
            many conversations of each group's token mean, as Hugging Face's trainer has it with batches of that size
            and a model that does not take ``num_items_in_batch``. Weighs tokens of short answers more.
        double_bos: Begin each conversation with two beginning-of-sequence tokens, as the lab's tool did.
        control_tokens: ``text`` encodes control tokens quoted inside a message as plain text; ``control`` parses them.
        max_length: Most tokens of a conversation.
        truncation: What happens to longer ones: ``tokens`` cuts, ``turns`` keeps the complete turns that fit, ``drop``
            drops the row, ``error`` stops.
        columns: Where the rows have other columns: a mapping such as ``{prompt: question, completion: answer}`` or
            ``{messages: dialog}``; null where they have the usual ones.
        ignore: Keys of rows and turns to leave out, whatever they mean. Others that are neither read nor harmless make
            a row a bad one.
        empty_answers: ``refuse`` takes a row with an empty answer for a bad one; ``keep`` trains to answer nothing.
        max_dropped: Most of the rows, as a fraction, that may be dropped for any reason.
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
        encoder: Tokenises conversations and prompts.
        rows: The source's rows.
        tokenized: Their tokens.
        micro_batch_tokens, eval_micro_batch_tokens: QLoRAModule replaces ``auto`` before there are loaders.

    Raises:
        LabError: A number is out of its range, or a word is none of the choices.

    """

    tokenizer: Any
    encoder: ConversationEncoder
    rows: Rows
    tokenized: TokenizedRows

    def __init__(
        self,
        source: list[str] | str = "mlabonne/FineTome-100k",
        source_config: str | None = None,
        source_split: str = "train",
        rows: int | None = None,
        split: list[int | float] = [0.8, 0.1, 0.1],  # noqa: B006  (read only; shown as the default in --help)
        validation_source: list[str] | str | None = None,
        test_source: list[str] | str | None = None,
        split_method: SplitMethod = "permutation",
        split_seed: int = 3407,
        group_duplicates: bool = False,
        eval_split: SplitName | None = None,
        allow_trained: bool = False,
        revision: str | None = None,
        tokenizer: str = "unsloth/Llama-3.2-1B-Instruct",
        tokenizer_revision: str | None = None,
        template: str = "llama-3.1",
        mask: Mask = "assistant",
        micro_mean: int | None = None,
        double_bos: bool = False,
        control_tokens: ControlTokens = "text",
        max_length: int = 2048,
        truncation: Truncation = "tokens",
        columns: dict[str, str] | None = None,
        ignore: list[str] = [],  # noqa: B006  (read only; shown as the default in --help)
        empty_answers: EmptyAnswers = "refuse",
        on_bad_row: OnBadRow = "error",
        max_dropped: float = 0.5,
        batch_size: int = 8,
        micro_batch_tokens: int | Literal["auto"] = 4096,
        eval_micro_batch_tokens: int | Literal["auto"] | None = None,
        predict_source: str | None = None,
        num_workers: int = 0,
        seed: int = 3407,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["seed"])
        check_arguments("data", ChatDataModule.__init__, {**self.hparams, "seed": seed}, RANGES)
        self.row_format = RowFormat(tuple(ignore), columns or {}, empty_answers)
        self.source, self.predict_source, self.eval_split = source, predict_source, eval_split
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.micro_batch_tokens, self.eval_micro_batch_tokens = micro_batch_tokens, eval_micro_batch_tokens

    # -- preparation ---------------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        if self.predict_source is None or self.trainer is None or self.trainer.state.fn != "predict":
            self.prepare(progress=True)
            print_summary(self)
            if self.trainer and self.trainer.state.fn == "fit":
                _ = self.duplicates  # found by one process, and kept in the cache for the others

    @override
    def setup(self, stage: str | None = None) -> None:
        if stage == "predict" and self.predict_source:
            self._open_tokenizer()
            assert self.own_prompts is not None  # read here, before the base is loaded
            return
        needed = ["train"] if stage == "fit" else []
        validation = self.splits["validation"]
        if stage == "fit" and not (len(validation.rows) or validation.dropped):  # none is asked for
            do_without_validation(self.trainer)
        elif stage is not None:
            needed.append(self.split_for(stage))
        for name in needed:
            if not len(self.splits[name].rows):
                raise LabError(
                    f"the {name} split of {self.rows.name} has no usable conversation; change data.split or data.rows"
                )

    def prepare(self, progress: bool) -> None:
        """Load the rows, tokenise them once and split them; ``progress`` says on stderr what is worth knowing.

        Raises:
            LabError: A source cannot be read, a row is bad under ``on_bad_row: error``, more rows than ``max_dropped``
                are dropped, or the split does not fit.

        """
        self._open_tokenizer()
        self.rows, self.tokenized, self.splits = prepare_rows(self.hparams, self.encoder, self.row_format, progress)

    def _open_tokenizer(self) -> None:
        options = self.hparams
        self.tokenizer = load_tokenizer(options["tokenizer"], options["tokenizer_revision"])
        rules = ("template", "double_bos", "control_tokens", "mask", "max_length", "truncation")
        self.encoder = ConversationEncoder(self.tokenizer, **{key: options[key] for key in rules})

    @cached_property
    def splits(self) -> dict[str, SplitData]:
        """The three splits by name."""
        self.prepare(progress=False)  # puts them here
        return self.splits

    @cached_property
    def duplicates(self) -> Duplicates | None:
        """Which rows repeat each other, in whatever split they are; None where that cannot be found out."""
        return try_find(self.rows, self.trainer is None or self.trainer.is_global_zero)

    def split_for(self, stage: str) -> str:
        """Name of the split that ``validate``, ``test`` or ``predict`` reads; ``fit`` always reads validation."""
        if stage == "fit":
            return "validation"
        return self.eval_split or ("validation" if stage == "validate" else "test")

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, as many as ``trainer.limit_train_batches`` lets through.

        The last step of the training split may hold fewer conversations.
        """
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(limit, self._unlimited_steps) if isinstance(limit, int) else int(limit * self._unlimited_steps)

    @property
    def _unlimited_steps(self) -> int:
        return math.ceil(len(self.splits["train"].rows) / self.batch_size)

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
        conversations = self.step_documents(step)
        rows = train.rows[conversations].tolist()
        lengths = self.tokenized.lengths[rows].tolist()
        factors, weight = batching.mean_factors(self.tokenized.weight[rows], self.hparams["micro_mean"])
        bins = batching.pack(lengths, self.budget(self.micro_batch_tokens), rank, world_size)
        return StepBatch(
            micro_batches=tuple(
                self._micro_batch(train, [conversations[i] for i in bin_], factors and [factors[i] for i in bin_])
                for bin_ in bins
            ),
            rows=tuple(rows),
            tokens=sum(lengths),
            supervised_tokens=int(self.tokenized.supervised[rows].sum()),
            weight=weight,
        )

    @override
    def train_dataloader(self) -> StepLoader:
        options = loading_options(partial(self.step_batch, **self._process()), self.trainer, self.num_workers)
        return StepLoader(self._unlimited_steps, self.steps_per_epoch, self._steps_done, options)

    def _steps_done(self) -> int:
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total  # its declared type lacks `processed`
        return int(total.processed)

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
        budget = self.budget(self.eval_micro_batch_tokens or self.micro_batch_tokens)
        return batching.pack(lengths, budget, rank, world_size)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.trainer.state.fn.value if self.trainer and self.trainer.state.fn else "fit")

    @override
    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def _eval_loader(self, stage: str) -> DataLoader:
        split = self.split_for(stage)
        bins: Any = self.micro_batches(split, **self._process())
        collate = partial(self._micro_batch, self.splits[split])
        return DataLoader(bins, **loading_options(collate, self.trainer, self.num_workers))

    def _micro_batch(
        self, split: SplitData, conversations: Sequence[int], factors: Sequence[float] | None = None
    ) -> MicroBatch:
        rows = split.rows[list(conversations)].tolist()
        return batching.collate([self.tokenized.example(row) for row in rows], conversations, rows, factors)

    def budget(self, tokens: int | Literal["auto"]) -> int:
        """``micro_batch_tokens`` or ``eval_micro_batch_tokens`` as a number; `LabError` while it is ``auto``."""
        if tokens == "auto":
            raise LabError("data.micro_batch_tokens is still auto: QLoRAModule chooses it; without one, give a number")
        return tokens

    def _process(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size} if self.trainer else {}

    # -- prompts -------------------------------------------------------------------------------------------------

    def first_prompts(self, split: str, count: int | None) -> list[Prompt]:
        """The first conversations of a split (None: all), each cut before its last answer; less those it begins."""
        prompts = (Prompt.of(row, self.rows.conversation(row)) for row in self.splits[split].rows.tolist())
        return list(islice(filter(None, prompts), count))

    def prompt_batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Tokenise prompts as in training; a template that refuses one raises `RowError`."""
        return tokenize_prompts(prompts, self.encoder, self.tokenizer)

    @override
    def predict_dataloader(self) -> DataLoader:
        prompts: Any = self.own_prompts if self.predict_source else self.first_prompts(self.split_for("predict"), None)
        return DataLoader(prompts, **loading_options(self.prompt_batch, self.trainer, 0, PREDICT_BATCH_SIZE))

    @cached_property
    def own_prompts(self) -> list[Prompt]:
        """Every row of ``predict_source``; bad ones are an error, or named and left out, as ``on_bad_row`` says."""
        assert self.predict_source is not None
        return read_prompts(self.predict_source, self.encoder.template, self.row_format, self.hparams["on_bad_row"])
