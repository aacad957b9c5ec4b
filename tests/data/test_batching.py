from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities import move_data_to_device

from lightning_lab.data.batching import Example, StepBatch, collate, epoch_order, pack, share, split_rows, split_sizes
from lightning_lab.errors import LabError

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 256))
def test_packing_keeps_every_document_once_and_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(i for documents in bins for i in documents) == list(range(len(lengths)))
    for documents in bins:
        assert sum(lengths[i] for i in documents) <= budget or len(documents) == 1


def test_a_document_over_the_budget_is_alone() -> None:
    assert pack([10, 600, 20], 512) == [[1], [0, 2]]


def test_packing_fills_before_it_opens() -> None:
    assert pack([6, 4, 5, 5], 10) == [[0, 1], [2, 3]]


@given(LENGTHS, st.integers(1, 5))
def test_sharing_keeps_every_document_once_and_is_even(lengths: list[int], processes: int) -> None:
    dealt = share(lengths, processes)
    assert len(dealt) == processes
    assert sorted(i for mine in dealt for i in mine) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(lengths)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 256))
def test_each_process_packs_its_share(lengths: list[int], processes: int, budget: int) -> None:
    for rank, mine in enumerate(share(lengths, processes)):
        bins = pack([lengths[i] for i in mine], budget)
        assert pack(lengths, budget, rank, processes) == [[mine[i] for i in documents] for documents in bins]


def test_more_processes_than_documents_leaves_some_empty() -> None:
    assert share([5], 3) == [[0], [], []]


def test_order_is_hugging_faces() -> None:
    # recorded from accelerate's SeedableRandomSampler at N = 100,000, seed 3407, epoch 0
    recorded = [60459, 64297, 22049, 75835, 81979, 24360, 91018, 34859, 37512, 57153, 72333, 72266, 91106, 70192]
    assert epoch_order(100_000, 3407, 0)[:14].tolist() == recorded
    assert (
        epoch_order(100, 3407, 1).tolist() == epoch_order(100, 3408, 0).tolist() != epoch_order(100, 3407, 0).tolist()
    )


def test_collating_by_hand() -> None:
    examples = [
        Example(np.array([1, 2, 3, 4], np.int32), np.array([-100, -100, 3, 4], np.int32)),
        Example(np.array([5, 6, 7], np.int32), np.array([5, -100, 7], np.int32)),  # the first label is no target
    ]
    batch = collate(examples, documents=[8, 9], rows=[80, 90])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.predicting.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [3, 4, 7]
    assert batch.target_documents.tolist() == [0, 0, 1]
    assert (batch.document_lengths, batch.target_counts) == ((4, 3), (2, 1))
    assert (batch.documents, batch.rows) == ((8, 9), (80, 90))


def test_collating_weights_and_a_conversation_of_two_documents_by_hand() -> None:
    def example(ids: list[int], labels: list[int], *rest: Any) -> Example:
        return Example(np.array(ids, np.int32), np.array(labels, np.int32), *rest)

    weighted = example([1, 2, 3], [-100, 2, 3], np.array([0, 0.5, 2], np.float32))
    two = example([4, 5, 6, 7, 8], [-100, 5, 6, -100, 8], None, [2])  # 6 begins the second document: no target
    batch = collate([weighted, two], documents=[0, 1], rows=[0, 1])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.predicting.tolist() == [0, 1, 3, 6]
    assert batch.targets.tolist() == [2, 3, 5, 8]
    assert batch.target_documents.tolist() == [0, 0, 1, 1]
    assert (batch.document_lengths, batch.target_counts) == ((3, 2, 3), (2, 2))
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5, 2, 1, 1]
    scaled = collate([weighted, two], [0, 1], [0, 1], factors=[2.0, 0.25]).weights
    assert scaled is not None
    assert scaled.tolist() == [1, 4, 0.25, 0.25]
    assert collate([two], [1], [1]).weights is None


def test_moving_a_step_moves_its_tensors() -> None:
    micro = collate([Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))], [0], [0])
    step = move_data_to_device(StepBatch((micro,), rows=(0,), tokens=2, supervised_tokens=1), torch.device("meta"))
    assert isinstance(step, StepBatch)
    assert step.micro_batches[0].input_ids.is_meta
    assert step.micro_batches[0].targets.is_meta
    assert step.micro_batches[0].document_lengths == (2,)


