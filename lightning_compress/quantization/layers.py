"""Quantizers, and the layers that quantize their weights. A layer keeps its identity, name, parameters and hooks: only
its class changes, to a subclass of its own. Quantizers are in no ``state_dict``: a checkpoint fits the plain model, and
the ranges are the callback's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.attention import PlainMultiheadAttention
from lightning_compress.quantization import affine
from lightning_compress.quantization.functional import unwatched

Range = Literal["minmax", "moving_average", "learned"]

MOMENTUM = 0.01
"""How far a moving range goes towards that of the present batch at each training batch."""

LARGEST = 1e30
"""What is larger is a mask's −inf or the lowest float, and no value."""


class _Touch(torch.autograd.Function):
    """Passes a tensor on and gives a scale that has no part yet a gradient of 0, which DDP waits for."""

    @staticmethod
    def forward(ctx, x, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _touch(x: Tensor, scale: Tensor | None) -> Tensor:
    """Pass a tensor on beside a scale that has no part in it yet."""
    if scale is None or not torch.is_grad_enabled():
        return x
    if torch.compiler.is_compiling():
        return x + 0.0 * scale.sum()
    return _Touch.apply(x, scale)


class Quantizer(nn.Module):
    """What all quantizers have in common: two switches, and a state that is kept out of ``state_dict``.

    Attributes:
        bits: 2 to 8.
        qmin: The lowest integer.
        qmax: The highest integer.
        is_on: Whether it quantizes; else its input passes untouched.
    """

    scale: nn.Parameter | None
    _plain: tuple[str, ...] = ()

    def __init__(self, bits: int, scheme: affine.Scheme, range: Range) -> None:
        super().__init__()
        self.bits, self.scheme, self.range = bits, scheme, range
        self.qmin, self.qmax = affine.integer_range(bits, scheme)
        self.is_on = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def state(self) -> dict[str, Any]:
        """Return the range, copied: tensors and plain values."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in own.items()}
        return {**tensors, **{name: getattr(self, name) for name in self._plain}}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the range back, in place."""
        for name, value in state.items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)
            else:
                setattr(self, name, value)

    def extra_repr(self) -> str:
        """Spell the numbers."""
        return f"{self.bits} bits, {self.scheme}, {self.range}, is_on={self.is_on}"


