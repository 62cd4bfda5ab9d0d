"""Removal is compared with the masked model's own answers, in plain torch."""

from __future__ import annotations

import ast
import copy
import inspect
import random
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.pruning import coupling, removal
from lightning_compress.pruning.removal import (
    ChannelGroup,
    PrunedMultiheadAttention,
    Slice,
    channel_groups,
    load_pruned,
    profile,
    removal_report,
    remove_pruned_channels,
)

F = nn.functional


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.skip(x))


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def vgg():
    def stage(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Flatten(), nn.Linear(16 * 2 * 2, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5)]
    return nn.Sequential(*stage(3, 8), *stage(8, 16), *head)


def separable():
    def layer(inputs, outputs, multiplier=1):
        inner = inputs * multiplier
        return [
            nn.Conv2d(inputs, inner, 3, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]

    stem = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6()]
    return nn.Sequential(
        *stem, *layer(8, 12), *layer(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


class Concatenation(nn.Module):
    """Dense connections on the way down, a skip connection and a transposed convolution on the way up."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(14)
        self.down = nn.Conv2d(14, 10, 3, 2, 1)
        self.up = nn.ConvTranspose2d(10, 7, 2, 2)
        self.last = nn.Conv2d(7 + 14, 3, 1)

    def forward(self, x):
        a = F.relu(self.a(x))
        both = F.relu(self.bn(torch.cat([a, self.b(a)], dim=1)))
        return self.last(torch.cat([self.up(F.relu(self.down(both))), both], dim=1))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.last(x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid())


class Chunk(nn.Module):
    """Case 3a."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x):
        x = self.conv1(x)
        first, second = x.chunk(2, dim=1)
        out = self.conv2(second)
        return self.conv3(torch.cat([first, second, out] if self.parts == "ab" else [x, out], dim=1))


class Gated(nn.Module):
    """The feed-forward of today's language models; RMSNorm before it, a residual stream around it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.w1, self.w2, self.w3 = nn.Linear(32, 24, bias=False), nn.Linear(24, 32), nn.Linear(32, 24, bias=False)

    def forward(self, x):
        inner = self.norm(x)
        return x + self.w2(F.silu(self.w1(inner)) * self.w3(inner))


class FusedQkv(nn.Module):
    """Case 3c."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.mix(x).reshape(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.out(qkv[0].transpose(1, 2).reshape(batch, length, 32))


class Tied(nn.Module):
    """Case 14: an embedding and an output layer that share a weight, and an MLP between them."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        return self.head(x + self.down(F.relu(self.up(x))))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` as a model's first layer, its weights not asked for."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **kwargs)
        self.last = nn.Linear(32, 3)

    def forward(self, x, key_padding_mask=None, attn_mask=None):
        out, _ = self.attention(x, x, x, key_padding_mask=key_padding_mask, attn_mask=attn_mask, need_weights=False)
        return self.last(out)


class Grouped(nn.Module):
    """Case 17: grouped queries, with the attributes that such code has."""

    def __init__(self, heads=4, key_heads=2, head_dim=8):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, key_heads, head_dim
        self.q_proj = nn.Linear(32, heads * head_dim)
        self.k_proj = nn.Linear(32, key_heads * head_dim)
        self.v_proj = nn.Linear(32, key_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, 32)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class BertSelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 8, 32
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        def heads(layer):
            return layer(x).view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).transpose(1, 2)

        out = F.scaled_dot_product_attention(heads(self.query), heads(self.key), heads(self.value))
        return out.transpose(1, 2).reshape(*x.shape[:2], self.all_head_size)


class BertOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, out, x):
        return self.norm(self.dense(out) + x)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"self": BertSelf(), "output": BertOutput()})

    def forward(self, x):
        return self.attention["output"](self.attention["self"](x), x)


class Vit(nn.Module):
    """A fused projection for queries, keys and values, the heads reshaped by attributes."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def encoder(batch_first=True, norm_first=False):
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))


# --- helpers ----------------------------------------------------------------------------------------------------------


def randomized(model, seed=0):
    """Give biases and norms values away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(noise + 0.5 if "var" in name or "weight" in name else noise - 0.5)
    return model


def mask(model, groups, share=0.5, seed=0):
    """Set a share of each group's units to zero, equally many in each block; return how many."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    counts = {}
    for group in groups:
        length = group.units // group.blocks
        units = torch.zeros(group.blocks, length, dtype=torch.bool)
        for row in units:
            row[torch.randperm(length, generator=generator)[: max(1, int(share * length))]] = True
        units = units.reshape(-1)
        for part in group.outputs:
            tensors[part.name].data.index_fill_(part.dim, part.index[units].reshape(-1), 0.0)
        counts[group.name] = int(units.sum())
    return counts


