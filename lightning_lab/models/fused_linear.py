"""One autograd function per QLoRA linear: y = x W^T + scale (x A^T) B^T, W kept in 4 bits.

PEFT's own layer runs the base and the adapter one after another: in 16 bits it keeps a float32 copy of the input for
each of a decoder layer's seven linears, and it passes four times over the output to scale, round, clone and add. Here
the input is kept as it is (query, key and value then share one tensor), the adapter's products go straight into the
base's result, W is dequantised again in the backward pass, and nothing is computed for the frozen W.

The layers reach PEFT as registered custom modules, its way to accept layers from outside
(https://huggingface.co/docs/peft/developer_guides/custom_models), and inherit merging, saving and everything else from
the ones they stand in for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Weight(NamedTuple):
    """A frozen weight as plain tensors: as it is, or NF4 (arXiv:2305.14314, bitsandbytes' layout).

    Attributes:
        values: ``[out_features, in_features]``; of NF4 uint8, two values a byte.
        scales: Of NF4 alone, ``[blocks]`` float32.
        sizes: Of NF4 alone: ``out_features``, ``in_features``, values that share a scale.

    """

    values: Tensor
    scales: Tensor | None = None
    sizes: Sequence[int] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> "Weight | None":
        """Read a layer; None where it is neither ``nn.Linear`` nor in doubly quantised NF4 (not repacked).

        The scales, which are stored in 8 bits, come in float32: four bytes more for 64 weights, and two kernels less
        each time the weight is dequantised, to the same values.
        """
        weight = cast(Tensor, layer.weight)
        if type(layer) is nn.Linear:
            return cls(weight)
        state = getattr(weight, "quant_state", None)
        if state is None or not state.nested or state.quant_type != "nf4":
            return None
        if getattr(state, "packing_format_for_cpu", False):  # for inference, in place
            return None
        inner = state.state2
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            state.absmax, inner.absmax, inner.code, inner.blocksize, torch.float32
        )
        return cls(weight.data, scales + state.offset, (*state.shape, state.blocksize))


def dequantise(values: Tensor, scales: Tensor | None, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a `Weight` as ``[out_features, in_features]``; NF4 in ``dtype``, by bitsandbytes' own kernel."""
    if scales is None:
        return values
    *shape, blocksize = sizes
    return torch.ops.bitsandbytes.dequantize_4bit(values, scales, blocksize, "nf4", shape, dtype)


def qlora_linear(
    x: Tensor, weight: Weight, a: Tensor, b: Tensor, scale: float, rounded: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x W^T + scale (x A^T) B^T``, differentiable with respect to ``x``, ``a`` and ``b``.

    Args:
        x: ``[..., in_features]`` in the compute dtype, in which everything is multiplied.
        weight: W, ``[out_features, in_features]``; frozen.
        a: ``[r, in_features]`` float32.
        b: ``[out_features, r]`` float32.
        scale: Of the adapter.
        rounded: ``a`` and ``b`` in the compute dtype, if somebody has them already.

    Returns:
        ``[..., out_features]`` in the compute dtype.

    """
    rows = x.reshape(-1, x.shape[-1])
    if rounded is None or rounded[0].dtype != x.dtype:
        rounded = a.detach().to(x.dtype), b.detach().to(x.dtype)
    y = _QLoRALinear.apply(rows, a, b, *rounded, scale, *weight)
    return y.reshape(*x.shape[:-1], b.shape[0])


class _QLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _a: Tensor,  # in float32, for the gradient alone
        _b: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        values: Tensor,
        scales: Tensor | None,
        sizes: Sequence[int],
    ) -> Tensor:
        # Not part of the operator: when a compiled layer is recomputed, its last linear's y is needed no more, only xa.
        xa = x @ a.T
        multiply = _multiply_op if torch.compiler.is_compiling() else _multiply
        y = multiply(x, values, scales, sizes, True, xa, b.T, scale)
        ctx.save_for_backward(x, xa, a, b, values, scales)
        ctx.scale, ctx.sizes = scale, sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b, values, scales = ctx.saved_tensors
        dy_b = dy @ b
        da = _product_in_float32(dy_b.T, x).mul_(ctx.scale) if ctx.needs_input_grad[1] else None
        db = _product_in_float32(dy.T, xa).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            multiply = _multiply_op if torch.compiler.is_compiling() else _multiply
            dx = multiply(dy, values, scales, ctx.sizes, False, dy_b, a, ctx.scale)
        return dx, da, db, None, None, None, None, None, None


def _multiply(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    sizes: Sequence[int],
    forward: bool,
    low: Tensor,
    factor: Tensor,
    scale: float,
) -> Tensor:
    """``x W^T + scale low factor`` in a forward pass, in a backward pass W itself; all in one dtype."""
    w = dequantise(values, scales, sizes, x.dtype)
    y = x @ (w.T if forward else w)
    return y.addmm_(low, factor, alpha=scale)


# For torch.compile: it would see that W is dequantised twice and keep it from the forward pass, and copy each result
# before adding to it. Not by `custom_op`, whose wrapper for autograd, of no use here, takes as long as the rest.
torch.library.define(
    "lightning_lab::qlora_linear",
    "(Tensor x, Tensor values, Tensor? scales, int[] sizes, bool forward, Tensor low, Tensor factor, float scale)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("lightning_lab::qlora_linear", "default", _multiply)
_multiply_op = torch.ops.lightning_lab.qlora_linear.default


@torch.library.register_fake("lightning_lab::qlora_linear")
def _(x: Tensor, values: Any, scales: Any, sizes: Any, forward: Any, low: Any, factor: Tensor, scale: Any) -> Tensor:
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

    plain_weight: Weight | None = None  # see `KeptTensors`
    rounded: Mapping[str, tuple[Tensor, Tensor]] = {}  # by the adapter's name

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
            or not (weight.sizes or weight.values.dtype == x.dtype)
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = active[0]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return qlora_linear(x, weight, a, b, layer.scaling[name], self.rounded.get(name))

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.plain_weight = None  # the base's is another one, and quantised anew when they are taken apart again
        super().merge(*args, **kwargs)  # type: ignore[misc]


class FusedLinear4bit(_Fused, lora.Linear4bit):
    """Stands in for PEFT's layer beside a ``bitsandbytes.nn.Linear4bit``."""


class FusedLinear(_Fused, lora.Linear):
    """Stands in for PEFT's layer beside an unquantised ``nn.Linear``."""


class KeptTensors:
    """What the fused layers need in every pass, made once: 4-bit weights as plain tensors, adapters rounded.

    `torch.compile` cannot read the weights from bitsandbytes' parameter class, and their scales are dequantised once.
    The layers hold these tensors until `close`; the model must stay where it is, and whoever changes an adapter calls
    `refresh`. The base's own weights stay too, for merging, saving and decoding.

    Args:
        model: Its adapters are rounded where one alone is active.
        dtype: The compute dtype.
        dequantised: Keep the whole weights in the compute dtype, for every pass to come: the same values.

    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, dequantised: bool = False) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, _Fused)]
        self._adapters: list[Tensor] = []
        self._rounded: list[Tensor] = []
        # whatever mode makes them, training can use them: Lightning evaluates in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for fused in self._layers:
                layer = cast(Any, fused)
                plain = isinstance(layer, FusedLinear4bit) and not layer.merged
                weight = Weight.of(layer.get_base_layer()) if plain else None
                fused.plain_weight = Weight(dequantise(*weight, dtype)) if weight and dequantised else weight
                if dtype.itemsize < 4 and len(layer.active_adapters) == 1:
                    (name,) = layer.active_adapters
                    pair = layer.lora_A[name].weight, layer.lora_B[name].weight
                    rounded = pair[0].to(dtype), pair[1].to(dtype)
                    fused.rounded = {name: rounded}
                    self._adapters += pair
                    self._rounded += rounded

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the adapters as they are now, all at once instead of each in every pass of its layer."""
        if self._rounded:
            torch._foreach_copy_(self._rounded, self._adapters)

    def close(self) -> None:
        """Let the layers read base and adapters by themselves again."""
        for layer in self._layers:
            layer.plain_weight, layer.rounded = None, {}
