"""The learning rate: against torch's schedulers and float64 formulas, in real runs, and where runs go wrong."""

from __future__ import annotations

import inspect
import io
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.learning_rate import DECAYS, FactorLR, LearningRateSchedule, Schedule
from lightning_compress.moments import RunLength
from tests import helpers
from tests.helpers import (
    BATCHES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    ManualNet,
    Net,
    Rates,
    StatefulLoader,
    TwoOptimizerNet,
    loss_scaling,
    same,
    seeded,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

STEPS = 4 * BATCHES  # of a run of helpers.trainer
RUN = RunLength(steps=40, steps_per_epoch=8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Nets this small train ten times faster on one thread than on two that others use as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rates_of(callback: LearningRateSchedule, tmp_path: Path, net: LightningModule | None = None, **kwargs: Any):
    """Fit, and return the rates of each training batch and those that the run ends with."""
    recorder = Rates()
    others = kwargs.pop("callbacks", [])
    loader = kwargs.pop("loader", StatefulLoader())
    run = helpers.trainer(tmp_path, [callback, *others, recorder], **kwargs)
    net = net or seeded(Net)
    run.fit(net, loader)
    last = [float(group["lr"]) for optimizer in run.optimizers for group in optimizer.param_groups]
    return [rates for _, rates in recorder.rates], last


def reference(make: Any, steps: int, lr: float = 0.1) -> list[float]:
    """Return the rates of steps 0 to `steps` that one of torch's schedulers writes."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def approximately(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [1, 4, 10])
@pytest.mark.parametrize("warmup_from", [0.0, 0.1, 0.5, 1.0])
def test_warmup_is_linear_lr(warmup, warmup_from):
    schedule = Schedule("constant", warmup=warmup, warmup_from=warmup_from, begin=warmup)
    first = warmup_from or 1 / (warmup + 1)
    expected = reference(lambda o: torch_schedulers.LinearLR(o, first, 1.0, warmup), 15)
    assert [0.1 * schedule(step) for step in range(16)] == approximately(expected)
    assert schedule(0) > 0
    assert schedule(warmup) == 1.0


@pytest.mark.parametrize(
    ("arguments", "make"),
    [
        ({"decay": "cosine"}, lambda o: torch_schedulers.CosineAnnealingLR(o, 40)),
        ({"decay": "cosine", "final": 0.1}, lambda o: torch_schedulers.CosineAnnealingLR(o, 40, eta_min=0.01)),
        ({"decay": "linear"}, lambda o: torch_schedulers.LinearLR(o, 1.0, 0.0, 40)),
        ({"decay": "linear", "final": 0.25}, lambda o: torch_schedulers.LinearLR(o, 1.0, 0.25, 40)),
        ({"decay": "polynomial"}, lambda o: torch_schedulers.PolynomialLR(o, 40, power=2.0)),
        ({"decay": "polynomial", "decay_rate": 0.9}, lambda o: torch_schedulers.PolynomialLR(o, 40, power=0.9)),
        ({"decay": "step", "decay_rate": 0.5}, lambda o: torch_schedulers.StepLR(o, 8, gamma=0.5)),
        # torch's ExponentialLR multiplies once a call: a call a step needs the eighth root
        ({"decay": "exponential", "decay_rate": 0.8}, lambda o: torch_schedulers.ExponentialLR(o, 0.8 ** (1 / 8))),
        ({"decay": "exponential", "final": 0.01}, lambda o: torch_schedulers.ExponentialLR(o, 0.01 ** (1 / 40))),
        ({"decay": "constant"}, lambda o: torch_schedulers.ConstantLR(o, 1.0)),
        ({"decay": "inverse_sqrt"}, lambda o: torch_schedulers.LambdaLR(o, lambda k: (1 + k) ** -0.5)),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_decays_against_torch(arguments, make):
    schedule = LearningRateSchedule(warmup=0, **arguments).schedule(RUN)
    assert [0.1 * schedule(step) for step in range(41)] == approximately(reference(make, 40))
    assert [schedule(step) for step in (41, 50, 1000)] == [schedule(40)] * 3


def test_formulas_after_a_warmup():
    def at(step, **arguments):
        return LearningRateSchedule(warmup=10, **arguments).schedule(RUN)(step)

    for k in range(10, 41):
        assert at(k, decay="inverse_sqrt") == approximately(math.sqrt(10 / k))
        assert at(k, decay="exponential", decay_rate=0.7) == approximately(0.7 ** ((k - 10) / 8))
        assert at(k, decay="step", decay_rate=0.7) == approximately(0.7 ** ((k - 10) // 8))
        assert at(k, decay="cosine", final=0.2) == approximately(0.2 + 0.4 * (1 + math.cos(math.pi * (k - 10) / 30)))
        assert at(k, decay="wsd", final=0.2) == approximately(1 - 0.8 * max(0, k - 32) / 8)
        assert at(k, decay="linear", begin_decay=0.5) == approximately(1 - max(0, k - 20) / 20)
        assert at(k, decay="inverse_sqrt", begin_decay="2ep") == approximately(math.sqrt(10 / (10 + max(0, k - 16))))


@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay_rises_then_never_rises_and_keeps_its_floor(decay):
    arguments = {"decay": decay, "final": 0.3 if decay != "constant" else 0.0}
    if decay in ("step", "exponential"):
        arguments["decay_rate"] = 0.5
    schedule = LearningRateSchedule(warmup=0.25, **arguments).schedule(RUN)
    factors = [schedule(step) for step in range(50)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[10] == 1.0
    assert min(factors[10:]) >= arguments["final"]
    if decay not in ("constant", "inverse_sqrt"):
        assert factors[40] == approximately(0.3)
    assert factors[40:] == [factors[40]] * 10


@pytest.mark.parametrize("decay", ["linear", "cosine", "polynomial", "wsd"])
def test_zero_is_exact_at_the_end_and_not_before(decay):
    schedule = LearningRateSchedule(decay=decay).schedule(RUN)
    assert schedule(40) == 0.0
    assert schedule(39) > 0.0


def test_no_room_for_a_decay():
    schedule = LearningRateSchedule(warmup=1.0).schedule(RUN)
    assert schedule(39) < 1.0
    assert schedule(40) == 0.0
    schedule = LearningRateSchedule(warmup=500, begin_decay="2ep").schedule(RUN)  # a run cut short to try things out
    assert [schedule(k) for k in (0, 40, 99)] == approximately([1 / 501, 41 / 501, 41 / 501])
    assert str(schedule) == "500 steps of warm-up from 0, then cosine; but the run ends before that, at step 40"


def test_words():
    def words(**arguments):
        return str(LearningRateSchedule(**arguments).schedule(RunLength(1890, 63)))

    assert words() == "95 steps of warm-up from 0, then cosine to 0 at step 1890"
    assert words(warmup=0, decay="wsd") == "constant until step 1512, then wsd to 0 at step 1890"
    assert words(warmup="1ep", warmup_from=0.1, decay="constant") == "63 steps of warm-up from 0.1, then constant"
    assert words(warmup=0, decay="constant") == "constant"
    assert words(warmup=0, decay="inverse_sqrt") == "inverse_sqrt to 0.023 at step 1890"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"warmup": -1}, ValueError, "`warmup`"),
        ({"warmup": 1.5}, ValueError, "`warmup`"),
        ({"warmup": True}, TypeError, "`warmup`"),
        ({"warmup": None}, TypeError, "`warmup`"),
        ({"warmup": "soon"}, ValueError, "`warmup`.*'soon'"),
        ({"warmup_from": 1.1}, ValueError, "`warmup_from`.*1.1"),
        ({"warmup_from": -0.1}, ValueError, "`warmup_from`"),
        ({"warmup_from": math.nan}, ValueError, "`warmup_from`"),
        ({"warmup_from": True}, TypeError, "`warmup_from`"),
        ({"warmup_from": [0.1]}, TypeError, "`warmup_from`"),
        ({"decay": "cosin"}, ValueError, "'cosin'.*cosine"),
        ({"decay": "exp"}, ValueError, "exponential"),
        ({"decay": None}, TypeError, "`decay`"),
        ({"decay": ["cosine"]}, TypeError, "`decay`"),
        ({"decay": "cosine", "decay_rate": 0.5}, ValueError, "`decay_rate=0.5` has no meaning for `decay='cosine'`"),
        ({"decay": "wsd", "decay_rate": 0.5}, ValueError, "`decay_rate=0.5` has no meaning"),
        ({"decay": "exponential"}, ValueError, "`decay_rate`.*`final`"),
        ({"decay": "step"}, ValueError, "needs a `decay_rate`"),
        ({"decay": "step", "final": 0.1}, ValueError, "needs a `decay_rate`"),
        ({"decay": "exponential", "decay_rate": 0}, ValueError, "above 0"),
        ({"decay": "exponential", "decay_rate": 1.1}, ValueError, r"\[0, 1\].*1.1"),
        ({"decay": "step", "decay_rate": "fast"}, ValueError, "'fast'"),
        ({"decay": "step", "decay_rate": True}, TypeError, "`decay_rate`"),
        ({"decay": "polynomial", "decay_rate": 0.0}, ValueError, "above 0"),
        ({"decay": "polynomial", "decay_rate": math.inf}, ValueError, "finite"),
        ({"final": 1.5}, ValueError, "`final`.*1.5"),
        ({"final": math.nan}, ValueError, "`final`"),
        ({"final": False}, TypeError, "`final`"),
        ({"decay": "constant", "final": 0.1}, ValueError, "`final=0.1` has no meaning"),
        ({"decay": "constant", "begin_decay": 0}, ValueError, "`begin_decay=0` has no meaning"),
        ({"begin_decay": 2.0}, ValueError, "`begin_decay`"),
        ({"warmup": 0.5, "begin_decay": 0.4}, ValueError, "`warmup=0.5`.*`begin_decay=0.4`"),
        ({"warmup": "2ep", "begin_decay": "1ep"}, ValueError, "`warmup=2ep`.*`begin_decay=1ep`"),
        ({"override": "yes"}, TypeError, "`override`"),
        ({"override": 1}, TypeError, "`override`"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        LearningRateSchedule(**arguments)


def test_numbers_in_strings_are_numbers():
    read = LearningRateSchedule(warmup="1e-1", warmup_from="1e-2", decay="exponential", decay_rate="9e-1", final="1e-3")
    bare = LearningRateSchedule(warmup=0.1, warmup_from=0.01, decay="exponential", decay_rate=0.9, final=0.001)
    assert read.schedule(RUN) == bare.schedule(RUN)


def test_one_is_a_step_and_one_point_zero_the_run():
    assert LearningRateSchedule(warmup=1).schedule(RUN).warmup == 1
    assert LearningRateSchedule(warmup="1").schedule(RUN).warmup == 1
    assert LearningRateSchedule(warmup=1.0).schedule(RUN).warmup == 40
    with pytest.raises(ValueError, match=r"`begin_decay=1` is one optimizer step; the whole run is `begin_decay=1\.0`"):
        LearningRateSchedule(warmup=0.5, begin_decay=1).schedule(RUN)
    with pytest.raises(ValueError, match=r"`warmup=10`.*`begin_decay=1ep`"):
        LearningRateSchedule(warmup=10, begin_decay="1ep").schedule(RUN)


def test_annotations_name_every_decay_and_leave_nothing_open():
    hints = typing.get_type_hints(LearningRateSchedule.__init__)
    assert typing.get_args(hints["decay"]) == tuple(DECAYS)
    assert typing.get_args(hints["warmup"]) == (int, float, str)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(LearningRateSchedule).parameters.values())


def test_jsonargparse_and_yaml_give_the_same_moments():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(LearningRateSchedule, "lr")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes

    def made(*arguments):
        return instantiate(parser.parse_args(list(arguments))).lr.schedule(RUN)

    expected = LearningRateSchedule(warmup=1, begin_decay=0.5, decay="linear", final=0.1).schedule(RUN)
    assert made("--lr.warmup=1", "--lr.begin_decay=5e-1", "--lr.decay=linear", "--lr.final=1e-1") == expected
    assert made("--lr.warmup=1.0").warmup == 40
    assert made("--lr.warmup=3ep").warmup == 24


UNKNOWN = RunLength(None, None, "the training loader has no length")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`decay='cosine'`.*the training loader has no length.*`max_steps`"),
        ({"warmup": 0.1, "decay": "constant"}, "`warmup=0.1` is a fraction"),
        ({"warmup": "1ep", "decay": "constant"}, "`warmup=1ep` is a number of epochs"),
        ({"warmup": 3, "decay": "exponential", "decay_rate": 0.9}, "`decay_rate=0.9`.*factor per epoch.*`final`"),
        ({"warmup": 3, "decay": "step", "decay_rate": 0.9}, "`decay_rate=0.9`.*factor per epoch"),
        ({"warmup": 3, "decay": "exponential", "final": 0.1}, "`decay='exponential'` lasts until the end"),
        ({"warmup": 3, "decay": "inverse_sqrt", "begin_decay": 0.5}, "`begin_decay=0.5` is a fraction"),
    ],
)
def test_an_unknown_length_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRateSchedule(**arguments).schedule(UNKNOWN)


def test_what_needs_no_length_goes_without():
    assert LearningRateSchedule(warmup=4, decay="constant").schedule(UNKNOWN)(2) == approximately(0.6)
    schedule = LearningRateSchedule(warmup=4, decay="inverse_sqrt", final=0.1).schedule(UNKNOWN)
    assert schedule(16) == approximately(0.5)
    assert schedule(10**6) == 0.1
    known_steps = RunLength(40, None, "the training loader has no length")
    schedule = LearningRateSchedule(warmup=0, decay="exponential", final=0.1).schedule(known_steps)
    assert schedule(20) == approximately(math.sqrt(0.1))


# --- the scheduler ----------------------------------------------------------------------------------------------------


def groups_of(*rates: float) -> SGD:
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates], lr=1.0)


def lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_a_rate_that_someone_changes_keeps_its_proportion():
    optimizer = groups_of(0.4, 0.2)
    scheduler = FactorLR(optimizer, Schedule("linear", end=10))
    for _ in range(5):
        scheduler.step()
    assert lrs(optimizer) == approximately([0.2, 0.1])
    optimizer.param_groups[1]["lr"] *= 0.1
    for left in (0.4, 0.3):
        scheduler.step()
        assert lrs(optimizer) == approximately([0.4 * left, 0.02 * left])


@pytest.mark.parametrize(("rate", "expected"), [(0.03, 0.3), (0.9, 0.9)])
def test_in_a_warmup_a_reduction_keeps_its_proportion_and_a_raised_rate_is_the_one_to_rise_to(rate, expected):
    optimizer = groups_of(0.4)
    scheduler = FactorLR(optimizer, Schedule("constant", warmup=9, begin=9))
    assert lrs(optimizer) == approximately([0.04])
    optimizer.param_groups[0]["lr"] = rate
    for _ in range(9):
        scheduler.step()
    assert lrs(optimizer) == approximately([expected])


@pytest.mark.parametrize(("joins_at", "expected"), [(2, 0.05), (6, 0.05), (8, 0.0625)])
def test_an_added_group_follows_from_where_it_is(joins_at, expected):
    optimizer = groups_of(0.4)
    scheduler = FactorLR(optimizer, Schedule("linear", warmup=5, begin=7, end=12))
    for step in range(12):
        if step == joins_at:
            optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.05})
        scheduler.step()
        if step >= joins_at and step + 1 >= 7:
            left = (12 - (step + 1)) / 5
            assert lrs(optimizer) == approximately([0.4 * left, expected * left])
    assert lrs(optimizer) == [0.0, 0.0]


def test_a_group_added_once_the_factor_is_zero_keeps_its_rate_and_one_of_zero_stays_zero():
    optimizer = groups_of(0.4)
    scheduler = FactorLR(optimizer, Schedule("linear", end=4))
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.0})
    for _ in range(5):
        scheduler.step()
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.05})
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.0})
    scheduler.step()
    assert lrs(optimizer) == [0.0, 0.0, 0.05, 0.0]
    scheduler.factor = Schedule("linear", end=28)  # the run is resumed with another length
    scheduler.step()
    assert lrs(optimizer) == approximately([0.3, 0.0, 0.0375, 0.0])


def test_tensor_rates_are_written_in_place():
    rate = torch.tensor(0.4)
    optimizer = Adam([torch.zeros(1, requires_grad=True)], lr=rate, foreach=False)
    scheduler = FactorLR(optimizer, Schedule("linear", warmup=1, begin=1, end=5))
    assert optimizer.param_groups[0]["lr"] is rate
    seen = [float(rate)]
    for _ in range(5):
        scheduler.step()
        seen.append(float(rate))
    assert seen == pytest.approx([0.2, 0.4, 0.3, 0.2, 0.1, 0.0], rel=1e-6)
    assert isinstance(scheduler.get_last_lr()[0], torch.Tensor)
    assert scheduler.get_last_lr()[0] is not rate
    assert all(isinstance(value, (int, float, list)) for value in scheduler.state_dict().values())


def test_state_goes_on_and_the_state_of_another_is_not_taken():
    optimizer = groups_of(0.4, 0.2)
    scheduler = FactorLR(optimizer, Schedule("linear", end=10))
    for _ in range(3):
        scheduler.step()
    optimizer.param_groups[0]["lr"] *= 0.5  # not seen by the scheduler when the state is saved
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    other = groups_of(0.4, 0.2)
    resumed = FactorLR(other, Schedule("linear", end=10))
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for _ in range(4):
        scheduler.step()
        resumed.step()
        assert lrs(other) == lrs(optimizer)
        assert resumed.state_dict() == scheduler.state_dict()

    for foreign in (torch_schedulers.StepLR(groups_of(0.01), 1), torch_schedulers.ReduceLROnPlateau(groups_of(0.01))):
        other = groups_of(0.4, 0.2)
        fresh = FactorLR(other, Schedule("linear", end=10))
        other.param_groups[0]["lr"] = 0.001
        fresh.load_state_dict(foreign.state_dict())
        fresh.step()
        assert lrs(other) == approximately([0.36, 0.18])


def test_a_clock_makes_a_call_too_many_harmless():
    optimizer = groups_of(0.4)
    clock = iter([0, 0, 1, 1, 1, 2])
    scheduler = FactorLR(optimizer, Schedule("linear", end=10), clock=lambda: next(clock))
    for _ in range(5):
        scheduler.step()
    assert lrs(optimizer) == approximately([0.32])


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_each_step_has_its_rate_from_the_first_on(tmp_path, accumulate):
    callback = LearningRateSchedule(warmup=4)
    recorder = Rates()
    run = helpers.trainer(tmp_path, [recorder, callback], accumulate_grad_batches=accumulate)
    run.fit(seeded(Net), StatefulLoader())
    steps = 4 * math.ceil(BATCHES / accumulate)
    assert run.global_step == steps
    schedule = callback.schedule(RunLength(steps, None))
    assert recorder.rates == [(step, [0.1 * schedule(step)]) for step, _ in recorder.rates]
    assert {step for step, _ in recorder.rates} == set(range(steps))
    assert lrs(run.optimizers[0]) == [0.0]
    assert recorder.rates[0][1] == approximately([0.1 / 5])


def test_accumulation_that_changes(tmp_path):
    others = [GradientAccumulationScheduler({0: 2, 2: 4})]
    rates, last = rates_of(LearningRateSchedule(warmup=4, decay="linear"), tmp_path, callbacks=others)
    assert last == [0.0]
    assert rates[-1] == approximately([0.1 / (2 * 4 + 2 * 2 - 4)])


def test_every_optimizer_and_group_in_manual_optimization(tmp_path):
    callback = LearningRateSchedule(warmup=0.25)
    rates, last = rates_of(callback, tmp_path, seeded(TwoOptimizerNet))
    schedule = callback.schedule(RunLength(STEPS, BATCHES))
    assert rates == [approximately([0.1 * schedule(k), 1e-3 * schedule(k)]) for k in range(STEPS)]
    assert last == [0.0, 0.0]


def test_max_steps_of_two_optimizers(tmp_path):
    """`max_steps` counts the steps of both, so it is half as many batches."""
    rates, last = rates_of(LearningRateSchedule(), tmp_path, seeded(TwoOptimizerNet), max_steps=20, max_epochs=-1)
    assert len(rates) == 10
    assert last == [0.0, 0.0]


class Shards(IterableDataset):
    def __iter__(self):
        yield from StatefulLoader()


def test_iterable_data(tmp_path):
    def loader():
        return DataLoader(Shards(), batch_size=None)

    with pytest.raises(ValueError, match="`decay='cosine'` lasts until the end of the run, but the training"):
        rates_of(LearningRateSchedule(warmup=3), tmp_path, loader=loader())
    rates, last = rates_of(LearningRateSchedule(warmup=3, decay="constant"), tmp_path, loader=loader())
    assert rates[:4] == approximately_rows([0.025, 0.05, 0.075, 0.1])
    assert last == [0.1]
    rates, last = rates_of(LearningRateSchedule(warmup=0.1), tmp_path, loader=loader(), max_steps=20)
    assert len(rates) == 20
    assert last == [0.0]
    with pytest.raises(ValueError, match="neither `max_epochs` nor `max_steps`"):
        rates_of(LearningRateSchedule(), tmp_path, max_epochs=-1, max_time={"seconds": 5})


def approximately_rows(values: list[float]) -> list[Any]:
    return [approximately([value]) for value in values]


def test_refusals_come_before_a_step(tmp_path):
    before = seeded(Net).state_dict()
    for callbacks, message in (
        ([LearningRateSchedule(warmup="2ep", begin_decay=0.25)], "`warmup=2ep`.*`begin_decay=0.25`"),
        ([LearningRateSchedule(), LearningRateSchedule(warmup=3)], "more than one LearningRateSchedule"),
    ):
        net = seeded(Net)
        with pytest.raises(ValueError, match=message):
            helpers.trainer(tmp_path, callbacks).fit(net, StatefulLoader())
        assert same(dict(before), dict(net.state_dict()))
    with pytest.raises(ValueError, match="parameter group 0 of SGD has `lr=None`"):
        rates_of(LearningRateSchedule(), tmp_path, seeded(lambda: Net(optimizer=rateless)))


def rateless(parameters: Any) -> SGD:
    optimizer = SGD(parameters, lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_no_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"Net.configure_optimizers returns no optimizer"):
        rates_of(LearningRateSchedule(), tmp_path, seeded(lambda: Net(optimizer=lambda parameters: None)))


def test_one_line_says_what_will_happen(tmp_path, caplog):
    caplog.set_level("INFO")
    rates_of(LearningRateSchedule(warmup=4), tmp_path)
    lines = [record.getMessage() for record in caplog.records if "LearningRateSchedule" in record.getMessage()]
    assert lines == ["LearningRateSchedule: 4 steps of warm-up from 0, then cosine to 0 at step 32"]


def test_fast_dev_run(tmp_path):
    for arguments in ({}, {"warmup": 500, "begin_decay": 0.8}, {"decay": "wsd"}):
        rates, _ = rates_of(LearningRateSchedule(**arguments), tmp_path, fast_dev_run=True)
        assert len(rates) == 1
        assert rates[0][0] > 0.0


# --- schedulers of the user -------------------------------------------------------------------------------------------


def with_scheduler(make: Any, **config: Any) -> Any:
    def optimizer(parameters: Any) -> Any:
        sgd = SGD(parameters, lr=0.1)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": make(sgd), **config}}

    return seeded(lambda: Net(optimizer=optimizer))


def test_a_configured_scheduler_is_respected(tmp_path):
    net = with_scheduler(lambda o: torch_schedulers.StepLR(o, 1))
    with pytest.raises(ValueError, match=r"Net\.configure_optimizers configures StepLR.*`override=True`"):
        rates_of(LearningRateSchedule(), tmp_path, net)
    net = with_scheduler(torch_schedulers.ReduceLROnPlateau, monitor="train_loss")
    with pytest.raises(ValueError, match=r"configures ReduceLROnPlateau.*`decay='constant'`"):
        rates_of(LearningRateSchedule(), tmp_path, net)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch_schedulers.LinearLR(o, start_factor=0.1),  # has set the rate to a tenth by then
        lambda o: torch_schedulers.SequentialLR(
            o, [torch_schedulers.ConstantLR(o, 0.2), torch_schedulers.StepLR(o, 1)], [3]
        ),
    ],
)
@pytest.mark.parametrize("arguments", [{"warmup": 4}, {"warmup": 0, "decay": "constant"}])
def test_override_replaces_it_and_says_so(tmp_path, caplog, make, arguments):
    caplog.set_level("INFO")
    net = seeded(lambda: Net(optimizer=lambda parameters: SGD(parameters, 0.1)))
    plain, _ = rates_of(LearningRateSchedule(**arguments), tmp_path, net)
    rates, _ = rates_of(LearningRateSchedule(override=True, **arguments), tmp_path, with_scheduler(make))
    assert rates == plain
    lines = [record.getMessage() for record in caplog.records if "removed" in record.getMessage()]
    assert len(lines) == 1
    assert "LR" in lines[0]


def test_override_of_nothing_is_no_matter(tmp_path):
    assert rates_of(LearningRateSchedule(override=True), tmp_path) == rates_of(LearningRateSchedule(), tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch_schedulers.OneCycleLR(o, 0.1, 100),
        lambda o: torch_schedulers.ChainedScheduler([torch_schedulers.CyclicLR(o, 0.01, 0.1)], o),
    ],
)
def test_a_scheduler_that_took_the_rates_away_cannot_be_replaced(tmp_path, make):
    with pytest.raises(ValueError, match=r"cannot take the place of (OneCycleLR|CyclicLR)"):
        rates_of(LearningRateSchedule(override=True), tmp_path, with_scheduler(make, interval="step"))


class Worse(Net):
    """Its watched metric never improves, so a plateau scheduler reduces in every epoch."""

    def training_step(self, batch, batch_idx):
        self.log("watched", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_reductions_of_a_plateau_scheduler_are_not_undone_by_the_warmup(tmp_path):
    def optimizer(parameters):
        sgd = SGD(parameters, lr=0.1)
        plateau = torch_schedulers.ReduceLROnPlateau(sgd, factor=0.5, patience=0)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": plateau, "monitor": "watched"}}

    net = seeded(lambda: Worse(optimizer=optimizer))
    rates, last = rates_of(LearningRateSchedule(warmup=20, decay="constant"), tmp_path, net)
    # the first epoch's value is the best; reductions come after the second, third and fourth
    own = [0.1] * 16 + [0.05] * 8 + [0.025] * 8
    assert rates == approximately_rows([own[k] * min(1, (k + 1) / 21) for k in range(STEPS)])
    assert last == approximately([0.0125])


# --- others who change rates and groups -------------------------------------------------------------------------------


class Unfreeze(BaseFinetuning):
    """Add the first layers to the optimizer at an epoch."""

    def __init__(self, epoch: int = 2, lr: float | None = 0.05) -> None:
        super().__init__()
        self.epoch, self.lr = epoch, lr

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[:3])

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers[0].param_groups) > 1:  # Lightning restores the groups but leaves them frozen
            self.make_trainable(pl_module.net[:3])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=self.lr)


class HeadNet(Net):
    def configure_optimizers(self):
        return SGD(self.net[4].parameters(), lr=0.1, momentum=0.9)


def test_case_5_a_group_added_in_mid_run(tmp_path):
    rates, last = rates_of(
        LearningRateSchedule(warmup=4, decay="linear", final=0),
        tmp_path, seeded(HeadNet), callbacks=[Unfreeze()], max_epochs=5,
    )  # fmt: skip
    assert rates[16][1] == 0.05
    factors = [1 - (k - 4) / 36 for k in range(40)]
    assert rates[16:] == [approximately([0.1 * f, 0.05 * f / factors[16]]) for f in factors[16:]]
    for group in ([row[0] for row in rates[4:]], [row[1] for row in rates[16:]]):
        assert group == sorted(group, reverse=True)
    assert last == [0.0, 0.0]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("step", [5, 18, 24])  # not 16: Lightning, without us too, then never adds the group
def test_resume_with_an_added_group(tmp_path, order, step):
    def callbacks():
        return [LearningRateSchedule(warmup=4, decay="linear"), Unfreeze()][::order]

    check_resume(tmp_path, callbacks, lambda: seeded(HeadNet), step)


def test_the_learning_rate_finder_finds_the_own_rate(tmp_path):
    class Tunable(Net):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=self.lr)

    for order in (1, -1):
        callbacks = [LearningRateFinder(num_training_steps=20), LearningRateSchedule(warmup=4)][::order]
        recorder = Rates()
        run = helpers.trainer(tmp_path, [*callbacks, recorder])
        net = seeded(Tunable)
        run.fit(net, StatefulLoader())
        assert net.lr != 0.1
        assert recorder.rates[0][1] == approximately([net.lr / 5])
        assert max(rates[0] for _, rates in recorder.rates) == approximately(net.lr)
        assert lrs(run.optimizers[0]) == [0.0]


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:Swapping scheduler `FactorLR` for `SWALR`")
@pytest.mark.parametrize("order", [1, -1])
def test_weight_averaging_takes_the_rates_over(tmp_path, order):
    callbacks = [LearningRateSchedule(warmup=4), StochasticWeightAveraging(0.03, 0.5, annealing_epochs=1)][::order]
    rates, last = rates_of(callbacks[0] if order == 1 else callbacks[1], tmp_path, callbacks=[callbacks[order == 1]])
    assert rates[0] == approximately([0.02])
    assert rates[31] != approximately([0.1 * Schedule("cosine", 4, begin=4, end=32)(31)])
    assert last == approximately([0.03])


class OwnStep(Net):
    """Steps schedulers its own way, as people who use another library's do."""

    def lr_scheduler_step(self, scheduler, metric):
        pass


class StepsItself(ManualNet):
    """Steps the scheduler itself, as under manual optimization one has to."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()


class SkipsEpochs(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 5 else None


def test_whoever_steps_the_schedulers(tmp_path):
    expected = rates_of(LearningRateSchedule(warmup=4), tmp_path)
    assert rates_of(LearningRateSchedule(warmup=4), tmp_path, seeded(OwnStep)) == expected
    assert rates_of(LearningRateSchedule(warmup=4), tmp_path, seeded(StepsItself)) == expected
    rates, _ = rates_of(LearningRateSchedule(warmup=4, decay="linear"), tmp_path, seeded(SkipsEpochs), max_epochs=2)
    assert rates[6:] == approximately_rows([0.1 * (16 - k) / 12 for k in (5, 6, 7, 8, 9, 10)])  # no step was skipped


# --- loss scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [0, 3])
def test_case_10_a_step_that_loss_scaling_skips(tmp_path, skipped):
    def fit(plugins):
        callbacks = [InfiniteGradientAt(skipped)] if plugins else []
        return rates_of(LearningRateSchedule(warmup=4), tmp_path, callbacks=callbacks, plugins=plugins, max_epochs=2)

    assert fit([loss_scaling()]) == fit([])  # and no warning of a "scheduler before optimizer": it would be an error


# --- loggers and checkpoints ------------------------------------------------------------------------------------------


def logged(tmp_path: Path) -> dict[str, list[float]]:
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names if name.startswith("lr-")}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Net, {"lr-SGD"}),
        (TwoOptimizerNet, {"lr-SGD", "lr-Adam"}),
        (lambda: Net(optimizer=two_groups), {"lr-SGD/head", "lr-SGD/pg1"}),
    ],
)
def test_learning_rate_monitor(tmp_path, make, names, order):
    callbacks = [LearningRateSchedule(warmup=4), LearningRateMonitor()][::order]
    logger = CSVLogger(tmp_path)
    recorder = Rates()
    run = helpers.trainer(tmp_path, [*callbacks, recorder], logger=logger, log_every_n_steps=1, max_epochs=2)
    run.fit(seeded(make), StatefulLoader())
    seen = logged(tmp_path)
    assert seen.keys() == names
    columns = sorted(zip(*(rates for _, rates in recorder.rates), strict=True))
    assert sorted(map(tuple, seen.values())) == [approximately(column) for column in columns]


def two_groups(parameters: Any) -> SGD:
    first, *rest = parameters
    return SGD([{"params": [first], "lr": 0.2}, {"params": rest, "name": "head"}], lr=0.1)


def test_learning_rate_monitor_of_two_alike(tmp_path):
    class Alike(TwoOptimizerNet):
        def configure_optimizers(self):
            return [SGD(self.net[:3].parameters(), lr=0.1), SGD(self.net[3:].parameters(), lr=0.2)]

    run = helpers.trainer(
        tmp_path, [LearningRateMonitor(), LearningRateSchedule()],
        logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1,
    )  # fmt: skip
    run.fit(seeded(Alike), StatefulLoader())
    seen = logged(tmp_path)
    assert seen["lr-SGD-1"] == approximately([2 * rate for rate in seen["lr-SGD"]])


class SaveAt(Callback):
    """Save a checkpoint at the start of the training, or after a batch."""

    def __init__(self, hook: str, path: Path, step: int = 0) -> None:
        self.path, self.step, self.saved = path, step, False
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if trainer.global_step == self.step and not self.saved:
            trainer.save_checkpoint(self.path)
            self.saved = True


def check_resume(tmp_path: Path, callbacks: Any, make: Any, step: int, plugins: Any = None, **kwargs: Any) -> None:
    """Break a run off after a step, resume it, and compare with one that was never stopped, bit by bit."""

    def trainer(*others: Callback):
        own = {"plugins": [plugins()]} if plugins else {}
        return helpers.trainer(tmp_path, [*callbacks(), *others], **kwargs, **own)

    path = tmp_path / "broken.ckpt"
    whole, rest = Rates(), Rates()
    full, expected = trainer(whole), make()
    full.fit(expected, StatefulLoader())
    with pytest.raises(Crash):
        trainer(CrashAt(step, path)).fit(make(), StatefulLoader())
    resumed = trainer(rest)
    net = make()
    torch.nn.init.zeros_(next(net.parameters()))
    resumed.fit(net, StatefulLoader(), ckpt_path=path, weights_only=True)
    assert same(snapshot(net, resumed), snapshot(expected, full))
    assert rest.rates
    assert rest.rates == whole.rates[-len(rest.rates) :]
    assert [c.scheduler.state_dict() for c in resumed.lr_scheduler_configs] == [
        c.scheduler.state_dict() for c in full.lr_scheduler_configs
    ]


@pytest.mark.parametrize("step", [1, 3, 8, 19, 30])
@pytest.mark.parametrize(
    "arguments",
    [{"warmup": 4, "decay": "cosine"}, {"warmup": 0.3, "decay": "exponential", "decay_rate": 0.7, "begin_decay": 0.4}],
)
def test_resume_is_bit_identical(tmp_path, step, arguments):
    check_resume(tmp_path, lambda: [LearningRateSchedule(**arguments)], lambda: seeded(Net), step)


@pytest.mark.parametrize("step", [2, 16, 46])
def test_resume_of_two_optimizers(tmp_path, step):
    check_resume(tmp_path, lambda: [LearningRateSchedule()], lambda: seeded(TwoOptimizerNet), step)


def test_resume_with_accumulation(tmp_path):
    check_resume(tmp_path, lambda: [LearningRateSchedule()], lambda: seeded(Net), 7, accumulate_grad_batches=3)


def test_resume_with_loss_scaling(tmp_path):
    class SkipAStep(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 4:
                pl_module.net[0].weight.grad.fill_(torch.inf)

    check_resume(tmp_path, lambda: [LearningRateSchedule(), SkipAStep()], lambda: seeded(Net), 11, plugins=loss_scaling)


def test_resume_beside_a_plateau_scheduler(tmp_path):
    """It steps every fourth batch here: one that steps at an epoch's end misses a step on resume, without us too."""

    class Flat(Net):
        def training_step(self, batch, batch_idx):
            self.log("watched", 1.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            sgd = SGD(self.parameters(), lr=0.1)
            plateau = torch_schedulers.ReduceLROnPlateau(sgd, factor=0.5, patience=0)
            config = {"scheduler": plateau, "monitor": "watched", "interval": "step", "frequency": 4}
            return {"optimizer": sgd, "lr_scheduler": config}

    for step in (9, 18, 23):
        check_resume(tmp_path, lambda: [LearningRateSchedule(warmup=20, decay="constant")], lambda: seeded(Flat), step)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_sanity_check_end"])
@pytest.mark.parametrize("order", [1, -1])
def test_resume_at_step_0(tmp_path, hook, order):
    path = tmp_path / "start.ckpt"
    whole, rest = Rates(), Rates()
    callbacks = [SaveAt(hook, path), LearningRateSchedule(warmup=4)][::order]
    expected, net = seeded(Net), seeded(Net)
    helpers.trainer(tmp_path, [*callbacks, whole]).fit(expected, StatefulLoader(), val())
    helpers.trainer(tmp_path, [LearningRateSchedule(warmup=4), rest]).fit(net, StatefulLoader(), val(), ckpt_path=path)
    assert rest.rates == whole.rates
    assert same(dict(net.state_dict()), dict(expected.state_dict()))


def val() -> StatefulLoader:
    return StatefulLoader(batches=2, seed=5)


@pytest.mark.parametrize("net", [Net, ManualNet])
@pytest.mark.parametrize("order", [1, -1])
def test_a_checkpoint_between_batches_whoever_saves_it(tmp_path, net, order):
    """Under manual optimization a callback before ours saves before the schedulers have stepped."""
    path = tmp_path / "between.ckpt"
    whole, rest = Rates(), Rates()
    callbacks = [SaveAt("on_train_batch_end", path, step=10), LearningRateSchedule(warmup=4)][::order]
    expected, resumed = seeded(net), seeded(net)
    helpers.trainer(tmp_path, [*callbacks, whole]).fit(expected, StatefulLoader())
    helpers.trainer(tmp_path, [LearningRateSchedule(warmup=4), rest]).fit(resumed, StatefulLoader(), ckpt_path=path)
    assert rest.rates == whole.rates[10:]
    assert same(dict(resumed.state_dict()), dict(expected.state_dict()))


def test_a_run_that_had_another_scheduler_or_none_goes_on_with_ours(tmp_path):
    for make in (lambda o: torch_schedulers.StepLR(o, 1, gamma=0.1), None):
        net = with_scheduler(make) if make else seeded(lambda: Net(optimizer=lambda p: SGD(p, lr=0.1)))
        path = tmp_path / "other.ckpt"
        with pytest.raises(Crash):
            helpers.trainer(tmp_path, [CrashAt(20, path)]).fit(net, StatefulLoader())
        rest = Rates()
        run = helpers.trainer(tmp_path, [LearningRateSchedule(warmup=4, decay="linear", override=True), rest])
        run.fit(net, StatefulLoader(), ckpt_path=path)
        assert [row for _, row in rest.rates] == approximately_rows([0.1 * (32 - k) / 28 for k in range(20, 32)])


def test_a_longer_run_goes_on_by_its_own_length(tmp_path):
    path = tmp_path / "done.ckpt"
    run = helpers.trainer(tmp_path, [LearningRateSchedule(warmup=0, decay="linear")])
    run.fit(seeded(Net), StatefulLoader())
    run.save_checkpoint(path)
    recorder = Rates()
    longer = helpers.trainer(tmp_path, [LearningRateSchedule(warmup=0, decay="linear"), recorder], max_epochs=8)
    longer.fit(seeded(Net), StatefulLoader(), ckpt_path=path)
    assert recorder.rates == [(k, approximately([0.1 * (64 - k) / 64])) for k in range(32, 64)]


def test_model_checkpoint_holds_plain_state(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=5, save_top_k=1)
    run = helpers.trainer(tmp_path, [keeper, LearningRateSchedule()], enable_checkpointing=True)
    run.fit(seeded(Net), StatefulLoader())
    checkpoint = torch.load(keeper.best_model_path, weights_only=True)
    (state,) = checkpoint["lr_schedulers"]
    assert state["last_epoch"] == checkpoint["global_step"]
    assert state["base_lrs"] == [0.1]


# --- one object, many uses --------------------------------------------------------------------------------------------


def test_one_object_for_many_runs(tmp_path):
    callback = LearningRateSchedule(warmup=4)
    recorder = Rates()
    run = helpers.trainer(tmp_path, [callback, recorder])
    net = seeded(Net)
    run.fit(net, StatefulLoader(), val())
    first = list(recorder.rates)
    hooks = helpers.hooks_of(net, run)
    run.validate(net, val(), verbose=False)
    run.test(net, val(), verbose=False)
    run.fit_loop.max_epochs = 8  # the same Trainer goes on: its step is 32, of 64
    run.fit(net, StatefulLoader())
    assert len(run.lr_scheduler_configs) == 1
    assert helpers.hooks_of(net, run) == hooks == 0
    schedule = callback.schedule(RunLength(64, 8))
    assert recorder.rates[32:] == [(k, [0.1 * schedule(k)]) for k in range(32, 64)]

    assert rates_of(callback, tmp_path, seeded(lambda: Net(width=24)))[0] == [row for _, row in first]
    with pytest.raises(Crash):
        helpers.trainer(tmp_path, [callback, CrashAt(3, tmp_path / "x.ckpt")]).fit(seeded(Net), StatefulLoader())
    assert rates_of(callback, tmp_path)[0] == [row for _, row in first]


def test_an_optimizer_that_outlives_its_run(tmp_path):
    """A module that hands out the same optimizer each time gets its own rate back, not the 0 of the last run's end."""

    class Keeps(Net):
        def configure_optimizers(self):
            self.kept = getattr(self, "kept", None) or SGD(self.parameters(), lr=0.1)
            return self.kept

    net = seeded(Keeps)
    assert rates_of(LearningRateSchedule(warmup=4), tmp_path, net) == rates_of(
        LearningRateSchedule(warmup=4), tmp_path, net
    )


def test_bf16_and_tensor_rates_in_a_run(tmp_path):
    def optimizer(parameters):
        return Adam(parameters, lr=torch.tensor(0.01), foreach=False)

    net = seeded(lambda: Net(optimizer=optimizer))
    rates, last = rates_of(LearningRateSchedule(warmup=4, decay="linear"), tmp_path, net, precision="bf16-mixed")
    assert [row[0] for row in rates] == pytest.approx(
        [0.01 * min((k + 1) / 5, (32 - k) / 28) for k in range(STEPS)], rel=1e-6
    )
    assert last == [0.0]


def test_training_differs_from_a_run_without_only_by_the_rates(tmp_path):
    """With a constant rate and no warm-up nothing is touched at all."""
    plain, scheduled = seeded(Net), seeded(Net)
    helpers.trainer(tmp_path).fit(plain, StatefulLoader())
    helpers.trainer(tmp_path, [LearningRateSchedule(warmup=0, decay="constant")]).fit(scheduled, StatefulLoader())
    assert same(dict(plain.state_dict()), dict(scheduled.state_dict()))