def answers(model, *args, **kwargs):
    mode = {name: child.training for name, child in model.named_modules()}
    model.eval()
    with torch.no_grad():
        out = model(*args, **kwargs)
    for name, child in model.named_modules():
        child.training = mode[name]
    return out


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def prune(model, inputs, kind="channel", share=0.5, **kwargs):
    """Mask and cut a model; its answers to the same and to other inputs stay what the masked model's were."""
    randomized(model)
    groups, refused = channel_groups(model, inputs, kind=kind, **kwargs)
    counts = mask(model, groups, share)
    other = torch.cat([inputs, inputs[:1]]).flip(0) if inputs.is_floating_point() else inputs.flip(0)
    before = [answers(model, inputs), answers(model, other)]
    smaller = remove_pruned_channels(model, inputs, groups=groups)
    assert smaller is model
    for old, new in zip(before, [answers(model, inputs), answers(model, other)], strict=True):
        close(new, old)
    return groups, refused, counts


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rest = [
        (name, child.training, len(child._forward_hooks), len(child._forward_pre_hooks), type(child))
        for name, child in model.named_modules()
    ]
    grads = [(parameter.requires_grad, id(parameter)) for parameter in model.parameters()]
    return state, rest, grads


def untouched(model, before):
    state, rest, grads = snapshot(model)
    assert rest == before[1]
    assert grads == before[2]
    return state.keys() == before[0].keys() and all(torch.equal(state[name], before[0][name]) for name in state)


# --- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "inputs", "expected"),
    [
        (
            Residual,
            IMAGE,
            {"stem.0": 8, "blocks.0.conv1": 8, "blocks.1.conv1": 16, "blocks.1.conv2": 16, "blocks.2.conv1": 16},
        ),
        (vgg, IMAGE, {"0": 8, "4": 16, "9": 24}),
        (separable, IMAGE, {"0": 8, "6": 12, "11": 16}),
        (Concatenation, IMAGE, {"a": 8, "b": 6, "down": 10, "up": 7}),
        (SqueezeExcite, IMAGE, {"conv": 8, "fc1": 4}),
        (Gated, TOKENS, {"w1": 24}),
        (lambda: Chunk("ab"), IMAGE, {"conv1": 8, "conv2": 8}),
        (lambda: Chunk("x"), IMAGE, {"conv1": 8, "conv2": 8}),
        (encoder, TOKENS, {"layers.0.linear1": 48, "layers.1.linear1": 48}),
        (lambda: encoder(batch_first=False, norm_first=True), TOKENS, {"layers.0.linear1": 48, "layers.1.linear1": 48}),
    ],
    ids=["residual", "vgg", "separable", "concatenation", "excite", "gated", "chunk", "chunk2", "encoder", "pre-norm"],
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_the_smaller_model_answers_like_the_masked_one(build, inputs, expected, share):
    model = build()
    wide = sum(p.numel() for p in model.parameters())
    groups, _, counts = prune(model, inputs, share=share)
    assert {group.name: group.units for group in groups} == expected
    again, _ = channel_groups(model, inputs)
    kept = {name: units - min(counts[name], units - 1) for name, units in expected.items()}
    left = {group.name: group.units for group in again if group.name in expected}
    assert left == {name: units for name, units in kept.items() if units > 1}
    assert sum(p.numel() for p in model.parameters()) < wide


def test_coupled_layers_are_one_group():
    model = Residual()
    groups, refused = channel_groups(model, IMAGE)
    group = groups[0]
    assert group.layers == ("stem.0", "blocks.0.conv2")
    assert {(part.name, part.scored) for part in group.outputs} == {
        ("stem.0.weight", True),
        ("stem.1.weight", False),
        ("stem.1.bias", False),
        ("blocks.0.conv2.weight", True),
        ("blocks.0.bn2.weight", False),
        ("blocks.0.bn2.bias", False),
    }
    assert {part.name for part in group.inputs} == {
        "stem.1.running_mean",
        "stem.1.running_var",
        "blocks.0.bn2.running_mean",
        "blocks.0.bn2.running_var",
        "blocks.0.conv1.weight",
        "blocks.1.conv1.weight",
        "blocks.1.skip.0.weight",
    }
    assert all(part.index.shape == (8, 1) for part in (*group.outputs, *group.inputs))
    assert refused == {"fc": "its width is that of an output of the model"}


def test_attributes_follow():
    model = separable()
    prune(model, IMAGE)
    first, depthwise, multiplied = model[0], model[3], model[8]
    assert (first.out_channels, model[1].num_features) == (4, 4)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    assert (multiplied.in_channels, multiplied.out_channels, multiplied.groups) == (6, 12, 6)
    assert (model[-1].in_features, model[-1].out_features) == (8, 5)


