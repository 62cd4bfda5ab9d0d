"""From fake quantization to integers: weights are kept as int8, batch norms are folded, ranges are numbers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_compress.copying import standalone_copy
from lightning_compress.quantization import affine, layers
from lightning_compress.quantization.functional import FunctionalQuantizers, is_watched
from lightning_compress.quantization.layers import (
    ActivationQuantizer,
    PerUse,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    WeightQuantizer,
)

Dialect = Literal["torch", "onnx"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


# In the dialect "onnx" two operators stand for themselves, so that an exporter finds them whole.


@torch.library.custom_op("lightning_compress::round_activation", mutates_args=())
def round_activation(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """Return the number that each number is rounded to (an operator that exporters find whole)."""
    return _round(x, scale, zero_point, qmin, qmax)


@round_activation.register_fake
def _(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_compress::dequantize_weight", mutates_args=())
def dequantize_weight(integers: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int, block: int) -> Tensor:
    """Return the weight that integers stand for (an operator that exporters find whole).

    Args:
        integers: int8.
        scale: 0-D, (channels,), or (rows, groups) where `block` is not 0.
        zero_point: int8, shaped like `scale`.
        bits: How many bits of the integers are in use.
        axis: The dimension that has a scale for each index; with blocks, the one that they run along.
        block: The length of a block, or 0.
    """
    return _dequantize(integers, scale, zero_point, axis, block)


@dequantize_weight.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int, block: int) -> Tensor:
    return torch.empty_like(integers, dtype=scale.dtype)


def _round(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    return torch.clamp(torch.round(x * (1.0 / scale)), qmin - zero_point, qmax - zero_point) * scale


def _dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
    if block:
        blocks = integers.unflatten(axis, (-1, block))
        return ((blocks.to(scale.dtype) - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(axis)
    if scale.dim():
        shape = [1] * integers.dim()
        shape[axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    return (integers.to(scale.dtype) - zero_point) * scale


class RoundedActivation(nn.Module):
    """What becomes of an `ActivationQuantizer`: its range is fixed.

    Args:
        scale: The step.
        zero_point: The integer that stands for 0.
        qmin: The lowest integer.
        qmax: The highest integer.
        dialect: See :func:`integer_module`.

    Example::

        >>> RoundedActivation(0.5, 0, 0, 255)(torch.tensor([-1.0, 0.6]))
        tensor([0.0000, 0.5000])
    """

    def __init__(self, scale: float, zero_point: int, qmin: int, qmax: int, dialect: Dialect = "torch") -> None:
        super().__init__()
        self.scale, self.zero_point, self.qmin, self.qmax, self.dialect = scale, zero_point, qmin, qmax, dialect

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded activation."""
        if not x.is_floating_point():
            return x
        apply = _round if self.dialect == "torch" else round_activation
        return apply(x.float(), self.scale, self.zero_point, self.qmin, self.qmax).to(x.dtype)

    def extra_repr(self) -> str:
        """Spell the numbers."""
        return f"scale={self.scale:.4g}, zero_point={self.zero_point}, [{self.qmin}, {self.qmax}]"


