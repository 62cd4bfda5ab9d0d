"""One file for a sparse, rounded model, and back: bit for bit, small, whole or not there."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_compress.export import packing
from lightning_compress.export.safetensors import KEY, VERSION, load_compressed, save_compressed
from lightning_compress.quantization import layers
from lightning_compress.quantization.layers import ActivationQuantizer, QuantizedLayer, WeightQuantizer


class State(nn.Module):
    """Any tensors, as buffers."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def blank(module: nn.Module) -> nn.Module:
    """Return a copy with every tensor, one for each name or shared as there, filled with ones."""
    module = copy.deepcopy(module)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.ones_like(tensor))
    return module


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert bits(tensor) == bits(right[name]), name


def round_trip(module: nn.Module, path: Path) -> nn.Module:
    again = load_compressed(save_compressed(module, path), blank(module))
    assert_same(module, again)
    return again


def description(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def sparsify(tensor: Tensor, sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return tensor.detach().masked_fill_(torch.rand(tensor.shape, generator=generator) < sparsity, 0)


def quantize(module: nn.Module, bits: int, **kwargs: Any) -> nn.Module:
    """Turn layers into quantized ones that are on."""
    settings: dict[str, Any] = {"scheme": "symmetric", "range": "minmax", "granularity": "channel", **kwargs}
    for child in list(module.modules()):
        if type(child) not in layers.QUANTIZED or isinstance(child, nn.modules.batchnorm._BatchNorm):
            continue
        child.__class__ = layers.QUANTIZED[type(child)]
        own = {"weight": "weight_quantizer"} if isinstance(child, QuantizedLayer) else {}
        if isinstance(child, nn.MultiheadAttention):
            own = {f"{name}_proj_weight": f"{name}_proj_quantizer" for name in ("in", "q", "k", "v")}
        for attribute, name in own.items():
            weight = getattr(child, attribute)
            if weight is not None:
                axis = (
                    1
                    if isinstance(child, nn.modules.conv._ConvTransposeNd)
                    and not isinstance(settings["granularity"], int)
                    else 0
                )
                quantizer = WeightQuantizer(weight.shape, bits, axis=axis, **settings)
                quantizer.start(weight)
                quantizer.is_on = True
                setattr(child, name, quantizer)
    return module


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def sparse_lenet(sparsity: float) -> nn.Sequential:
    net = lenet()
    for seed, layer in enumerate(net[::2]):
        sparsify(layer.weight, sparsity, seed)
    return net


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(13))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packed_integers_come_back(width: int, count: int) -> None:
    values = np.random.default_rng(width).integers(0, 1 << width, count)
    data = packing.pack(values, width)
    assert len(data) == math.ceil(width * count / 8)
    assert np.array_equal(packing.unpack(data, width, count), values)


@pytest.mark.parametrize("seed", range(20))
def test_huffman_codes_come_back(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(0, 5000))
    values = np.round(random.normal(0, random.choice([0.1, 2, 50]), size)).astype(np.int64)
    code = packing.huffman(values)
    data = code.encode()
    assert len(data) == code.size
    again, used = packing.unhuffman(data + b"more", size)
    assert np.array_equal(again, values)
    assert used == len(data)


def test_huffman_codes_of_skewed_counts_are_limited() -> None:
    counts = np.array([1, 1, *(int(1.7**i) + 1 for i in range(40))])
    lengths = packing.code_lengths(counts)
    assert lengths.max() == packing.LONGEST
    assert (2.0 ** -lengths.astype(float)).sum() == 1
    values = np.repeat(np.arange(20), [int(1.7**i) + 1 for i in range(20)])
    assert np.array_equal(packing.unhuffman(packing.huffman(values).encode(), len(values))[0], values)


def test_huffman_codes_span_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_CHUNK", 64)
    values = np.random.default_rng(0).integers(-40, 40, 1000)
    assert np.array_equal(packing.unhuffman(packing.huffman(values).encode(), 1000)[0], values)
    assert np.array_equal(packing.unpack(packing.pack(values + 40, 7), 7, 1000), values + 40)


@pytest.mark.parametrize("mask", [
    np.zeros(100, bool), np.ones(100, bool), np.arange(1) > 0, np.arange(1) == 0, np.zeros(0, bool),
    np.arange(100_000) == 99_999, np.arange(100_000) == 0, np.arange(4096) % 7 == 3,
    *(np.random.default_rng(seed).random(3000) < 0.7**seed for seed in range(12)),
])  # fmt: skip
def test_positions_come_back(mask: np.ndarray) -> None:
    for code in packing.code_positions(mask):
        data = code.encode()
        assert len(data) == code.size, code.name
        found = packing.read_positions(code.name, data, int(mask.sum()), len(mask))
        assert np.array_equal(found, np.flatnonzero(mask)), code.name


def test_codes_are_near_the_entropy() -> None:
    mask = np.random.default_rng(0).random(100_000) < 0.1
    sizes = {code.name: code.size * 8 / 100_000 for code in packing.code_positions(mask)}
    share = mask.mean()
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert max(sizes["rice"], sizes["huffman"]) < 1.02 * entropy
    values = np.round(np.random.default_rng(0).normal(0, 3, 100_000)).astype(int)
    shares = np.unique(values, return_counts=True)[1] / 100_000
    assert packing.huffman(values).size * 8 / 100_000 < 1.02 * -(shares * np.log2(shares)).sum()


# --- tensors as they are ----------------------------------------------------------------------------------------------


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool,
          torch.complex64, torch.complex128, torch.float8_e5m2]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_any_tensor_comes_back(dtype: torch.dtype, sparsity: float, tmp_path: Path) -> None:
    shapes = [(), (0,), (3, 0, 2), (1,), (5,), (2000,), (60, 50), (50, 60), (8, 4, 3, 3, 2)]
    tensors = {}
    for index, shape in enumerate(shapes):
        values = sparsify(torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 3, sparsity)
        tensors[f"t{index}"] = values.to(dtype)
    round_trip(State(**tensors), tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_special_numbers_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    special = torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45], dtype=dtype)
    few = torch.zeros(10_000, dtype=dtype)
    few[100:108] = special
    payload = torch.full((1000,), 0.0)
    payload.view(torch.int32)[7] = 0x7F800001  # a signaling NaN
    state = State(few=few, special=special, payload=payload, negative=-torch.zeros(999, dtype=dtype))
    again = round_trip(state, tmp_path / "a.safetensors")
    assert again.few[101].signbit()
    assert {"few", "negative", "payload"} <= description(tmp_path / "a.safetensors")["tensors"].keys()