@pytest.mark.parametrize("kind", ["maps", "list", "tuple", "dataclass", "relu"])
def test_what_the_model_returns_keeps_its_width(kind):
    """Case 2."""

    @dataclass
    class Maps:
        p3: torch.Tensor
        p4: torch.Tensor

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 12, 3, padding=1)
            self.conv1, self.conv2 = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)

        def forward(self, x):
            p3 = self.conv1(F.relu(self.inner(x)))
            p4 = self.conv2(F.relu(p3))
            if kind == "relu":
                return F.relu(p3), p4
            return {"maps": {"p3": p3, "p4": p4}, "list": [p3, p4], "tuple": (p3, p4), "dataclass": Maps(p3, p4)}[kind]

    model, x = Backbone(), IMAGE[:2]
    groups, refused = channel_groups(model, x)
    assert [group.name for group in groups] == ["inner"]
    assert set(refused) == {"conv1", "conv2"}
    assert all("width" in reason for reason in refused.values())
    mask(model, groups)

    def maps():
        out = answers(model, x)
        return [out.p3, out.p4] if kind == "dataclass" else list(out.values() if kind == "maps" else out)

    before = maps()
    remove_pruned_channels(model, x)
    assert model.inner.out_channels == 6
    assert [tuple(out.shape) for out in maps()] == [(2, 16, 8, 8), (2, 32, 8, 8)]
    for new, old in zip(maps(), before, strict=True):
        close(new, old)


@pytest.mark.parametrize(
    ("build", "inputs", "layer", "reason"),
    [
        (lambda: nn.Conv2d(16, 32, 3, groups=16), torch.randn(2, 16, 6, 6), "", "does not run"),
        (FusedQkv, TOKENS, "mix", "fit"),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 3, 3)), IMAGE, "0", "fit"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(3, 4), "0", "'1'"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)), torch.randn(3, 4), "0", "sigmoid"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 2, 3)), IMAGE, "0", "statistic"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 3)), IMAGE, "0", "together"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 2)),
            torch.randn(3, 4),
            "0",
            "another answer",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 2)), torch.randn(3, 4), "0", "RMSNorm '1'"),
        (lambda: nn.LSTM(8, 16, 2), torch.randn(5, 2, 8), "", "no dependency rule for LSTM"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (8, 1)), nn.Flatten(), nn.Linear(8, 2)),
            torch.randn(3, 4),
            "0",
            "does not run",
        ),
    ],
    ids=["3b", "3c", "3d", "layer norm", "sigmoid", "softmax", "group norm", "no affine", "rms", "lstm", "constant"],
)
def test_what_cannot_be_exact_is_refused_by_name(build, inputs, layer, reason):
    model = build()
    before = snapshot(model)
    groups, refused = channel_groups(model, inputs)
    assert layer not in {name for group in groups for name in group.layers}
    assert reason in refused[layer]
    assert untouched(model, before)
    answers(model, inputs)


def test_channels_that_must_stay_are_named_when_they_are_masked():
    """Case 3: nothing fails deep inside, and the given module is left as it was."""
    model = FusedQkv()
    with torch.no_grad():
        model.mix.weight[:8], model.mix.bias[:8] = 0, 0
    before = snapshot(model)
    with pytest.warns(UserWarning, match="'mix' .*they stay"):
        remove_pruned_channels(model, TOKENS)
    assert untouched(model, before)


def test_says_when_nothing_is_zero():
    with pytest.warns(UserWarning, match="No channel or head of Residual is zero"):
        remove_pruned_channels(Residual(), IMAGE)