class WeightQuantizer(Quantizer):
    """Rounds a weight. Its range is that of the weight itself as it stands, or a learned scale.

    Args:
        shape: The weight's shape.
        bits: 2 to 8.
        scheme: ``"symmetric"`` or ``"affine"``.
        range: ``"learned"``, or any other for the weight's own range.
        granularity: ``"channel"`` (a scale for each index of dimension `axis`), ``"tensor"``, or the length of the
            groups of weights that share a scale, consecutive in the weight as a matrix (shape[0], …).
        axis: The dimension of the output channels.
    """

    _plain = ("is_initialized",)

    def __init__(
        self,
        shape: torch.Size,
        bits: int,
        scheme: affine.Scheme,
        range: Range,
        granularity: str | int = "channel",
        axis: int = 0,
    ) -> None:
        super().__init__(bits, scheme, range)
        self.granularity, self.axis = granularity, axis
        self.is_initialized = False
        self.scale = None
        if range == "learned":
            groups = math.prod(shape) // granularity if isinstance(granularity, int) else 1
            self.scale = nn.Parameter(torch.ones(shape[axis] if granularity == "channel" else groups))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Give a learned scale its first value."""
        if self.scale is not None and not self.is_initialized:
            rows = self._rows(weight)
            self.scale.copy_(affine.learned_start(rows, self.qmax, keep=(0,)).flatten())
        self.is_initialized = True

    def _rows(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix in which each row has a scale."""
        if self.granularity == "tensor":
            return weight.reshape(1, -1)
        if isinstance(self.granularity, int):
            return weight.reshape(-1, self.granularity)
        return weight.transpose(0, self.axis).flatten(1) if self.axis else weight.flatten(1)

    def parameters_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, one for each channel or group: (C,), (groups,) or (1,)."""
        if self.scale is not None:
            scale = self.scale.detach().float().clamp(min=affine.SCALE_FLOOR)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        low, high = torch.aminmax(self._rows(weight.detach()), dim=1)
        return affine.affine_parameters(low, high, self.bits, self.scheme)

    def integers(self, weight: Tensor) -> Tensor:
        """Return the integers that stand for the weight, in its shape, as int32."""
        scale, zero_point = self.parameters_of(weight)
        rows = self._rows(weight.detach())
        return self._unrow(affine.quantize(rows, scale[:, None], zero_point[:, None], self.qmin, self.qmax), weight)

    def _unrow(self, rows: Tensor, weight: Tensor) -> Tensor:
        if self.granularity == "channel" and self.axis:
            return rows.reshape(weight.transpose(0, self.axis).shape).transpose(0, self.axis)
        return rows.reshape(weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        if not self.is_on:
            return _touch(weight, self.scale)
        if self.scale is not None:
            rows = self._rows(weight)
            return self._unrow(affine.fake_quantize_learned(rows, self.scale[:, None], 0, self.qmin, self.qmax), weight)
        scale, zero_point = self.parameters_of(weight)
        if self.granularity == "channel":
            shape = [1] * weight.dim()
            shape[self.axis] = -1
            return affine.fake_quantize(weight, scale.view(shape), zero_point.view(shape), self.qmin, self.qmax)
        if self.granularity == "tensor":
            return affine.fake_quantize(weight, scale[0], zero_point[0], self.qmin, self.qmax)
        rows = affine.fake_quantize(self._rows(weight), scale[:, None], zero_point[:, None], self.qmin, self.qmax)
        return self._unrow(rows, weight)


class ActivationQuantizer(Quantizer):
    """Rounds an activation; its range follows what training batches show, until it is frozen.

    Args:
        bits: 2 to 8.
        range: ``"minmax"`` (of all training batches), ``"moving_average"`` or ``"learned"``.
        is_rectified: Whether only max(x, 0) is of interest, because a ReLU and nothing else comes next. Rounding to
            a range that begins at 0 is the ReLU then, and no integer is wasted on what it will cut.
        bounds: A range that is known beforehand, such as (0, 1) after a softmax.

    Attributes:
        low: The lower end of the range.
        high: The upper end.
        is_observing: Whether the range moves.
        has_seen: Whether it has seen data; without, it never quantizes.
        zero_point: The integer that stands for 0 beside a learned scale.
    """

    low: Tensor
    high: Tensor
    _plain = ("has_seen", "zero_point")

    def __init__(
        self, bits: int, range: Range, *, is_rectified: bool = False, bounds: tuple[float, float] | None = None
    ) -> None:
        super().__init__(bits, "affine", range)
        self.is_rectified, self.is_fixed = is_rectified, bounds is not None
        self.is_observing = False
        low, high = bounds or (0.0, 0.0)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        # Plain values: an average of two models must not average them.
        self.has_seen, self.zero_point = bounds is not None, 0
        self.scale = None
        if range == "learned" and bounds is None:
            self.scale = nn.Parameter(torch.ones(1))

    def affine_parameters(self) -> tuple[Tensor, Tensor]:
        """Return scale (float32) and zero point (int32), both without dimensions."""
        if self.scale is not None:
            zero_point = torch.full((), self.zero_point, dtype=torch.int32, device=self.low.device)
            return self.scale.detach().float().clamp(min=affine.SCALE_FLOOR)[0], zero_point
        return affine.affine_parameters(self.low, self.high, self.bits, "affine")

    @torch.compiler.disable
    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        # A forward pass that activation checkpointing repeats within backward counts once.
        if self.is_fixed or not x.numel() or torch._C._current_graph_task_id() != -1:
            return
        low, high = torch.aminmax(x.detach())
        low, high = low.to(self.low.dtype), high.to(self.low.dtype)
        if not (low > -LARGEST and high < LARGEST):
            x = x.detach().float()
            x = x[x.isfinite() & (x.abs() < LARGEST)]
            if not x.numel():
                return
            low, high = torch.aminmax(x.to(self.low.dtype))
        if self.is_rectified:
            low = torch.zeros_like(low)
        if not self.has_seen:
            self.has_seen = True
            self.low.copy_(low)
            self.high.copy_(high)
            if self.scale is not None:
                self._start_learned(x.detach(), low, high)
        elif self.range == "minmax":
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
        elif self.scale is None:
            self.low.lerp_(low, MOMENTUM)
            self.high.lerp_(high, MOMENTUM)

    def _start_learned(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        # LSQ's rule for one sign; numbers of both signs share the integers as their range does (LSQ+, 2004.09576).
        assert self.scale is not None
        _, zero_point = affine.affine_parameters(low, high, self.bits, "affine")
        self.zero_point = int(zero_point)
        x = x.relu() if self.is_rectified else x
        levels = max(self.qmax - self.zero_point, self.zero_point - self.qmin)
        self.scale.copy_(affine.learned_start(x, levels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded activation."""
        if not x.is_floating_point():
            return x
        if not self.is_on:
            return _touch(x, self.scale)
        if self.is_observing and (self.scale is None or not self.has_seen):
            self._observe(x)
        if not self.has_seen:
            return _touch(x, self.scale)
        if self.scale is not None:
            return affine.fake_quantize_learned(x, self.scale, self.zero_point, self.qmin, self.qmax)
        return affine.fake_quantize(x, *self.affine_parameters(), self.qmin, self.qmax)


