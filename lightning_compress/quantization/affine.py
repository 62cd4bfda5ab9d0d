"""Affine quantization of tensors: integers q in [qmin, qmax] that stand for the numbers scale · (q − zero_point).

Zero is always one of these numbers, so that padding and pruned weights stay exactly zero (Jacob et al. 2018,
arXiv 1712.05877). Symmetric integers leave out the lowest one: [−127, 127] with 8 bits, {−1, 0, 1} with 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SCALE_FLOOR = 2.0**-24
"""The smallest scale. The bias of a layer is an int32 in units of (scale of input · scale of weight): with a scale that
an all-zero channel would have, a bias of ordinary size overflows it."""

Scheme = Literal["symmetric", "affine"]


def integer_range(bits: int, scheme: Scheme) -> tuple[int, int]:
    """Return the lowest and the highest integer.

    Example::

        >>> integer_range(8, "affine"), integer_range(4, "symmetric"), integer_range(2, "symmetric")
        ((0, 255), (-7, 7), (-1, 1))
    """
    if scheme == "affine":
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1


def affine_parameters(low: Tensor, high: Tensor, bits: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return scale (float32) and zero point (int32) for numbers in [low, high], which is widened to hold 0.

    affine: scale = (high − low) / (2^bits − 1), zero_point = round(−low / scale).
    symmetric: scale = max(|low|, |high|) / (2^(bits − 1) − 1), zero_point = 0. No scale is below `SCALE_FLOOR`.

    Args:
        low: The smallest number, of any shape.
        high: The largest number, of the same shape.
        bits: 2 to 8.
        scheme: ``"symmetric"`` or ``"affine"``.

    Example::

        >>> affine_parameters(torch.tensor(-1.0), torch.tensor(254.0), 8, "affine")
        (tensor(1.), tensor(1, dtype=torch.int32))
        >>> affine_parameters(torch.tensor(-1.0), torch.tensor(14.0), 4, "symmetric")
        (tensor(2.), tensor(0, dtype=torch.int32))
    """
    low, high = low.detach().float().clamp(max=0.0), high.detach().float().clamp(min=0.0)
    qmin, qmax = integer_range(bits, scheme)
    if scheme == "symmetric":
        scale = (torch.maximum(-low, high) / qmax).clamp_(min=SCALE_FLOOR)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (qmax - qmin)).clamp_(min=SCALE_FLOOR)
    return scale, torch.round(-low / scale).clamp_(qmin, qmax).to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the integers, clamped to [qmin, qmax], as int32; `scale` and `zero_point` broadcast against `x`.

    Example::

        >>> quantize(torch.tensor([-9.0, 0.0, 0.9]), torch.tensor(0.5), torch.tensor(0), -7, 7)
        tensor([-7,  0,  2], dtype=torch.int32)
    """
    return (torch.round(_wide(x) * (1.0 / scale)) + zero_point).clamp(qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the numbers that the integers stand for, scale · (q − zero_point)."""
    return (q - zero_point) * scale


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Round(torch.autograd.Function):
    """Rounds; the gradient passes where the number was within half a step of the range (straight-through)."""

    @staticmethod
    def forward(ctx, x, scale, low, high):  # type: ignore[no-untyped-def]
        # In one buffer, on vectorized kernels: torch.fake_quantize_per_tensor_affine takes 4 times as long on a CPU.
        ctx.save_for_backward(x, scale, low, high)
        return x.mul(1.0 / scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, low, high = ctx.saved_tensors
        least, most = (low - 0.5) * scale, (high + 0.5) * scale
        if x.device.type == "cpu" and least.numel() == 1:
            return torch.ops.aten.hardtanh_backward(grad, x, float(least), float(most)), None, None, None
        return grad * ((x >= least) & (x <= most)), None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the number that each number is rounded to; its gradient passes inside of the range and is 0 outside.

    scale · (clamp(round(x / scale) + zero_point, qmin, qmax) − zero_point), as ONNX has it: rounded before the zero
    point is added, half to even.

    Args:
        x: Any floating type; what is narrower than float32 is rounded in float32.
        scale: Broadcasts against `x`.
        zero_point: Broadcasts against `x`.
        qmin: The lowest integer.
        qmax: The highest integer.

    Example::

        >>> fake_quantize(torch.tensor([0.1, 0.9]), torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), -1, 1)
        tensor([0.0000, 0.5000])
    """
    low, high = (qmin - zero_point).to(scale.dtype), (qmax - zero_point).to(scale.dtype)
    wide = _wide(x)
    if torch.compiler.is_compiling():
        inside = torch.clamp(wide, (low - 0.5) * scale, (high + 0.5) * scale)
        return _straight_through(inside, torch.round(wide * (1.0 / scale)).clamp(low, high) * scale).to(x.dtype)
    return _Round.apply(wide, scale, low, high).to(x.dtype)


def _straight_through(source: Tensor, values: Tensor) -> Tensor:
    """Return values with the gradient of another tensor, in operations that a compiler can trace."""
    return values.detach() + (source - source.detach())


def fake_quantize_learned(x: Tensor, scale: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """Return the number that each number is rounded to, with a gradient for `scale` too (LSQ, arXiv 1902.08153).

    ∂/∂scale = round(x/s) − x/s inside of the range, and the clamped integer at its ends and outside, times
    1 / √(numbers that share a scale · qmax), as the paper has it. A scale below `SCALE_FLOOR` counts as that.

    Args:
        x: The numbers.
        scale: Broadcasts against `x`.
        zero_point: The integer that stands for 0.
        qmin: The lowest integer.
        qmax: The highest integer.

    Example::

        >>> scale = torch.tensor([0.5], requires_grad=True)
        >>> fake_quantize_learned(torch.tensor([9.0]), scale, 0, -1, 1).sum().backward()
        >>> scale.grad  # the integer 1, one number, qmax 1
        tensor([1.])
    """
    factor = (x.numel() / max(scale.numel(), 1) * max(qmax, 1)) ** -0.5
    low, high, wide = qmin - zero_point, qmax - zero_point, _wide(x)
    if torch.compiler.is_compiling():
        # The gradient passes the floor, so that a scale below it can come back.
        scale = _straight_through(scale * factor, scale.clamp(min=SCALE_FLOOR))
        ratio = torch.clamp(wide * (1.0 / scale), low, high)
        return (_straight_through(ratio, ratio.round()) * scale).to(x.dtype)
    return _RoundLearned.apply(wide, scale, low, high, factor).to(x.dtype)


class _RoundLearned(torch.autograd.Function):
    """Rounds; the gradient of the scale is Σ g·(y − x·[x within the range]) / scale · factor."""

    @staticmethod
    def forward(ctx, x, scale, low, high, factor):  # type: ignore[no-untyped-def]
        step = scale.clamp(min=SCALE_FLOOR).to(x.dtype)
        inverse = 1.0 / step
        y = x.mul(inverse).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, y, inverse, scale)
        ctx.bounds, ctx.factor = (low, high), factor
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, y, inverse, scale = ctx.saved_tensors
        within = torch.ops.aten.hardtanh_backward(grad, x * inverse, *ctx.bounds)
        share = _sum_like(grad, y, scale).sub_(_sum_like(within, x, scale)).mul_(inverse).mul_(ctx.factor)
        return within, share.to(scale.dtype), None, None, None


def _sum_like(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Return the sums of x · y over what shares an entry of a third tensor, without a product in memory if it can."""
    if like.numel() == 1:
        return torch.dot(x.flatten(), y.flatten()).view(like.shape)
    return (x * y).sum_to_size(like.shape)


