import pytest
import torch

from lightning_lab.training.module import LossScale, linear_schedule


@pytest.mark.parametrize(("warmup", "total"), [(5, 1500), (5, 6), (5, 3), (0, 10)])
def test_the_schedule_is_transformers(warmup: int, total: int) -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert linear_schedule(step, warmup, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_loss_scale_halves_and_doubles() -> None:
    scale = LossScale()
    scale.overflowed()
    assert (scale.value, scale.overflows, scale.overflows_in_a_row) == (2.0**15, 1, 1)
    for _ in range(2_000):
        scale.succeeded()
    assert (scale.value, scale.overflows, scale.overflows_in_a_row) == (2.0**16, 1, 0)
    assert LossScale(**scale.state()) == scale
