"""Losses of features and projectors: the papers' formulas written anew in float64, shapes, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.distillation import features
from lightning_compress.distillation.features import FEATURE_LOSSES, make_projector, parse_features
from lightning_compress.moments import RunLength


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the papers' formulas ---------------------------------------------------------------------------------------------


def hint(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(((student - teacher) ** 2).sum() / student.size)


def attention(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for own, other in zip(student, teacher, strict=True):
        maps = [sum(channel.ravel() ** 2 for channel in sample) for sample in (own, other)]
        maps = [values / math.sqrt(values @ values) for values in maps]
        total += ((maps[0] - maps[1]) ** 2).mean()
    return total / len(student)


def huber(gap: float) -> float:
    return gap**2 / 2 if abs(gap) <= 1 else abs(gap) - 0.5


def relation(student: np.ndarray, teacher: np.ndarray) -> float:
    samples = range(len(student))
    both = [vectors.reshape(len(vectors), -1) for vectors in (student, teacher)]
    unlike = list(itertools.permutations(samples, 2))
    mean = [np.mean([np.linalg.norm(x[i] - x[j]) for i, j in unlike]) for x in both]
    distances = [
        huber(np.linalg.norm(both[0][i] - both[0][j]) / mean[0] - np.linalg.norm(both[1][i] - both[1][j]) / mean[1])
        for i, j in itertools.product(samples, repeat=2)
    ]

    def angle(x: np.ndarray, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / math.sqrt((a @ a) * (b @ b))

    angles = [huber(angle(both[0], *ijk) - angle(both[1], *ijk)) for ijk in itertools.product(samples, repeat=3)]
    return float(np.mean(distances) + 2 * np.mean(angles))


def cosine(student: np.ndarray, teacher: np.ndarray) -> float:
    if student.ndim >= 4:
        student, teacher = np.moveaxis(student, 1, -1), np.moveaxis(teacher, 1, -1)
    rows = zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, student.shape[-1]), strict=True)
    return float(np.mean([1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in rows]))


CASES = [
    ("hint", hint, (4, 6), (4, 6)),
    ("hint", hint, (4, 3, 5, 5), (4, 3, 5, 5)),
    ("attention", attention, (4, 3, 7), (4, 5, 7)),
    ("attention", attention, (4, 3, 5, 6), (4, 8, 5, 6)),
    ("attention", attention, (2, 3, 2, 3, 4), (2, 1, 2, 3, 4)),
    ("relation", relation, (5, 6), (5, 9)),
    ("relation", relation, (4, 2, 3, 3), (4, 7)),
    ("cosine", cosine, (4, 6), (4, 6)),
    ("cosine", cosine, (4, 3, 6), (4, 3, 6)),
    ("cosine", cosine, (4, 6, 3, 2), (4, 6, 3, 2)),
]


def test_every_loss_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(FEATURE_LOSSES)


@pytest.mark.parametrize(("name", "reference", "own", "other"), CASES)
def test_formula(name: str, reference: Any, own: tuple[int, ...], other: tuple[int, ...]) -> None:
    student, teacher = draw(*own, seed=1), draw(*other, seed=2)
    loss = FEATURE_LOSSES[name].function
    assert loss(student, teacher).item() == pytest.approx(reference(student.numpy(), teacher.numpy()), abs=1e-6)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())


@pytest.mark.parametrize(("name", "reference", "own", "other"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    name: str, reference: Any, own: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype
) -> None:
    student, teacher = draw(*own, seed=1).to(dtype).requires_grad_(), draw(*other, seed=2).to(dtype)
    expected = reference(student.detach().double().numpy(), teacher.double().numpy())
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = FEATURE_LOSSES[name].function(student, teacher)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(3, 2, 4), draw(3, 2, 4, dtype=torch.float32)),
        (draw(3, 2, 4, dtype=torch.float32), torch.zeros(3, 2, 4)),
        (draw(1, 2, 4, dtype=torch.float32), draw(1, 2, 4, seed=1, dtype=torch.float32)),  # one sample
        (draw(1, 2, 4, dtype=torch.float32).repeat(3, 1, 1), draw(3, 2, 4, seed=1, dtype=torch.float32)),  # all alike
    ],
)
def test_degenerate_features_are_finite(name: str, student: Tensor, teacher: Tensor) -> None:
    student = student.clone().requires_grad_()
    loss = FEATURE_LOSSES[name].function(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e3


def test_attention_of_another_size_is_pooled() -> None:
    student, teacher = draw(2, 3, 4, 4, seed=1), draw(2, 5, 8, 8, seed=2)
    squares = teacher.square().sum(1)
    pooled = squares.reshape(2, 4, 2, 4, 2).mean((2, 4))[:, None].sqrt()  # one channel with this map
    torch.testing.assert_close(features.attention(student, teacher), features.attention(student, pooled))


def test_relations_know_no_scale_and_no_rotation() -> None:
    student = draw(6, 4)
    rotation = torch.linalg.qr(draw(4, 4, seed=1)).Q
    assert features.relation(student, 3.0 * student @ rotation + 1.0).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "own", "other", "match"),
    [
        ("hint", (4, 6), (4, 1), "one shape, got 4×6 of the student and 4×1 of the teacher.*projector"),
        ("cosine", (4, 6), (4, 7), "one shape"),
        ("attention", (4, 6), (4, 6), r"maps \[B, C, ...\].*4×6"),
        ("attention", (4, 3, 6), (4, 3, 6, 6), r"maps \[B, C, ...\]"),
        ("relation", (4, 6), (3, 6), "same samples"),
    ],
)
def test_refuses_shapes(name: str, own: tuple[int, ...], other: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FEATURE_LOSSES[name].function(torch.zeros(own), torch.zeros(other))


# --- projectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "kinds"),
    [
        ((4, 6), (4, 9), [nn.Linear]),
        ((4, 7, 6), (4, 7, 9), [nn.Linear]),
        ((4, 6, 7), (4, 9, 7), [nn.Conv1d]),
        ((4, 6, 5, 5), (4, 9, 5, 5), [nn.Conv2d]),
        ((4, 6, 8, 6), (4, 9, 4, 6), [nn.AdaptiveAvgPool2d, nn.Conv2d]),
        ((4, 6, 4, 8), (4, 9, 6, 6), [nn.Conv2d, nn.Upsample]),
        ((4, 6, 8, 8), (4, 6, 4, 4), [nn.AdaptiveAvgPool2d, nn.Conv2d]),
        ((2, 6, 2, 3, 4), (2, 5, 4, 6, 8), [nn.Conv3d, nn.Upsample]),
        ((2, 6, 4, 4, 4), (2, 5, 2, 2, 2), [nn.AdaptiveAvgPool3d, nn.Conv3d]),
    ],
)
def test_projector(own: tuple[int, ...], other: tuple[int, ...], kinds: list[type[nn.Module]]) -> None:
    state = torch.random.get_rng_state()
    projector, same, another = (make_projector(own, other, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert projector is not None
    assert same is not None
    assert another is not None
    assert [type(layer) for layer in projector] == kinds
    student = draw(*own, dtype=torch.float32)
    assert torch.equal(projector(student), same(student))
    assert not torch.equal(projector(student), another(student))
    for dtype in (torch.float32, torch.bfloat16):
        assert projector(student.to(dtype)).shape == other
        assert projector(student.to(dtype)).dtype == torch.float32
    assert projector.double()(student).dtype == torch.float64


def test_projector_starts_like_torchs_own_layer() -> None:
    projector = make_projector((4, 300, 2, 2), (4, 200, 2, 2), 0)
    assert projector is not None
    weight, bias = projector.parameters()
    torchs = nn.Conv2d(300, 200, 1).weight
    assert weight.std().item() == pytest.approx(torchs.std().item(), rel=0.02)
    assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(300), rel=0.01)
    assert (bias == 0).all()


def test_projector_pools_and_convolves() -> None:
    projector = make_projector((2, 3, 8, 8), (2, 5, 4, 4), 0)
    assert projector is not None
    weight, bias = projector.parameters()
    student = draw(2, 3, 8, 8, dtype=torch.float32)
    expected = F.avg_pool2d(torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], student) + bias[:, None, None], 2)
    torch.testing.assert_close(projector(student), expected)


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6), (4, 6, 5, 5)])
def test_no_projector_where_shapes_agree(shape: tuple[int, ...]) -> None:
    assert make_projector(shape, (9, *shape[1:]), 0) is None


@pytest.mark.parametrize(
    ("own", "other"),
    [((4, 6), (4, 6, 7)), ((4,), (4, 2)), ((4, 6, 7), (4, 8, 9)), ((2,) * 6, (2,) * 5 + (3,))],
)
def test_refuses_projectors(own: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="No projector leads from .* Name layers whose outputs are alike"):
        make_projector(own, other, 0)


# --- what a user writes -----------------------------------------------------------------------------------------------


def test_parse_features() -> None:
    pairs = parse_features(
        {
            "net.0": "body.0",
            "net.1": {"layer": "body.3", "loss": "attention", "weight": {"first": 1.0, "last": 0.0, "end": 10}},
        }
    )
    assert [(pair.student, pair.teacher, pair.loss) for pair in pairs] == [
        ("net.0", "body.0", "hint"),
        ("net.1", "body.3", "attention"),
    ]
    run = RunLength(None, None)
    assert [[pair.weight.resolve(run)(step) for step in (0, 5)] for pair in pairs] == [[1.0, 1.0], [1.0, 0.5]]
    assert parse_features({}) == []


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (["net.0"], TypeError, "`features` must be a mapping"),
        ({"net.0": 3}, TypeError, r"`features\['net.0'\]` must be the name"),
        ({"net.0": {"loss": "hint"}}, TypeError, r"`features\['net.0'\]` must be the name"),
        ({"net.0": {"layer": "a", "losses": "hint"}}, ValueError, "layer, loss, weight, got 'losses'"),
        ({"net.0": {"layer": "a", "loss": "kl"}}, ValueError, "hint, attention, relation, cosine, got 'kl'"),
        ({"net.0": {"layer": "a", "weight": -1}}, ValueError, r"`features\['net.0'\]\['weight'\]`"),
    ],
)
def test_refuses_features(value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        parse_features(value)