class IntegerWeight(nn.Module):
    """A weight as integers, in the place of a layer's weight and `WeightQuantizer`.

    Args:
        integers: int8, in the weight's shape, or as a matrix (shape[0], …) where blocks of it share scales.
        scale: 0-D, (channels,) or (shape[0], blocks).
        zero_point: int8, shaped like `scale`.
        shape: The weight's shape.
        dtype: The weight's type.
        bits: How many bits of the integers are in use.
        axis: The dimension of the output channels.
        dialect: See :func:`integer_module`.
    """

    is_on, granularity = False, "channel"  # what `QuantizedLayer.quantized_weight` asks of a quantizer
    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        integers: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        bits: int,
        axis: int = 0,
        dialect: Dialect = "torch",
    ) -> None:
        super().__init__()
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.to(torch.int8))
        self.shape, self.dtype, self.bits, self.axis, self.dialect = shape, dtype, bits, axis, dialect

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight; the argument, that a quantizer would round, is not there any more."""
        block = self.integers.shape[1] // self.scale.shape[1] if self.scale.dim() == 2 else 0
        axis = 1 if block else self.axis
        if self.dialect == "torch":
            rounded = _dequantize(self.integers, self.scale, self.zero_point, axis, block)
        else:
            rounded = dequantize_weight(self.integers, self.scale, self.zero_point, self.bits, axis, block)
        if block:
            rounded = rounded.view(self.shape)
        return rounded.to(self.dtype)

    def split(self, parts: int) -> list[IntegerWeight]:
        """Return the same weight as several, cut along dimension 0."""
        scales = self.scale.chunk(parts) if self.scale.dim() else [self.scale] * parts
        zero_points = self.zero_point.chunk(parts) if self.scale.dim() else [self.zero_point] * parts
        shape = torch.Size((self.shape[0] // parts, *self.shape[1:]))
        return [
            # Cloned: a chunk of a larger tensor would be saved with all of it.
            IntegerWeight(q.clone(), s.clone(), z.clone(), shape, self.dtype, self.bits, self.axis, self.dialect)
            for q, s, z in zip(self.integers.chunk(parts), scales, zero_points, strict=True)
        ]

    def extra_repr(self) -> str:
        """Spell the numbers."""
        return f"{tuple(self.shape)}, {self.bits} bits"


def integer_module(module: nn.Module, dialect: Dialect = "torch") -> nn.Module:
    """Return a copy, in eval mode, that holds the integers which a quantized module has been trained for.

    Weights become int8 tensors that the forward pass dequantizes, batch norms are folded into the layers before them,
    and the ranges of activations are numbers. Its outputs are those of the given module in eval mode, but where a sum
    in another order rounds to the neighbouring integer. What is not quantized (a quantizer that is off, an activation
    that never saw data) stays float. The given module is left as it is. Hooks other than those of the quantizers, and
    Lightning's trainer, are not in the copy.

    Args:
        module: What `QuantizationAwareTraining` has trained, or any module that holds such layers.
        dialect: ``"torch"`` for operators that every torch has, ``"onnx"`` for two operators of this package
            (``lightning_compress::round_activation`` and ``::dequantize_weight``) in their place.

    Example::

        >>> from lightning_compress.quantization.insertion import Settings, insert
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[127.0, -3.2]]))
        >>> insert(net, Settings()).switch(True)
        >>> integer_module(net)[0].weight_quantizer.integers
        tensor([[127,  -3]], dtype=torch.int8)
    """
    copied = _copy(module)
    with torch.no_grad():
        _replace_weights(copied, dialect)
        _replace_activations(copied, dialect)
    return copied.eval().requires_grad_(False)


def _copy(module: nn.Module) -> nn.Module:
    copied = standalone_copy(module)
    for child in copied.modules():
        vars(child).pop("_insertions", None)  # it holds the float weights
        if is_watched(child):
            child.forward = _as_method(child, child.forward)
    return copied


def _as_method(module: nn.Module, stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in for a module's forward as a method, which exporters ask for its arguments' names."""

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stand_in(*args, **kwargs)

    return types.MethodType(forward, module)


def _replace_activations(module: nn.Module, dialect: Dialect) -> None:
    done: dict[int, nn.Module] = {}  # a tensor that is read in two places has one quantizer
    for child in list(module.modules()):
        if isinstance(child, (PerUse, FunctionalQuantizers)):
            child.use = 0
        for name, quantizer in child._modules.items():
            if isinstance(quantizer, ActivationQuantizer):
                if id(quantizer) not in done:
                    done[id(quantizer)] = _rounded(quantizer, dialect)
                child._modules[name] = done[id(quantizer)]


def _rounded(quantizer: ActivationQuantizer, dialect: Dialect) -> nn.Module:
    if not quantizer.is_on or not quantizer.has_seen:
        return nn.Identity()
    scale, zero_point = quantizer.affine_parameters()
    return RoundedActivation(float(scale), int(zero_point), quantizer.qmin, quantizer.qmax, dialect)