@pytest.mark.parametrize(
    ("layers", "units", "width"),
    [
        ([nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 3)], 4, 4),
        ([nn.Conv2d(3, 16, 3), nn.GroupNorm(16, 16), nn.ReLU(), nn.Conv2d(16, 4, 3)], 16, 1),
        ([nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)], 16, 1),
        ([nn.Conv2d(3, 9, 3), nn.InstanceNorm2d(9, affine=True, track_running_stats=True), nn.Conv2d(9, 4, 3)], 9, 1),
        ([nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 4, 3)], 16, 1),
        ([nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3, groups=4), nn.Tanh(), nn.Conv2d(16, 2, 1)], 4, 4),
        ([nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 2, 3)], 8, 1),
        ([nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)], 2, 2),
        ([nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)], 4, 1),
        ([nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)], 4, 2),
        ([nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 36), nn.ReLU(), nn.Linear(8 * 36, 2)], 8, 36),
    ],
)  # fmt: skip
def test_norms_and_grouped_and_transposed_convolutions_are_exact(layers, units, width):
    """Case 8, among others; a unit is as wide as it must be."""
    model = copy.deepcopy(nn.Sequential(*layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an InstanceNorm complains of a width that it was not told
        groups, _, _ = prune(model, IMAGE)
    assert (groups[0].name, groups[0].units) == ("0", units)
    assert max(part.index.shape[1] for part in groups[0].outputs) == width


def test_flattening_maps_a_channel_to_all_its_places():
    groups, _ = channel_groups(vgg(), IMAGE)
    (columns,) = [part for part in groups[1].inputs if part.name == "9.weight"]
    assert columns.index.tolist() == [list(range(4 * c, 4 * c + 4)) for c in range(16)]


def test_one_output_channel_stays():
    """Case 19b."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
    groups, refused, _ = prune(model, IMAGE, share=1.0)
    assert [group.name for group in groups] == ["0"]
    assert refused == {"2": "it has one channel"}
    assert tuple(model[2].weight.shape) == (1, 1, 3, 3)
    assert tuple(model[0].weight.shape) == (1, 3, 3, 3)  # all eight were zero, and one stays


def test_tied_weights_stay_tied():
    """Case 14."""
    ids = torch.randint(0, 50, (4, 6))
    model = Tied()
    groups, _, _ = prune(model, ids)
    assert [(group.name, group.units) for group in groups] == [("up", 16)] or groups[0].name == "up"
    assert model.emb.weight is model.head.weight
    assert model.up.out_features == 8


def test_tied_columns_are_cut_once():
    """The features of the embedding are the inputs of the layer that shares its weight."""
    ids = torch.randint(0, 50, (4, 6))
    model = Tied()
    groups, _ = channel_groups(model, ids)
    (stream,) = [group for group in groups if "down" in group.layers]
    assert set(stream.layers) == {"emb", "down"}
    assert [part.name for part in (*stream.outputs, *stream.inputs)].count("emb.weight") == 1
    mask(model, [stream])
    before = answers(model, ids)
    remove_pruned_channels(model, ids)
    close(answers(model, ids), before)
    assert model.head.weight is model.emb.weight
    assert tuple(model.head.weight.shape) == (50, 4)
    assert (model.emb.embedding_dim, model.head.in_features) == (4, 4)


def test_a_layer_that_is_used_twice_is_exact_or_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.last(F.relu(self.shared(F.relu(self.shared(x)))))

    model, x = Twice(), torch.randn(5, 4)
    groups, refused, _ = prune(model, x)
    assert {"first", "shared"} <= {name for group in groups for name in group.layers} | set(refused)


def test_layers_that_only_run_in_training_are_not_broken():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            out = self.last(F.relu(self.b(x)))
            return (out, self.aux(x)) if self.training else out

    groups, refused = channel_groups(Auxiliary(), torch.randn(3, 4))
    assert [group.name for group in groups] == ["b"]
    assert "does not train" in refused["a"]
    assert "do not reach" in refused["aux"]


def test_patterns():
    model = Residual()
    groups, refused = channel_groups(model, IMAGE, include=["blocks.*"], exclude=["blocks.2.conv1"])
    assert [group.name for group in groups] == ["blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2"]
    assert "coupled with those of 'stem.0'" in refused["blocks.0.conv2"]
    with pytest.raises(ValueError, match="matches no module"):
        channel_groups(model, IMAGE, include=["block.*"])
    with pytest.raises(ValueError, match="`kind` must be"):
        channel_groups(model, IMAGE, kind="heads")


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 32, "vdim": 16},
    ],
    ids=str,
)
def test_heads_of_multihead_attention(arguments):
    """Case 17."""

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **arguments)

        def forward(self, x):
            return self.attention(x, x, x[..., : arguments.get("vdim", 32)], need_weights=False)[0]

    model = Attend()
    names, attention = shapes(model), model.attention
    (group,), refused, _ = prune(model, TOKENS, "head")
    assert (group.units, refused) == (4, {})
    for part in group.outputs:
        width = 24 if "in_proj" in part.name else 8
        assert part.index.shape == (4, width)
    assert any(part.name.endswith("out_proj.weight") and part.dim == 1 for part in group.outputs)
    assert model.attention is attention
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (2, 8, 32)
    assert isinstance(attention, PrunedMultiheadAttention)
    assert list(shapes(model)) == list(names)
    close(answers(model, torch.randn(7, 9, 32)), answers(copy.deepcopy(model), torch.randn(7, 9, 32)), 1e9)
    prune(model, TOKENS, "head")  # and once more
    assert attention.num_heads == 1


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads", "causal"])
def test_smaller_attention_is_attention_with_the_other_heads_zero(batch_first, need_weights, masks):
    torch.manual_seed(0)
    attention = randomized(nn.MultiheadAttention(32, 4, batch_first=batch_first)).eval()
    model = nn.Sequential(OrderedDict(a=attention))
    keep = [0, 2]
    with torch.no_grad():
        for head in (1, 3):
            rows = torch.arange(8 * head, 8 * head + 8)
            attention.out_proj.weight[:, rows] = 0
            for part in range(3):
                attention.in_proj_weight[rows + 32 * part], attention.in_proj_bias[rows + 32 * part] = 0, 0
    smaller = copy.deepcopy(model)
    group = ChannelGroup("a", 4, tuple(heads_slices()), (), ("a",))

    class Call(nn.Module):
        def __init__(self, a):
            super().__init__()
            self.a = a

        def forward(self, x):
            return self.a(x, x, x, need_weights=False)[0]

    remove_pruned_channels(Call(smaller.a), TOKENS, groups=[group])
    q, k = torch.randn(2, 3, 32), torch.randn(2, 4, 32)
    keywords, less = {"need_weights": need_weights, "average_attn_weights": False}, {}
    if masks in ("bool", "float"):
        keywords["attn_mask"] = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]).bool()
        keywords["key_padding_mask"] = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]).bool()
        if masks == "float":
            for name in ("attn_mask", "key_padding_mask"):
                keywords[name] = torch.zeros(keywords[name].shape).masked_fill(keywords[name], -3.0)
    elif masks == "heads":
        full = torch.randn(2, 4, 3, 4)
        keywords["attn_mask"] = full.reshape(8, 3, 4)
        less["attn_mask"] = full[:, keep].reshape(4, 3, 4)
    elif masks == "causal":
        keywords["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(4)[:3]
        keywords["is_causal"] = not need_weights and False
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    expected, weights = attention(q, k, k, **keywords)
    got, fewer = smaller.a(q, k, k, **{**keywords, **less})
    close(got, expected)
    if need_weights:
        close(fewer, weights[:, keep])
        one, _ = attention(
            q[0] if batch_first else q[:, 0], k[0] if batch_first else k[:, 0], k[0] if batch_first else k[:, 0]
        )
        two, _ = smaller.a(
            q[0] if batch_first else q[:, 0], k[0] if batch_first else k[:, 0], k[0] if batch_first else k[:, 0]
        )
        close(two, one)
    else:
        assert fewer is None
        assert weights is None


def heads_slices():
    rows = torch.arange(32).reshape(4, 8)
    thrice = torch.cat([rows, rows + 32, rows + 64], 1)
    yield Slice("a.in_proj_weight", 0, thrice, True)
    yield Slice("a.in_proj_bias", 0, thrice, False)
    yield Slice("a.out_proj.weight", 1, rows, True)


def test_grouped_queries_lose_equally_many_in_each_group():
    """Case 17."""
    model = Grouped()
    (group,), _, counts = prune(model, TOKENS, "head")
    assert (group.units, group.blocks, counts) == (4, 2, {"": 2})
    assert {part.name for part in group.outputs} == {"q_proj.weight", "q_proj.bias", "o_proj.weight"}
    assert (model.num_heads, model.num_key_value_heads) == (2, 2)
    assert (model.q_proj.out_features, model.k_proj.out_features, model.o_proj.in_features) == (16, 16, 16)
    assert answers(model, torch.randn(2, 11, 32)).shape == (2, 11, 32)


def test_unevenly_masked_groups_are_cut_evenly():
    model = Grouped(6, 2)
    (group,), _ = channel_groups(model, TOKENS, kind="head")
    for unit in (0, 1, 4):  # two of the first three, one of the second
        for part in group.outputs:
            dict(model.named_parameters())[part.name].data.index_fill_(part.dim, part.index[unit], 0.0)
    before = answers(model, TOKENS)
    remove_pruned_channels(model, TOKENS)
    close(answers(model, TOKENS), before)
    assert model.num_heads == 4


@pytest.mark.parametrize(("build", "name"), [(Bert, "attention.self"), (Vit, ""), (lambda: Grouped(4, 4), "")])
def test_heads_by_the_names_of_attributes(build, name):
    model = build()
    (group,), _, _ = prune(model, TOKENS, "head")
    assert (group.name, group.units, group.blocks) == (name, 4, 1)
    assert answers(model, torch.randn(2, 11, 32)).shape == (2, 11, 32)
    fresh = load_pruned(build(), model.state_dict())
    assert torch.equal(answers(fresh, TOKENS), answers(model, TOKENS))


def test_heads_that_cannot_go_are_refused_by_name():
    class Constant(Grouped):
        def forward(self, x):
            return self.o_proj(self.q_proj(x).view(*x.shape[:2], 4, 8).flatten(2))

    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.a(x, x, x, average_attn_weights=False)

    class Uncounted(Grouped):
        def __init__(self):
            super().__init__()
            del self.num_heads, self.head_dim, self.num_key_value_heads

        def forward(self, x):
            return self.o_proj(self.q_proj(x))

    assert "does not run" in channel_groups(Constant(), TOKENS, kind="head")[1][""]
    assert "output" in channel_groups(Returned(), TOKENS, kind="head")[1]["a"]
    assert "how many heads" in channel_groups(Uncounted(), TOKENS, kind="head")[1][""]
    one = channel_groups(SelfAttention(), TOKENS, kind="head", exclude=["attention"])
    assert one == ([], {})


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch, of its own fused path


@NESTED
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_loses_heads_and_hidden_units(norm_first):
    model = encoder(norm_first=norm_first)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    inputs = {"src": TOKENS, "src_key_padding_mask": padding}
    for kind in ("channel", "head"):
        mask(model, channel_groups(model, inputs, kind=kind)[0])
    before, plain = answers(model, **inputs), answers(model, TOKENS)
    remove_pruned_channels(model, inputs)
    after = answers(model, **inputs)
    close(after[~padding], before[~padding])  # at padded places torch's fused path writes zeros
    close(answers(model, TOKENS), plain)
    assert [layer.self_attn.num_heads for layer in model.layers] == [2, 2]
    assert [layer.linear1.out_features for layer in model.layers] == [24, 24]
    fresh = load_pruned(encoder(norm_first=norm_first), model.state_dict())
    assert torch.equal(answers(fresh, TOKENS), answers(model, TOKENS))
    model.train()(TOKENS).sum().backward()


@NESTED
def test_heads_of_one_layer_alone():
    """Torch's fused path would hand nested tensors to the smaller layers."""
    model = encoder()
    mask(model, channel_groups(model, TOKENS, kind="head", include=["layers.1.self_attn"])[0])
    padding = torch.tensor([[0, 0, 0, 0, 1]] * 3).bool()
    before = answers(model, TOKENS, src_key_padding_mask=padding)
    remove_pruned_channels(model, TOKENS)
    assert [layer.self_attn.num_heads for layer in model.layers] == [4, 2]
    close(answers(model, TOKENS, src_key_padding_mask=padding)[~padding], before[~padding])


# --- the given module -------------------------------------------------------------------------------------------------


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_looking_changes_nothing():
    model = Residual().train()
    model.blocks[0].eval()
    model.fc.weight.requires_grad_(False)
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    before, random_states = snapshot(model), states()
    precision, fast = torch.get_float32_matmul_precision(), torch.backends.mha.get_fastpath_enabled()
    channel_groups(model, IMAGE)
    channel_groups(model, IMAGE, kind="head")
    profile(model, IMAGE)
    with pytest.raises(ValueError, match="do not run through Residual"):
        channel_groups(model, torch.zeros(2, 4, 8, 8))
    assert untouched(model, before)
    assert states() == random_states
    assert (precision, fast) == (torch.get_float32_matmul_precision(), torch.backends.mha.get_fastpath_enabled())
    assert torch.is_grad_enabled()
    assert calls == []


def test_removal_keeps_hooks_modes_gradients_and_random_numbers():
    model = Residual().train()
    model.blocks[0].eval()
    model.stem[0].weight.requires_grad_(False)
    groups, _ = channel_groups(model, IMAGE)
    mask(model, groups)
    model(IMAGE).sum().backward()
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    full = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    random_states = states()
    remove_pruned_channels(model, IMAGE)
    assert states() == random_states
    assert calls == []
    assert [child.training for child in model.blocks] == [False, True, True]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not model.stem[0].weight.requires_grad
    assert model.fc.weight.requires_grad
    assert model.fc.weight.grad.shape == model.fc.weight.shape != full["fc.weight"].shape
    assert model.stem[0].weight.grad is None
    model(IMAGE)
    assert calls == [1]


@pytest.mark.parametrize("what", ["groups", "inputs", "optimizer", "other"])
def test_after_a_failure_the_module_is_as_it_was(what):
    model = Residual()
    groups, _ = channel_groups(model, IMAGE)
    mask(model, groups)
    before, random_states = snapshot(model), states()
    arguments = {"example_inputs": IMAGE}
    if what == "groups":
        first = groups[0]
        arguments["groups"] = [ChannelGroup(first.name, first.units, first.outputs, (), first.layers)]
        message = "'stem.0' .*cannot be cut out"
    elif what == "inputs":
        arguments["example_inputs"] = IMAGE[:, :2]
        message = "`example_inputs` do not run"
    elif what == "other":
        part = Slice("backbone.weight", 0, torch.tensor([[0], [1]]), True)
        arguments["groups"] = [ChannelGroup("backbone", 2, (part,), ())]
        message = "another module"
    else:
        optimizer = torch.optim.LBFGS(model.parameters())
        optimizer.step(lambda: model(IMAGE).square().mean())
        mask(model, groups)
        before = snapshot(model)
        arguments["optimizer"] = optimizer
        message = "LBFGS"
    with pytest.raises(ValueError, match=message):
        remove_pruned_channels(model, **arguments)
    assert untouched(model, before)
    assert states() == random_states
    answers(model, IMAGE)


def test_what_depends_on_the_data_is_found_before_anything_changes():
    """The example inputs of the search did not show it, those of the removal do."""

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, shift):
            return self.b(F.relu(self.a(x)) + shift)

    model, x = Switch(), torch.randn(3, 4)
    groups, _ = channel_groups(model, (x, torch.zeros(())))
    mask(model, groups)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'a' .*another answer"):
        remove_pruned_channels(model, (x, torch.ones(())), groups=groups)
    assert untouched(model, before)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "list"])
