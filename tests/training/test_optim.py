"""The schedule and the loss scale, against transformers' and torch's own."""

import inspect

import pytest
import torch

from lightning_lab.training.optim import LossScale, linear_schedule


class TestSchedule:
    @pytest.mark.parametrize(("total", "warmup"), [(1500, 5), (6, 5), (5, 5), (3, 5), (1, 5), (1, 0), (10, 0), (7, 1)])
    def test_transformers_has_the_same(self, total: int, warmup: int) -> None:
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        factor = get_linear_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
        for step in [*range(min(total, 20)), total - 1, total, total + 3]:
            assert linear_schedule(step, warmup, total) == factor(step)

    def test_by_hand(self) -> None:
        assert [linear_schedule(step, 2, 6) for step in range(8)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        assert [linear_schedule(step, 4, 2) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]  # still warming up


class TestLossScale:
    def test_the_constants_are_torchs(self) -> None:
        torchs = inspect.signature(torch.amp.GradScaler).parameters
        assert LossScale().value == torchs["init_scale"].default == 65536.0
        scale = LossScale()
        for _ in range(torchs["growth_interval"].default - 1):
            scale.succeeded()
        assert scale.value == 65536.0
        scale.succeeded()
        assert scale.value == 65536.0 * torchs["growth_factor"].default
        scale.overflowed()
        assert scale.value == 65536.0 * 2 * torchs["backoff_factor"].default == 65536.0

    def test_it_moves_as_torchs(self) -> None:
        """Through 6,100 steps with overflows alone, in a row, and one short of and just after a doubling."""
        ours = LossScale()
        value, tracker = torch.tensor(65536.0), torch.tensor(0, dtype=torch.int32)
        overflowing = {0, 1, 7, 2007, 4008, 4009}
        doubled = False
        for step in range(6_100):
            found = torch.tensor(float(step in overflowing))
            torch._amp_update_scale_(value, tracker, found, 2.0, 0.5, 2000)
            before = ours.value
            ours.overflowed() if step in overflowing else ours.succeeded()
            doubled |= ours.value > before
            assert (ours.value, ours.good_steps) == (value.item(), tracker.item()), step
        assert doubled
        assert (ours.overflows, ours.overflows_in_a_row) == (6, 0)