def test_negative_zeros_of_a_mask_are_still_left_out(tmp_path: Path) -> None:
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    weight = weight * (torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) > 0.9)
    assert int(((weight == 0) & weight.signbit()).sum()) > 30_000
    round_trip(State(weight=weight), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 0.15 * 360_000


@pytest.mark.parametrize("seed", range(15))
def test_random_modules_come_back(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    tensors = {}
    for index in range(8):
        shape = [1 + draw(20) for _ in range(draw(5))]
        tensor = torch.randn(shape, generator=generator) * 10.0 ** (draw(9) - 4)
        tensor = sparsify(tensor, draw(11) / 10, seed)
        if draw(3) == 0:
            tensor = tensor.reshape(-1).repeat_interleave(2).view(2, -1).t()  # not contiguous
        tensors[f"t{index}"] = tensor.to(DTYPES[draw(len(DTYPES))])
    round_trip(State(**tensors), tmp_path / "a.safetensors")


@pytest.mark.parametrize("order", ["row", "column"])
def test_channels_that_are_off_cost_next_to_nothing(order: str, tmp_path: Path) -> None:
    weight = torch.randn(200, 200)
    weight[:, torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    weight = weight if order == "column" else weight.t()
    round_trip(State(weight=weight), tmp_path / "a.safetensors")
    spec = description(tmp_path / "a.safetensors")["tensors"]["weight"]
    assert (spec["positions"], spec.get("order", "row")) == ("runs", order)
    assert sum(spec["bytes"]) < int(weight.count_nonzero()) * 4 + 200


def test_a_network_with_batch_norm_comes_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    net(torch.randn(4, 3, 8, 8))
    sparsify(net[4].weight, 0.8)
    again = round_trip(net, tmp_path / "a.safetensors")
    assert again[1].num_batches_tracked == 1
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net.eval()(x), again.eval()(x))


def test_a_dense_file_is_no_larger_than_the_plain_one(tmp_path: Path) -> None:
    net = lenet()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "plain.safetensors")
    round_trip(net, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < (tmp_path / "plain.safetensors").stat().st_size + 300
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a.safetensors")["0.weight"], net[0].weight)


def test_the_module_is_not_changed_and_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    net = quantize(sparse_lenet(0.9), 4)
    before = copy.deepcopy(net.state_dict())
    first = save_compressed(net, tmp_path / "a.safetensors").read_bytes()
    assert save_compressed(net, tmp_path / "b.safetensors").read_bytes() == first
    assert all(bits(before[name]) == bits(tensor) for name, tensor in net.state_dict().items())


# --- tied, shared, wrapped --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_there_once(tmp_path: Path) -> None:
    net = Tied()
    again = round_trip(net, tmp_path / "a.safetensors")
    assert again.head.weight is again.embedding.weight
    assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")) == 1
    assert description(tmp_path / "a.safetensors")["aliases"] == {"head.weight": "embedding.weight"}

    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(50, 16))
    load_compressed(tmp_path / "a.safetensors", untied)
    assert torch.equal(untied.head.weight, net.head.weight)

    save_compressed(untied, tmp_path / "b.safetensors")
    load_compressed(tmp_path / "b.safetensors", Tied())
    untied.head.weight.data[0] = 7
    save_compressed(untied, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match="'embedding.weight' and 'head.weight' are one tensor in the module and two in"
    ):
        load_compressed(tmp_path / "b.safetensors", Tied())


def test_a_tied_weight_is_rounded_if_one_of_its_modules_rounds_it(tmp_path: Path) -> None:
    net = Tied()
    quantize(net.head, 4)
    again = load_compressed(save_compressed(net, tmp_path / "a.safetensors"), Tied())
    assert torch.equal(again.embedding.weight, net.head.quantized_weight())
    quantize(net.embedding, 4)
    load_compressed(save_compressed(net, tmp_path / "a.safetensors"), again)
    assert torch.equal(again.embedding.weight, net.head.quantized_weight())
    quantize(net.embedding.requires_grad_(True), 4)
    net.embedding.weight_quantizer.qmax = 3
    with pytest.raises(ValueError, match="'embedding.weight' and 'head.weight' are one tensor that is rounded in two"):
        save_compressed(net, tmp_path / "a.safetensors")


def test_tensors_that_share_memory_without_being_one_come_back(tmp_path: Path) -> None:
    base = torch.randn(10, 10)
    state = State(base=base, flat=base.view(-1), row=base[3], turned=base.t(), wide=base[:1].expand(4, 10))
    tensors = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    again = load_compressed(
        save_compressed(state, tmp_path / "a.safetensors"),
        State(**{k: torch.zeros_like(v) for k, v in tensors.items()}),
    )
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())


