"""Scales, zero points, rounding and gradients against torchao, torch's own operators and plain float64."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.quantization import affine
from lightning_compress.quantization.layers import ActivationQuantizer, WeightQuantizer

BITS = range(2, 9)
every_bits = pytest.mark.parametrize("bits", BITS)
every_scheme = pytest.mark.parametrize("scheme", ["symmetric", "affine"])
every_granularity = pytest.mark.parametrize("granularity", ["channel", "tensor", 8])


@pytest.fixture(scope="module")
def torchao() -> Any:
    """torchao's operators; its import warns and logs, which is no test's affair."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )
    logging.disable(logging.NOTSET)

    def fake_quantize(x: Any, bits: int, scheme: str, block: tuple[int, ...]) -> Any:
        qmin, qmax = affine.integer_range(bits, scheme)
        mapping = MappingType.ASYMMETRIC if scheme == "affine" else MappingType.SYMMETRIC_NO_CLIPPING_ERR
        lowest = qmin if scheme == "affine" else qmin - 1  # their symmetric scale divides by the lowest and the highest
        target = torch.uint8 if scheme == "affine" else torch.int8
        scale, zero_point = choose_qparams_affine(
            x, mapping, block, target, lowest, qmax, eps=affine.SCALE_FLOOR, zero_point_dtype=torch.int32
        )
        q = quantize_affine(x, block, scale, zero_point, target, qmin, qmax)
        return scale, zero_point, q, dequantize_affine(q, block, scale, zero_point, target, qmin, qmax)

    return fake_quantize


def weight(seed: int = 0, shape: tuple[int, ...] = (6, 16)) -> Any:
    """Rows of unlike size, one of zeros, one of one sign."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w = w * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    w[1], w[2] = 0, w[2].abs()
    return w


def blocks(granularity: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return {"channel": (1, *shape[1:]), "tensor": shape}.get(granularity, (1, granularity))


def plain(x: Any, bits: int, scheme: str) -> tuple[float, int, list[float]]:
    """The textbook's formulas for one list of numbers, in Python's floats, but for the scale's own precision."""
    low, high = min(0.0, *x), max(0.0, *x)
    if scheme == "affine":
        steps, qmin, qmax = 2**bits - 1, 0, 2**bits - 1
        scale = max((high - low) / steps, 2.0**-24)
        zero = min(max(round(-low / scale), qmin), qmax)
    else:
        qmax = 2 ** (bits - 1) - 1
        qmin, scale, zero = -qmax, max(max(-low, high) / qmax, 2.0**-24), 0
    scale = float(torch.tensor(scale, dtype=torch.float32))
    return scale, zero, [(min(max(round(v / scale) + zero, qmin), qmax) - zero) * scale for v in x]


@every_bits
@every_scheme
@every_granularity
def test_against_torchao(torchao: Any, bits: int, scheme: Any, granularity: Any) -> None:
    w = weight()
    quantizer = WeightQuantizer(w.shape, bits, scheme, "minmax", granularity)
    quantizer.is_on = True
    ours, integers, (scale, zero_point) = quantizer(w), quantizer.integers(w), quantizer.parameters_of(w)
    their_scale, their_zero_point, q, theirs = torchao(w, bits, scheme, blocks(granularity, tuple(w.shape)))
    # A symmetric scale of theirs is max(max / qmax, −min / −lowest), with one integer more on the negative side.
    if scheme == "symmetric":
        rows = quantizer._rows(w).abs().amax(1)
        assert torch.equal(scale, (rows / quantizer.qmax).clamp(min=affine.SCALE_FLOOR))
        is_same = torch.isclose(scale, their_scale.flatten(), rtol=1e-6)
        assert is_same.any()
        is_same = is_same[:, None].expand_as(quantizer._rows(w)).reshape(w.shape)
    else:
        torch.testing.assert_close(scale, their_scale.flatten(), rtol=1e-6, atol=0)
        assert torch.equal(zero_point, their_zero_point.flatten())
        is_same = torch.ones_like(w, dtype=torch.bool)
    # Half a step may fall either way.
    step = quantizer._unrow(scale[:, None].expand_as(quantizer._rows(w)), w)
    is_tie = ((w / step) % 1 - 0.5).abs() < 1e-3
    assert torch.equal(integers[is_same & ~is_tie], q[is_same & ~is_tie].int())
    torch.testing.assert_close(ours[is_same & ~is_tie], theirs[is_same & ~is_tie], rtol=1e-6, atol=1e-7)