def test_inputs_are_what_forward_takes(form):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, scale=1.0):
            x = x[0] if isinstance(x, list) else x
            return self.b(F.relu(self.a(x)) * scale)

    x = torch.randn(3, 4)
    inputs = {"tensor": x, "tuple": (x, 2.0), "dict": {"scale": 2.0, "x": x}, "list": [x]}[form]
    model = Model()
    groups, _ = channel_groups(model, inputs)
    mask(model, groups)
    remove_pruned_channels(model, inputs)
    assert model.a.out_features == 4


def test_a_lightning_module_with_its_trainer():
    class Heavy:
        def __deepcopy__(self, memo):
            raise AssertionError("the trainer must not be copied")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Residual()

        def forward(self, x):
            return self.net(x)

    model = Module()
    trainer = Heavy()
    model.__dict__["_trainer"] = trainer
    model.net.cache = model.net.fc.weight * 2  # a tensor of a graph, which deepcopy refuses
    groups, _ = channel_groups(model, IMAGE)
    mask(model, groups)
    before = answers(model, IMAGE)
    remove_pruned_channels(model, IMAGE)
    close(answers(model, IMAGE), before)
    assert model.__dict__["_trainer"] is trainer


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(whole):
    model = Residual(4)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    groups, _ = channel_groups(model, IMAGE)
    assert "blocks.1.conv1" in [group.name for group in groups]
    clean = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
    for group in groups:
        for part in group.outputs:
            clean[part.name].data.index_fill_(part.dim, part.index[:1].reshape(-1), 0.0)
    before = answers(model, IMAGE)
    assert remove_pruned_channels(model, IMAGE) is model
    close(answers(model, IMAGE), before)
    state = model.state_dict()
    fresh = load_pruned(Residual(4), state)
    close(answers(fresh, IMAGE), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = Residual().to(dtype)
    groups, _ = channel_groups(model, IMAGE.to(dtype))
    mask(model, groups)
    remove_pruned_channels(model, IMAGE.to(dtype))
    assert model.fc.in_features == 8
    assert model.fc.weight.dtype == dtype
    assert answers(model, IMAGE.to(dtype)).dtype == dtype


def test_the_switches_of_either_kind_are_left_as_they_were():
    """Torch 2.9 has new ones for TF32, and raises when old ones are read after new ones were set."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("older than the new switches")
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        channel_groups(Residual(), IMAGE)
        assert torch.backends.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before
    torch.set_float32_matmul_precision("high")
    try:
        channel_groups(Residual(), IMAGE)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_loop_with_wrong_offsets_ends():
    """torch-pruning maps the splits inside an unrolled GRU to ever higher channels."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gru, self.last = nn.Linear(32, 16), nn.GRU(16, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.gru(F.relu(self.first(x)))[0])

    groups, refused = channel_groups(Recurrent(), TOKENS)
    assert groups == []
    assert set(refused) == {"first", "gru", "last"}


def test_computed_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.utils.parametrizations.weight_norm(model[2])
    groups, refused = channel_groups(model, torch.randn(3, 4))
    assert groups == []
    assert "computed from other parameters" in refused["2"]
    assert "'2'" in refused["0"]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "momentum", "amsgrad", "rmsprop", "adafactor", "plain"])