def test_a_compiled_module_has_its_plain_names(tmp_path: Path) -> None:
    net = sparse_lenet(0.9)
    save_compressed(torch.compile(net), tmp_path / "a.safetensors")
    assert_same(load_compressed(tmp_path / "a.safetensors", lenet()), net)
    compiled = torch.compile(blank(net))
    assert load_compressed(tmp_path / "a.safetensors", compiled) is compiled
    assert_same(compiled._orig_mod, net)


# --- rounded ----------------------------------------------------------------------------------------------------------


GRANULARITIES = [
    *({"granularity": granularity, "scheme": scheme} for granularity in ("channel", "tensor", 8)
      for scheme in ("symmetric", "affine")),
    *({"granularity": granularity, "range": "learned"} for granularity in ("channel", "tensor", 8)),
]  # fmt: skip


def net_of_all_layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 24), nn.Conv1d(16, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv3d(8, 4, 2),
        nn.ConvTranspose1d(8, 16, 3), nn.ConvTranspose2d(8, 16, 3), nn.ConvTranspose3d(4, 8, 2), nn.Embedding(30, 16),
    )  # fmt: skip


@pytest.mark.parametrize("settings", GRANULARITIES, ids=str)
@pytest.mark.parametrize("width", range(2, 9))
def test_rounded_weights_come_back(width: int, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(width)
    plain = net_of_all_layers()
    for index, layer in enumerate(plain):
        sparsify(layer.weight, index / 8, index)
        layer.weight.data[0] *= 3
        layer.weight.data += 0.01 * (layer.weight.data > 0)
    net = quantize(copy.deepcopy(plain), width, **settings)
    again = load_compressed(save_compressed(net, tmp_path / "a.safetensors"), plain)
    specs = description(tmp_path / "a.safetensors")["tensors"]
    for index, (layer, rounded) in enumerate(zip(plain, net, strict=True)):
        assert torch.equal(layer.weight, rounded.weight_quantizer(rounded.weight)), index
        assert not (layer.weight.signbit() & (layer.weight == 0)).any()
        assert f"{index}.weight" not in specs or specs[f"{index}.weight"]["bits"] == width
    assert len(specs) >= 6  # of 8: a small one with many scales is smaller as it is
    assert again is plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", GRANULARITIES, ids=str)
def test_rounded_weights_of_other_dtypes_come_back(
    dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    net = quantize(copy.deepcopy(plain), 4, **settings).to(dtype)
    load_compressed(save_compressed(net, tmp_path / "a.safetensors"), plain)
    assert plain[0].weight.dtype == dtype
    assert torch.equal(plain[0].weight, net[0].quantized_weight())
    assert description(tmp_path / "a.safetensors")["tensors"]["0.weight"]["bits"] == 4


def test_a_layer_folded_into_a_batch_norm_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32))
    plain[1].running_var.uniform_(0.1, 5)
    nn.init.normal_(plain[1].weight)  # of both signs
    sparsify(plain[0].weight, 0.5)
    for granularity in ("tensor", "channel"):
        net = quantize(copy.deepcopy(plain), 8, granularity=granularity)
        net[0].folded = (net[1],)
        again = load_compressed(save_compressed(net, tmp_path / "a.safetensors"), blank(plain))
        assert torch.equal(again[0].weight, net[0].quantized_weight())
        assert not (again[0].weight.signbit() & (again[0].weight == 0)).any()
        assert description(tmp_path / "a.safetensors")["tensors"]["0.weight"]["bits"] == 8


