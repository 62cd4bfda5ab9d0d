"""Losses of logits: the papers' formulas written anew in float64, degenerate rows, shapes, masks, refusals."""

from __future__ import annotations

import math
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.distillation import losses
from lightning_compress.distillation.losses import LOSSES, LogitLoss, as_losses, call, class_dim, find_labels
from lightning_compress.moments import RunLength


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


ROWS, CLASSES = 6, 5
STUDENT, TEACHER = draw(ROWS, CLASSES, seed=1), draw(ROWS, CLASSES, seed=2)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


# --- the papers' formulas, row by row ---------------------------------------------------------------------------------


def softmax(row: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp((row - row.max()) / temperature)
    return powers / powers.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def kl(student: np.ndarray, teacher: np.ndarray, label: int, t: float) -> float:
    return t**2 * divergence(softmax(teacher, t), softmax(student, t))


def reverse_kl(student: np.ndarray, teacher: np.ndarray, label: int, t: float) -> float:
    return t**2 * divergence(softmax(student, t), softmax(teacher, t))


def jensen_shannon(student: np.ndarray, teacher: np.ndarray, label: int, t: float, beta: float = 0.5) -> float:
    p, q = softmax(teacher, t), softmax(student, t)
    m = beta * p + (1 - beta) * q
    return t**2 * (beta * divergence(p, m) + (1 - beta) * divergence(q, m))


def mse(student: np.ndarray, teacher: np.ndarray, label: int, t: float) -> float:
    return ((student - teacher) ** 2).sum() / len(student)


def hard(student: np.ndarray, teacher: np.ndarray, label: int, t: float) -> float:
    return -math.log(softmax(student)[list(teacher).index(max(teacher))])


def dkd(student: np.ndarray, teacher: np.ndarray, label: int, t: float, alpha: float = 1, beta: float = 8) -> float:
    p, q = softmax(teacher, t), softmax(student, t)
    target = divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = divergence(softmax(np.delete(teacher, label), t), softmax(np.delete(student, label), t))
    return t**2 * (alpha * target + beta * others)


def cosine(student: np.ndarray, teacher: np.ndarray, label: int, t: float) -> float:
    return 1 - student @ teacher / math.sqrt((student @ student) * (teacher @ teacher))


def mean_of(row_loss: Callable[..., float]) -> Callable[..., float]:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor, t: float, **options: float) -> float:
        rows = zip(student.double().numpy(), teacher.double().numpy(), labels.tolist(), strict=True)
        return float(np.mean([row_loss(*row, t, **options) for row in rows]))

    return loss


def dist(student: Tensor, teacher: Tensor, labels: Tensor, t: float, beta: float = 1.0, gamma: float = 1.0) -> float:
    q, p = (np.stack([softmax(row, t) for row in logits.numpy()]) for logits in (student, teacher))
    between_classes = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    between_rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(t**2 * (beta * between_classes + gamma * between_rows))


REFERENCES: dict[str, Callable[..., float]] = {
    "kl": mean_of(kl),
    "reverse_kl": mean_of(reverse_kl),
    "jensen_shannon": mean_of(jensen_shannon),
    "mse": mean_of(mse),
    "hard": mean_of(hard),
    "dkd": mean_of(dkd),
    "dist": dist,
    "cosine": mean_of(cosine),
}
OPTIONS = {"jensen_shannon": {"beta": 0.1}, "dkd": {"alpha": 0.5, "beta": 2.0}, "dist": {"beta": 2.0, "gamma": 0.25}}


def test_every_loss_has_a_reference() -> None:
    assert set(REFERENCES) == set(LOSSES)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_formula(name: str, temperature: float) -> None:
    for options in ({}, OPTIONS.get(name, {})):
        loss = partial(LOSSES[name].function, **options)
        ours = call(loss, STUDENT, TEACHER, temperature, LABELS)
        assert ours.item() == pytest.approx(
            REFERENCES[name](STUDENT, TEACHER, LABELS, temperature, **options), abs=1e-6
        )
        assert ours.dtype == torch.float64
        module = LogitLoss(name, options=options)
        assert torch.equal(module(STUDENT, TEACHER, temperature, LABELS), ours)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: call(LOSSES[name].function, rows, TEACHER, 3.0, LABELS), student)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = STUDENT.to(dtype).requires_grad_(), TEACHER.to(dtype)
    expected = REFERENCES[name](student.detach().double(), teacher.double(), LABELS, 4.0)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = call(LOSSES[name].function, student, teacher, 4.0, LABELS)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(expected, rel=1e-5)
    ours.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4)),
        (torch.zeros(3, 4), draw(3, 4)),
        (torch.zeros(3, 10), draw(3, 10)),  # their mean is not exactly a tenth
        (draw(3, 4), torch.zeros(3, 4)),
        (draw(1, 4), draw(1, 4, seed=1)),  # one row
        (draw(3, 1), draw(3, 1, seed=1)),  # one class
        (1e3 * draw(3, 4), 1e3 * draw(3, 4, seed=1)),  # all but one probability are 0
    ],
)
def test_degenerate_rows_are_finite(name: str, dtype: torch.dtype, student: Tensor, teacher: Tensor) -> None:
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    labels = torch.zeros(len(student), dtype=torch.long)
    loss = call(LOSSES[name].function, student, teacher, 2.0, labels)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jensen_shannon", "dkd"])