def test_training_goes_on_as_it_would_have(name):
    def optimizer_of(model):
        options = {
            "adam": lambda p: torch.optim.AdamW(p, lr=1e-2),
            "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
            "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
            "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
            "plain": lambda p: torch.optim.SGD(p, lr=0.05),
        }
        return options[name](list(model.parameters()))

    model = randomized(Residual())
    optimizer = optimizer_of(model)
    groups, _ = channel_groups(model, IMAGE)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(8)]

    def train(model, optimizer, batches, masked=True):
        losses = []
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if masked:
                mask(model, groups)
            losses.append(loss.item())
        return losses

    mask(model, groups)
    train(model, optimizer, batches[:3])
    other = copy.deepcopy(model)
    its_optimizer = optimizer_of(other)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    remove_pruned_channels(model, IMAGE, optimizer)
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim() and name != "adafactor":
                assert value.shape == parameter.shape
    dense = train(other, its_optimizer, batches[3:])
    smaller = train(model, optimizer, batches[3:], masked=False)
    if name == "adafactor":  # its row means and clipping run over the whole tensor, pruned entries included
        assert smaller[0] == pytest.approx(dense[0], rel=1e-4)
    else:
        assert smaller == pytest.approx(dense, rel=1e-4)


def test_several_optimizers_and_frozen_parameters():
    model = Residual()
    first = torch.optim.Adam(model.blocks.parameters())
    second = torch.optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    mask(model, channel_groups(model, IMAGE)[0])
    model(IMAGE).sum().backward()
    first.step(), second.step()
    mask(model, channel_groups(model, IMAGE)[0])
    remove_pruned_channels(model, IMAGE, [first, second])
    assert second.state[model.fc.weight]["momentum_buffer"].shape == (5, 8)
    assert first.state[model.blocks[0].conv1.weight]["exp_avg"].shape == (4, 4, 3, 3)
    model(IMAGE).sum().backward()
    first.step(), second.step()


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Residual, IMAGE),
        (separable, IMAGE),
        (Concatenation, IMAGE),
        (encoder, TOKENS),
        (Grouped, TOKENS),
        (Tied, torch.randint(0, 50, (4, 6))),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.PReLU(16), nn.Conv2d(16, 4, 3)), IMAGE),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)), IMAGE),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, groups=4),
                               nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3)), IMAGE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["state_dict", "file", "checkpoint"])