@every_bits
@every_scheme
@every_granularity
def test_against_plain_loops(bits: int, scheme: Any, granularity: Any) -> None:
    w = weight(1)
    quantizer = WeightQuantizer(w.shape, bits, scheme, "minmax", granularity)
    quantizer.is_on = True
    ours, (scales, zeros) = quantizer(w), quantizer.parameters_of(w)
    rows = quantizer._rows(w)
    for row, own, scale, zero in zip(rows, quantizer._rows(ours), scales, zeros, strict=True):
        expected = plain([float(v) for v in row], bits, scheme)
        assert float(scale) == pytest.approx(expected[0], rel=1e-6)
        assert int(zero) == expected[1]
        off = (own.double() - torch.tensor(expected[2], dtype=torch.float64)).abs()
        ties = (row.double() / expected[0] % 1 - 0.5).abs() < 1e-4
        assert (off[~ties] <= 1e-6 * max(expected[0] * 2**bits, 1e-6)).all()
        assert len(own.unique()) <= 2**bits
    # What the integers stand for is what training has seen, bit by bit.
    rebuilt = affine.dequantize(quantizer._rows(quantizer.integers(w)), scales[:, None], zeros[:, None])
    assert torch.equal(rebuilt, quantizer._rows(ours))


@every_bits
def test_against_torchs_operators(bits: int) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)) * 3
    qmin, qmax = affine.integer_range(bits, "affine")
    scale, zero_point = affine.affine_parameters(x.min(), x.max(), bits, "affine")
    assert torch.equal(
        affine.fake_quantize(x, scale, zero_point, qmin, qmax),
        torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax),
    )
    qmin, qmax = affine.integer_range(bits, "symmetric")
    scale, zero_point = affine.affine_parameters(x.amin(0), x.amax(0), bits, "symmetric")
    assert torch.equal(
        affine.fake_quantize(x, scale, zero_point, qmin, qmax),
        torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, qmin, qmax),
    )


@every_bits
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_stays_zero(bits: int, scheme: Any, dtype: torch.dtype) -> None:
    qmin, qmax = affine.integer_range(bits, scheme)
    for low, high in [(-1, 1), (0.3, 5), (-5, -0.3), (0, 0), (-1e-9, 1e-9), (-1e4, 3), (-0.001, 100)]:
        scale, zero_point = affine.affine_parameters(torch.tensor(low), torch.tensor(high), bits, scheme)
        assert scale.dtype == torch.float32
        assert zero_point.dtype == torch.int32
        assert qmin <= int(zero_point) <= qmax
        assert float(scale) >= affine.SCALE_FLOOR
        x = torch.tensor([0.0, -0.0, low, high], dtype=dtype)
        y = affine.fake_quantize(x, scale, zero_point, qmin, qmax)
        assert y.dtype == dtype
        assert y[:2].tolist() == [0.0, 0.0]
        assert affine.quantize(x, scale, zero_point, qmin, qmax)[0] == zero_point


@every_scheme
def test_a_dead_channel_has_a_scale_that_divides(scheme: Any) -> None:
    scale, _ = affine.affine_parameters(torch.zeros(3), torch.tensor([0.0, 1e-12, 1.0]), 8, scheme)
    assert scale[:2].tolist() == [2.0**-24] * 2
    assert 30 / float(scale[0]) < 2**31  # a bias of ordinary size fits an int32
    assert affine.fake_quantize(torch.zeros(3), scale, torch.zeros(3, dtype=torch.int32), -127, 127).tolist() == [0] * 3