class TestSplitSizes:
    @pytest.mark.parametrize(
        ("split", "rows", "sizes"),
        [
            ([12_000, 1_500, 1_500], 15_000, [12_000, 1_500, 1_500]),
            ([10, 5, 0], 40, [10, 5, 0]),  # counts may leave rows over
            ([10.0, 5.0, 2.0], 17, [10, 5, 2]),  # YAML's 10.0 is a count
            ([0.8, 0.1, 0.1], 503, [403, 50, 50]),
            ([0.7, 0.2, 0.1], 10, [7, 2, 1]),  # in floats these add up to less than 1
            ([0.1, 0.2, 0.7], 10, [1, 2, 7]),  # and these to more
            ([0.5, 0.25, 0.25], 11, [5, 3, 3]),  # 2.75 rounds to 3, training takes the rest
            ([0.5, 0.25, 0.0], 8, [4, 2, 0]),  # a sum below 1 leaves rows over
            ([0, 0, 1], 7, [0, 0, 7]),
        ],
    )
    def test_sizes(self, split: list[int | float], rows: int, sizes: list[int]) -> None:
        assert split_sizes(split, rows, "x") == sizes

    @pytest.mark.parametrize(
        ("split", "message"),
        [
            ([1, 2], r"^data\.split is 1/2; give three sizes or three fractions"),
            ([1, 2, 3, 4], r"^data\.split is 1/2/3/4; give three"),
            ([0, 0, 0], r"^data\.split is 0/0/0; give three"),
            ([10, 1.5, 1], r"^data\.split is 10/1\.5/1; counts must be whole numbers"),
            ([0.9, 0.1, 0.1], r"^data\.split is 0\.9/0\.1/0\.1; counts must be whole numbers, and fractions add up"),
            ([38, 1, 2], r"asks for 41 rows \(38/1/2\), but here\.jsonl gives 40; lower data\.split, raise data\.rows"),
        ],
    )
    def test_what_cannot_be_split_is_said(self, split: list[int | float], message: str) -> None:
        with pytest.raises(LabError, match=message):
            split_sizes(split, 40, "here.jsonl")

    @pytest.mark.parametrize("rows", [3, 7])
    def test_no_split_is_negative(self, rows: int) -> None:
        sizes = split_sizes([0, 0.5, 0.5], rows, "x")
        assert min(sizes) >= 0
        assert sum(sizes) == rows


class TestTheLabsSplit:
    """Against ``datasets`` itself, split twice with one seed: the second split's train rows are for validation."""

    @staticmethod
    def twice(rows: int, held_out: float, test: float, train: float | None = None) -> list[list[int]]:
        numbered = datasets.Dataset.from_dict({"row": range(rows)})
        first = numbered.train_test_split(test_size=held_out, train_size=train, seed=42)
        second = first["test"].train_test_split(test_size=test, seed=42)
        return [list(part["row"]) for part in (first["train"], second["train"], second["test"])]

    @pytest.mark.parametrize(
        ("rows", "split", "options"),
        [
            (15_000, [12_000, 1_500, 1_500], (0.2, 0.5)),
            (15_000, [0.8, 0.1, 0.1], (0.2, 0.5)),
            *((rows, [0.8, 0.1, 0.1], (0.2, 0.5)) for rows in (7, 11, 15, 503, 4_017)),
            *((rows, [0.7, 0.2, 0.1], (0.3, 1 / 3)) for rows in (10, 503)),
            (101, [0.85, 0.12, 0.03], (0.15, 0.2)),
            (99, [0.29, 0.35, 0.35], (0.7, 0.5, 0.29)),
            (50, [20, 7, 5], (12, 5, 20)),
        ],
    )
    def test_is_that_of_datasets(self, rows: int, split: list[int | float], options: Any) -> None:
        sizes = split_sizes(split, rows, "x", "lab")
        found = split_rows(sizes, rows, 42, {}, "lab")
        assert [part.rows.tolist() for part in found.values()] == self.twice(rows, *options)

    def test_a_dropped_row_moves_no_other(self) -> None:
        whole, less = (split_rows([5, 3, 2], 10, 42, dropped, "lab") for dropped in ({}, {4: "bad"}))
        for name, part in whole.items():
            assert less[name].rows.tolist() == [row for row in part.rows.tolist() if row != 4]
        assert [part.dropped for part in less.values() if part.dropped] == [{4: "bad"}]

    @pytest.mark.parametrize("split", [[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1.0], [0.29, 0.71, 0.0], [0.93, 0.07, 0.0]])
    def test_any_fractions_keep_within_the_rows(self, split: list[float]) -> None:
        for rows in (1, 9, 100):
            sizes = split_sizes(split, rows, "x", "lab")
            assert min(sizes) >= 0
            assert sum(sizes) <= rows
            parts = split_rows(sizes, rows, 42, {}, "lab").values()
            assert [len(part.rows) for part in parts] == sizes
            assert len({row for part in parts for row in part.rows.tolist()}) == sum(sizes)


class TestGroups:
    """Rows of a group go to one split. By hand with the permutation by seed 0 of eight rows, 2 4 3 6 5 0 1 7."""

    def dealt(self, sizes: list[int], groups: list[int], seed: int = 0) -> list[list[int]]:
        parts = split_rows(sizes, len(groups), seed, {}, groups=np.array(groups)).values()
        return [part.rows.tolist() for part in parts]

    def test_each_row_alone_is_the_permutation(self) -> None:
        assert self.dealt([4, 2, 1], list(range(8))) == [[2, 4, 3, 6], [5, 0], [1]]

    def test_a_group_goes_to_the_first_split_with_room(self) -> None:
        """2, 0 and 7 leave one place in train, so that 4 and 1 go to validation; 5 comes when all is full."""
        assert self.dealt([4, 2, 1], [9, 1, 9, 3, 1, 5, 6, 9]) == [[2, 3, 0, 7], [4, 1], [6]]

    def test_a_group_that_fits_nowhere_goes_where_most_room_is(self) -> None:
        assert self.dealt([3, 3, 2], [0, 1, 9, 9, 9, 9, 9, 7]) == [[2, 4, 3, 6, 5], [0, 1, 7], []]

    @given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 9))
    def test_no_group_is_divided(self, groups: list[int], seed: int) -> None:
        parts = self.dealt(split_sizes([0.6, 0.2, 0.2], len(groups), "x"), groups, seed)
        assert sorted(row for part in parts for row in part) == list(range(len(groups)))
        assert sum(len({groups[row] for row in part}) for part in parts) == len(set(groups))
        order = np.random.default_rng(seed).permutation(len(groups)).tolist()
        assert all(part == sorted(part, key=order.index) for part in parts)
