"""Masks, allocation and the pruner, held to torch.nn.utils.prune and to plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress.modules import select_parameters
from lightning_compress.pruning.allocation import SCOPES, erk_shares
from lightning_compress.pruning.granularity import Granularity, element_fields
from lightning_compress.pruning.importance import CRITERIA
from lightning_compress.pruning.masks import as_bits, free_surplus_, initial_mask, pack, unpack, zero_pruned_
from lightning_compress.pruning.pruner import Group, Pruner

CASE_4 = [(16, 3, 3, 3), (32, 16, 3, 3), (32, 16, 1, 1), (64, 32, 3, 3), (10, 64)]


def network(*shapes: tuple[int, int]) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in shapes))
    for layer in net:
        nn.init.normal_(layer.weight)
    return net


def pruner(net: nn.Module, sparsity: float, scope: str = "global", **kwargs: Any) -> Pruner:
    targets = select_parameters(net)
    fields, _ = element_fields(Granularity.parse("weight"), targets)
    made = Pruner(targets, fields, [Group(sparsity, list(range(len(fields))))], CRITERIA["magnitude"], scope, **kwargs)
    made.start()
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_zero_pruned(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    weight = torch.randn(4, 3, 2, 2).to(dtype).contiguous(memory_format=memory_format)
    weight[0, 0, 0, 0], weight[1, 0, 0, 0], weight[2, 0, 0, 0] = torch.nan, torch.inf, -1
    mask = (torch.rand(weight.shape) < 0.5).contiguous(memory_format=memory_format)
    mask[:3, 0, 0, 0] = False
    expected = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    other = weight.clone(memory_format=torch.preserve_format)
    zero_pruned_([other], [as_bits(mask, dtype)])
    zero_pruned_([weight], [mask])
    assert torch.equal(weight, other)
    assert torch.equal(weight, expected)
    assert not torch.signbit(weight[~mask]).any()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2, 0), (2, 3, 3, 3)])
def test_packing_is_lossless(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    assert pack(mask).numel() == math.ceil(mask.numel() / 8)
    assert torch.equal(unpack(pack(mask), shape), mask)


def test_initial_mask_tells_pruned_from_initialized() -> None:
    weight = torch.randn(6, 6)
    weight[2] = 0
    assert torch.equal(initial_mask(weight), weight != 0)
    for fresh in (torch.zeros(4, 4), torch.eye(4), nn.init.dirac_(torch.empty(3, 3, 3, 3)), torch.randn(4, 4)):
        assert initial_mask(fresh).all()


def test_free_surplus() -> None:
    masks = [torch.rand(4, 5) < 0.5, (torch.rand(2, 3, 2, 2) < 0.5).contiguous(memory_format=torch.channels_last)]
    pruned = sum(int((~mask).sum()) for mask in masks)
    free_surplus_(masks, pruned - 3)
    assert sum(int((~mask).sum()) for mask in masks) == 3


def test_case_4_erk() -> None:
    shares = erk_shares(CASE_4, 0.5)
    sizes = [math.prod(shape) for shape in CASE_4]
    assert abs(sum(share.count for share in shares) - sum(sizes) / 2) <= 1
    assert [share.count for share in shares][0:1] + [shares[2].count, shares[4].count] == [0, 0, 0]
    densities = [1 - share.count / share.size for share in shares]
    rule = [sum(shape) / size for shape, size in zip(CASE_4, sizes, strict=True)]
    assert densities[1] / rule[1] == pytest.approx(densities[3] / rule[3], rel=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_shares_add_up(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for sparsity in (0.0, 0.05, 0.29, 0.5, 0.7, 0.9, 0.98):
        shapes = [tuple(torch.randint(1, 40, (2,), generator=generator).tolist()) for _ in range(12)]
        shares = SCOPES[scope](shapes, sparsity)
        total = sum(math.prod(shape) for shape in shapes)
        assert sum(share.size for share in shares) == total
        assert abs(sum(share.count for share in shares) - sparsity * total) <= 0.5 + 1e-6
        if scope == "layer":
            assert all(abs(share.count - sparsity * share.size) < 1 for share in shares)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.987])
def test_agrees_with_torch_prune(sparsity: float) -> None:
    net, reference = network((30, 20), (10, 30)), network((30, 20), (10, 30))
    ours = pruner(net, sparsity)
    ours.update(1.0)
    prune.global_unstructured([(layer, "weight") for layer in reference], prune.L1Unstructured, amount=sparsity)
    for layer, other in zip(net, reference, strict=True):
        assert torch.equal(layer.weight, other.weight)

    net, reference = network((30, 20), (10, 30)), network((30, 20), (10, 30))
    pruner(net, sparsity, "layer").update(1.0)
    for layer, other in zip(net, reference, strict=True):
        prune.l1_unstructured(other, "weight", amount=sparsity)
        assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("scope", SCOPES)
def test_pruned_weights_stay_pruned_and_counts_are_exact(scope: str) -> None:
    net = network((40, 30), (20, 40), (5, 20))
    ours = pruner(net, 0.9, scope, initial_sparsity=0.2)
    before = [torch.zeros_like(mask) for mask in ours.masks]
    for done in (0.0, 0.1, 0.1, 0.5, 0.77, 1.0):
        ours.update(done)
        total = sum(layer.weight.numel() for layer in net)
        zeros = sum(int((layer.weight == 0).sum()) for layer in net)
        assert abs(zeros / total - (0.2 + 0.7 * done)) <= (0.5 + len(net)) / total
        assert zeros / total == ours.sparsity
        assert all(bool((~mask)[was].all()) for mask, was in zip(ours.masks, before, strict=True))
        before = [~mask for mask in ours.masks]
        with torch.no_grad():
            for layer in net:
                layer.weight.add_(torch.randn_like(layer.weight))
        ours.enforce()
    assert abs(ours.sparsity - 0.9) < 1 / total
    assert ours.stage == 1.0


def test_starts_from_a_sparse_model() -> None:
    net = network((40, 30), (20, 40))
    for layer, amount in zip(net, (0.6, 0.3), strict=True):
        prune.l1_unstructured(layer, "weight", amount=amount)
        prune.remove(layer, "weight")
    old = [layer.weight == 0 for layer in net]
    ours = pruner(net, 0.8)
    existing = sum(int(zero.sum()) for zero in old)
    assert ours.sparsity == existing / ours.total
    ours.update(0.0)
    assert ours.sparsity == existing / ours.total
    ours.update(0.5)
    assert ours.sparsity == pytest.approx((existing / ours.total + 0.8) / 2, abs=1 / ours.total)
    ours.update(1.0)
    assert all(bool((layer.weight == 0)[zero].all()) for layer, zero in zip(net, old, strict=True))

    less = pruner(net, 0.5, "layer")
    less.update(1.0)
    assert less.sparsity == 0.5
    assert less.surplus == round(0.8 * 2000) - 1000


def test_no_layer_is_emptied() -> None:
    net = network((40, 30), (20, 40))
    with torch.no_grad():
        net[1].weight.mul_(1e-6)
    ours = pruner(net, 0.95)
    ours.update(1.0)
    assert ours.sparsity == 0.95
    assert ours.pruned()["1.weight"] == (799, 800)
    assert int(net[1].weight.abs().argmax()) == int(network((40, 30), (20, 40))[1].weight.abs().argmax())


@pytest.mark.parametrize(("scope", "sparsity"), [("global", 0.999), ("layer", 0.96), ("erk", 0.999)])
def test_refuses_a_sparsity_that_would_empty_a_layer(scope: str, sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"`final_sparsity` would leave \d of the .*'1\.weight'"):
        pruner(network((40, 30), (2, 5)), sparsity, scope)


def test_state_goes_on_where_it_was_taken() -> None:
    net = network((40, 30), (20, 40))
    ours = pruner(net, 0.9)
    ours.update(0.4)
    other = network((40, 30), (20, 40))
    other.load_state_dict(net.state_dict())
    again = pruner(other, 0.9)
    again.load_state_dict(ours.state_dict())
    for one in (ours, again):
        one.update(0.8)
    assert torch.equal(net[0].weight, other[0].weight)
    assert again.sparsity == ours.sparsity

    smaller = pruner(network((40, 30)), 0.5)
    with pytest.raises(ValueError, match=r"belong to other parameters.*1\.weight"):
        smaller.load_state_dict(ours.state_dict())
    wider = pruner(network((40, 31), (20, 40)), 0.5)
    with pytest.raises(ValueError, match=r"mask of '0\.weight' has shape"):
        wider.load_state_dict(ours.state_dict())


def test_nan_is_refused_by_name_and_nothing_is_pruned() -> None:
    net = network((40, 30), (20, 40))
    ours = pruner(net, 0.5)
    with torch.no_grad():
        net[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.weight"):
        ours.update(1.0)
    assert ours.sparsity == 0.0


def test_gradients() -> None:
    net = network((40, 30), (20, 40))
    ours = pruner(net, 0.5)
    ours.clear_gradients()  # none there yet
    ours.update(1.0)
    net(torch.randn(3, 30)).sum().backward()
    ours.clear_gradients()
    for layer, mask in zip(net, ours.masks, strict=True):
        assert (layer.weight.grad[~mask] == 0).all()
        assert (layer.weight.grad[mask] != 0).any()


@pytest.mark.parametrize("kernel", [(), (3,)])
def test_a_pattern_keeps_the_largest_of_each_group(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(8, 5, 3) if kernel else nn.Linear(8, 5)
    groups = layer.weight.detach().clone().movedim(1, -1).reshape(-1, 4)
    expected = torch.zeros_like(groups).scatter(1, groups.abs().topk(2, dim=1).indices, 1.0) * groups
    targets = select_parameters(nn.Sequential(layer))
    fields, _ = element_fields(Granularity.parse("2:4"), targets)
    made = Pruner(targets, fields, [Group(0.5, [0])], CRITERIA["magnitude"], "global")
    made.start()
    assert made.update(1.0)
    assert torch.equal(layer.weight.movedim(1, -1).reshape(-1, 4), expected)
