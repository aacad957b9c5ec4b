"""One autograd function per QLoRA linear: y = x W^T + scale (x A^T) B^T, W kept in 4 bits.

PEFT's own layer runs the base and the adapter one after another: in 16 bits it keeps a float32 copy of the input for
each of a decoder layer's seven linears, and it passes four times over the output to scale, round, clone and add. Here
the input is kept as it is (query, key and value then share one tensor), the adapter's products go straight into the
base's result, W is dequantised again in the backward pass, and nothing is computed for the frozen W.

The layers reach PEFT as registered custom modules, its way to accept layers from outside
(https://huggingface.co/docs/peft/developer_guides/custom_models), and inherit merging, saving and everything else from
the ones they stand in for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import bitsandbytes as bnb
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class NF4(NamedTuple):
    """A doubly quantised NF4 weight as plain tensors (arXiv:2305.14314; the layout is that of bitsandbytes).

    Attributes:
        packed: uint8, two weights a byte.
        absmax: ``[blocks]`` uint8, each block's scale, quantised itself.
        absmax_code: ``[256]`` float32, what its codes stand for.
        absmax_absmax: ``[blocks of absmax]`` float32.
        absmax_offset: float32 scalar.
        shape: ``(out_features, in_features)``.
        blocksize: Weights that share a scale.
        absmax_blocksize: Scales that share a scale.

    """

    packed: Tensor
    absmax: Tensor
    absmax_code: Tensor
    absmax_absmax: Tensor
    absmax_offset: Tensor
    shape: Sequence[int]
    blocksize: int
    absmax_blocksize: int

    @classmethod
    def of(cls, layer: nn.Module) -> "NF4 | None":
        """Read a bitsandbytes layer; None where it is not doubly quantised NF4 (or repacked for inference)."""
        state = getattr(layer.weight, "quant_state", None)
        if state is None or not state.nested or state.quant_type != "nf4":
            return None
        if getattr(state, "packing_format_for_cpu", False):
            return None
        inner = state.state2
        return cls(
            cast(Tensor, layer.weight).data,
            state.absmax,
            inner.code,
            inner.absmax,
            state.offset,
            tuple(state.shape),
            state.blocksize,
            inner.blocksize,
        )


def dequantise(weight: NF4, dtype: torch.dtype) -> Tensor:
    """Return ``[out_features, in_features]`` in ``dtype``, by bitsandbytes' own kernels."""
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        weight.absmax, weight.absmax_absmax, weight.absmax_code, weight.absmax_blocksize, torch.float32
    )
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed, absmax + weight.absmax_offset, weight.blocksize, "nf4", weight.shape, dtype
    )


