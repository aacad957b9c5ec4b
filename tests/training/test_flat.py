"""Weights and gradients end to end: the same bits as tensor by tensor, and no waiting for the device."""

from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from lightning_lab.training.adamw_8bit import AdamW8bitAsync
from lightning_lab.training.flat import LEAST_8BIT, FlatWeights

# Of 256-blocks exactly, with a remainder, too small for 8-bit state, and just large enough.
SHAPES = ((32, 128), (57, 91), (8, 16), (1, LEAST_8BIT), (5, LEAST_8BIT // 4 + 1), (300,))
KEYS: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def random_weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator) * 10.0 ** (step % 5 - 3)


def flat_step(flat: FlatWeights, optimizer: torch.optim.Optimizer, step: int) -> None:
    flat.begin_step()
    give_gradients(flat.weights, step)
    flat.gather_gradients(torch.zeros(()))
    optimizer.step()


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW8bitAsync, AdamW8bit), (torch.optim.AdamW, torch.optim.AdamW)])
def test_twenty_steps_are_bit_equal_to_tensor_by_tensor(ours: Any, theirs: Any) -> None:
    expected, flat = random_weights(), FlatWeights(random_weights())
    reference, optimizer = theirs(expected, **KEYS), ours(flat.parameters, **KEYS)
    for step in range(20):
        give_gradients(expected, step)
        reference.step()
        flat_step(flat, optimizer, step)
        assert all(torch.equal(a, b) for a, b in zip(flat.weights, expected, strict=True))


def test_8_bit_state_is_saved_and_loaded() -> None:
    whole, first, second = (FlatWeights(random_weights()) for _ in range(3))
    through = AdamW8bitAsync(whole.parameters, **KEYS)
    before, after = AdamW8bitAsync(first.parameters, **KEYS), AdamW8bitAsync(second.parameters, **KEYS)
    for step in range(6):
        flat_step(whole, through, step)
    for step in range(3):
        flat_step(first, before, step)
    assert before.state[first.parameters[0]]["state1"].dtype == torch.uint8
    after.load_state_dict(before.state_dict())
    for to, of in zip(second.weights, first.weights, strict=True):
        to.data.copy_(of)
    for step in range(3, 6):
        flat_step(second, after, step)
    assert all(torch.equal(a, b) for a, b in zip(second.weights, whole.weights, strict=True))


def test_the_step_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda tensor: waited.append("waited"))
    for kind, times in ((AdamW8bit, len(SHAPES)), (AdamW8bitAsync, 0)):
        weights = random_weights()
        give_gradients(weights, 0)
        waited.clear()
        kind(weights, **KEYS).step()
        assert len(waited) == times


def test_one_message_holds_all_gradients_and_the_scalar() -> None:
    weights = random_weights()
    flat = FlatWeights(weights)
    give_gradients(weights, 0)
    weights[1].grad = None
    expected = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    message = flat.gather_gradients(torch.tensor(7.5))
    assert message[-1] == 7.5
    assert message.abs().sum() - 7.5 == pytest.approx(sum(each.abs().sum().item() for each in expected), rel=1e-5)
    flat.scale_gradients(2.0)  # what is done to the message is done to everybody's gradient
    for weight, gradient in zip(weights, expected, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, 2 * gradient)
    assert all(parameter.grad is not None for parameter in flat.parameters)
    flat.begin_step()
    assert all(each.grad is None for each in (*weights, *flat.parameters))


def test_each_weight_begins_with_a_block() -> None:
    flat = FlatWeights(random_weights())
    starts = {w.storage_offset() % 256 for w in flat.weights if w.numel() >= LEAST_8BIT}
    assert starts == {0}
    assert all(torch.equal(a, b) for a, b in zip(flat.weights, random_weights(), strict=True))


def test_a_weight_whose_data_was_replaced_is_trained_all_the_same() -> None:
    flat = FlatWeights(random_weights())
    optimizer = AdamW8bitAsync(flat.parameters, **KEYS)
    replaced = torch.full_like(flat.weights[0], 3.0)
    flat.weights[0].data = replaced
    flat.begin_step()
    assert torch.equal(flat.weights[0], replaced)
    flat_step(flat, optimizer, 0)
    assert not torch.equal(flat.weights[0], replaced)


def test_small_weights_alone() -> None:
    weights = [nn.Parameter(torch.ones(3, 5))]
    flat = FlatWeights(weights)
    assert flat.parameters == weights
    flat_step(flat, AdamW8bitAsync(flat.parameters, **KEYS), 0)
    assert not torch.equal(weights[0], torch.ones(3, 5))
