"""Figures of an evaluation by hand, whatever the packing."""

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lab.data.batching import Example, collate
from lightning_lab.training.evaluation import Evaluation, EvaluationSums


def test_loss_is_weighted_by_tokens_and_hf_loss_by_samples() -> None:
    # nine conversations: one batch of eight with 10 tokens each but the first, and one of a single conversation
    nll = torch.tensor([100.0, *[10.0] * 7, 6.0], dtype=torch.float64)
    tokens = torch.tensor([20, *[10] * 7, 2])
    result = Evaluation(torch.arange(9), nll, tokens, tokens.double(), torch.tensor([5] * 8 + [1]))
    figures = result.figures("test")
    assert figures["test_loss"] == result.loss == (100 + 70 + 6) / (20 + 70 + 2)
    assert figures["test_perplexity"] == math.exp(176 / 92)
    assert math.isclose(figures["test_token_accuracy"], 41 / 92)
    first, second = 170 / 90, 6 / 2
    assert math.isclose(figures["test_loss_hf"], (8 * first + 1 * second) / 9)
    # in batches of two: the first conversation with one of the others, three of 20 / 20, and the last alone
    in_pairs = replace(result, hf_batch_size=2).figures("test")
    assert math.isclose(in_pairs.pop("test_loss_hf"), (2 * 110 / 30 + 3 * 2 * 1 + 1 * second) / 9)
    assert in_pairs.items() <= figures.items()


def test_sums_do_not_depend_on_the_packing_and_keep_the_splits_order() -> None:
    generator = torch.Generator().manual_seed(0)
    counts, rows = [3, 7, 1, 5, 4], [40, 10, 30, 20, 0]
    nll = [torch.rand(n, generator=generator) for n in counts]
    correct = [torch.rand(n, generator=generator) > 0.5 for n in counts]
    found = []
    for packing in ([[0, 1, 2, 3, 4]], [[4], [1, 3], [0, 2]], [[3], [2], [1], [0], [4]]):
        sums = EvaluationSums(keep_tokens=True)
        for documents in packing:
            add(sums, documents, rows, nll, correct)
        found.append(sums.evaluation(world_size=1))
    for evaluation in found:
        assert evaluation.rows.tolist() == rows
        assert evaluation.tokens.tolist() == counts
        assert evaluation.correct.tolist() == [int(c.sum()) for c in correct]
        assert evaluation.nll.tolist() == [n.double().sum().item() for n in nll]
        assert evaluation.token_nll is not None
        assert evaluation.token_nll.tolist() == [value for n in nll for value in n.tolist()]


def add(
    sums: EvaluationSums, documents: list[int], rows: list[int], nll: list[torch.Tensor], correct: list[torch.Tensor]
) -> None:
    """Add a micro-batch of some conversations."""
    sizes = [len(nll[d]) for d in documents]
    examples = [Example(np.zeros(size + 1, np.int32), np.r_[-100, np.ones(size, np.int32)]) for size in sizes]
    batch = collate(examples, documents, [rows[d] for d in documents])
    sums.add(batch, torch.cat([nll[d] for d in documents]), torch.cat([correct[d] for d in documents]))


def test_tokens_are_gathered_in_the_splits_order_and_kept_apart_with_their_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, nll = [7, 5, 3], [torch.tensor(values) for values in ([1.0, 2.0], [4.0], [8.0, 16.0, 32.0])]
    correct = [values > 3 for values in nll]
    sent: list[bytes] = []

    def gather(shares: list[Any], own: Any) -> None:
        sent.append(pickle.dumps(own))
        shares[:] = [pickle.loads(share) for share in [*sent, *[pickle.dumps([])] * (len(shares) - len(sent))]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for documents in ([2, 1], [0]):  # each process's share
        sums = EvaluationSums([5], keep_tokens=True)
        add(sums, sorted(documents), rows, nll, correct)
        result = sums.evaluation(world_size=2)
    assert result.trained is not None
    for part, of in ((result, {7: [1.0, 2.0], 3: [8.0, 16.0, 32.0]}), (result.trained, {5: [4.0]})):
        assert part.rows.tolist() == list(of)
        assert part.token_nll is not None
        assert part.token_nll.tolist() == [value for values in of.values() for value in values]
    without = EvaluationSums()
    add(without, [0], rows, nll, correct)
    assert without.evaluation(1).token_nll is None


def test_one_conversation_is_still_a_list() -> None:
    sums = EvaluationSums()
    batch = collate([Example(np.arange(3, dtype=np.int32), np.array([-100, 1, 2], np.int32))], [0], [9])
    sums.add(batch, torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    result = sums.evaluation(world_size=1)
    assert result.loss == result.loss_hf == 1.5
    assert result.hf_batch_size == 8
    assert sums.evaluation(1, hf_batch_size=2).hf_batch_size == 2
    assert result.rows.tolist() == [9]