@every_bits
@every_scheme
def test_gradient_is_straight_through(bits: int, scheme: Any) -> None:
    x = torch.linspace(-4.01, 4, 805, dtype=torch.float64, requires_grad=True)
    scale, zero_point = affine.affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), bits, scheme)
    qmin, qmax = affine.integer_range(bits, scheme)
    weights = torch.randn(805, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (affine.fake_quantize(x, scale, zero_point, qmin, qmax) * weights).sum().backward()
    q = x.detach() / scale.double() + zero_point
    inside = (q >= qmin - 0.5) & (q <= qmax + 0.5)
    assert torch.equal(x.grad, weights * inside)
    assert inside.any()
    assert not inside.all()
    # One scale a channel takes another path than a single one.
    y = x.detach().view(-1, 1).clone().requires_grad_()
    affine.fake_quantize(y, scale.view(1, 1), zero_point.view(1, 1), qmin, qmax).mul(weights[:, None]).sum().backward()
    assert torch.equal(y.grad.flatten(), x.grad)


def test_a_compiler_sees_the_same() -> None:
    scale, zero_point = affine.affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), 4, "affine")
    results = []
    for function in (affine.fake_quantize, torch.compile(affine.fake_quantize, backend="eager")):
        x = torch.linspace(-4, 4, 80, requires_grad=True)
        y = function(x, scale, zero_point, 0, 15)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


# --- learned scales ---------------------------------------------------------------------------------------------------


def lsq(x: Any, scale: Any, qmin: int, qmax: int, grad: Any) -> tuple[Any, Any, Any]:
    """Equations 1 to 4 of arXiv 1902.08153, for one scale, in float64."""
    ratio = x / scale
    inner = (ratio > qmin) & (ratio < qmax)
    bar = ratio.clamp(qmin, qmax).round()
    of_scale = torch.where(inner, bar - ratio, bar)
    g = 1 / (x.numel() * qmax) ** 0.5
    return bar * scale, grad * inner, (grad * of_scale).sum() * g


@every_bits
def test_learned_gradient_is_the_papers(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(40, dtype=torch.float64, generator=generator)
    grad = torch.randn(40, dtype=torch.float64, generator=generator)
    qmin, qmax = affine.integer_range(bits, "symmetric")
    scale = torch.tensor([1.3 / qmax], dtype=torch.float64, requires_grad=True)
    own = x.clone().requires_grad_()
    y = affine.fake_quantize_learned(own, scale, 0, qmin, qmax)
    y.backward(grad)
    values, of_x, of_scale = lsq(x, scale.detach(), qmin, qmax, grad)
    torch.testing.assert_close(y.detach(), values)
    torch.testing.assert_close(own.grad, of_x)
    torch.testing.assert_close(scale.grad, of_scale.view(1))

    # torch's operator, with a zero point, in float32; its gradient of the input reaches half a step further
    single = x.float().requires_grad_()
    their_scale = scale.detach().float().requires_grad_()
    factor = 1 / (40 * qmax) ** 0.5
    theirs = torch._fake_quantize_learnable_per_tensor_affine(
        single, their_scale, torch.zeros(1), qmin, qmax, grad_factor=factor
    )
    theirs.backward(grad.float())
    torch.testing.assert_close(theirs.detach().double(), values, rtol=1e-5, atol=1e-6)
    edge = ((x / scale.detach()).abs() > qmax) & ((x / scale.detach()).abs() < qmax + 0.5)
    if not edge.any():
        torch.testing.assert_close(their_scale.grad.double(), of_scale.view(1), rtol=1e-4, atol=1e-5)


def test_learned_gradient_of_groups_and_zero_points() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.05, 0.4, 5, dtype=torch.float64).view(5, 1).requires_grad_()
    affine.fake_quantize_learned(x, scale, 0, -7, 7).sum().backward()
    expected = [
        lsq(row, s, -7, 7, torch.ones(8, dtype=torch.float64))[2] for row, s in zip(x, scale[:, 0], strict=True)
    ]
    torch.testing.assert_close(scale.grad[:, 0], torch.stack(expected).detach())
    y = affine.fake_quantize_learned(x, scale.detach()[:1], 3, 0, 15)
    assert torch.equal(y, affine.fake_quantize(x, scale.detach()[:1], torch.tensor(3), 0, 15))