def _replace_weights(module: nn.Module, dialect: Dialect) -> None:
    done: dict[tuple[int, int, int], IntegerWeight] = {}  # tied weights share their integers
    for child in list(module.modules()):
        if isinstance(child, QuantizedMultiheadAttention):
            _replace_projections(child, dialect)
        elif isinstance(child, QuantizedLayer):
            layer: Any = child
            quantizer = layer.weight_quantizer
            if not quantizer.is_on:
                layer.__class__ = layers.PLAIN[type(layer)]
                del layer.weight_quantizer
                for name in ("folded", "input_range"):
                    layer.__dict__.pop(name, None)
                continue
            norm, unit = layer.folded[0] if layer.folded else None, layer.bias_unit()
            key = (id(layer.weight), id(quantizer), id(norm))
            if key not in done:
                done[key] = _integers(layer.weight, quantizer, norm, dialect)
            if norm is not None or getattr(layer, "bias", None) is not None:
                _round_bias(layer, norm, unit)
            layer.weight_quantizer = done[key]
            layer.folded = layer.input_range = ()
            layer.register_parameter("weight", None)
    for child in list(module.modules()):
        # Not before: one that two layers were folded into is needed by both.
        if getattr(child, "_is_folded", False):
            child.__class__ = nn.Identity  # in place, since hooks that round its output belong to it
            child._parameters.clear()
            child._buffers.clear()


def _round_bias(layer: Any, norm: Any, unit: Tensor | None) -> None:
    """Give a layer the bias of itself and its batch norm, in multiples of the unit where there is one."""
    dtype = torch.float64 if unit is None else torch.float32  # as in training, so that both round alike
    bias = layer.bias if norm is None else layers.folded_bias(layer, norm, dtype)
    if unit is not None:
        bias = affine.round_bias(bias, unit)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
    if norm is not None:
        norm._is_folded = True


def _integers(weight: Tensor, quantizer: WeightQuantizer, norm: nn.Module | None, dialect: Dialect) -> IntegerWeight:
    """Return the integers of a weight, or those of the weight that a batch norm is folded into."""
    axis, granularity = quantizer.axis, quantizer.granularity
    qmin, qmax = quantizer.qmin, quantizer.qmax
    source = weight.detach()
    if granularity == "tensor" and norm is not None:
        source = source * layers.fold_factor(norm, weight, axis)
    scale, zero_point = quantizer.parameters_of(source)
    integers = quantizer.integers(source)
    if granularity == "tensor":
        scale, zero_point = scale[0], zero_point[0]
    elif isinstance(granularity, int):
        integers = integers.flatten(1)
        scale, zero_point = (x.view(len(integers), -1) for x in (scale, zero_point))
    if norm is not None:
        factor = layers.norm_factor(norm, torch.float64)
        channels = [1] * integers.dim()
        channels[axis] = -1
        if granularity != "tensor":
            along = (-1, 1) if isinstance(granularity, int) else (-1,)
            is_negative = factor < 0
            mirrored = is_negative.view(along)
            integers = torch.where(is_negative.view(channels), qmin + qmax - integers, integers)
            zero_point = torch.where(mirrored, qmin + qmax - zero_point, zero_point)
            size = factor.abs().view(along)
            # A channel that γ has switched off has zero integers, and keeps a scale that divides.
            scale = torch.where(size < 1e-12, scale, scale * size).float()
        dead = (factor.abs() < 1e-12).view(channels)
        rows = zero_point
        if granularity == "channel":
            rows = zero_point.view(channels)
        elif isinstance(granularity, int):
            rows = zero_point.repeat_interleave(granularity, 1)
        integers = torch.where(dead, rows, integers)
    shift = 2 ** (quantizer.bits - 1) if quantizer.scheme == "affine" else 0
    return IntegerWeight(
        integers - shift,
        scale,
        zero_point - shift,
        weight.shape,
        weight.dtype,
        quantizer.bits,
        axis,
        dialect,
    ).to(weight.device)


def _replace_projections(attention: QuantizedMultiheadAttention, dialect: Dialect) -> None:
    """Give each projection a weight of its own: a runtime has no integer kernel that reads a part of one."""
    if attention.in_proj_weight is not None:
        quantizer = attention.in_proj_quantizer
        if not isinstance(quantizer, WeightQuantizer) or not quantizer.is_on:
            return
        whole = _integers(attention.in_proj_weight, quantizer, None, dialect)
        attention.register_parameter("in_proj_weight", None)
        del attention.in_proj_quantizer
        for name, part in zip(_PROJECTIONS, whole.split(3), strict=True):
            attention.add_module(f"{name}_quantizer", part)
        return
    for name in _PROJECTIONS:
        quantizer = cast(WeightQuantizer, getattr(attention, f"{name}_quantizer"))
        if quantizer.is_on:
            part = _integers(getattr(attention, f"{name}_weight"), quantizer, None, dialect)
            attention.register_parameter(f"{name}_weight", None)
            setattr(attention, f"{name}_quantizer", part)
