"""Which of the student's outputs is meant, and what was computed."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.distillation.capture import OutputCapture, select_output


class Student(nn.Module):
    """Has a forward of its own, a metric, a loss, and parts that can be called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        self.nets = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        self.metric = MulticlassAccuracy(2)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


X, Y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)


def record(capture: OutputCapture, step: Any) -> Any:
    with capture.recording():
        result = step()
    return capture.take(), result


@pytest.mark.parametrize(
    ("called", "name"),
    [
        (lambda s: s(X), ""),
        (lambda s: s.net(X), "net"),
        (lambda s: s.nets["b"](X), "nets.b"),
        (lambda s: (s.nets["a"](X), s(X))[1], ""),
    ],
)
def test_finds_the_outermost_module(called: Any, name: str) -> None:
    student = Student()
    capture = OutputCapture(student)

    def step() -> Tensor:
        y = called(student)
        student.metric(y, Y)
        student.loss(y, Y)
        return y

    for _ in range(2):  # in the search, and after it
        calls, y = record(capture, step)
        assert capture.name == name
        assert [call.output is y for call in calls] == [True]
        assert calls[0].args[0].equal(X)
    capture.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()) == 0


def test_keeps_each_call_and_only_those_of_the_recording() -> None:
    student = Student()
    capture = OutputCapture(student)
    student(X)  # validation, say
    calls, _ = record(capture, lambda: (student(X), student(2 * X)))
    assert [call.args[0].equal(x) for call, x in zip(calls, (X, 2 * X), strict=True)] == [True, True]
    student(X)
    calls, _ = record(capture, lambda: student(x=X))
    assert len(calls) == 1
    assert calls[0].kwargs["x"] is X


def test_asks_as_a_call_with_gradients_begins() -> None:
    asked = []

    def ask(args: Any, kwargs: Any) -> float:
        asked.append(float(args[0].sum()))
        return asked[-1]

    student = Student()
    capture = OutputCapture(student, "net", ask=ask)
    student.net[0].register_forward_pre_hook(lambda module, args: (args[0].zero_(),))
    with torch.no_grad():
        student.net(torch.ones(1, 3))
    calls, _ = record(capture, lambda: (student.net(torch.ones(1, 3)), student.net(torch.ones(2, 3))))
    assert [call.answer for call in calls] == asked == [3.0, 6.0]
    with torch.no_grad():
        calls, _ = record(capture, lambda: student.net(torch.ones(1, 3)))
    assert [call.answer for call in calls] == [None]
    assert len(asked) == 2


def test_two_modules_are_one_too_many() -> None:
    student = Student()
    capture = OutputCapture(student)
    with pytest.raises(ValueError, match="calls 'nets.a' and 'nets.b'.*`module`"):
        record(capture, lambda: (student.nets["a"](X), student.nets["b"](X)))
    named = OutputCapture(student, "nets.b")
    calls, result = record(named, lambda: (student.nets["a"](X), student.nets["b"](X)))
    assert calls[0].output is result[1]


def test_what_is_never_called() -> None:
    student = Student()
    with pytest.raises(ValueError, match="calls neither the module itself nor a submodule"):
        record(OutputCapture(student), lambda: student.loss(X, Y % 2))
    with pytest.raises(ValueError, match="never calls 'nets.a'"):
        record(OutputCapture(student, "nets.a"), lambda: student(X))
    with pytest.raises(ValueError, match="`module` names 'nest.a'.*'nets.a'"):
        OutputCapture(student, "nest.a")
    with pytest.raises(ValueError, match="`features` names 'net.7'"):
        OutputCapture(student, features=["net.7"])


def test_features() -> None:
    student = Student()
    capture = OutputCapture(student, features=["net.0"])
    for _ in range(2):
        record(capture, lambda: student(X))
        assert capture.features()["net.0"].equal(student.net[0](X))
    with capture.recording():
        student.nets["a"](X)
    with pytest.raises(ValueError, match="'net.0', which `training_step` never calls"):
        capture.features()


def test_a_feature_that_is_changed_in_place_is_refused() -> None:
    student = Student()
    student.net[1] = nn.ReLU(inplace=True)
    capture = OutputCapture(student, features=["net.0"])
    record(capture, lambda: student(X))
    with pytest.raises(ValueError, match=r"'net\.0', whose output a later layer of the student changes in place"):
        capture.features()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_parts(inside: bool) -> None:
    student = Student()
    if inside:
        student.net = torch.compile(student.net, backend="eager")
    else:
        student.net.compile(backend="eager")
    student.net(X)  # compiled before anybody asks
    capture = OutputCapture(student, features=["net.0"])
    for _ in range(3):
        calls, y = record(capture, lambda: student.net(X))
        assert (capture.name, len(calls)) == ("net", 1)
        assert calls[0].output.equal(y)
        assert capture.features()["net.0"].shape == (4, 5)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


Named = namedtuple("Named", ["hidden", "score"])
LOGITS = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("output", "select"),
    [
        (LOGITS, None),
        (LOGITS, "logits"),
        ({"logits": LOGITS, "hidden": torch.zeros(2, 5)}, None),
        (Output(torch.tensor(1.0), LOGITS), None),
        ((LOGITS, None), None),
        ((torch.zeros(2, 5), LOGITS), 1),
        ((torch.zeros(2, 5), LOGITS), -1),
        ({"out": LOGITS, "loss": torch.tensor(1.0), "ids": torch.zeros(2, dtype=torch.long)}, None),
        (Named(torch.zeros(2, 5), LOGITS), "score"),
        ([{"x": LOGITS}], lambda output: output[0]["x"]),
    ],
)
def test_select_output(output: Any, select: Any) -> None:
    assert select_output(output, select) is LOGITS


@pytest.mark.parametrize(
    ("output", "select"),
    [((LOGITS, LOGITS), None), ({"a": LOGITS, "b": LOGITS}, None), ({"a": LOGITS}, "b"), ((LOGITS,), 3), (None, None)],
)
def test_select_output_says_what_there_is(output: Any, select: Any) -> None:
    with pytest.raises(ValueError, match="give `output` the key, the index"):
        select_output(output, select)


@pytest.mark.parametrize("name", [None, ""])
def test_a_call_around_the_recording_does_not_count(name: str | None) -> None:
    """DistributedDataParallel calls the root around ``training_step``."""
    root = nn.Linear(3, 2)
    capture, forward = OutputCapture(root, name), root.forward
    taken = []

    def redirected(x: Tensor) -> Tensor:
        root.forward = forward  # type: ignore[method-assign]
        with capture.recording():
            loss = root(x).sum()
            taken.extend(capture.take())
        return loss

    for _ in range(2):
        root.forward = redirected  # type: ignore[method-assign]
        root(torch.zeros(4, 3))
    assert [call.output.shape for call in taken] == [(4, 2), (4, 2)]
