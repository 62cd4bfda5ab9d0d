"""Warm-up and decay of the learning rate: functions of the step, a torch scheduler, and the callback that says when."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightning_compress.moments import (
    Moment,
    MomentLike,
    RunLength,
    number,
    progress,
    refuse_if_after,
    resolve_span,
)
from lightning_compress.training import callbacks, run_length, steps_done

# --- the decays: functions of the time since the decay began ----------------------------------------------------------


class Elapsed(NamedTuple):
    """How long the decay has lasted, in three units.

    Args:
        share: The share of it that is done, in [0, 1]; 1 is the end of the run.
        epochs: Epochs since it began, whole and fractional.
        warmups: Steps since it began, in lengths of the warm-up (of one step where there is none).
    """

    share: float
    epochs: float
    warmups: float


def constant(now: Elapsed, rate: float | None, final: float) -> float:
    """Return 1: no decay.

    Example::

        >>> constant(Elapsed(share=0.5, epochs=2, warmups=3), None, 0.0)
        1.0
    """
    return 1.0


def linear(now: Elapsed, rate: float | None, final: float) -> float:
    """Return the factor on a straight line from 1 to `final`.

    Example::

        >>> linear(Elapsed(share=0.25, epochs=1, warmups=3), None, 0.2)
        0.8
    """
    return final + (1.0 - final) * (1.0 - now.share)


def cosine(now: Elapsed, rate: float | None, final: float) -> float:
    """Return the factor on half a cosine from 1 to `final` (Loshchilov and Hutter 2017, arXiv 1608.03983).

    Example::

        >>> round(cosine(Elapsed(share=0.5, epochs=2, warmups=3), None, 0.0), 6)
        0.5
    """
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * now.share)) / 2.0


def polynomial(now: Elapsed, rate: float | None, final: float) -> float:
    """Return the factor (1 − share)^rate, from 1 to `final`; `rate` is the power, 2 by default.

    Example::

        >>> polynomial(Elapsed(share=0.5, epochs=2, warmups=3), None, 0.0)
        0.25
    """
    return final + (1.0 - final) * (1.0 - now.share) ** (2.0 if rate is None else rate)


def exponential(now: Elapsed, rate: float | None, final: float) -> float:
    """Return rate^epochs at every step; without a `rate`, final^share, which is `final` at the end of the run.

    Example::

        >>> exponential(Elapsed(share=0.5, epochs=2, warmups=3), 0.9, 0.0)
        0.81
        >>> exponential(Elapsed(share=0.5, epochs=2, warmups=3), None, 0.01)
        0.1
    """
    return final**now.share if rate is None else rate**now.epochs


def step(now: Elapsed, rate: float | None, final: float) -> float:
    """Return rate^⌊epochs⌋: a step down after each whole epoch.

    Example::

        >>> step(Elapsed(share=0.5, epochs=2.9, warmups=3), 0.5, 0.0)
        0.25
    """
    assert rate is not None
    return rate ** math.floor(now.epochs)


def inverse_sqrt(now: Elapsed, rate: float | None, final: float) -> float:
    """Return 1 / √(1 + warmups), which is √(warm-up / step) right after a warm-up (Vaswani et al. 2017, 1706.03762).

    Example::

        >>> inverse_sqrt(Elapsed(share=0.5, epochs=2, warmups=3), None, 0.0)
        0.5
    """
    return 1.0 / math.sqrt(1.0 + now.warmups)


class Decay(NamedTuple):
    """A decay, and what it needs.

    Args:
        factor: The factor of the rate, a function of the time that the decay has lasted, ``decay_rate`` and ``final``.
        needs_end: Whether it must know when the run ends.
        rate: What ``decay_rate`` is to it: a ``"power"``, a factor ``"per epoch"``, or ``None`` where it has none.
        rate_from_final: Whether a ``final`` above 0 and the end of the run can stand in for ``decay_rate``.
        begin: When it begins if the user does not say; ``None`` is right after the warm-up.
    """

    factor: Callable[[Elapsed, float | None, float], float]
    needs_end: bool = True
    rate: Literal["power", "per epoch"] | None = None
    rate_from_final: bool = False
    begin: Moment | None = None


DECAYS: dict[str, Decay] = {
    "constant": Decay(constant, needs_end=False),
    "linear": Decay(linear),
    "cosine": Decay(cosine),
    "exponential": Decay(exponential, needs_end=False, rate="per epoch", rate_from_final=True),
    "polynomial": Decay(polynomial, rate="power"),
    "step": Decay(step, needs_end=False, rate="per epoch"),
    "inverse_sqrt": Decay(inverse_sqrt, needs_end=False),
    "wsd": Decay(linear, begin=Moment(0.8, "fraction")),
}


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate as a function of the step, with every moment in steps.

    Args:
        decay: One of :data:`DECAYS`.
        warmup: Steps of warm-up.
        warmup_from: The factor of the first of them, in [0, 1]; 0 stands for 1 / (warmup + 1), one even part.
        begin: The step at which the decay begins.
        end: The step after the last one, ``None`` where nobody knows it. From there on the factor stays.
        epoch: Steps of an epoch, for decays that count in epochs.
        decay_rate: See the decay.
        final: The factor at the end, and a floor for every decay.

    Example::

        >>> schedule = Schedule("linear", warmup=4, begin=4, end=14)
        >>> print(schedule)
        4 steps of warm-up from 0, then linear to 0 at step 14
        >>> [round(schedule(step), 6) for step in (0, 1, 3, 4, 9, 13, 14, 99)]
        [0.2, 0.4, 0.8, 1.0, 0.5, 0.1, 0.0, 0.0]
    """

    decay: str
    warmup: int = 0
    warmup_from: float = 0.0
    begin: int = 0
    end: int | None = None
    epoch: int | None = None
    decay_rate: float | None = None
    final: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the factor for a step, counted from 0."""
        step = step if self.end is None else min(step, self.end)
        # 1) a straight line from the first factor up to 1
        if step < self.warmup:
            first = self.warmup_from or 1.0 / (self.warmup + 1)
            return first + (1.0 - first) * step / self.warmup
        # 2) the full rate until the decay begins
        if step < self.begin:
            return 1.0
        # 3) down, but not below `final`
        since = step - self.begin
        share = 0.0 if self.end is None else progress(step, self.begin, self.end)
        now = Elapsed(share, since / (self.epoch or 1), since / (self.warmup or 1))
        return max(self.final, DECAYS[self.decay].factor(now, self.decay_rate, self.final))

    def __str__(self) -> str:
        phases = []
        if self.warmup:
            phases.append(f"{self.warmup} steps of warm-up from {self.warmup_from:g}")
        if self.begin > self.warmup:
            phases.append(f"constant until step {self.begin}")
        if self.end is not None and self.end < self.begin:
            phases.append(f"{self.decay}; but the run ends before that, at step {self.end}")
        elif self.end is None or self.decay == "constant":
            phases.append(self.decay)
        else:
            phases.append(f"{self.decay} to {self(self.end):.3g} at step {self.end}")
        return ", then ".join(phases)


# --- the scheduler ----------------------------------------------------------------------------------------------------


class FactorLR(LRScheduler):
    """Multiply the rate of each parameter group by one factor, a function of the step.

    In an orderly run it is ``LambdaLR``. It differs where a run is not orderly:

    - A group whose rate is not the one written last was changed by someone else, a plateau scheduler or a hand, and the
      change is kept: the group's own rate becomes its present one divided by the factor, so that it goes on in
      proportion. A group that was added (``LambdaLR`` raises there) is taken in the same way.
    - While the factor rises, a rate that was raised or came with a new group is the one to rise to. In proportion, a
      group added at 1/100 of a warm-up would end at 100 times the rate that it was given.
    - While the factor stays the same, nothing is written.
    - A `clock` can tell the step instead of the number of calls: a call too many or too few then does no harm.

    Args:
        optimizer: The optimizer. A group's own rate is its ``initial_lr`` where an earlier scheduler left one, as it is
            for every scheduler of torch, else its ``lr``.
        factor: A function of the step, counted from 0, that returns a factor of 0 or more.
        clock: A function that returns the step; without it each call of ``step`` is one.

    Example::

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
        >>> scheduler = FactorLR(optimizer, lambda step: 1.0 / (1 + step))
        >>> optimizer.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.2]
    """

    def __init__(
        self, optimizer: Optimizer, factor: Callable[[int], float], clock: Callable[[], int] | None = None
    ) -> None:
        self.factor, self.clock = factor, clock
        self.applied = 1.0  # the factor that the rates carry
        self.written: list[float] = []  # the rates that were written last
        for group in optimizer.param_groups:
            if "initial_lr" in group:
                _write(group, group["initial_lr"])
        super().__init__(optimizer)  # takes the first step

    def step(self, epoch: int | None = None) -> None:
        """Write the rates of the next step, or of the clock's; `epoch` is torch's old argument and is ignored.

        Unlike torch's own this never warns that it came before the optimizer: a step that loss scaling skips is a step.
        """
        self._step_count += 1  # torch makes it
        self.last_epoch = self.last_epoch + 1 if self.clock is None else self.clock()
        factor = self.factor(self.last_epoch)
        if factor != self.applied:
            self.base_lrs = self._own_rates(is_rising=factor > self.applied)
            self.applied = factor
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                _write(group, rate)
            self.written = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group."""
        return [rate * self.applied for rate in self.base_lrs]

    def _own_rates(self, is_rising: bool) -> list[float | Tensor]:
        """Return each group's rate without the factor: the one that we know, or what its present rate says."""
        rates: list[float | Tensor] = []
        for index, group in enumerate(self.optimizer.param_groups):
            rate = float(group["lr"])
            written = self.written[index] if index < len(self.written) else None  # a new group
            if rate == written:
                rates.append(float(self.base_lrs[index]))
            elif is_rising and rate >= (written or 0.0):  # always so from a factor of 0
                rates.append(rate)
            else:
                rates.append(rate / self.applied)
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: the step, the factor, each group's own rate, and the rates written last."""
        return {
            "last_epoch": self.last_epoch,
            "applied": self.applied,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "written": list(self.written),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another stopped. The state of another class is not taken, nor are the rates that it left."""
        if state_dict.keys() == self.state_dict().keys():
            self.__dict__.update(state_dict)
            return
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=False):
            _write(group, rate)


def _write(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = float(rate)


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


# --- the callback -----------------------------------------------------------------------------------------------------


class LearningRateSchedule(Callback):
    """Warm the learning rate up and let it decay, for any optimizer that the module configures.

    The rate of each parameter group is its own rate lr₀ times one factor, written before the first training batch and
    after each optimizer step. With k the step, counted from 0, W the steps of warm-up, B the step at which the decay
    begins and N the steps of the run:

    - k < W: first + (1 − first)·k/W, where first is ``warmup_from``, or 1/(W + 1) if that is 0: no step is done at a
      rate of 0. This is ``LinearLR(start_factor=first, total_iters=W)``.
    - W ≤ k < B: 1
    - B ≤ k ≤ N: the decay, with s = (k − B)/(N − B), t = (k − B)/steps of an epoch, f = ``final``, r = ``decay_rate``;
      never below f:

      ================  =======================================================================
      ``constant``      1
      ``linear``        f + (1 − f)·(1 − s)
      ``cosine``        f + (1 − f)·(1 + cos πs)/2
      ``exponential``   rᵗ, evaluated at every step; without r, fˢ, which ends at f
      ``polynomial``    f + (1 − f)·(1 − s)ʳ, r = 2 by default
      ``step``          r^⌊t⌋
      ``inverse_sqrt``  1/√(1 + (k − B)/W), which is √(W/k) right after the warm-up; W is 1 if there is none
      ``wsd``           linear, with B = 0.8·N by default
      ================  =======================================================================

    - k > N: the value at N. The last step of the run, N − 1, is still above f; the rate is f once the run is over.

    The scheduler is a ``torch.optim.lr_scheduler.LRScheduler`` and stands where Lightning keeps its own, one for each
    optimizer: ``LearningRateMonitor`` logs it, checkpoints hold it. Steps are the trainer's optimizer steps; under
    manual optimization training batches.

    Rates that others change are respected: a reduction by ``ReduceLROnPlateau``, a rate set by hand, a parameter group
    added in mid-run. Each follows the factor from where it is (see :class:`FactorLR`).

    Args:
        warmup: How long the warm-up is: an ``int`` is optimizer steps, a ``float`` a fraction of the run, ``"3ep"``
            epochs; 0 is none.
        warmup_from: The factor of the first step, in [0, 1]; 0 stands for 1/(W + 1), one even part.
        decay: What comes after it, see above.
        decay_rate: The factor per epoch for ``exponential`` and ``step``, in (0, 1]; the power for ``polynomial``,
            above 0. The other decays have none.
        final: The factor at the end and the lowest one after the warm-up, in [0, 1].
        begin_decay: When the decay begins, as `warmup`; ``None`` is right after the warm-up, or 0.8 for ``wsd``.
        override: Whether to take the place of the schedulers that the module configures. Without it they are an error;
            only ``ReduceLROnPlateau`` may stay, beside ``decay="constant"``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: At construction, for a value out of range, an unknown decay, or an argument that the decay would
            ignore. Before the first step, if the module configures a scheduler, if the run has no known length and the
            schedule needs one, or if the decay would begin before the warm-up ends.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LearningRateSchedule(warmup=100, decay="cosine", final=0.01)], logger=False)
        >>> print(LearningRateSchedule(warmup=0.05).schedule(RunLength(steps=1890, steps_per_epoch=63)))
        95 steps of warm-up from 0, then cosine to 0 at step 1890
    """

    def __init__(
        self,
        warmup: MomentLike = 0.05,
        warmup_from: float = 0.0,
        decay: Literal[
            "constant", "linear", "cosine", "exponential", "polynomial", "step", "inverse_sqrt", "wsd"
        ] = "cosine",
        decay_rate: float | None = None,
        final: float = 0.0,
        begin_decay: MomentLike | None = None,
        override: bool = False,
    ) -> None:
        super().__init__()
        self.warmup = Moment.parse(warmup, "warmup")
        self.warmup_from = number(warmup_from, "warmup_from", 0.0, 1.0)
        self.decay = _known_decay(decay)
        self.final = number(final, "final", 0.0, 1.0)
        self.decay_rate = _decay_rate(decay_rate, decay, self.final)
        self.begin_decay = None if begin_decay is None else Moment.parse(begin_decay, "begin_decay")
        if self.begin_decay is not None:
            refuse_if_after(self.warmup, self.begin_decay, "warmup", "begin_decay")
        for name, value in (("final", self.final or None), ("begin_decay", begin_decay)):
            if decay == "constant" and value is not None:
                raise ValueError(f"`{name}={value!r}` has no meaning for `decay='constant'`: leave it out.")
        if not isinstance(override, bool):
            raise TypeError(f"`override` must be True or False, got {override!r} of type {type(override).__name__}.")
        self.override = override

    def schedule(self, run: RunLength) -> Schedule:
        """Return the schedule for a run of some length.

        Raises:
            ValueError: If it needs a length that is not known, or the decay would begin before the warm-up ends.
        """
        decay = DECAYS[self.decay]
        derives_rate = decay.rate_from_final and self.decay_rate is None
        if run.steps is None and (decay.needs_end or derives_rate):
            raise ValueError(
                f"`decay='{self.decay}'` lasts until the end of the run, but {run.reason}. Give the Trainer "
                f"`max_steps`, or `max_epochs` and a loader with a length; `constant` and `inverse_sqrt` need no end."
            )
        if run.steps_per_epoch is None and decay.rate == "per epoch" and not derives_rate:
            raise ValueError(
                f"`decay_rate={self.decay_rate}` of `decay='{self.decay}'` is a factor per epoch, but {run.reason}. "
                f"Take `decay='exponential'` with `final` in place of `decay_rate`, and give the Trainer `max_steps`."
            )
        warmup = begin = self.warmup.resolve(run, "warmup")
        begin_decay = self.begin_decay or decay.begin
        if begin_decay is not None:
            begin = max(warmup, begin_decay.resolve(run, "begin_decay"))
        is_warmup_over = run.steps is None or warmup < run.steps  # it is not in a run of one step that tries things out
        if self.begin_decay is not None and is_warmup_over:
            resolve_span(self.warmup, self.begin_decay, run, "warmup", "begin_decay")
        return Schedule(
            self.decay,
            warmup=warmup,
            warmup_from=self.warmup_from,
            begin=begin,
            end=run.steps,
            epoch=run.steps_per_epoch,
            decay_rate=self.decay_rate,
            final=self.final,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second schedule."""
        if stage != "fit":
            return
        if sum(isinstance(callback, LearningRateSchedule) for callback in callbacks(trainer)) > 1:
            raise ValueError("The Trainer has more than one LearningRateSchedule. Keep one: it serves all optimizers.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the schedulers where Lightning keeps its own. The factor is not known yet, nor the length of the run."""
        self._see_to_configured_schedulers(trainer, pl_module)
        for optimizer in trainer.optimizers:
            _refuse_without_rate(optimizer, pl_module)
            scheduler = FactorLR(optimizer, lambda step: 1.0, clock=lambda: steps_done(trainer, pl_module))
            trainer.strategy.lr_scheduler_configs.append(LRSchedulerConfig(scheduler, interval="step"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rates of the first step, or of the one with which a resumed run goes on."""
        schedule = self.schedule(run_length(trainer))
        rank_zero_info(f"LearningRateSchedule: {schedule}")
        for scheduler in _schedulers(trainer):
            scheduler.factor = schedule
            scheduler.step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the schedulers where Lightning has not: under manual optimization, or past an own ``lr_scheduler_step``.

        Where it has, this changes nothing: the schedulers go by the trainer's step.
        """
        for scheduler in _schedulers(trainer):
            scheduler.step()

    def _see_to_configured_schedulers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        configured = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
        if not configured:
            return
        names = " and ".join(type(scheduler).__name__ for scheduler in configured)
        is_plateau_only = all(isinstance(scheduler, ReduceLROnPlateau) for scheduler in configured)
        if not self.override and is_plateau_only and self.decay == "constant":
            return
        if not self.override:
            raise ValueError(
                f"{type(pl_module).__name__}.configure_optimizers configures {names}, and LearningRateSchedule would "
                f"set the same rates. Remove one of them, or give LearningRateSchedule `override=True` to replace it."
                + (" Beside ReduceLROnPlateau, `decay='constant'` (warm-up alone) may stay." if is_plateau_only else "")
            )
        for scheduler in _with_nested(configured):
            if isinstance(scheduler, CyclicLR | OneCycleLR):
                raise ValueError(
                    f"`override=True` cannot take the place of {type(scheduler).__name__}: it has replaced the "
                    f"optimizer's own rates. Remove it from {type(pl_module).__name__}.configure_optimizers."
                )
        trainer.strategy.lr_scheduler_configs = []
        rank_zero_info(f"LearningRateSchedule(override=True): removed {names}, which the module configures.")


def _schedulers(trainer: Trainer) -> Iterator[FactorLR]:
    """Yield ours, as long as nobody (weight averaging does) has put others in their place."""
    return (c.scheduler for c in trainer.strategy.lr_scheduler_configs if isinstance(c.scheduler, FactorLR))


def _with_nested(schedulers: list[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _with_nested(getattr(scheduler, "_schedulers", []))  # SequentialLR, ChainedScheduler


def _known_decay(decay: object) -> str:
    if not isinstance(decay, str):
        raise TypeError(f"`decay` must be one of {', '.join(DECAYS)}, got {decay!r} of type {type(decay).__name__}.")
    if decay not in DECAYS:
        close = difflib.get_close_matches(decay, DECAYS, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"`decay` must be one of {', '.join(DECAYS)}, got {decay!r}.{hint}")
    return decay


def _decay_rate(value: object, decay: str, final: float) -> float | None:
    kind, can_derive = DECAYS[decay].rate, DECAYS[decay].rate_from_final
    if value is None:
        if kind == "per epoch" and not (can_derive and final > 0.0):
            raise ValueError(
                f"`decay='{decay}'` needs a `decay_rate`, the factor per epoch in (0, 1], such as 0.9"
                + (", or a `final` above 0 to end at." if can_derive else ".")
            )
        return None
    if kind is None:
        users = ", ".join(name for name, other in DECAYS.items() if other.rate)
        raise ValueError(
            f"`decay_rate={value!r}` has no meaning for `decay='{decay}'`, only for {users}: leave it out."
        )
    rate = number(value, "decay_rate", 0.0, 1.0 if kind == "per epoch" else math.inf)
    if not 0.0 < rate < math.inf:
        raise ValueError(f"`decay_rate` must be above 0 and finite, got {value!r}.")
    return rate


def _refuse_without_rate(optimizer: Optimizer, pl_module: LightningModule) -> None:
    if not optimizer.param_groups:
        raise ValueError(
            f"LearningRateSchedule has no rate to set: {type(pl_module).__name__}.configure_optimizers returns no "
            f"optimizer. Return one, or remove the callback."
        )
    for index, group in enumerate(optimizer.param_groups):
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ValueError(
                f"LearningRateSchedule has no rate to set: parameter group {index} of {type(optimizer).__name__} has "
                f"`lr={group.get('lr')!r}`. Give it a number, or remove the callback."
            )