def test_classes_that_both_rule_out_count_for_nothing(name: str) -> None:
    out = torch.full((ROWS, 1), -math.inf, dtype=torch.float64)
    student = torch.cat([STUDENT, out], 1).requires_grad_()
    loss = call(LOSSES[name].function, student, torch.cat([TEACHER, out], 1), 2.0, LABELS)
    assert loss.item() == pytest.approx(REFERENCES[name](STUDENT, TEACHER, LABELS, 2.0), abs=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_dkd_is_kl_put_together_again() -> None:
    """KL = TCKD + (1 − p of the label) · NCKD, for each row (Zhao et al. 2022, equation 7)."""
    for row in range(ROWS):
        rows = STUDENT[row : row + 1], TEACHER[row : row + 1]
        left = 1.0 - F.softmax(rows[1] / 4.0, dim=1)[0, LABELS[row]].item()
        parts = losses.dkd(*rows, LABELS[row : row + 1], temperature=4.0, alpha=1.0, beta=left)
        assert parts.item() == pytest.approx(losses.kl(*rows, temperature=4.0).item(), abs=1e-9)


@pytest.mark.parametrize(("beta", "end"), [(1e-6, losses.kl), (1 - 1e-6, losses.reverse_kl)])
def test_jensen_shannon_goes_to_both_divergences(beta: float, end: Callable[..., Tensor]) -> None:
    ours = losses.jensen_shannon(STUDENT, TEACHER, beta=beta) / min(beta, 1.0 - beta)
    assert ours.item() == pytest.approx(end(STUDENT, TEACHER).item(), rel=1e-3)


def test_kl_and_cross_entropy_of_torch() -> None:
    target = F.softmax(TEACHER / 4.0, dim=1)
    student = STUDENT.clone().requires_grad_()
    (ours,) = torch.autograd.grad(losses.kl(student, TEACHER, temperature=4.0), student)
    (torchs,) = torch.autograd.grad(16.0 * F.cross_entropy(student / 4.0, target), student)
    torch.testing.assert_close(ours, torchs)


def test_standardize() -> None:
    ours = losses.standardize(STUDENT.float())
    rows = STUDENT.numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)
    same = LogitLoss("kl", standardize=True)
    assert same(7.0 * STUDENT + 2.0, STUDENT).item() == pytest.approx(0.0, abs=1e-12)
    assert LogitLoss("kl")(7.0 * STUDENT + 2.0, STUDENT) > 0.1
    flat = torch.zeros(2, 3, requires_grad=True)
    same(flat, draw(2, 3, dtype=torch.float32)).backward()
    assert flat.grad is not None
    assert flat.grad.abs().max() < 1e5


# --- any shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_positions_count_alike_however_many(name: str, standardize: bool) -> None:
    student, teacher = draw(4, 7, 11, seed=3, dtype=torch.float32), draw(4, 7, 11, seed=4, dtype=torch.float32)
    labels = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(5))
    loss = LogitLoss(name, standardize=standardize)
    value = loss(student, teacher, 4.0, labels)
    flat = loss(student.reshape(28, 11), teacher.reshape(28, 11), 4.0, labels.reshape(28))
    tiled = loss(student.repeat(1, 2, 1), teacher.repeat(1, 2, 1), 4.0, labels.repeat(1, 2))
    torch.testing.assert_close(value, flat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(value, tiled, rtol=1e-6, atol=1e-6)
    first = LogitLoss(name, dim=1, standardize=standardize)
    torch.testing.assert_close(first(student.transpose(1, 2), teacher.transpose(1, 2), 4.0, labels), value)


@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [
        ((5,), 0, 0),
        ((2, 5), None, 1),
        ((2, 3, 5), None, 2),
        ((2, 5, 3, 4), None, 1),
        ((2, 5, 3, 4, 2), None, 1),
        ((2, 3, 4, 5), -1, 3),
        ((2, 5, 3), 1, 1),
    ],
)
def test_dimension_of_the_classes(shape: tuple[int, ...], dim: int | None, expected: int) -> None:
    student, teacher = draw(*shape, seed=1), draw(*shape, seed=2)
    loss = LogitLoss("kl", dim=dim)
    assert class_dim(student, dim) == expected
    p, q = (F.softmax(logits, dim=expected) for logits in (teacher, student))
    assert loss(student, teacher).item() == pytest.approx((p * (p / q).log()).sum(expected).mean().item(), abs=1e-9)