def round_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """Return the multiples of `unit` that are closest to a bias; the gradient passes.

    Args:
        bias: (channels,).
        unit: What an integer kernel's sum counts in, scale of the input · scale of the weight: (channels,) or (1,).

    Example::

        >>> round_bias(torch.tensor([0.3, -0.7]), torch.tensor([0.25]))
        tensor([ 0.2500, -0.7500])
    """
    return _straight_through(bias, (torch.round(bias / unit) * unit).to(bias.dtype))


def learned_start(x: Tensor, qmax: int, keep: tuple[int, ...] | None = None) -> Tensor:
    """Return LSQ's first scale, 2 · mean(|x|) / √qmax, with the dimensions other than `keep` averaged over (and kept).

    Zeros do not count: those of a ReLU and of pruned weights are exact with any scale.

    Example::

        >>> learned_start(torch.tensor([1.0, 0.0, -3.0]), 4)
        tensor([2.])
    """
    x = x.detach().float().abs()
    dims = tuple(d for d in range(x.dim()) if keep is not None and d not in keep)
    if dims:
        mean = x.sum(dims, keepdim=True) / (x != 0).sum(dims, keepdim=True).clamp(min=1)
    else:
        mean = (x.sum() / (x != 0).sum().clamp(min=1)).reshape(1)
    return (2.0 * mean / qmax**0.5).clamp(min=SCALE_FLOOR)
