import math

import torch

from lightning_lab.training.evaluation import Evaluation, PerConversation


def test_loss_is_weighted_by_tokens_and_hf_loss_by_samples() -> None:
    # nine conversations: one batch of eight with 10 tokens each but the first, and one of a single conversation
    nll = torch.tensor([100.0, *[10.0] * 7, 6.0], dtype=torch.float64)
    tokens = torch.tensor([20, *[10] * 7, 2])
    result = Evaluation(nll, tokens, torch.tensor([5] * 8 + [1]))
    assert result.loss == (100 + 70 + 6) / (20 + 70 + 2)
    assert result.perplexity == math.exp(176 / 92)
    assert math.isclose(result.token_accuracy, 41 / 92)
    first, second = 170 / 90, 6 / 2
    assert math.isclose(result.loss_hf, (8 * first + 1 * second) / 9)


def test_collecting_does_not_depend_on_the_packing() -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(5, (200,), generator=generator)
    nll, correct = torch.rand(200, generator=generator), torch.rand(200, generator=generator) > 0.5
    whole, pieces = PerConversation(5), PerConversation(5)
    whole.update(owner, nll, correct)
    for part in torch.randperm(200, generator=generator).split(33):
        pieces.update(owner[part], nll[part], correct[part])
    a, b = whole.evaluation(), pieces.evaluation()
    assert a.tokens.tolist() == b.tokens.tolist() == torch.bincount(owner, minlength=5).tolist()
    assert a.correct.tolist() == b.correct.tolist()
    torch.testing.assert_close(a.nll, b.nll, atol=1e-12, rtol=0)
    torch.testing.assert_close(a.nll.sum(), nll.double().sum(), atol=1e-12, rtol=0)


def test_one_conversation_is_still_a_list() -> None:
    metric = PerConversation(1)
    metric.update(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    assert metric.evaluation().loss == metric.evaluation().loss_hf == 1.5
