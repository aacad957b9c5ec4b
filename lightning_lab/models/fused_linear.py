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

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Weight(NamedTuple):
    """A frozen weight as plain tensors: as it is, or doubly quantised NF4 (arXiv:2305.14314, bitsandbytes' layout).

    Attributes:
        tensors: ``[out_features, in_features]``. Of NF4: the weight, uint8, two values a byte; each block's scale,
            ``[blocks]`` uint8, quantised itself; what its codes stand for, ``[256]`` float32; the scales of the scales,
            ``[blocks of blocks]`` float32; and their offset, float32 scalar.
        sizes: None. Of NF4: ``out_features``, ``in_features``, values that share a scale, scales that share a scale.

    """

    tensors: Sequence[Tensor]
    sizes: Sequence[int] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> "Weight | None":
        """Read a layer; None where it is neither ``nn.Linear`` nor in doubly quantised NF4 (not repacked)."""
        weight = cast(Tensor, layer.weight)
        if type(layer) is nn.Linear:
            return cls((weight,))
        state = getattr(weight, "quant_state", None)
        if state is None or not state.nested or state.quant_type != "nf4":
            return None
        if getattr(state, "packing_format_for_cpu", False):  # for inference, in place
            return None
        inner = state.state2
        return cls(
            (weight.data, state.absmax, inner.code, inner.absmax, state.offset),
            (*state.shape, state.blocksize, inner.blocksize),
        )


def dequantise(tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a `Weight` as ``[out_features, in_features]``; NF4 in ``dtype``, by bitsandbytes' own kernels."""
    if not sizes:
        return tensors[0]
    packed, absmax, absmax_code, absmax_absmax, absmax_offset = tensors
    *shape, blocksize, absmax_blocksize = sizes
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, absmax_absmax, absmax_code, absmax_blocksize, torch.float32
    )
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax + absmax_offset, blocksize, "nf4", shape, dtype)


def qlora_linear(x: Tensor, weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
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
    return _QLoRALinear.apply(rows, a, b, scale, weight.sizes, *weight.tensors).reshape(*x.shape[:-1], b.shape[0])


class _QLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, sizes: Sequence[int], *weight: Tensor
    ) -> Tensor:
        # Not part of the operator: when a compiled layer is recomputed, its last linear's y is needed no more, only xa.
        xa = x @ a.to(x.dtype).T
        multiply = _multiply_op if torch.compiler.is_compiling() else _multiply
        y = multiply(x, weight, sizes, True, xa, b.T, scale)
        ctx.save_for_backward(x, xa, a, b, *weight)
        ctx.scale, ctx.sizes = scale, sizes
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
            multiply = _multiply_op if torch.compiler.is_compiling() else _multiply
            dx = multiply(dy, weight, ctx.sizes, False, dy_b, a, ctx.scale)
        return dx, da, db, None, None, *(None for _ in weight)


def _multiply(
    x: Tensor, weight: Sequence[Tensor], sizes: Sequence[int], forward: bool, low: Tensor, factor: Tensor, scale: float
) -> Tensor:
    """``x W^T + scale low factor`` in a forward pass, in a backward pass W itself; ``factor`` is in float32."""
    w = dequantise(weight, sizes, x.dtype)
    y = x @ (w.T if forward else w)
    return y.addmm_(low, factor.to(x.dtype), alpha=scale)


# For torch.compile: it would see that W is dequantised twice and keep it from the forward pass, and copy each result
# before adding to it.
_multiply_op = torch.library.custom_op("lightning_lab::qlora_linear", _multiply, mutates_args=())


@_multiply_op.register_fake
def _(x: Tensor, weight: Any, sizes: Any, forward: bool, low: Tensor, factor: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], factor.shape[1])


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

    plain_weight: Weight | None = None  # see `keep_weights`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = cast(Any, self)
        base, active = layer.get_base_layer(), layer.active_adapters
        # one token a row is decoding, for which bitsandbytes has kernels that read the 4 bits directly; a 4-bit weight
        # is dequantised to the input's dtype, another must have it
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
            or base.bias is not None
            or (weight := layer.plain_weight or Weight.of(base)) is None
            or not (weight.sizes or weight.tensors[0].dtype == x.dtype)
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = active[0]
        return qlora_linear(x, weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


class FusedLinear4bit(_Fused, lora.Linear4bit):
    """Stands in for PEFT's layer beside a ``bitsandbytes.nn.Linear4bit``."""


class FusedLinear(_Fused, lora.Linear):
    """Stands in for PEFT's layer beside an unquantised ``nn.Linear``."""


def keep_weights(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Let each fused layer hold its base's 4-bit weight as plain tensors; the base must then stay where it is.

    `torch.compile` cannot read them from bitsandbytes' parameter class. With a ``dtype`` they are dequantised once, for
    every pass to come: the same values. The base's own weights stay too, for merging, saving and decoding.
    """
    for module in model.modules():
        if isinstance(module, FusedLinear4bit) and module.plain_weight is None:
            weight = Weight.of(module.get_base_layer())
            if weight and dtype:
                weight = Weight((dequantise(*weight, dtype),))
            module.plain_weight = weight