def test_a_smaller_model_is_saved_and_loaded(build, inputs, form, tmp_path):
    """Torch-Pruning #148."""
    model = randomized(build())
    for kind in ("channel", "head"):
        mask(model, channel_groups(model, inputs, kind=kind)[0])
    remove_pruned_channels(model, inputs)
    state = model.state_dict()
    if form == "file":
        torch.save(state, tmp_path / "smaller.pt")
        state = tmp_path / "smaller.pt"
    elif form == "checkpoint":
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "smaller.ckpt")
        state = str(tmp_path / "smaller.ckpt")
    fresh = build()
    assert load_pruned(fresh, state) is fresh
    assert torch.equal(answers(fresh, inputs), answers(model, inputs))
    assert str(fresh) == str(model)
    fresh.train()(inputs).sum().backward()
    again = load_pruned(fresh, model.state_dict())  # one that has these shapes already
    assert torch.equal(answers(again, inputs), answers(model, inputs))


def test_loading_refuses_by_name():
    model = Residual()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"missing 'fc.bias'"):
        load_pruned(model, {name: value for name, value in model.state_dict().items() if name != "fc.bias"})
    with pytest.raises(ValueError, match=r"behind 'net\.'"):
        load_pruned(model, {f"net.{name}": value for name, value in model.state_dict().items()})
    with pytest.raises(ValueError, match=r"'stem.0.weight' has shape \(16, 3, 3, 3\)"):
        load_pruned(model, Residual(16).state_dict())
    assert untouched(model, before)


