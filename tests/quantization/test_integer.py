"""Integer modules give what fake-quantized ones give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from examples.models import ResidualCNN
from lightning_compress.quantization.insertion import Settings, insert
from lightning_compress.quantization.integer import IntegerWeight, RoundedActivation, integer_module
from lightning_compress.quantization.layers import ActivationQuantizer, QuantizedLayer
from tests.quantization.networks import Encoder, Moving, Tied, TwoInputs, mlp, quantized, transposed, with_uneven_norms

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def cases() -> list[Any]:
    found: list[Any] = []
    for granularity in ("channel", "tensor", 32):
        for scheme in ("symmetric", "affine"):
            for bits in (8, 3):
                settings = {"granularity": granularity, "scheme": scheme, "weight_bits": bits}
                found.append(pytest.param(mlp, (X,), settings, id=f"mlp-{granularity}-{scheme}-{bits}"))
    found += [
        pytest.param(mlp, (X,), {"range": "learned", "weight_bits": 4}, id="learned"),
        pytest.param(mlp, (X,), {"range": "learned", "granularity": "tensor"}, id="learned-tensor"),
        pytest.param(mlp, (X,), {"activation_bits": None}, id="weights-only"),
        pytest.param(lambda: ResidualCNN((4, 4, 4)), (torch.randn(8, 1, 28, 28),), {}, id="residual"),
        pytest.param(Moving, (torch.randn(8, 1, 10, 10),), {"weight_bits": 4, "activation_bits": 4}, id="moving"),
        pytest.param(transposed, (torch.randn(4, 3, 6, 6),), {}, id="transposed"),
        pytest.param(transposed, (torch.randn(4, 3, 6, 6),), {"granularity": "tensor"}, id="transposed-tensor"),
        pytest.param(Encoder, (X.view(16, 4, 16),), {}, id="encoder"),
        pytest.param(Encoder, (X.view(16, 4, 16),), {"granularity": 16, "weight_bits": 4}, id="encoder-groups"),
        pytest.param(Encoder, (X.view(16, 4, 16),), {"granularity": "tensor"}, id="encoder-tensor"),
        pytest.param(Tied, (torch.arange(96).view(8, 12),), {}, id="tied"),
        pytest.param(TwoInputs, (X[:, :8], X[:, 8:12]), {}, id="two-inputs"),
    ]
    return found


@pytest.mark.parametrize(("make", "inputs", "settings"), cases())
def test_gives_what_the_fake_quantized_module_gives(make: Any, inputs: Any, settings: Any) -> None:
    torch.manual_seed(0)
    net = quantized(with_uneven_norms(make()), *inputs, **settings)
    before = copy.deepcopy(net.state_dict())
    expected = net(*inputs)
    for dialect in ("torch", "onnx"):
        integer = integer_module(net, dialect)  # type: ignore[arg-type]
        assert not integer.training
        torch.testing.assert_close(integer(*inputs), expected, atol=1e-5, rtol=0.0)
        assert not any(isinstance(child, ActivationQuantizer) for child in integer.modules())
        if settings.get("activation_bits", 8) is not None:
            assert not any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in integer.modules())
        for child in integer.modules():
            if isinstance(child, QuantizedLayer):
                assert isinstance(child.weight_quantizer, IntegerWeight)
                assert child.weight_quantizer.integers.dtype == torch.int8
                bits = settings.get("weight_bits", 8)
                assert child.weight_quantizer.integers.int().abs().max() <= 2 ** (bits - 1)
    torch.testing.assert_close(net.state_dict(), before, atol=0.0, rtol=0.0)
    torch.testing.assert_close(net(*inputs), expected, atol=0.0, rtol=0.0)


def test_batch_norm_turns_integers_where_its_factor_is_negative() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, eps=0.0))
    net[0].weight.data.copy_(torch.tensor([[127.0, -3.0], [127.0, -3.0], [127.0, -3.0]]))
    net[1].weight.data.copy_(torch.tensor([2.0, -2.0, 0.0]))
    net[1].bias.data.copy_(torch.tensor([1.0, 1.0, 5.0]))
    insert(net, Settings()).switch(True)
    integer = integer_module(net)
    assert integer[0].weight_quantizer.integers.tolist() == [[127, -3], [-127, 3], [0, 0]]
    assert integer[0].weight_quantizer.scale.tolist() == [2.0, 2.0, 1.0]
    assert integer[0].bias.tolist() == [1.0, 1.0, 5.0]
    assert isinstance(integer[1], nn.Identity)
    assert not dict(integer[1].named_parameters())


def test_a_tied_weight_is_there_once() -> None:
    integer = integer_module(quantized(Tied(), torch.arange(96).view(8, 12)))
    assert integer.embedding.weight_quantizer is integer.head.weight_quantizer  # type: ignore[union-attr]
    assert sum(buffer.numel() for buffer in integer.buffers() if buffer.dim() > 1) == 500 * 64 + 64 * 64


def test_one_output_has_a_scale_with_one_dimension() -> None:
    integer = integer_module(quantized(nn.Sequential(nn.Conv2d(8, 1, 3)), torch.randn(2, 8, 5, 5)))
    assert integer[0].weight_quantizer.scale.shape == (1,)


def test_what_is_off_or_never_saw_data_stays_float() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.unused(x) if x.shape[0] == 1 else self.used(x)

    net = quantized(Branches(), torch.randn(8, 4))
    integer = integer_module(net)
    x = torch.randn(1, 4)
    torch.testing.assert_close(integer(x), net(x), atol=1e-6, rtol=0.0)
    assert sum(isinstance(child, RoundedActivation) for child in integer.modules()) == 1

    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    insert(plain, Settings())
    integer = integer_module(plain)
    assert type(integer[0]) is nn.Linear
    assert isinstance(integer[1], nn.BatchNorm1d)


def test_foreign_hooks_are_not_in_the_copy() -> None:
    seen = []
    net = quantized(mlp(), X)
    net[0].register_forward_hook(lambda *args: seen.append(1))
    integer_module(net)(X)
    assert not seen
    net(X)
    assert seen
