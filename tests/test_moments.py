"""Moments, ramps and numbers: what is read, what is refused, and when it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_compress.moments import RAMPS, Moment, RunLength, number, progress, ramp, refuse_if_after, resolve_span
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
