"""The loss scale against torch's own."""

import inspect

import torch

from lightning_lab.training.optim import LossScale


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
        assert ours.overflows_in_a_row == 0
