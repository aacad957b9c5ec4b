"""Figures of an evaluation by hand, whatever the packing."""

import math
from dataclasses import replace

import numpy as np
import torch

from lightning_lab.data.batching import collate
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
        sums = EvaluationSums()
        for documents in packing:
            examples = [
                (np.zeros(counts[d] + 1, np.int32), np.r_[-100, np.ones(counts[d], np.int32)]) for d in documents
            ]
            batch = collate(examples, documents, [rows[d] for d in documents])
            sums.add(batch, torch.cat([nll[d] for d in documents]), torch.cat([correct[d] for d in documents]))
        found.append(sums.evaluation(world_size=1))
    for evaluation in found:
        assert evaluation.rows.tolist() == rows
        assert evaluation.tokens.tolist() == counts
        assert evaluation.correct.tolist() == [int(c.sum()) for c in correct]
        assert evaluation.nll.tolist() == [n.double().sum().item() for n in nll]


def test_one_conversation_is_still_a_list() -> None:
    sums = EvaluationSums()
    batch = collate([(np.arange(3, dtype=np.int32), np.array([-100, 1, 2], np.int32))], [0], [9])
    sums.add(batch, torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    result = sums.evaluation(world_size=1)
    assert result.loss == result.loss_hf == 1.5
    assert result.hf_batch_size == 8
    assert sums.evaluation(1, hf_batch_size=2).hf_batch_size == 2
    assert result.rows.tolist() == [9]
