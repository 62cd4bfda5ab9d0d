"""Moments, ramps and numbers: what is read, what is refused, and when it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_compress.moments import (
    RAMPS,
    Moment,
    RunLength,
    Schedule,
    number,
    progress,
    ramp,
    refuse_if_after,
    resolve_span,
    scheduled,
)
from lightning_compress.training import plain, run_length, steps_done
from tests.helpers import BATCHES, ManualNet, Net, StatefulLoader, TwoOptimizerNet, held_out, seeded, trainer

RUN = RunLength(steps=1000, steps_per_epoch=50)


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (0, 0),
        (1, 1),
        (1.0, 1000),
        (0.0, 0),
        (0.1, 100),
        (0.0005, 1),
        ("1", 1),
        ("1.0", 1000),
        ("1e-1", 100),
        ("3ep", 150),
        ("0.5ep", 25),
        ("2 epochs", 100),
        (" .5ep ", 25),
        (torch.tensor([7]).numpy()[0], 7),
        (1500, 1500),
    ],
)
def test_reads(value: Any, step: int) -> None:
    assert Moment.parse(value).resolve(RUN) == step


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, math.nan, math.inf, "x", "", "ep", "-1ep", "-3", "1.5", "nan"])
def test_refuses_values(value: Any) -> None:
    with pytest.raises(ValueError, match="`begin`"):
        Moment.parse(value, "begin")


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}])
def test_refuses_types(value: Any) -> None:
    with pytest.raises(TypeError, match="`begin`"):
        Moment.parse(value, "begin")


def test_unknown_length_names_the_way_out() -> None:
    run = RunLength(steps=None, steps_per_epoch=None, reason="the training loader has no length")
    assert Moment.parse(30).resolve(run) == 30
    for value in (0.5, "3ep"):
        with pytest.raises(ValueError, match="`end=.*no length.*optimizer steps.*`max_steps`"):
            Moment.parse(value).resolve(run, "end")


def test_order() -> None:
    refuse_if_after(Moment.parse(0.5), Moment.parse(1))  # not comparable before the run
    with pytest.raises(ValueError, match="`begin=0.5` comes after `end=0.2`"):
        refuse_if_after(Moment.parse(0.5), Moment.parse(0.2))
    with pytest.raises(ValueError, match=r"step 500 .*`end=1`.*`end=1.0`"):
        resolve_span(Moment.parse(0.5), Moment.parse(1), RUN)


@pytest.mark.parametrize("name", RAMPS)
def test_ramps_rise_from_0_to_1(name: str) -> None:
    values = [ramp(name)(t / 100) for t in range(101)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1.0, abs=1e-12)
    assert values[0] == (1.0 if name == "one_shot" else 0.0)


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ("qubic", ValueError),
        (3, TypeError),
        (lambda t: 2 * t, ValueError),
        (lambda t: t / 2, ValueError),
        (lambda t: "x", TypeError),
    ],
)
def test_refuses_ramps(schedule: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`schedule`"):
        ramp(schedule)


def test_number() -> None:
    assert number("1e-4", "strength", 0.0) == 1e-4
    for value in (math.nan, 2.0, "x"):
        with pytest.raises(ValueError, match="`share`"):
            number(value, "share", 0.0, 1.0)
    with pytest.raises(TypeError, match="`share`"):
        number(True, "share", 0.0, 1.0)


def test_progress_of_a_span_of_no_length() -> None:
    assert [progress(step, 5, 5) for step in (4, 5, 6)] == [0.0, 1.0, 1.0]


ENDLESS = RunLength(steps=None, steps_per_epoch=None, reason="the training loader has no length")


@pytest.mark.parametrize(
    ("value", "run", "expected"),  # at steps 0, 99, 100, 250, 500, 1000 and 2000
    [
        (4, ENDLESS, [4.0] * 7),
        (" 1e-1", ENDLESS, [0.1] * 7),
        (Schedule(0.3, 0.3, begin=0.1, end=0.5), ENDLESS, [0.3] * 7),
        (Schedule(4.0, 1.0, begin=100, end=500), ENDLESS, [4.0, 4.0, 4.0, 2.875, 1.0, 1.0, 1.0]),
        (Schedule(0.0, 1.0), RUN, [0.0, 0.099, 0.1, 0.25, 0.5, 1.0, 1.0]),
        ({"first": "0", "last": 1, "begin": "2ep", "end": 0.5}, RUN, [0.0, 0.0, 0.0, 0.375, 1.0, 1.0, 1.0]),
        (Schedule(2.0, 5.0, "one_shot", 100, 500), ENDLESS, [2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0]),
        (Schedule(8.0, 0.0, "cubic", 0, 500), ENDLESS, [8.0, 8 * 0.802**3, 8 * 0.8**3, 1.0, 0.0, 0.0, 0.0]),
        (Schedule(8.0, 0.0, lambda t: t**2, 0, 500), ENDLESS, [8.0, 8 - 8 * 0.198**2, 7.68, 6.0, 0.0, 0.0, 0.0]),
        (Schedule(1.0, 3.0, begin=250, end=250), ENDLESS, [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0]),
        (lambda t: 9 * t * t, RUN, [0.0, 9 * 0.099**2, 0.09, 0.5625, 2.25, 9.0, 9.0]),
    ],
)
def test_values_follow_their_schedule(value: Any, run: RunLength, expected: list[float]) -> None:
    function = scheduled(value, "weight", 0.0, 10.0).resolve(run)
    for step, wanted in zip((0, 99, 100, 250, 500, 1000, 2000), expected, strict=True):
        assert function(step) == pytest.approx(wanted, abs=1e-12)
    assert scheduled(scheduled(value, "weight"), "weight").resolve(run)(250) == function(250)


def test_schedules_end_exactly() -> None:
    value = Schedule(0.1, 0.7, "cosine", 10, 30).resolve(ENDLESS)
    assert [value(step) for step in (0, 9, 10, 30, 31)] == [0.1, 0.1, 0.1, 0.7, 0.7]


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (-1, ValueError, r"`weight` must be a number in \[0, 10\]"),
        ("linear", ValueError, "`weight` must be a number"),
        (math.nan, ValueError, "`weight`"),
        (True, TypeError, "`weight`"),
        (None, TypeError, "`weight` must be .*a Schedule"),
        ([1.0], TypeError, "`weight` must be .*a Schedule"),
        (Schedule(0.0, 11.0), ValueError, r"`weight.last` must be a number in \[0, 10\]"),
        ({"first": -1.0, "last": 1.0}, ValueError, "`weight.first`"),
        ({"first": 1.0}, ValueError, "`weight` as a mapping takes first, last, schedule, begin, end"),
        ({"first": 1.0, "last": 2.0, "start": 3}, ValueError, "`weight` as a mapping takes .*'start': 3"),
        ({"first": 1.0, "last": 2.0, "begin": 1.5}, ValueError, "`weight`: `begin`"),
        ({"first": None, "last": 2.0}, TypeError, "`weight`: `first`"),
        (lambda t: 11 * t, ValueError, r"`weight` must stay within \[0, 10\]"),
        (lambda t: math.nan, ValueError, "`weight` must stay within"),
        (lambda t: "x", TypeError, "`weight` must return a number"),
        (lambda: 1.0, TypeError, "`weight` must be a function of progress"),
    ],
)
def test_refuses_scheduled_values(value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        scheduled(value, "weight", 0.0, 10.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"first": math.inf}, "`first` must be finite"),
        ({"last": "x"}, "`last`"),
        ({"schedule": "qubic"}, "`schedule`"),
        ({"begin": 0.5, "end": 0.2}, "`begin=0.5` comes after `end=0.2`"),
    ],
)
def test_refuses_schedules(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Schedule(**{"first": 0.0, "last": 1.0, **arguments})
    with pytest.raises(ValueError, match="`weight` must be finite"):
        scheduled(math.inf, "weight")


def test_schedules_of_a_run_without_length() -> None:
    with pytest.raises(ValueError, match="`end=1.0` is a fraction of the run, but the training loader has no length"):
        Schedule(0.0, 1.0).resolve(ENDLESS)
    with pytest.raises(
        ValueError, match="function of progress needs the length of the run, but .*no length.*`Schedule`"
    ):
        scheduled(lambda t: t, "weight").resolve(ENDLESS)


class Ask(Callback):
    def __init__(self) -> None:
        self.length: RunLength | None = None
        self.steps: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.length = run_length(trainer)
        self.steps.append(steps_done(trainer, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps.append(steps_done(trainer, pl_module))


LENGTHS = [{}, {"max_epochs": 2, "max_steps": 6}, {"max_epochs": -1, "max_steps": 12}]


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        *((make, kwargs) for make in (Net, ManualNet, TwoOptimizerNet) for kwargs in LENGTHS),
        (Net, {"accumulate_grad_batches": 3}),  # Lightning refuses it under manual optimization
    ],
)
def test_length_is_what_the_run_takes(tmp_path: Any, make: Any, kwargs: dict[str, Any]) -> None:
    ask = Ask()
    trainer(tmp_path, [ask], **kwargs).fit(seeded(make), StatefulLoader(), held_out())
    assert ask.length is not None
    assert ask.steps[0] == 0
    assert ask.steps[-1] == ask.length.steps
    assert ask.length.steps_per_epoch == math.ceil(BATCHES / kwargs.get("accumulate_grad_batches", 1))


def test_length_with_changing_accumulation(tmp_path: Any) -> None:
    ask = Ask()
    trainer(tmp_path, [ask, GradientAccumulationScheduler({0: 1, 2: 3})]).fit(seeded(Net), StatefulLoader(), held_out())
    assert ask.length is not None
    assert ask.length.steps == 2 * 8 + 2 * 3 == ask.steps[-1]
    with pytest.raises(ValueError, match="changes from epoch to epoch"):
        Moment.parse("1ep").resolve(ask.length)


class Endless:
    def __iter__(self) -> Any:
        while True:
            yield from StatefulLoader()


def test_length_of_endless_data(tmp_path: Any) -> None:
    ask = Ask()
    trainer(tmp_path, [ask], max_epochs=-1, max_steps=9).fit(seeded(Net), Endless(), held_out())
    assert ask.length == RunLength(9, None, "the training loader has no length")


def test_length_of_a_run_that_only_time_limits(tmp_path: Any) -> None:
    ask = Ask()
    trainer(tmp_path, [ask], max_epochs=-1, max_time={"seconds": 1}).fit(seeded(Net), StatefulLoader(), held_out())
    assert ask.length is not None
    assert ask.length.steps is None
    assert Moment.parse("2ep").resolve(ask.length) == 2 * BATCHES


def test_hydra_containers_become_plain() -> None:
    from omegaconf import OmegaConf

    value = OmegaConf.create({"a": [1, 2], "b": {"c": "${a}"}})
    assert plain(value) == {"a": [1, 2], "b": {"c": [1, 2]}}
    assert type(plain(value)["a"]) is list
    assert plain(3) == 3