def test_report():
    model = Residual()
    wide = profile(model, IMAGE[:1])
    kernels = 64 * 9 * (3 * 8 + 8 * 8 * 2) + 16 * 9 * (8 * 16 + 16 * 16 * 3) + 16 * 8 * 16
    assert wide.multiply_adds == kernels + 16 * 5
    assert wide.parameters == sum(p.numel() for p in model.parameters())
    assert wide.widths["blocks.1.conv1"] == 16
    mask(model, channel_groups(model, IMAGE)[0])
    remove_pruned_channels(model, IMAGE)
    small = profile(model, IMAGE[:1])
    assert small.multiply_adds < wide.multiply_adds / 3
    lines = removal_report(wide, small).splitlines()
    assert lines[0].startswith("parameters")
    assert "stem.0           8 -> 4" in lines


def test_multiply_adds_of_attention():
    model = SelfAttention()
    work = profile(model, TOKENS).multiply_adds
    tokens, keys = 3 * 5, 5
    assert work == tokens * 32 * 32 * 4 + 2 * tokens * keys * 32 + tokens * 32 * 3


def test_nothing_is_imported_before_it_is_needed_and_nothing_is_said(capfd):
    for file in (removal, coupling):
        top = [
            node for node in ast.parse(inspect.getsource(file)).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in top if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.startswith(("lightning.", "torch_pruning"))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_pruning"]:
        del sys.modules[name]
    channel_groups(Residual(), IMAGE)
    assert "torch_pruning" in sys.modules
    assert capfd.readouterr() == ("", "")