@pytest.mark.parametrize("start", [0.0, -0.3, 1e-12])
def test_a_learned_scale_comes_back_from_below_the_floor(start: float) -> None:
    scale = torch.tensor([start], requires_grad=True)
    x = torch.ones(4)
    for _ in range(200):
        loss = (affine.fake_quantize_learned(x, scale, 0, -7, 7) - x).square().sum()
        (grad,) = torch.autograd.grad(loss, scale)
        loss = loss.detach()
        scale.data -= 0.02 * grad
    assert torch.isfinite(scale).all()
    assert float(loss) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_learned_types(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.25], requires_grad=True)
    x = torch.randn(20).to(dtype).requires_grad_()
    y = affine.fake_quantize_learned(x, scale, 0, -7, 7)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32


def test_learned_start() -> None:
    x = torch.randn(4, 9)
    assert torch.allclose(affine.learned_start(x, 7), 2 * x.abs().mean() / 7**0.5)
    assert torch.allclose(affine.learned_start(x, 7, (0,))[:, 0], 2 * x.abs().mean(1) / 7**0.5)
    assert affine.learned_start(torch.zeros(3), 7) == affine.SCALE_FLOOR
    pruned = torch.where(x.abs() > 1, x, 0.0)  # a pruned weight says nothing about the size of the others
    for row, scale in zip(pruned, affine.learned_start(pruned, 7, (0,)), strict=True):
        assert torch.allclose(scale, affine.learned_start(row[row != 0], 7))


# --- ranges of activations --------------------------------------------------------------------------------------------


def show(quantizer: Any, *batches: Any) -> Any:
    quantizer.is_on = quantizer.is_observing = True
    return [quantizer(batch) for batch in batches][-1]


def test_ranges() -> None:
    batches = torch.tensor([[-1.0, 2.0]]), torch.tensor([[-5.0, 1.0]])
    minmax = ActivationQuantizer(8, "minmax")
    show(minmax, *batches)
    assert (float(minmax.low), float(minmax.high)) == (-5, 2)
    moving = ActivationQuantizer(8, "moving_average")
    show(moving, *batches)
    assert float(moving.low) == pytest.approx(-1 + 0.01 * -4)
    assert float(moving.high) == pytest.approx(2 - 0.01)
    moving.is_observing = False
    moving(torch.tensor([1e6]))
    assert float(moving.high) == pytest.approx(1.99)
    assert moving(torch.tensor([3])).dtype == torch.int64  # token ids pass


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_masks_and_nan_are_no_values(mask: float) -> None:
    quantizer = ActivationQuantizer(8, "minmax")
    x = torch.tensor([-1.0, 2.0, mask])
    y = show(quantizer, x)
    assert (float(quantizer.low), float(quantizer.high)) == (-1, 2)
    assert torch.allclose(y[:2], x[:2], atol=0.01)
    blind = ActivationQuantizer(8, "minmax")
    assert show(blind, torch.full((3,), mask)).shape == (3,)
    assert not blind.has_seen


def test_rectified_and_bounded_ranges() -> None:
    rectified = ActivationQuantizer(8, "minmax", is_rectified=True)
    show(rectified, torch.tensor([-3.0, 2.0]))
    assert (float(rectified.low), float(rectified.high)) == (0, 2)
    fixed = ActivationQuantizer(8, "learned", bounds=(0.0, 1.0))
    show(fixed, torch.tensor([0.2, 0.7]))
    assert (float(fixed.low), float(fixed.high)) == (0, 1)
    assert fixed.scale is None


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_follow_the_output_channels(axis: int) -> None:
    layer = nn.ConvTranspose2d(3, 8, 2) if axis else nn.Conv2d(3, 8, 2)
    quantizer = WeightQuantizer(layer.weight.shape, 4, "symmetric", "minmax", axis=axis)
    quantizer.is_on = True
    assert quantizer.parameters_of(layer.weight)[0].shape == (8,)
    rounded = quantizer(layer.weight).transpose(0, axis)
    for channel, own in zip(layer.weight.transpose(0, axis), rounded, strict=True):
        step = channel.abs().max() / 7
        torch.testing.assert_close(own, (channel / step).round() * step)
    assert torch.equal(
        quantizer.integers(layer.weight).transpose(0, axis).flatten(1).abs().amax(1), torch.full((8,), 7)
    )
