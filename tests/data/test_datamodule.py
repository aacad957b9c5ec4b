"""ChatDataModule on short chats: which row goes to which split, step and process, against numpy and torch alone."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_lab.data.conversation import Conversation, Message, Prompt
from lightning_lab.data.datamodule import RANGES, ChatDataModule
from lightning_lab.data.loading import StepLoader, outlive_signals
from lightning_lab.data.preview import packing_statistics
from lightning_lab.data.summary import data_record
from lightning_lab.errors import LabError

SPLIT_SEED, SEED, BATCH_SIZE = 11, 5, 4
STEPS = 5  # of an epoch: 18 training rows in fours, the last step has 2


def build(tiny_base: Path, source: Path | str | list[str], **changes: Any) -> ChatDataModule:
    settings = dict(
        rows=40,
        split=[18, 9, 8],
        split_seed=SPLIT_SEED,
        template="tokenizer",
        batch_size=BATCH_SIZE,
        micro_batch_tokens=150,
        seed=SEED,
    )
    source = source if isinstance(source, list) else str(source)
    return ChatDataModule(source=source, tokenizer=str(tiny_base), **settings | changes)


pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def prepared(tiny_base: Path, short_chats: Path) -> ChatDataModule:
    data = build(tiny_base, short_chats)
    data.prepare(progress=False)
    return data


@pytest.fixture
def data(prepared: ChatDataModule) -> ChatDataModule:
    return copy.copy(prepared)


@pytest.fixture(scope="module")
def train_rows() -> list[int]:
    """The 18 training rows in split order."""
    return np.random.default_rng(SPLIT_SEED).permutation(40)[:18].tolist()


def visited(step: int) -> list[int]:
    """Documents of a step, from the definition."""
    epoch, within = divmod(step, STEPS)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
    return order[4 * within : 4 * within + 4]


ON_CPU = SimpleNamespace(root_device=torch.device("cpu"))


def at_step(processed: int, limit: float = 1.0) -> Any:
    """A trainer that has done so many steps."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loop, limit_train_batches=limit, global_rank=0, world_size=1, strategy=ON_CPU)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestSettings:
    @pytest.mark.parametrize("key", ["batch_size", "micro_batch_tokens", "eval_micro_batch_tokens", "rows"])
    def test_must_be_at_least_one(self, key: str) -> None:
        with pytest.raises(LabError, match=rf"^data\.{key} is 0; it must be between 1 and"):
            ChatDataModule(**{key: 0})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("split_seed", -1), ("split_seed", 1e20), ("split_seed", 2**32), ("seed", -1), ("seed", 2**32)),
            *(("max_length", 1), ("max_length", math.nan), ("num_workers", -1), ("batch_size", 1e20)),
            *(("rows", 10**20), ("split", [-1, 2, 3]), ("split", [1e20, 0, 0]), ("micro_batch_tokens", math.inf)),
        ],
    )
    def test_numbers_have_ranges(self, key: str, value: Any) -> None:
        with pytest.raises(LabError, match=rf"^data\.{key} is [^ ]+; it must be between "):
            ChatDataModule(**{key: value})

    def test_a_mean_over_more_than_a_step_is_refused(self) -> None:
        with pytest.raises(LabError, match=r"^data\.micro_mean 9 is more than data\.batch_size 8; lower it$"):
            ChatDataModule("embedded", micro_mean=9, tokenizer="embedded", template="tokenizer").prepare(progress=False)

    def test_every_number_has_a_range(self) -> None:
        hints = typing.get_type_hints(ChatDataModule.__init__)
        numeric = {key for key, hint in hints.items() if {"int", "float"} & set(re.findall(r"\w+", str(hint)))}
        assert numeric == set(RANGES)
        for key, (low, high) in RANGES.items():
            for value in (low, high):
                ChatDataModule(**{key: [value] * 3 if key == "split" else int(value)})

    @pytest.mark.parametrize(
        ("key", "value", "choices"),
        [
            ("control_tokens", "parse", "text, control"),
            ("mask", "roles", "assistant, last"),
            ("truncation", None, "tokens, turns, drop, error"),
            ("on_bad_row", "skip", "error, drop"),
            ("eval_split", "dev", "train, validation, test"),
            ("micro_batch_tokens", "all", "auto"),
        ],
    )
    def test_words_have_choices(self, key: str, value: Any, choices: str) -> None:
        with pytest.raises(LabError, match=rf"^data\.{key} is {value!r}; choose one of {choices}$"):
            ChatDataModule(**{key: value})

    def test_workers_may_be_none(self) -> None:
        assert ChatDataModule(num_workers=0).num_workers == 0

    def test_hyper_parameters_are_kept(self) -> None:
        data = ChatDataModule(source="embedded", rows=7, seed=9, micro_batch_tokens="auto")
        assert (data.hparams["source"], data.hparams["rows"], data.hparams["split"]) == ("embedded", 7, [0.8, 0.1, 0.1])
        data.micro_batch_tokens = 100
        assert data.hparams["micro_batch_tokens"] == "auto"
        assert "seed" not in data.hparams  # the run's

    def test_each_stage_has_its_split(self) -> None:
        data = ChatDataModule()
        stages = ("fit", "validate", "test", "predict")
        assert [data.split_for(stage) for stage in stages] == ["validation", "validation", "test", "test"]
        data.eval_split = "train"
        assert [data.split_for(stage) for stage in stages] == ["validation", "train", "train", "train"]