@pytest.mark.parametrize("kdim", [None, 24])
def test_the_projections_of_an_attention_come_back(kdim: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4, kdim=kdim)
    net = quantize(copy.deepcopy(plain), 4)
    again = load_compressed(save_compressed(net, tmp_path / "a.safetensors"), plain)
    weights = (plain.in_proj_weight.chunk(3) if kdim is None
               else (plain.q_proj_weight, plain.k_proj_weight, plain.v_proj_weight))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(weights, net.projections(), strict=True))
    assert torch.equal(again.out_proj.weight, net.out_proj.quantized_weight())
    assert sum("bits" in spec for spec in description(tmp_path / "a.safetensors")["tensors"].values()) == (
        2 if kdim is None else 4
    )


def test_zeros_everywhere_nowhere_and_numbers_that_are_none(tmp_path: Path) -> None:
    plain = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
    plain[0].weight.data.zero_()
    plain[1].weight.data.fill_(0.25)
    plain[2].weight.data[3, 4] = math.nan
    plain[3].weight.data[3, 4] = math.inf
    for scheme in ("symmetric", "affine"):
        net = quantize(copy.deepcopy(plain), 3, scheme=scheme)
        again = load_compressed(save_compressed(net, tmp_path / "a.safetensors"), blank(plain))
        for layer, rounded in zip(again, net, strict=True):
            assert torch.equal(layer.weight.isnan(), rounded.quantized_weight().isnan())
            assert torch.equal(layer.weight.nan_to_num(), rounded.quantized_weight().nan_to_num())
        specs = description(tmp_path / "a.safetensors")["tensors"]
        assert {name for name, spec in specs.items() if "bits" in spec} == {"0.weight", "1.weight"}


def test_a_quantizer_that_is_off_leaves_its_weight_alone(tmp_path: Path) -> None:
    plain = lenet()
    net = quantize(copy.deepcopy(plain), 4)
    for layer in net[::2]:
        layer.weight_quantizer.is_on = False
    assert_same(load_compressed(save_compressed(net, tmp_path / "a.safetensors"), lenet()), plain)