@pytest.mark.parametrize(("shape", "dim"), [((), None), ((1,) * 6, None), ((2, 5), 2), ((2, 5), -3)])
def test_refuses_outputs_without_classes(shape: tuple[int, ...], dim: int | None) -> None:
    with pytest.raises(ValueError, match="`dim` must name the dimension of the classes"):
        LogitLoss(dim=dim)(torch.zeros(shape), torch.zeros(shape))


def test_refuses_other_shapes() -> None:
    loss = LogitLoss()
    with pytest.raises(ValueError, match="student has 5 classes and the teacher 6"):
        loss(torch.zeros(2, 5), torch.zeros(2, 6))
    for shape in ((3, 5), (2, 1, 5)):
        with pytest.raises(ValueError, match="same shape, got 2×5 and "):
            loss(torch.zeros(2, 5), torch.zeros(shape))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_positions_do_not_count(name: str) -> None:
    labels = torch.tensor([[0, -100, 3], [2, 4, -100]])
    student, teacher = STUDENT.reshape(2, 3, CLASSES).clone().requires_grad_(), TEACHER.reshape(2, 3, CLASSES)
    counts = labels != -100
    value = LogitLoss(name)(student, teacher, 2.0, labels)
    expected = REFERENCES[name](student.detach()[counts], teacher[counts], labels[counts], 2.0)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    value.backward()
    assert student.grad is not None
    assert (student.grad[~counts] == 0).all()
    assert (student.grad[counts] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_left_is_zero(name: str, dtype: torch.dtype) -> None:
    student = draw(2, 3, 4).to(dtype).requires_grad_()
    value = LogitLoss(name, ignore_index=7)(student, draw(2, 3, 4, seed=1).to(dtype), 2.0, torch.full((2, 3), 7))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_labels_are_needed_or_must_fit() -> None:
    with pytest.raises(ValueError, match=r"'dkd' needs labels.*shape \[2\].*labels=lambda batch"):
        LogitLoss("dkd")(torch.zeros(2, 5), torch.zeros(2, 5))
    for labels in (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"`labels` must be integers of the shape of the positions, \[2\]"):
            LogitLoss("kl")(torch.zeros(2, 5), torch.zeros(2, 5), labels=labels)


def test_own_temperature_goes_before_the_callers() -> None:
    assert torch.equal(LogitLoss(temperature=2.0)(STUDENT, TEACHER, 5.0), losses.kl(STUDENT, TEACHER, 2.0))


def test_own_function_with_options() -> None:
    def scaled(student: Tensor, teacher: Tensor, scale: float = 1.0) -> Tensor:
        return scale * (student - teacher).abs().mean()

    loss = LogitLoss(scaled, options={"scale": "2"})  # type: ignore[dict-item]
    assert loss(torch.ones(2, 3), torch.zeros(2, 3)).item() == 2.0
    assert (loss.name, loss.needs_labels) == ("scaled", False)
    assert LogitLoss(losses.dkd).needs_labels
    assert repr(loss) == "LogitLoss('scaled')"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"function": "kld"}, ValueError, "`function` must be one of kl, "),
        ({"function": 3}, TypeError, "`function`"),
        ({"function": nn.MSELoss}, TypeError, "`function`"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        ({"labels": "y"}, TypeError, "`labels`"),
        ({"options": {"beta": 0.5}}, ValueError, r"`options` of 'kl' must be among \[\], got 'beta'"),
        ({"function": "dkd", "options": {"temperature": 2.0}}, ValueError, "'alpha', 'beta'.*got 'temperature'"),
        ({"function": "dkd", "options": {"beta": "x"}}, ValueError, r"`options\['beta'\]`"),
        ({"function": "jensen_shannon", "options": {"beta": 1.0}}, ValueError, "`beta`.*'reverse_kl'"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LogitLoss(**arguments)


# --- labels in a batch ------------------------------------------------------------------------------------------------

X, Y = torch.zeros(2, 3), torch.tensor([1, 0])
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@dataclass
class Sample:
    x: Tensor
    target: Tensor


Pair = namedtuple("Pair", ["label", "weight"])


@pytest.mark.parametrize(
    ("batch", "positions", "expected"),
    [
        ((X, Y), [2], Y),
        ([X, Y, torch.ones(2)], torch.Size([2]), Y),
        ((Y + 1, Y), [2], Y),
        ((X, Y), [2, 3], None),
        ({"y": Y + 1, "labels": Y}, [2], Y),
        ({"labels": F.one_hot(Y), "target": Y}, [2], Y),
        ({"labels": Y.float()}, [2], None),
        ({"labels": Y.bool()}, [2], None),
        ({"input_ids": IDS, "mask": IDS}, [2, 3], None),
        (UserDict({"input_ids": IDS, "labels": IDS + 1}), [2, 3], IDS + 1),
        (Sample(X, Y), [2], Y),
        (SimpleNamespace(y=Y, target=X), [2], Y),
        (Pair(Y, Y + 1), [2], Y),
        ((X, IDS.to(torch.uint8)), [2, 3], IDS.to(torch.uint8)),
        (Y, [2], None),
        ((X, "two"), [2], None),
        (None, [2], None),
    ],
)
def test_find_labels(batch: Any, positions: Any, expected: Tensor | None) -> None:
    found = find_labels(batch, positions)
    assert found is None if expected is None else torch.equal(found, expected) and found.dtype == expected.dtype


# --- what a user writes -----------------------------------------------------------------------------------------------


def own_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).abs().mean()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("kl", [("kl", 1.0)]),
        (["kl", "mse"], [("kl", 1.0), ("mse", 1.0)]),
        (("kl", ("dist", "0.5")), [("kl", 1.0), ("dist", 0.5)]),
        ({"kl": 0.5, "hard": {"first": 2.0, "last": 0.0}}, [("kl", 0.5), ("hard", 2.0)]),
        (nn.L1Loss(), [("L1Loss", 1.0)]),
        ([own_loss, [own_loss, 3.0]], [("own_loss", 1.0), ("own_loss_2", 3.0)]),
        ([partial(own_loss), lambda student, teacher: student], [("own_loss", 1.0), ("lambda", 1.0)]),
        ([LogitLoss("kl", temperature=1.0), "kl", "kl"], [("kl", 1.0), ("kl_2", 1.0), ("kl_3", 1.0)]),
    ],
)
def test_as_losses(value: Any, expected: list[tuple[str, float]]) -> None:
    read = as_losses(value)
    assert [(loss.name, loss.weight.resolve(RunLength(10, 5))(0)) for loss in read] == expected
    assert all(call(loss.loss, STUDENT, TEACHER, 1.0, None).isfinite().all() for loss in read)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("kld", ValueError, "`losses` must be one of kl, "),
        ([], ValueError, "`losses` must name a loss"),
        ({}, ValueError, "`losses` must name a loss"),
        ({"kl": -1.0}, ValueError, r"`losses\['kl'\]`"),
        (["kl", 0.5], TypeError, r"`losses` takes .*pairs \[loss, weight\].*got 0.5"),
        ([["kl", 0.5, 2]], ValueError, r"pairs \[loss, weight\]"),
        (nn.MSELoss, TypeError, "`losses`"),
        (None, TypeError, "`losses`"),
    ],
)
def test_refuses_losses(value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        as_losses(value)


class Recorder(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, **rest: Any) -> Any:
        return labels, rest


def test_call_gives_what_the_signature_names() -> None:
    labels, rest = call(Recorder(), STUDENT, TEACHER, 2.0, LABELS)  # type: ignore[misc]
    assert labels is LABELS
    assert rest == {}
    assert call(nn.MSELoss(), STUDENT, TEACHER, 2.0, LABELS) == F.mse_loss(STUDENT, TEACHER)
    assert call(torch.dist, STUDENT, TEACHER, 2.0, LABELS) == (STUDENT - TEACHER).norm()  # has no signature
    assert torch.equal(call(losses.kl, STUDENT, TEACHER, 2.0, LABELS), losses.kl(STUDENT, TEACHER, 2.0))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_number_a_sample_is_no_class(shape: tuple[int, ...]) -> None:
    student, teacher = draw(*shape, seed=1), draw(*shape, seed=2)
    labels = torch.tensor([1, -100, 0, 1, 0, 1])
    counts = labels != -100
    value = LogitLoss("mse")(student, teacher, labels=labels)
    torch.testing.assert_close(value, F.mse_loss(student[counts], teacher[counts]))
    for name in LOSSES.keys() - {"mse"}:
        with pytest.raises(ValueError, match=f"'{name}' compares classes.*use 'mse'"):
            LogitLoss(name)(student, teacher, labels=labels)


def test_labels_beyond_the_classes_are_refused() -> None:
    student, teacher = draw(2, 4, 3, 3, seed=1), draw(2, 4, 3, 3, seed=2)
    labels = torch.randint(4, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    labels[0, 0] = 255
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 4\), got 0 to 255.*ignore_index"):
        LogitLoss("dkd")(student, teacher, labels=labels)
    assert LogitLoss("dkd", ignore_index=255)(student, teacher, labels=labels).isfinite()