class TestSplits:
    def test_a_permutation_of_the_first_rows_cut_in_order(self, data: ChatDataModule) -> None:
        order = np.random.default_rng(SPLIT_SEED).permutation(40)
        assert data.splits["train"].rows.tolist() == order[:18].tolist()
        assert data.splits["validation"].rows.tolist() == order[18:27].tolist()
        assert data.splits["test"].rows.tolist() == order[27:35].tolist()  # five rows are in no split
        assert len(data.rows) == 40  # of 80

    def test_or_as_the_lab_split(self, tiny_base: Path, short_chats: Path) -> None:
        data = build(tiny_base, short_chats, split_method="lab", split=[0.5, 0.25, 0.25])
        numbered = datasets.Dataset.from_dict({"row": range(40)}).train_test_split(test_size=0.5, seed=SPLIT_SEED)
        held_out = numbered["test"].train_test_split(test_size=0.5, seed=SPLIT_SEED)
        expected = {"train": numbered["train"], "validation": held_out["train"], "test": held_out["test"]}
        assert {name: s.rows.tolist() for name, s in data.splits.items()} == {
            n: [*e["row"]] for n, e in expected.items()
        }
        assert (data_record(data)["split_method"], data_record(data)["split_seed"]) == ("lab", SPLIT_SEED)

    def test_the_runs_seed_moves_nothing_and_the_splits_seed_does(
        self, data: ChatDataModule, tiny_base: Path, short_chats: Path
    ) -> None:
        same = build(tiny_base, short_chats, seed=SEED + 1)
        other = build(tiny_base, short_chats, split_seed=SPLIT_SEED + 1)
        for name, split in data.splits.items():
            assert same.splits[name].rows.tolist() == split.rows.tolist()
            assert other.splits[name].rows.tolist() != split.rows.tolist()

    def test_a_dropped_row_moves_no_other(
        self, data: ChatDataModule, tiny_base: Path, short_chats: Path, tmp_path: Path
    ) -> None:
        lines = short_chats.read_text().splitlines()
        order = np.random.default_rng(SPLIT_SEED).permutation(40).tolist()
        bad = {"train": [order[0], order[7]], "validation": [order[18]], "test": [order[30]]}
        all_bad = [row for rows in bad.values() for row in rows]
        for row in all_bad:
            lines[row] = '{"nothing": 1}'
        source = tmp_path / "bad.jsonl"
        source.write_text("\n".join(lines))
        dropping = build(tiny_base, source, on_bad_row="drop")
        for name, rows in bad.items():
            kept = [row for row in data.splits[name].rows.tolist() if row not in rows]
            assert dropping.splits[name].rows.tolist() == kept
            assert sorted(dropping.splits[name].dropped) == sorted(rows)
            assert all("keys found: nothing" in reason for reason in dropping.splits[name].dropped.values())
        record = data_record(dropping)["splits"]
        assert {name: split["conversations"] for name, split in record.items()} == {
            "train": 16,
            "validation": 8,
            "test": 7,
        }
        assert sorted(record["train"]["dropped"]) == sorted(map(str, bad["train"]))
        with pytest.raises(LabError, match=rf"bad\.jsonl line {min(all_bad) + 1}: "):
            build(tiny_base, source).prepare(progress=False)

    @pytest.mark.parametrize(
        ("stage", "eval_split", "split", "empty"),
        [
            ("fit", None, [0, 9, 8], "train"),
            ("validate", None, [18, 0, 8], "validation"),
            ("test", None, [18, 9, 0], "test"),
            ("predict", "validation", [18, 0, 8], "validation"),
        ],
    )
    def test_a_split_that_the_stage_needs_and_is_empty(
        self,
        tiny_base: Path,
        short_chats: Path,
        stage: str,
        eval_split: str | None,
        split: list[int],
        empty: str,
    ) -> None:
        data = build(tiny_base, short_chats, split=split, eval_split=eval_split)
        with pytest.raises(LabError, match=rf"^the {empty} split of .*short\.jsonl has no usable conversation"):
            data.setup(stage)

    def test_without_validation_rows_there_is_no_validation(
        self, tiny_base: Path, short_chats: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = build(tiny_base, short_chats, split=[1, 0, 0])
        data.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        data.setup("fit")
        assert not data.trainer.enable_validation
        assert "there will be no best checkpoint, last.ckpt remains" in capsys.readouterr().err
        data.trainer = pl.Trainer(logger=False, callbacks=[EarlyStopping("val_loss")], accelerator="cpu")
        with pytest.raises(LabError, match="early stopping needs a validation split"):
            data.setup("fit")

    def test_a_validation_split_that_is_all_bad_is_an_error(self, tiny_base: Path, tmp_path: Path) -> None:
        good, bad = write(tmp_path / "good.jsonl", [chat("a", "b")] * 6), write(tmp_path / "bad.jsonl", [{"a": 1}])
        data = build(
            tiny_base, good, rows=None, split=[1, 0, 0], validation_source=str(bad), on_bad_row="drop", max_dropped=0.5
        )
        with pytest.raises(LabError, match="the validation split of .* has no usable conversation"):
            data.setup("fit")

    def test_a_split_that_the_stage_does_not_need_may_be_empty(self, tiny_base: Path, short_chats: Path) -> None:
        data = build(tiny_base, short_chats, split=[18, 9, 0])
        data.setup("fit")
        assert data.splits["test"].rows.tolist() == []


class TestGroups:
    """50 conversations, of which each of the first ten is there three times, with one word changed."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        answers = [[f"{i}w{k}" for k in range(20)] for i in range(30)]
        changed = [[*answer[:word], "else", *answer[word + 1 :]] for word in (7, 13) for answer in answers[:10]]
        rows = [chat("Which?", " ".join(answer)) for answer in answers + changed]
        return write(tmp_path_factory.mktemp("groups") / "rows.jsonl", rows)

    def test_near_duplicates_are_in_one_split(
        self, tiny_base: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def dealt(**changes: Any) -> list[list[int]]:
            data = build(tiny_base, source, rows=50, split=[0.6, 0.2, 0.2], **changes)
            data.prepare(progress=True)
            return [part.rows.tolist() for part in data.splits.values()]

        def of_whom(row: int) -> int:
            return row if row < 30 else row % 10

        grouped = dealt(group_duplicates=True)
        assert sorted(row for part in grouped for row in part) == list(range(50))
        assert sum(len(set(map(of_whom, part))) for part in grouped) == 30
        assert dealt(group_duplicates=True) == grouped
        said = capsys.readouterr().err
        shown = "/".join(str(len(part)) for part in grouped)
        assert ("data.group_duplicates: the splits have" in said) == (shown != "30/10/10")
        ungrouped = dealt()
        assert sum(len(set(map(of_whom, part))) for part in ungrouped) > 30
        assert list(map(len, ungrouped)) == [30, 10, 10]

    def test_sizes_that_cannot_be_had_are_said(
        self, tiny_base: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        three = [rows[0], rows[30], rows[40]]
        twice = write(source.with_name("twice.jsonl"), [*three, *rows[1:4]])
        build(tiny_base, twice, rows=None, split=[2, 2, 2], group_duplicates=True).prepare(progress=True)
        said = capsys.readouterr().err
        found = re.search(r"data\.group_duplicates: the splits have (\d)/(\d)/(\d) rows, 2/2/2 were asked for\n", said)
        assert found
        assert sorted(found.groups()) == ["1", "2", "3"]
        alone = write(source.with_name("alone.jsonl"), three)
        with pytest.raises(
            LabError, match=r"leave a split empty: one group of near-duplicates has 3 of 3 rows; set it"
        ):
            build(tiny_base, alone, rows=None, split=[1, 1, 1], group_duplicates=True).prepare(progress=True)

    def test_the_labs_split_is_refused(self, tiny_base: Path, source: Path) -> None:
        with pytest.raises(LabError, match=r"^data\.group_duplicates moves rows, which data\.split_method lab cannot;"):
            build(tiny_base, source, group_duplicates=True, split_method="lab").prepare(progress=False)

    def test_rows_of_other_sources_move_none(self, tiny_base: Path, source: Path) -> None:
        """Rows 0 and 30 are near-duplicates, of each other and of the test source's only row."""
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        train = write(source.with_name("train.jsonl"), [rows[0], *rows[10:29], rows[30]])
        other = str(write(source.with_name("other.jsonl"), [rows[40]]))
        data = build(tiny_base, train, rows=None, split=[18, 3, 0], group_duplicates=True, test_source=other)
        data.prepare(progress=False)
        parts = {name: part.rows.tolist() for name, part in data.splits.items()}
        assert [name for name, part in parts.items() if {0, 20} <= set(part)]
        assert (len(parts["train"]), len(parts["validation"]), parts["test"]) == (18, 3, [21])


class TestSourcesOfTheirOwn:
    """Validation and test rows from other files, in one numbering after those of the source."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, str]:
        counts = {"source": 10, "validation_source": 3, "test_source": 2}
        return {
            key: str(write(tmp_path / f"{key}.jsonl", [chat(f"{key} {i}", "yes") for i in range(count)]))
            for key, count in counts.items()
        }

    def open(self, tiny_base: Path, files: dict[str, str], **changes: Any) -> ChatDataModule:
        settings = {"rows": None, "split": [0.8, 0.1, 0.1], **changes, **files}
        data = build(tiny_base, **settings)
        data.prepare(progress=False)
        return data

    def said(self, data: ChatDataModule, split: str) -> list[str]:
        return [data.rows[row]["messages"][0]["content"] for row in data.splits[split].rows.tolist()]

    def test_each_split_has_its_file(self, tiny_base: Path, files: dict[str, str]) -> None:
        data = self.open(tiny_base, files, rows=9)
        order = np.random.default_rng(SPLIT_SEED).permutation(9).tolist()
        assert self.said(data, "train") == [f"source {i}" for i in order]
        assert self.said(data, "validation") == [f"validation_source {i}" for i in range(3)]
        assert self.said(data, "test") == [f"test_source {i}" for i in range(2)]
        assert data.rows.where(10) == f"{files['validation_source']} line 2"
        assert data.micro_batches("test") == [[0, 1]]

    def test_the_other_split_is_cut_from_the_source(self, tiny_base: Path, files: dict[str, str]) -> None:
        files.pop("validation_source")
        data = self.open(tiny_base, files)
        order = np.random.default_rng(SPLIT_SEED).permutation(10).tolist()
        assert self.said(data, "train") == [f"source {i}" for i in order[:9]]
        assert self.said(data, "validation") == [f"source {order[9]}"]

    def test_counts_must_agree(self, tiny_base: Path, files: dict[str, str]) -> None:
        assert len(self.said(self.open(tiny_base, files, split=[10, 0, 0]), "train")) == 10
        with pytest.raises(LabError, match=r"^data\.split is 8/1/1, but data\.validation_source is set; give 0"):
            self.open(tiny_base, files, split=[8, 1, 1])

    def test_the_fingerprint_knows_what_serves_as_what(self, tiny_base: Path, files: dict[str, str]) -> None:
        apart = self.open(tiny_base, files)
        swapped = self.open(tiny_base, {**files, "validation_source": files["test_source"]})
        together = self.open(tiny_base, {"source": list(files.values())}, split=[1, 0, 0])
        assert list(together.rows) == list(apart.rows)
        assert len({data.tokenized.fingerprint for data in (apart, swapped, together)}) == 3

    def test_of_the_same_hub_data_set_the_split_of_that_name(
        self, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        from lightning_lab import hub

        asked = []

        def load(name: str, **parts: str | None) -> datasets.Dataset:
            asked.append((name, *parts.values()))
            return datasets.Dataset.from_list([chat("a", "b")] * 4)

        monkeypatch.setattr(hub, "load_dataset", load)
        names = {"source": "o/n", "validation_source": "o/n", "test_source": "o/other:dev"}
        self.open(tiny_base, names, source_config="c", source_split="train_sft", revision="0123abc")
        assert asked == [
            ("o/n", "c", "train_sft", "0123abc"),
            ("o/n", "c", "validation", "0123abc"),
            ("o/other", None, "dev", None),
        ]


class TestSummary:
    def bad(self, path: Path, bad: int) -> Path:
        rows = [*[{"text": i} for i in range(bad // 2)], *[{"messages": []}] * (bad - bad // 2)]
        return write(path, [*rows, *[chat("a", "b")] * (90 - bad)])

    def options(self) -> dict[str, Any]:
        return {"rows": None, "split": [0.8, 0.1, 0.1], "on_bad_row": "drop"}

    def test_it_says_what_became_of_the_rows(
        self, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = build(tiny_base, path := self.bad(tmp_path / "a.jsonl", 9), **self.options())
        data.prepare_data()
        text = "\n" + capsys.readouterr().err
        assert f"\n90 rows of {path}: 81 kept, 9 dropped\n" in text
        tokens = int(data.tokenized.lengths.sum())
        assert f"\n{tokens:,} tokens, {int(data.tokenized.supervised.sum()):,} supervised (" in text
        assert "\n0 cut at max_length\n" in text
        assert f"dropped 5: 'messages' is empty ({path} line 5, {path} line 6, {path} line 7 and 2 more)\n" in text
        assert "dropped 4: no 'conversations'" in text

    def test_more_than_a_tenth_is_a_warning(
        self, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = build(tiny_base, path := self.bad(tmp_path / "a.jsonl", 10), **self.options())
        data.prepare_data()
        assert f"warning: 90 rows of {path}: 80 kept, 10 dropped\n" in capsys.readouterr().err

    def test_more_than_half_is_an_error_unless_allowed(self, tiny_base: Path, tmp_path: Path) -> None:
        build(tiny_base, self.bad(tmp_path / "45.jsonl", 45), **self.options()).prepare(progress=False)
        path = self.bad(tmp_path / "60.jsonl", 60)
        reason = rf"dropped 30: 'messages' is empty \({path} line 31, .* and 27 more\)"
        said = rf"^60 of 90 rows of {path} would be dropped, more than data\.max_dropped \(0\.5\) allows: .*{reason}"
        with pytest.raises(LabError, match=said):
            build(tiny_base, path, **self.options()).prepare(progress=False)
        build(tiny_base, path, **self.options(), max_dropped=0.7).prepare(progress=False)


class TestSteps:
    @pytest.mark.parametrize(("limit", "steps"), [(1.0, 5), (0.5, 2), (0.0, 0), (2, 2), (1, 1), (100, 5)])
    def test_an_epoch_ends_where_the_trainer_says(self, data: ChatDataModule, limit: float, steps: int) -> None:
        assert data.steps_per_epoch == STEPS
        data.trainer = at_step(0, limit)
        assert data.steps_per_epoch == steps
        assert len(data.train_dataloader()) == STEPS  # Lightning applies the limit to this

    def test_the_next_epoch_has_its_own_order_also_when_epochs_are_cut(self, data: ChatDataModule) -> None:
        data.trainer = at_step(0, 2)
        assert [data.step_documents(step) for step in range(4)] == [visited(step) for step in (0, 1, 5, 6)]

    @pytest.mark.parametrize("key", ["micro_batch_tokens", "eval_micro_batch_tokens"])
    def test_auto_is_for_the_module_to_replace(self, tiny_base: Path, short_chats: Path, key: str) -> None:
        data = build(tiny_base, short_chats, **{key: "auto"})
        use = (lambda: data.step_batch(0)) if key == "micro_batch_tokens" else (lambda: data.micro_batches("test"))
        with pytest.raises(LabError, match=r"^data\.micro_batch_tokens is still auto"):
            use()
        setattr(data, key, 150)
        assert use()

    def test_documents_are_a_pure_function_of_seed_and_step(
        self, data: ChatDataModule, tiny_base: Path, short_chats: Path
    ) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        for step in (12, 0, 4, 5, 9, 0, 12):
            data.trainer = at_step(step * 3)  # where the run is does not matter
            assert data.step_documents(step) == visited(step)
        assert [len(visited(step)) for step in range(6)] == [4, 4, 4, 4, 2, 4]
        assert sorted(d for step in range(5, 10) for d in data.step_documents(step)) == list(range(18))
        assert data.step_documents(0) != data.step_documents(5)
        later = build(tiny_base, short_chats, seed=SEED + 1)  # its first epoch is this one's second
        assert later.step_documents(1) == data.step_documents(6)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("world_size", [1, 2, 5])
    @pytest.mark.parametrize("step", [0, 4, 7])
    def test_a_step_over_processes(
        self, data: ChatDataModule, train_rows: list[int], world_size: int, step: int
    ) -> None:
        documents = visited(step)
        rows = [train_rows[document] for document in documents]
        batches = [data.step_batch(step, rank, world_size) for rank in range(world_size)]
        micro_batches = [micro for batch in batches for micro in batch.micro_batches]
        assert sorted(d for micro in micro_batches for d in micro.documents) == sorted(documents)
        assert sorted(row for micro in micro_batches for row in micro.rows) == sorted(rows)
        supervised = sum(int((data.tokenized.labels(row)[1:] != -100).sum()) for row in rows)
        tokens = sum(len(data.tokenized.input_ids(row)) for row in rows)
        for batch in batches:  # every process knows the whole step's counts
            assert batch.rows == tuple(rows)
            assert (batch.supervised_tokens, batch.tokens) == (supervised, tokens)
        assert sum(len(micro.targets) for micro in micro_batches) == supervised
        assert sum(micro.input_ids.numel() for micro in micro_batches) == tokens
        assert all(micro.input_ids.numel() <= 150 or len(micro.documents) == 1 for micro in micro_batches)
        assert [bool(batch.micro_batches) for batch in batches] == [r < len(documents) for r in range(world_size)]
        for micro in micro_batches:
            ids = np.concatenate([data.tokenized.input_ids(row) for row in micro.rows])
            assert micro.input_ids[0].tolist() == ids.tolist()
            assert micro.rows == tuple(train_rows[document] for document in micro.documents)

    @pytest.mark.parametrize("world_size", [1, 2, 5, 8])
    def test_an_evaluation_over_processes(self, data: ChatDataModule, world_size: int) -> None:
        lengths = [len(data.tokenized.input_ids(row)) for row in data.splits["test"].rows]
        ranks = [data.micro_batches("test", rank, world_size) for rank in range(world_size)]
        assert all(ranks)  # Lightning evaluates nothing on a process without batches
        bins = [documents for rank in ranks for documents in rank]
        assert sorted(document for documents in bins for document in documents) == list(range(8))
        assert all(sum(lengths[d] for d in documents) <= 150 or len(documents) == 1 for documents in bins)

    def test_fewer_conversations_than_processes(self, data: ChatDataModule) -> None:
        with pytest.raises(LabError, match="^the test split has 8 conversations for 9 processes; use fewer"):
            data.micro_batches("test", 0, 9)

    def test_packing_statistics_by_hand(self, data: ChatDataModule) -> None:
        lengths = [len(data.tokenized.input_ids(row)) for row in data.splits["train"].rows]
        data.micro_batch_tokens = 10_000  # a step is one micro-batch
        statistics = packing_statistics(data)
        assert statistics["optimizer steps an epoch"] == 5
        assert statistics["tokens a step (mean)"] == round(sum(lengths) / 5)
        assert statistics["micro-batches a step (mean)"] == 1.0
        longest = [max(lengths[d] for d in visited(step)) * len(visited(step)) for step in range(5)]
        added = sum(longest) / sum(lengths) - 1
        assert statistics["tokens that padding each step to its longest would add"] == f"{added:.0%}"


def steps_of(loader: StepLoader) -> list[tuple[int, ...]]:
    return [batch.rows for batch in loader]


class TestLoaders:
    def test_training_starts_at_the_step_after_the_last_completed_one(
        self, data: ChatDataModule, train_rows: list[int]
    ) -> None:
        def rows(*steps: int) -> list[tuple[int, ...]]:
            return [tuple(train_rows[document] for document in visited(step)) for step in steps]

        loader = data.train_dataloader()
        assert steps_of(loader) == rows(0, 1, 2, 3, 4)
        data.trainer = at_step(3)
        assert steps_of(loader) == rows(3, 4)
        data.trainer = at_step(5)  # the next epoch, through the same loader
        assert steps_of(loader) == rows(5, 6, 7, 8, 9)
        data.trainer = at_step(14)
        assert steps_of(data.train_dataloader()) == rows(14)
        assert len(loader) == 5

    def test_a_loader_has_nothing_of_its_own_to_resume(self, data: ChatDataModule) -> None:
        loader = data.train_dataloader()
        state = loader.state_dict()
        data.trainer = at_step(4)
        loader.load_state_dict(state)
        assert len(steps_of(loader)) == 1

    def test_workers_give_the_same_batches(self, data: ChatDataModule) -> None:
        data.trainer = at_step(1)
        alone = list(data.train_dataloader())
        data.num_workers = 2
        helped = list(data.train_dataloader())
        assert len(alone) == len(helped) == 4
        for a, b in zip(alone, helped, strict=True):
            assert (a.rows, a.supervised_tokens) == (b.rows, b.supervised_tokens)
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                assert x.documents == y.documents
                for name in ("input_ids", "position_ids", "cu_seqlens", "predicting", "targets", "target_documents"):
                    assert torch.equal(getattr(x, name), getattr(y, name))

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("stop", [3, 5, 7])
    def test_lightning_resumes_at_the_next_step(
        self, tiny_base: Path, short_chats: Path, tmp_path: Path, stop: int, workers: int
    ) -> None:
        """With the iterator made early, as `configure_optimizers` does by asking for the number of steps."""

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.weight = torch.nn.Parameter(torch.zeros(()))
                self.seen: list[tuple[int, ...]] = []

            def training_step(self, batch: Any, batch_idx: int) -> None:
                self.seen.append(batch.rows)
                self.optimizers().step()

            def on_train_batch_end(self, *_: Any) -> None:
                if self.global_step == stop:
                    self.trainer.save_checkpoint(tmp_path / "stop.ckpt")

            def configure_optimizers(self) -> Any:
                assert self.trainer.estimated_stepping_batches == 10
                return torch.optim.SGD(self.parameters(), lr=0.1)

        def seen(**options: Any) -> list[tuple[int, ...]]:
            module = Module()
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = pl.Trainer(max_epochs=2, accelerator="cpu", enable_checkpointing=False, **quiet)
            data = build(tiny_base, short_chats, num_workers=workers)
            data.val_dataloader = lambda: []  # type: ignore[method-assign]
            trainer.fit(module, datamodule=data, **options)
            return module.seen

        whole = seen()
        train = build(tiny_base, short_chats).splits["train"].rows
        assert whole == [tuple(train[visited(step)].tolist()) for step in range(10)]
        assert seen(ckpt_path=tmp_path / "stop.ckpt", weights_only=False) == whole[stop:]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_no_loader_draws_from_the_generator_that_dropout_uses(self, data: ChatDataModule, workers: int) -> None:
        data.num_workers = workers
        torch.manual_seed(1)
        before = torch.get_rng_state()
        for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader):
            assert list(loader())
            assert torch.equal(torch.get_rng_state(), before), loader.__name__

    @pytest.mark.parametrize(
        ("stage", "eval_split", "split"),
        [("fit", "test", "validation"), ("validate", "test", "test"), ("validate", None, "validation")],
    )
    def test_validation_reads_its_split(self, data: ChatDataModule, stage: str, eval_split: Any, split: str) -> None:
        data.eval_split = eval_split
        fn = SimpleNamespace(value=stage)
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=fn), global_rank=0, world_size=1, strategy=ON_CPU)
        rows = [row for micro in data.val_dataloader() for row in micro.rows]
        assert sorted(rows) == sorted(data.splits[split].rows.tolist())


def conversation(*turns: tuple[Any, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


WORKERS = """
import os, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from lightning_lab.data.loading import outlive_signals

loader = DataLoader(range(60), batch_size=None, collate_fn=int, num_workers=2, worker_init_fn=outlive_signals)
numbers = iter(loader)
found = [next(numbers), next(numbers)]  # one of each worker: both have begun
if sys.argv[1] == "signals":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
        # by another process: what the run itself sends, the workers obey
        kill = ["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"]
        subprocess.run(kill, check=True, start_new_session=True)
        time.sleep(0.2)
    found += numbers
    assert found == [*range(60)]
    print("whole")
else:  # ends in the middle of an epoch, with the iterator in a cycle that is not searched for
    class Keep: pass
    keep = Keep()
    keep.numbers, keep.itself = numbers, keep
    print("begun")
"""


class TestWorkers:
    @pytest.mark.parametrize(("case", "said"), [("signals", "whole"), ("exit", "begun")])
    def test_they_outlive_signals_to_the_group_and_end_with_the_run(self, case: str, said: str) -> None:
        command = [sys.executable, "-c", WORKERS, case]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                output, _ = process.communicate(timeout=60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        assert (output, process.returncode) == (f"{said}\n", 0)

    def test_every_loader_with_workers_has_them(self, data: ChatDataModule) -> None:
        assert data.train_dataloader().options["worker_init_fn"] is outlive_signals
        for loader in (data.val_dataloader(), data.test_dataloader()):
            assert loader.worker_init_fn is outlive_signals


class TestPrompts:
    def test_cut_before_the_last_answer(self) -> None:
        turns = (("system", "S"), ("user", "1"), ("assistant", "A"), ("user", "2"), ("assistant", "B"))
        prompt = Prompt.of(7, conversation(*turns))
        assert prompt is not None
        assert (prompt.row, prompt.reference) == (7, "B")
        assert prompt.conversation == conversation(*turns[:4])

    def test_what_follows_the_last_answer_is_left_out(self) -> None:
        prompt = Prompt.of(0, conversation(("user", "1"), ("assistant", "A"), ("user", "2")))
        assert prompt is not None
        assert prompt.conversation == conversation(("user", "1"))
        assert prompt.reference == "A"

    def test_an_answer_to_nothing_is_no_prompt(self) -> None:
        assert Prompt.of(0, conversation(("assistant", "A"))) is None
        assert Prompt.of(0, conversation(("assistant", "A"), ("user", "1"))) is None

    def test_the_first_of_a_split(self, data: ChatDataModule) -> None:
        prompts = data.first_prompts("validation", 2)
        assert [prompt.row for prompt in prompts] == data.splits["validation"].rows[:2].tolist()
        assert len(data.first_prompts("validation", 99)) == 9
        assert data.first_prompts("validation", 0) == []

    def test_a_batch_by_hand(self, data: ChatDataModule) -> None:
        """Against transformers' own template and tokenizer."""
        prompts = data.first_prompts("test", 2)
        batch = data.prompt_batch(prompts)
        assert batch.prompts == prompts
        for prompt, ids in zip(prompts, batch.input_ids, strict=True):
            turns = [{"role": message.role, "content": message.content} for message in prompt.conversation.messages]
            text = data.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert ids == data.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = data.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert batch.stop_ids == sorted({end, data.tokenizer.eos_token_id})
        assert batch.pad_id == data.tokenizer.pad_token_id
        answers = [data.tokenizer("Yes, it is.")["input_ids"] + [end], [end]]
        assert batch.texts(answers) == ["Yes, it is.", ""]

    def test_of_a_split_in_its_order(self, data: ChatDataModule, short_chats: Path) -> None:
        data.eval_split = "validation"
        prompts = [prompt for batch in data.predict_dataloader() for prompt in batch.prompts]
        assert [prompt.row for prompt in prompts] == data.splits["validation"].rows.tolist()
        source = [json.loads(line)["conversations"] for line in short_chats.read_text().splitlines()]
        for prompt in prompts:
            assert prompt.conversation == conversation(("user", source[prompt.row][0]["value"]))
            assert prompt.reference == source[prompt.row][1]["value"]

    def test_of_another_file_without_reading_the_source(self, tiny_base: Path, tmp_path: Path) -> None:
        rows = [chat(f"question {i}", f"answer {i}") for i in range(10)]
        rows[3] = {"prompt": "question 3"}
        path = write(tmp_path / "ask.jsonl", rows)
        data = build(tiny_base, "missing.jsonl", predict_source=str(path))
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn="predict"), strategy=ON_CPU)
        data.prepare_data()
        data.setup("predict")
        batches = [batch.prompts for batch in data.predict_dataloader()]
        assert [[prompt.row for prompt in batch] for batch in batches] == [[*range(8)], [8, 9]]
        assert batches[1][1].conversation == conversation(("user", "question 9"))
        assert batches[1][1].reference == "answer 9"
        assert batches[0][3].conversation == conversation(("user", "question 3"))
        assert batches[0][3].reference is None
        with pytest.raises(LabError, match=r"missing\.jsonl"):
            data.setup("test")  # which does read the source

    def test_a_bad_row_of_another_file_is_named(
        self, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path / "ask.jsonl", [chat("a", "b"), {"messages": [{"role": "user", "content": None}]}])
        missing = r"ask\.jsonl line 2: the content of turn 1 \(user\) is missing"
        with pytest.raises(LabError, match=missing):
            build(tiny_base, "missing.jsonl", predict_source=str(path)).setup("predict")  # before the base is loaded
        data = build(tiny_base, "missing.jsonl", predict_source=str(path), on_bad_row="drop")
        data.setup("predict")
        assert re.search(rf"1 of 2 rows are not answered: .*{missing}", capsys.readouterr().err)
        assert [prompt.row for batch in data.predict_dataloader() for prompt in batch.prompts] == [0]


class TestRowsLeftOut:
    def test_they_are_said_once(self, tiny_base: Path, short_chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = build(tiny_base, short_chats)
        data.prepare(progress=True)
        line = "data.rows: the first 40 of 80 rows are used\n"
        assert capsys.readouterr().err.count(line) == 1
        data.prepare(progress=False)
        build(tiny_base, short_chats, rows=80).prepare(progress=True)
        build(tiny_base, short_chats, rows=None).prepare(progress=True)
        assert "data.rows" not in capsys.readouterr().err


class TestEndOfTurn:
    def test_a_template_without_one_is_warned_of(
        self, tiny_base: Path, short_chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        template = tmp_path / "plain.jinja"
        template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
        build(tiny_base, short_chats, template=str(template)).prepare(progress=True)
        assert "plain.jinja writes no control token after an answer" in capsys.readouterr().err

    def test_a_template_with_one_is_not(
        self, tiny_base: Path, short_chats: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build(tiny_base, short_chats).prepare(progress=True)
        assert "warning" not in capsys.readouterr().err