def test_ranges_and_learned_scales_come_back(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        net = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), 4, range="learned")
        net[0].input_quantizer = ActivationQuantizer(8, "moving_average")
        net[2].input_quantizer = ActivationQuantizer(4, "learned")
        net[2].output_quantizer = ActivationQuantizer(8, "minmax")  # never sees data
        return net

    net = make()
    for _ in range(3):
        for quantizer in (net[0].input_quantizer, net[2].input_quantizer):
            quantizer.is_on = quantizer.is_observing = True
            quantizer(torch.randn(5, 8))
    path = save_compressed(net, tmp_path / "a.safetensors")
    again = load_compressed(path, make())
    for name, child in net.named_modules():
        if isinstance(child, layers.Quantizer):
            other = again.get_submodule(name)
            for key, value in child.state().items():
                assert (
                    (bits(value) == bits(other.state()[key]))
                    if isinstance(value, Tensor)
                    else (value == other.state()[key])
                ), (name, key)
    assert again[2].input_quantizer.zero_point
    assert not again[2].output_quantizer.has_seen
    # A learned scale rounds the rounded weight to itself.
    assert torch.equal(again[0].quantized_weight(), net[0].quantized_weight())
    load_compressed(path, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))

    other = make()
    other[0].input_quantizer = ActivationQuantizer(7, "moving_average")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'0.input_quantizer' has 8 bits in the file and 7 bits in the module"):
        load_compressed(path, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    other = make()
    other[2].input_quantizer = ActivationQuantizer(4, "minmax")
    with pytest.raises(ValueError, match=r"'2.input_quantizer' has 4 bits, learned in the file and 4 bits in the"):
        load_compressed(path, other)
    other = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), 4, range="learned", granularity=4)
    with pytest.raises(ValueError, match=r"the scale of the quantizer of '0.weight' is \(8,\) in the file and \(16,\)"):
        load_compressed(path, other)


def test_a_learned_scale_is_kept_where_its_integers_are_not_exact(tmp_path: Path) -> None:
    net = quantize(nn.Sequential(nn.Linear(8, 8)), 4, range="learned").double()
    net[0].weight_quantizer.scale.data.mul_(1 + 1e-12)  # no float32
    plain = nn.Sequential(nn.Linear(8, 8)).double()
    path = save_compressed(net, tmp_path / "a.safetensors")
    assert torch.equal(load_compressed(path, plain)[0].weight, net[0].quantized_weight())
    again = quantize(nn.Sequential(nn.Linear(8, 8)), 4, range="learned").double()
    load_compressed(path, again)
    assert torch.equal(again[0].weight_quantizer.scale, net[0].weight_quantizer.scale)


