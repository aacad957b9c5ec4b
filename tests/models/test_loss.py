import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_lab.models import cpu, loss
from lightning_lab.models.loss import supervised_nll, supervised_nll_sum

VOCABULARY, HIDDEN = 97, 16


@pytest.fixture(autouse=True)
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the positions in a chunk of logits; 5 otherwise."""

    def set_rows(rows: int) -> None:
        monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", rows * VOCABULARY)

    set_rows(5)
    return set_rows


def _inputs(positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    return hidden, head, torch.randint(VOCABULARY, (positions,), generator=generator)


@pytest.mark.parametrize("positions", [1, 7, 10, 23])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_value_and_gradient_equal_whole_logits(
    positions: int, chunk_rows: int, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(chunk_rows)
    hidden, head, targets = _inputs(positions)
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(3.0 * expected, hidden)
    total = supervised_nll_sum(hidden, head, targets)
    (gradient,) = torch.autograd.grad(3.0 * total, hidden)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_no_chunk_has_one_row_alone(chunks_of: Callable[[int], None]) -> None:
    chunks_of(7)
    head = torch.empty(VOCABULARY, HIDDEN)
    for positions in range(2, 60):
        sizes = [len(range(positions)[chunk]) for chunk in loss._chunks(positions, head, compiled=True)]
        assert sum(sizes) == positions
        assert 1 < min(sizes) <= max(sizes) <= 7


def test_chunks_grow_with_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """T4, RTX 4090, A100: 261, 523 and 1,046 positions of Llama-3's vocabulary."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for index, (mib, rows) in enumerate(((15_102, 261), (24_217, 523), (81_251, 1046))):
        properties = SimpleNamespace(total_memory=mib * 2**20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert loss.chunk_rows(128_256, torch.device("cuda", 90 + index)) == rows


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_reach_value_and_gradient(chunks_of: Callable[[int], None], compiled: bool) -> None:
    chunks_of(5)
    hidden, head, targets = _inputs(13)
    weights = torch.tensor([0.0, 0.25, 1.0, 3.0] * 4)[:13]
    expected = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    total = supervised_nll_sum(hidden, head, targets, 8.0, compiled=compiled, weights=weights)
    (gradient,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, 8.0 * expected_gradient, atol=1e-5, rtol=1e-5)


def test_no_positions_is_zero_with_a_graph() -> None:
    hidden, head, targets = _inputs(0)
    total = supervised_nll_sum(hidden, head, targets)
    assert total.item() == 0.0
    total.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


def test_scaling_reaches_the_gradient_before_it_is_rounded_to_half() -> None:
    # the target is nearly certain, the others' probabilities (about 1e-8) are 0 in float16
    hidden = torch.zeros(1, HIDDEN, dtype=torch.float16)
    hidden[0, 0] = 18.0
    hidden.requires_grad_()
    head = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float16)
    head[5, 0] = 1.0
    head[6:, 1] = 1.0
    targets, scale = torch.tensor([5]), 2.0**14
    probability = math.exp(-18.0) / (1 + (VOCABULARY - 1) * math.exp(-18.0))
    expected = probability * (VOCABULARY - 6) * scale
    unscaled = supervised_nll_sum(hidden, head, targets)
    scaled = supervised_nll_sum(hidden, head, targets, gradient_scale=scale)
    assert scaled.item() == unscaled.item()
    (gradient,) = torch.autograd.grad(scaled, hidden)
    assert math.isclose(gradient[0, 1].item(), expected, rel_tol=0.01)
    (late,) = torch.autograd.grad(unscaled * scale, hidden)  # scaling the loss instead comes too late
    assert not math.isclose(late[0, 1].item(), expected, rel_tol=0.01)


def test_bfloat16_error_is_no_larger_than_whole_logits() -> None:
    exact, exact_head, targets = _inputs(50)
    truth = F.cross_entropy(exact @ exact_head.T, targets, reduction="sum")
    (true_gradient,) = torch.autograd.grad(truth, exact)
    hidden, head = exact.detach().bfloat16().requires_grad_(), exact_head.bfloat16()
    whole = F.cross_entropy((hidden @ head.T).float(), targets, reduction="sum")
    (whole_gradient,) = torch.autograd.grad(whole, hidden)
    chunked = supervised_nll_sum(hidden, head, targets)
    (gradient,) = torch.autograd.grad(chunked, hidden)
    assert (chunked - truth).abs() <= (whole - truth).abs() * 1.01 + 1e-4
    assert (gradient.float() - true_gradient).norm() <= (whole_gradient.float() - true_gradient).norm() * 1.01


def test_evaluation_gives_each_token() -> None:
    hidden, head, targets = _inputs(23)
    logits = (hidden @ head.T).detach()
    targets[::2] = logits[::2].argmax(-1)
    nll, correct = supervised_nll(hidden, head, targets)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=1e-5)
    assert correct.tolist() == (logits.argmax(-1) == targets).tolist()
    assert 12 <= int(correct.sum()) < 23
    assert not nll.requires_grad


def test_logits_never_exist_whole() -> None:
    shapes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCABULARY,) and out.shape[0] != HIDDEN
            ):  # head.T has that shape
                shapes.append(out.shape[0])
            return out

    hidden, head, targets = _inputs(40)
    with Watch():
        supervised_nll_sum(hidden, head, targets).backward()
        supervised_nll(hidden, head, targets)
    assert shapes
    assert max(shapes) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_not_agree(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    counters.clear()
    for positions in (23, 1, 8):  # chunks of 5, and shorter ones
        hidden, head, targets = _inputs(positions, dtype)
        targets[::2] = (hidden @ head.T)[::2].argmax(-1)
        found = []
        for compiled in (False, True):
            total = supervised_nll_sum(hidden, head, targets, 4.0, compiled=compiled)
            (gradient,) = torch.autograd.grad(total, hidden)
            found.append((total.detach(), gradient, *supervised_nll(hidden, head, targets, compiled=compiled)))
        off, on = found
        rounding = 0.01 if dtype == torch.bfloat16 else 1e-5  # of the gradient; the rest is float32 either way
        torch.testing.assert_close(on[1], off[1], rtol=rounding, atol=rounding)
        torch.testing.assert_close((on[0], *on[2:]), (off[0], *off[2:]), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 4  # of both functions, for any number of rows