class PerUse(nn.Module):
    """A quantizer for each use of a module that is used several times in a forward pass, in the order of the uses.

    Args:
        quantizers: One for each use; an identity where a use has none.
    """

    def __init__(self, quantizers: list[nn.Module]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.use = 0

    def forward(self, x: Tensor) -> Tensor:
        """Round what the present use shows."""
        quantizer = self.quantizers[self.use]
        self.use = (self.use + 1) % len(self.quantizers)
        return quantizer(x)


def round_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A forward pre-hook: round a module's first argument with its ``input_quantizer``."""
    quantizer: Any = module.input_quantizer
    with unwatched:
        if args:
            return (quantizer(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: quantizer(kwargs[name])}


def round_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook: round what a module returns with its ``output_quantizer``."""
    with unwatched:
        return module.output_quantizer(output)  # type: ignore[operator]


# A copy of a module that drops other people's hooks keeps these.
round_input.follows_module = True  # type: ignore[attr-defined]
round_output.follows_module = True  # type: ignore[attr-defined]


# --- layers -----------------------------------------------------------------------------------------------------------


class QuantizedLayer:
    """Mixed into a layer's class: its ``weight`` is rounded where forward uses it."""

    weight_quantizer: WeightQuantizer
    folded: tuple[nn.Module, ...] = ()
    """The batch norm that the layer is folded into, where it has one."""
    input_range: tuple[ActivationQuantizer, ...] = ()
    """What has rounded the layer's input, where there is one such quantizer."""

    def quantized_weight(self) -> Tensor:
        """Return the rounded weight."""
        quantizer, weight = self.weight_quantizer, cast(Tensor, cast(Any, self).weight)
        with unwatched:
            if quantizer.is_on and quantizer.granularity == "tensor" and self.folded:
                # One scale for all channels has to see them as large as the folded batch norm makes them.
                factor = fold_factor(self.folded[0], weight, quantizer.axis)
                return quantizer(weight * factor) / factor
            return quantizer(weight)

    def bias_unit(self) -> Tensor | None:
        """Return what an integer kernel's sums count in: scale of the input · scale of the (folded) weight.

        (channels,) or (1,); ``None`` where the input's scale is not known, or the weights of a channel share none.
        """
        quantizer = self.weight_quantizer
        is_on = quantizer.is_on and any(each.is_on and each.has_seen for each in self.input_range)
        if not is_on or isinstance(quantizer.granularity, int):
            return None
        weight = cast(Tensor, cast(Any, self).weight).detach()
        factor = fold_factor(self.folded[0], weight, quantizer.axis) if self.folded else None
        if factor is not None and quantizer.granularity == "tensor":
            weight = weight * factor
        unit = self.input_range[0].affine_parameters()[0] * quantizer.parameters_of(weight)[0]
        return unit if factor is None or quantizer.granularity == "tensor" else unit * factor.abs().flatten()

    def quantized_bias(self) -> Tensor | None:
        """Return the bias, rounded as an integer kernel holds it; that of a folded layer is rounded in its norm."""
        bias: Tensor | None = cast(Any, self).bias
        with unwatched:
            unit = None if bias is None or self.folded else self.bias_unit()
            return bias if bias is None or unit is None else affine.round_bias(bias, unit)


def fold_factor(norm: nn.Module, weight: Tensor, axis: int) -> Tensor:
    """Return what a batch norm multiplies each output channel with, γ / √(running variance + ε), shaped for `weight`.

    Where it is 0 (a channel that γ has switched off) it stands as 1: nothing is divided by zero.
    """
    factor = torch.rsqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    if norm.weight is not None:
        factor = factor * norm.weight.detach()  # type: ignore[operator]
    factor = torch.where(factor.abs() < 1e-12, torch.ones_like(factor), factor)
    shape = [1] * weight.dim()
    shape[axis] = -1
    return factor.detach().view(shape).to(weight.dtype)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return F.linear(input, self.quantized_weight(), self.quantized_bias())


class QuantizedProjection(QuantizedLinear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection of `nn.MultiheadAttention` with a rounded weight."""


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """`nn.Conv1d` with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return self._conv_forward(input, self.quantized_weight(), self.quantized_bias())


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return self._conv_forward(input, self.quantized_weight(), self.quantized_bias())


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """`nn.Conv3d` with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return self._conv_forward(input, self.quantized_weight(), self.quantized_bias())


class _QuantizedTransposed(QuantizedLayer):
    _dimensions = 0

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        layer: Any = self
        padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, self._dimensions, layer.dilation
        )
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self._dimensions - 1]
        return function(
            input,
            self.quantized_weight(),
            self.quantized_bias(),
            layer.stride,
            layer.padding,
            padding,
            layer.groups,
            layer.dilation,
        )


class QuantizedConvTranspose1d(_QuantizedTransposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a rounded weight."""

    _dimensions = 1


class QuantizedConvTranspose2d(_QuantizedTransposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a rounded weight."""

    _dimensions = 2


class QuantizedConvTranspose3d(_QuantizedTransposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a rounded weight."""

    _dimensions = 3


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding` with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return F.embedding(
            input,
            self.quantized_weight(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class QuantizedMultiheadAttention(PlainMultiheadAttention):
    """`nn.MultiheadAttention` that rounds the projections' weights and what its matrix products read.

    Children (any of the activation quantizers may be missing, with `activation_bits=None`):
    ``in_proj_quantizer`` (a `WeightQuantizer`; ``q_proj_quantizer``, ``k_proj_quantizer`` and ``v_proj_quantizer``
    where the widths differ), ``out_proj`` (a `QuantizedLinear`), and the `ActivationQuantizer` of ``query_input``,
    ``key_input``, ``value_input``, ``query``, ``key``, ``value``, ``probabilities`` and ``context``.
    Scores before the softmax stay float: a mask of −inf has no place on a grid.
    """

    reads_products = True

    def _round(self, name: str, x: Tensor) -> Tensor:
        quantizer = getattr(self, f"{name}_quantizer", None)
        return x if quantizer is None else quantizer(x)

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rounded weights of the query's, the key's and the value's projection."""
        if self.in_proj_weight is not None:
            q, k, v = self._round("in_proj", self.in_proj_weight).chunk(3)
            return q, k, v
        return (
            self._round("q_proj", self.q_proj_weight),
            self._round("k_proj", self.k_proj_weight),
            self._round("v_proj", self.v_proj_weight),
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention` does; while the quantizers are off, torch's own operations do it."""
        with unwatched:
            own = [q for q in self.children() if isinstance(q, WeightQuantizer)]
            has_all_heads = self.num_heads * self.head_dim == self.embed_dim
            if own and not own[0].is_on and has_all_heads:
                output, probabilities = nn.MultiheadAttention.forward(self, *args, **kwargs)
                for child in self.modules():
                    output = _touch(output, getattr(child, "scale", None))
                return output, probabilities
            return super().forward(*args, **kwargs)

    forward.__wrapped__ = nn.MultiheadAttention.forward  # type: ignore[attr-defined]  # for inspect.signature


def norm_factor(norm: Any, dtype: torch.dtype) -> Tensor:
    """Return what a batch norm multiplies each channel with, γ / √(running variance + ε); 0 where γ is 0."""
    factor = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    return factor if norm.weight is None else factor * norm.weight.to(dtype)


def folded_bias(layer: Any, norm: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the biases of a layer and its batch norm as one, β + (b − running mean) · γ / √(running variance + ε)."""
    bias = -norm.running_mean.to(dtype)
    if layer.bias is not None:
        bias = bias + layer.bias.to(dtype)
    bias = bias * norm_factor(norm, dtype)
    return bias if norm.bias is None else bias + norm.bias.to(dtype)


class FreezableNorm:
    """Mixed into a batch norm's class: its statistics can be frozen, whatever ``train()`` says."""

    is_frozen = False
    folded_layer: tuple[QuantizedLayer, ...] = ()
    """The layer that is folded into it."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the norm."""
        norm: Any = self
        if not self.is_frozen and norm.training:
            return super().forward(input)  # type: ignore[misc]
        norm._check_input_dim(input)
        with unwatched:
            bias = norm.bias
            unit = self.folded_layer[0].bias_unit() if self.folded_layer else None
            if unit is not None:
                whole = folded_bias(self.folded_layer[0], norm).detach()
                moved = (affine.round_bias(whole, unit) - whole).to(input.dtype)
                bias = moved if bias is None else bias + moved
        return F.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, bias, False, 0.0, norm.eps)


class FreezableBatchNorm1d(FreezableNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose statistics can be frozen."""


class FreezableBatchNorm2d(FreezableNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics can be frozen."""


class FreezableBatchNorm3d(FreezableNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` whose statistics can be frozen."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: QuantizedProjection,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
    nn.BatchNorm1d: FreezableBatchNorm1d,
    nn.BatchNorm2d: FreezableBatchNorm2d,
    nn.BatchNorm3d: FreezableBatchNorm3d,
}
"""The class that a layer of each class becomes."""

PLAIN = {quantized: plain for plain, quantized in QUANTIZED.items()}
"""The class that it was."""