# --- sizes and times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "width", "share"), [(0.9, 8, 0.045), (0.98, 4, 0.011), (0.98, 8, 0.015)])
def test_sizes(sparsity: float, width: int, share: float, tmp_path: Path) -> None:
    """The issue asks for 0.06 and 0.015."""
    safetensors.torch.save_file(lenet().state_dict(), tmp_path / "plain.safetensors")
    net = quantize(sparse_lenet(sparsity), width)
    save_compressed(net, tmp_path / "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size < share * (tmp_path / "plain.safetensors").stat().st_size
    again = load_compressed(tmp_path / "a.safetensors", lenet())
    for layer, rounded in zip(again[::2], net[::2], strict=True):
        assert torch.equal(layer.weight, rounded.quantized_weight())


def test_sizes_of_sparse_floats_and_dense_integers(tmp_path: Path) -> None:
    size = lambda net: save_compressed(net, tmp_path / "a.safetensors").stat().st_size / 1_067_000  # noqa: E731
    assert size(sparse_lenet(0.9)) < 0.12
    assert size(sparse_lenet(0.98)) < 0.028
    assert size(quantize(lenet(), 8)) < 0.256
    assert size(quantize(lenet(), 4)) < 0.128
    assert size(quantize(lenet(), 2)) < 0.055


def test_a_million_weights_are_read_in_less_than_a_second(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1000, 1000))
    nn.init.normal_(net[0].weight)  # so that Huffman codes are the smallest: the slow case
    path = save_compressed(quantize(copy.deepcopy(net), 8), tmp_path / "a.safetensors")
    assert description(path)["tensors"]["0.weight"]["values"] == "huffman"
    start = time.process_time()
    load_compressed(path, net)
    assert time.process_time() - start < 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_metadata(tmp_path: Path) -> None:
    path = save_compressed(lenet(), tmp_path / "new" / "a.safetensors", {"git": "abc", "sparsity": 0.9, "n": [1, 2]})
    with safetensors.safe_open(path, "pt") as file:
        words = file.metadata()
    assert (words["git"], words["sparsity"], words["n"]) == ("abc", "0.9", "[1, 2]")
    assert json.loads(words[KEY])["version"] == VERSION
    with pytest.raises(ValueError, match="'lightning_compress'"):
        save_compressed(lenet(), path, {KEY: "mine"})
    with pytest.raises(TypeError):
        save_compressed(lenet(), path, {"a": object()})
    assert os.listdir(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_crash_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    old = save_compressed(lenet(), path).read_bytes()
    save_file = safetensors.torch.save_file

    def crash(tensors: Any, filename: Any, metadata: Any) -> None:
        save_file(tensors, filename, metadata)
        Path(filename).write_bytes(Path(filename).read_bytes()[: 100 if where == "before" else None])
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        save_compressed(sparse_lenet(0.9), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.safetensors"]


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """Write a file again with another description, or other tensors."""
    words = description(path)
    tensors = safetensors.torch.load_file(path)
    change(words, tensors)
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(words)})
    return path


def test_files_that_are_refused(tmp_path: Path) -> None:
    net = quantize(sparse_lenet(0.9), 4)
    path = save_compressed(net, tmp_path / "a.safetensors")
    whole, before = path.read_bytes(), lenet()
    target = copy.deepcopy(before)
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file"):
            load_compressed(path, target)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged: its checksum"):
        load_compressed(path, target)
    path.write_bytes(whole)
    edit(path, lambda words, tensors: words.update(version=99))
    with pytest.raises(ValueError, match="version 99"):
        load_compressed(path, target)
    for change in ({"count": 3}, {"bytes": [1, 2]}, {"positions": "x"}, {"values": "x"}, {"dtype": "x"}):
        path.write_bytes(whole)
        edit(path, lambda words, tensors, change=change: words["tensors"]["0.weight"].update(change))
        with pytest.raises(ValueError, match=r"'0\.weight' cannot be decoded"):
            load_compressed(path, target)
    safetensors.torch.save_file(before.state_dict(), path)
    with pytest.raises(ValueError, match="save_compressed did not write it"):
        load_compressed(path, target)
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "none.safetensors", target)
    assert_same(target, before)


def test_modules_that_do_not_fit_are_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = save_compressed(lenet(), tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 90), nn.ReLU(), nn.Linear(90, 10))
    before = copy.deepcopy(other)
    with pytest.raises(
        ValueError, match=r"this Sequential: '2\.bias' is \(100,\) in the file and \(90,\) in the module"
    ):
        load_compressed(path, other)
    assert_same(other, before)
    with pytest.raises(
        ValueError, match=r"only the file has '0\.bias'.* and 1 more; only the module has 'bias', 'weight'"
    ):
        load_compressed(path, nn.Linear(784, 300))
    with pytest.raises(ValueError, match=r"'0\.weight' is torch.float32 in the file and torch.float16 in the module"):
        load_compressed(path, lenet().half())
    with pytest.raises(ValueError, match=r"'0\.weight' is no plain tensor .* meta"):
        load_compressed(path, lenet().to("meta"))


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    for module, match in (
        (nn.Sequential(Extra(2, 2)), "'0._extra_state' is no plain tensor .* a dict"),
        (nn.Sequential(nn.LazyLinear(2)), r"'0\.weight' is no plain .* run the module once"),
        (State(a=torch.eye(3).to_sparse()), "'a' is no plain tensor"),
    ):
        with pytest.raises(ValueError, match=match):
            save_compressed(module, tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_compress\[export\]'"):
        save_compressed(lenet(), tmp_path / "a.safetensors")