def qlora_linear(x: Tensor, weight: NF4 | Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + scale (x A^T) B^T``, differentiable with respect to ``x``, ``a`` and ``b``.

    Args:
        x: ``[..., in_features]`` in the compute dtype, in which everything is multiplied.
        weight: W, ``[out_features, in_features]``; frozen.
        a: ``[r, in_features]`` float32.
        b: ``[out_features, r]`` float32.
        scale: Of the adapter.

    Returns:
        ``[..., out_features]`` in the compute dtype.

    """
    rows = x.reshape(-1, x.shape[-1])
    tensors, settings = [weight] if isinstance(weight, Tensor) else weight[:5], []
    if isinstance(weight, NF4):
        settings = [*weight.shape, weight.blocksize, weight.absmax_blocksize]
    return _QLoRALinear.apply(rows, a, b, scale, settings, *tensors).reshape(*x.shape[:-1], b.shape[0])


class _QLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, settings: list[int], *weight: Tensor
    ) -> Tensor:
        # Not part of the operator: when a compiled layer is recomputed, its last linear's y is needed no more, only xa.
        xa = x @ a.to(x.dtype).T
        multiply = _multiply_op if torch.compiler.is_compiling() else _multiply
        y = multiply(x, xa, b, scale, settings, weight)
        ctx.save_for_backward(x, xa, a, b, *weight)
        ctx.scale, ctx.settings = scale, settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b, *weight = ctx.saved_tensors
        dy_b = dy @ b.to(dy.dtype)
        da = _product_in_float32(dy_b.T, x).mul_(ctx.scale) if ctx.needs_input_grad[1] else None
        db = _product_in_float32(dy.T, xa).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            input_gradient = _input_gradient_op if torch.compiler.is_compiling() else _input_gradient
            dx = input_gradient(dy, dy_b, a, ctx.scale, ctx.settings, weight)
        return dx, da, db, None, None, *(None for _ in weight)


def _multiply(
    x: Tensor, xa: Tensor, b: Tensor, scale: float, settings: Sequence[int], weight: Sequence[Tensor]
) -> Tensor:
    """``x W^T + scale xa B^T``."""
    y = x @ _full(weight, settings, x.dtype).T
    return y.addmm_(xa, b.to(x.dtype).T, alpha=scale)


def _input_gradient(
    dy: Tensor, dy_b: Tensor, a: Tensor, scale: float, settings: Sequence[int], weight: Sequence[Tensor]
) -> Tensor:
    """``dy W + scale (dy B) A``."""
    dx = dy @ _full(weight, settings, dy.dtype)
    return dx.addmm_(dy_b, a.to(dy.dtype), alpha=scale)


# For torch.compile: it would see that W is dequantised twice and keep it from the forward pass, and copy each result
# before adding to it.
_multiply_op = torch.library.custom_op("lightning_lab::qlora_linear", _multiply, mutates_args=())
_input_gradient_op = torch.library.custom_op("lightning_lab::qlora_input_gradient", _input_gradient, mutates_args=())


@_multiply_op.register_fake
def _(x: Tensor, xa: Tensor, b: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@_input_gradient_op.register_fake
def _(dy: Tensor, dy_b: Tensor, a: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], a.shape[1])


def _full(weight: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
    if not settings:
        return weight[0]
    packed, absmax, code, absmax_absmax, offset = weight
    return dequantise(NF4(packed, absmax, code, absmax_absmax, offset, settings[:2], *settings[2:]), dtype)


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply 16-bit matrices into a float32 result: on a GPU an adapter's gradient is not rounded on the way.

    A CPU has no such product; bfloat16 ones, rounded at the end, take a fifth of the time of float32 ones where the
    CPU has bfloat16 units.
    """
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _Fused:
    """Takes the plain case of a PEFT layer: one adapter, not merged, without dropout or a variant such as DoRA."""

    # Of a 4-bit base: torch.compile cannot read it from bitsandbytes' parameter class. Or dequantised, to be kept so.
    plain_weight: NF4 | Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = cast(Any, self)
        active = layer.active_adapters
        # one token a row is decoding, for which bitsandbytes has kernels that read the 4 bits directly
        if (
            args
            or kwargs
            or layer.disable_adapters
            or layer.merged
            or len(active) != 1
            or active[0] not in layer.lora_A
            or active[0] in layer.lora_variant
            or (layer.training and not isinstance(layer.lora_dropout[active[0]], nn.Identity))
            or torch.is_autocast_enabled(x.device.type)
            or x.shape[-2] == 1
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = layer.get_base_layer()
        weight = base.weight if type(base) is nn.Linear else layer.plain_weight
        if weight is None:
            weight = NF4.of(base)
        if weight is None or base.bias is not None or _of_another_dtype(weight, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = active[0]
        return qlora_linear(x, weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _of_another_dtype(weight: NF4 | Tensor, x: Tensor) -> bool:
    """Whether an unquantised weight has another dtype than its input; a 4-bit one is dequantised to any."""
    return isinstance(weight, Tensor) and weight.dtype != x.dtype


class FusedLinear4bit(_Fused, lora.Linear4bit):
    """Stands in for PEFT's layer beside a ``bitsandbytes.nn.Linear4bit``."""


class FusedLinear(_Fused, lora.Linear):
    """Stands in for PEFT's layer beside an unquantised ``nn.Linear``."""


def keep_plain_weights(model: nn.Module) -> None:
    """Let each fused layer hold its base's 4-bit weight as plain tensors; the base must then stay where it is."""
    for module in model.modules():
        if isinstance(module, FusedLinear4bit) and module.plain_weight is None:
            module.plain_weight = NF4.of(module.get_base_layer())


def keep_dequantised_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Dequantise the base of each fused layer once, for every pass to come: the same values, in 16 bits or more.

    The 4-bit weights stay too, for merging, saving and decoding. The base must then stay where it is.
    """
    for module in model.modules():
        if isinstance(module, FusedLinear4bit) and (weight := NF4.of(module.get_base_layer())) is not None:
            module.plain_weight = dequantise(weight, dtype)


def fused_layers(targets: Sequence[nn.Module]) -> dict[type[nn.Module], type[nn.Module]]:
    """What to register with PEFT for these target layers; those of other classes stay PEFT's own.

    ``nn.Linear`` is left out beside its subclasses: PEFT asks with isinstance, so 8-bit layers would match it.
    """
    classes = {type(target) for target in targets}
    found: dict[type[nn.Module], type[nn.Module]] = {}
    if bnb.nn.Linear4bit in classes:
        found[bnb.nn.Linear4bit] = FusedLinear4bit
    if classes == {nn.Linear}:
        found[nn.Linear] = FusedLinear
    return found
