"""The adapters' weights, and their gradients, end to end in one tensor: one optimizer kernel, one message to others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# bitsandbytes keeps 8-bit optimizer state in blocks of so many values, and that of smaller tensors in 32 bits.
BLOCK = 256
LEAST_8BIT = 4096


class FlatWeights:
    """Weights that lie end to end in one tensor, each beginning with a block of 8-bit optimizer state.

    The gaps between them are 0, so an optimizer that updates the whole gives each weight the bits that it would have by
    itself. Weights too small for 8-bit state stay where they are.

    Args:
        weights: The adapters', float32, on one device. From now on each large one is a view of the whole.

    Attributes:
        weights: As given.
        parameters: What an optimizer is to update: the whole, and the small weights.

    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = list(weights)
        self._large = [weight for weight in weights if weight.numel() >= LEAST_8BIT]
        self._small = [weight for weight in weights if weight.numel() < LEAST_8BIT]
        # of each large weight, and of the gap behind it
        self._sizes = [size for weight in self._large for size in (weight.numel(), -weight.numel() % BLOCK)]
        self._gathered: Tensor | None = None
        self._whole = nn.Parameter(self.weights[0].new_zeros(sum(self._sizes)))
        self.parameters = [self._whole, *self._small] if self._large else self._small
        self._lay_out()

    def release(self) -> None:
        """Let go of all that the weights, which have been moved elsewhere, do not need."""
        self._clear_gradients()
        self._whole.data = self._whole.data.new_empty(0)

    def begin_step(self) -> None:
        """Let go of the gradients of the step before, and see that the weights are where the optimizer finds them."""
        self._clear_gradients()
        self._lay_out()

    def _clear_gradients(self) -> None:
        self._gathered = None
        for weight in (self._whole, *self.weights):
            weight.grad = None

    @torch.no_grad()
    def _lay_out(self) -> None:
        """Put each large weight into the whole unless it lies there: what replaces a weight's data takes it out."""
        for weight, view in zip(self._large, self._whole.detach().split(self._sizes)[::2], strict=True):
            if weight.data_ptr() != view.data_ptr():
                view.copy_(weight.reshape(-1))
                weight.data = view.view_as(weight)

    def gather_gradients(self, scalar: Tensor) -> Tensor:
        """Lay the gradients (0 where there is none) end to end, with a scalar behind them.

        Args:
            scalar: float32, on the weights' device.

        Returns:
            ``[values + 1]`` float32. The gradients of `weights` and of `parameters` are views of it from now on.

        """
        pieces = []
        for weight in (*self._large, *self._small):
            pieces.append((torch.zeros_like(weight) if weight.grad is None else weight.grad).reshape(-1))
            if weight.numel() >= LEAST_8BIT and weight.numel() % BLOCK:
                pieces.append(scalar.new_zeros(-weight.numel() % BLOCK))
        gathered = torch.cat([*pieces, scalar[None]])
        self._gathered = gathered
        self._whole.grad = gathered[: len(self._whole)]
        views = self._whole.grad.split(self._sizes)[::2]
        views += gathered[len(self._whole) : -1].split([weight.numel() for weight in self._small])
        for weight, view in zip((*self._large, *self._small), views, strict=True):
            weight.grad = view.view_as(weight)
        return gathered

    def scale_gradients(self, factor: float) -> None:
        """Multiply what was gathered."""
        assert self._gathered is not None
        self._gathered.mul_(factor)
