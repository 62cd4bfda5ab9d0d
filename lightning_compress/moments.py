"""Points in time, ramps between them, and values that follow a ramp.

A user writes a point in time as Lightning does: an ``int`` is optimizer steps, a ``float`` is a fraction of the run,
a string such as ``"3ep"`` is epochs. :class:`Moment` is the one parser of it; every callback uses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

MomentLike = int | float | str  # `int` first: jsonargparse takes the first that fits, and 1 is not 1.0
Ramp = Callable[[float], float]

_EPOCHS = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:ep|epochs?)")
_ALLOWED = "an int (optimizer steps), a float in [0, 1] (a fraction of the run) or a string such as '3ep' (epochs)"


@dataclass(frozen=True)
class RunLength:
    """How long a run is, as far as it can be known.

    Args:
        steps: Optimizer steps of the whole run, ``None`` where nobody can tell.
        steps_per_epoch: Optimizer steps of one epoch, ``None`` where nobody can tell.
        reason: Why something is ``None``, for the error message.
    """

    steps: int | None
    steps_per_epoch: int | None
    reason: str = "the run has no known length"


@dataclass(frozen=True)
class Moment:
    """A point in time: a number and its unit.

    Example::

        >>> run = RunLength(steps=200, steps_per_epoch=20)
        >>> [Moment.parse(value).resolve(run) for value in (7, 0.5, 1, 1.0, "3ep", "1e-1")]
        [7, 100, 1, 200, 60, 20]
    """

    value: float
    unit: Literal["steps", "fraction", "epochs"]

    @classmethod
    def parse(cls, value: MomentLike | Moment, name: str = "moment") -> Moment:
        """Read what a user wrote.

        Numbers in strings mean what they mean bare, since YAML reads ``1e-1`` as a string.

        Args:
            value: An ``int`` ≥ 0, a ``float`` in [0, 1], or a string such as ``"3ep"`` or ``"0.5ep"``.
            name: The argument's name, for the error message.

        Raises:
            ValueError: If the value is none of these.
            TypeError: If it is of another type (``bool`` included).
        """
        if isinstance(value, Moment):
            return value
        if isinstance(value, str):
            return cls._parse_text(value, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"`{name}` must be {_ALLOWED}, got {value!r} of type {type(value).__name__}.")
        if isinstance(value, Integral):
            if value < 0:
                raise ValueError(f"`{name}` in optimizer steps must be 0 or more, got {value!r}.")
            return cls(int(value), "steps")
        if not 0.0 <= float(value) <= 1.0:  # NaN is refused here too
            raise ValueError(
                f"`{name}` as a float is a fraction of the run and must lie in [0, 1], got {value!r}. "
                f"For optimizer steps give an int, for epochs a string such as '3ep'."
            )
        return cls(float(value), "fraction")

    @classmethod
    def _parse_text(cls, text: str, name: str) -> Moment:
        stripped = text.strip()
        if match := _EPOCHS.fullmatch(stripped):
            return cls(float(match[1]), "epochs")
        for number in (int, float):
            try:
                return cls.parse(number(stripped), name)
            except ValueError as error:
                if f"`{name}`" in str(error):
                    raise
        raise ValueError(f"`{name}` must be {_ALLOWED}, got {text!r}.")

    def resolve(self, run: RunLength, name: str = "moment") -> int:
        """Return the moment as a number of optimizer steps, counted from the start of the run.

        Raises:
            ValueError: If the run's length is not known and the moment depends on it.
        """
        if self.unit == "steps":
            return int(self.value)
        length = run.steps if self.unit == "fraction" else run.steps_per_epoch
        if length is None:
            what = "a fraction of the run" if self.unit == "fraction" else "a number of epochs"
            raise ValueError(
                f"`{name}={self}` is {what}, but {run.reason}. Give `{name}` in optimizer steps (an int), "
                f"or give the Trainer `max_steps`, or `max_epochs` and a loader with a length."
            )
        return math.floor(self.value * length + 0.5)

    def __str__(self) -> str:
        return f"{self.value:g}ep" if self.unit == "epochs" else repr(self.value)

    def is_after(self, other: Moment) -> bool:
        """Whether this moment surely comes after another: only moments of one unit can be compared before the run."""
        return self.unit == other.unit and self.value > other.value


def number(value: object, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a number within [low, high]; numbers in strings count, since YAML reads ``1e-4`` as a string.

    Example::

        >>> number("1e-1", "strength", 0.0)
        0.1

    Raises:
        ValueError: If it lies outside, or is NaN.
        TypeError: If it is no number (``bool`` is none).
    """
    allowed = f"a number in [{low:g}, {high:g}]"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}.") from None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be {allowed}, got {value!r} of type {type(value).__name__}.")
    if not low <= float(value) <= high:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    return float(value)


def one_of(value: object, allowed: Iterable[str], name: str) -> str:
    """Return a word that must be one of those allowed.

    Example::

        >>> one_of("max", ("max", "min"), "mode")
        'max'

    Raises:
        ValueError: If it is another, or no word.
    """
    words = list(allowed)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"`{name}` must be one of {', '.join(words)}, got {value!r}.")
    return value


def refuse_if_after(begin: Moment, end: Moment, begin_name: str = "begin", end_name: str = "end") -> None:
    """Raise ``ValueError`` where `begin` surely comes after `end`; moments of unlike units wait for the run."""
    if begin.is_after(end):
        raise ValueError(f"`{begin_name}={begin}` comes after `{end_name}={end}`: give a `{begin_name}` before it.")


def resolve_span(
    begin: Moment, end: Moment, run: RunLength, begin_name: str = "begin", end_name: str = "end"
) -> tuple[int, int]:
    """Return two moments in optimizer steps and refuse a span that ends before it begins.

    Example::

        >>> resolve_span(Moment.parse(0.25), Moment.parse(1.0), RunLength(steps=80, steps_per_epoch=8))
        (20, 80)

    Raises:
        ValueError: If the begin comes after the end, as ``begin=0.5`` and ``end=1`` (step 1) do in a long run.
    """
    first, last = begin.resolve(run, begin_name), end.resolve(run, end_name)
    if first > last and run.steps is not None and first >= run.steps:
        return first, first  # a trial run that ends before it begins
    if first > last:
        hint = ""
        if end.unit == "steps" and end.value == 1:
            hint = f" `{end_name}=1` is one optimizer step; the whole run is `{end_name}=1.0`."
        raise ValueError(
            f"`{begin_name}={begin}` is optimizer step {first} of this run and comes after `{end_name}={end}`, "
            f"which is step {last}.{hint}"
        )
    return first, last


def progress(step: int, begin: int, end: int) -> float:
    """Return how far a step is between two others, within [0, 1]; a span of no length is over once it is reached.

    Example::

        >>> [progress(step, 10, 30) for step in (5, 10, 20, 30, 99)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if step < begin:
        return 0.0
    return 1.0 if step >= end else (step - begin) / (end - begin)


def linear(t: float) -> float:
    """Return the share of the way that is done at progress `t`, evenly: t.

    Example::

        >>> linear(0.25)
        0.25
    """
    return t


def cubic(t: float) -> float:
    """Return 1 − (1 − t)³: fast at first, ever slower (Zhu and Gupta 2017, arXiv 1710.01878).

    Example::

        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - t) ** 3


def cosine(t: float) -> float:
    """Return (1 − cos πt) / 2: slow at both ends.

    Example::

        >>> cosine(0.0), round(cosine(0.5), 6), cosine(1.0)
        (0.0, 0.5, 1.0)
    """
    return (1.0 - math.cos(math.pi * t)) / 2.0


def exponential(t: float) -> float:
    """Return (1 − e^(−5t)) / (1 − e^(−5)): what is left to do shrinks by the same factor in equal times.

    Example::

        >>> exponential(0.0), exponential(1.0), round(exponential(0.2), 2)
        (0.0, 1.0, 0.64)
    """
    return math.expm1(-5.0 * t) / math.expm1(-5.0)


def one_shot(t: float) -> float:
    """Return 1 at once, whatever `t` is: all of it at `begin`.

    Example::

        >>> one_shot(0.0)
        1.0
    """
    return 1.0


RAMPS: dict[str, Ramp] = {
    "cubic": cubic,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "one_shot": one_shot,
}


def ramp(schedule: str | Ramp, name: str = "schedule") -> Ramp:
    """Return a ramp by its name, or check a callable that maps progress in [0, 1] to the share that is done.

    Raises:
        ValueError: If the name is unknown, or the callable does not end at 1 or leaves [0, 1] on its way.
        TypeError: If it is neither a string nor callable, or does not return a number.
    """
    if isinstance(schedule, str):
        if schedule not in RAMPS:
            raise ValueError(f"`{name}` must be one of {', '.join(RAMPS)} or a callable, got {schedule!r}.")
        return RAMPS[schedule]
    if not callable(schedule):
        raise TypeError(f"`{name}` must be one of {', '.join(RAMPS)} or a callable, got {schedule!r}.")
    _sample(schedule, name, 0.0, 1.0)
    if not math.isclose(float(schedule(1.0)), 1.0, abs_tol=1e-9):
        raise ValueError(f"`{name}` must return 1 at progress 1, got {schedule(1.0)!r}: the target is never reached.")
    return schedule


def _sample(function: Callable[[float], float], name: str, low: float, high: float) -> None:
    """Raise where a function of progress returns anything but numbers within [low, high]."""
    for t in (i / 100 for i in range(101)):
        try:
            value = function(t)
        except TypeError as error:
            raise TypeError(f"`{name}` must be a function of progress in [0, 1], and raised: {error}") from error
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"`{name}` must return a number, got {value!r} at progress {t}.")
        if not low <= float(value) <= high or math.isinf(value):
            raise ValueError(f"`{name}` must stay within [{low:g}, {high:g}], got {value!r} at progress {t}.")


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `first` to `last`: `first` until `begin`, along the ramp, `last` from `end` on.

    Args:
        first: The value up to `begin`.
        last: The value from `end` on.
        schedule: The ramp between them: a name in :data:`RAMPS`, or a callable that maps progress in [0, 1] to the
            share of the way that is done. ``"one_shot"`` is a jump at `begin`.
        begin: The moment at which the value starts to change.
        end: The moment at which it has changed.

    Raises:
        ValueError: If a value is not finite, a moment or ramp is unknown, or `begin` surely comes after `end`.
        TypeError: If something is of another type.

    Example::

        >>> value = Schedule(4.0, 1.0, begin=10, end=30).resolve(RunLength(steps=None, steps_per_epoch=None))
        >>> [value(step) for step in (0, 10, 20, 30, 99)]
        [4.0, 4.0, 2.5, 1.0, 1.0]
    """

    first: float
    last: float
    schedule: str | Ramp = "linear"
    begin: MomentLike = 0
    end: MomentLike = 1.0

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = number(getattr(self, name), name)
            if math.isinf(value):
                raise ValueError(f"`{name}` must be finite, got {value!r}.")
            object.__setattr__(self, name, value)
        ramp(self.schedule)
        refuse_if_after(Moment.parse(self.begin, "begin"), Moment.parse(self.end, "end"))

    def resolve(self, run: RunLength) -> Callable[[int], float]:
        """Return the value as a function of optimizer steps; where it never changes, the run may be of any length.

        Raises:
            ValueError: If a moment depends on a length that is not known, or `begin` comes after `end` in this run.
        """
        if self.first == self.last:
            return lambda step: self.first
        share = ramp(self.schedule)
        begin, end = resolve_span(Moment.parse(self.begin), Moment.parse(self.end), run)

        def value(step: int) -> float:
            # `first` before `begin` whatever the ramp is at 0, and both ends exactly, whatever rounding does between
            done = share(progress(step, begin, end)) if step >= begin else 0.0
            return (1.0 - done) * self.first + done * self.last

        return value

    def __str__(self) -> str:
        return f"{self.first:g}" + (f" to {self.last:g}" if self.first != self.last else "")


@dataclass(frozen=True)
class ProgressFunction:
    """A value that is a function of progress in [0, 1] over the whole run.

    Example::

        >>> value = ProgressFunction(lambda t: 4.0 - 2.0 * t).resolve(RunLength(steps=100, steps_per_epoch=10))
        >>> value(0), value(50), value(100)
        (4.0, 3.0, 2.0)
    """

    function: Callable[[float], float]

    def resolve(self, run: RunLength) -> Callable[[int], float]:
        """Return the value as a function of optimizer steps.

        Raises:
            ValueError: If the run's length is not known.
        """
        steps = run.steps
        if steps is None:
            raise ValueError(
                f"A value that is a function of progress needs the length of the run, but {run.reason}. Give a "
                f"`Schedule` with `begin` and `end` in optimizer steps, or give the Trainer `max_steps`, or "
                f"`max_epochs` and a loader with a length."
            )
        return lambda step: float(self.function(progress(step, 0, steps)))

    def __str__(self) -> str:
        return "as a function of progress"


ScheduledLike = int | float | str | Schedule | Mapping[str, Any] | Callable[[float], float]


def scheduled(
    value: ScheduledLike | ProgressFunction, name: str, low: float = -math.inf, high: float = math.inf
) -> Schedule | ProgressFunction:
    """Read a value that may change during the run; ``resolve(run)`` then gives it for each step.

    Args:
        value: A number (constant; in a string too, since YAML reads ``1e-4`` as one), a :class:`Schedule`, a mapping of
            its arguments (what YAML gives), or a callable that maps progress in [0, 1] over the whole run to the value.
        name: The argument's name, for the error message.
        low: The lowest value allowed.
        high: The highest value allowed.

    Example::

        >>> scheduled("4", "temperature", 0.01, 100.0).resolve(RunLength(None, None))(7)
        4.0
        >>> scheduled({"first": 1.0, "last": 0.5, "end": 0.5}, "weight", 0.0, 1.0)
        Schedule(first=1.0, last=0.5, schedule='linear', begin=0, end=0.5)

    Raises:
        ValueError: If a value lies outside [low, high], or a schedule cannot be read. A callable is sampled.
        TypeError: If it is of another type.
    """
    if isinstance(value, ProgressFunction):
        value = value.function
    if isinstance(value, Mapping):
        value = _read_schedule(value, name)
    if isinstance(value, Schedule):
        for end in ("first", "last"):
            number(getattr(value, end), f"{name}.{end}", low, high)
        return value
    if isinstance(value, (str, Real)):
        constant = number(value, name, low, high)
        if math.isinf(constant):
            raise ValueError(f"`{name}` must be finite, got {value!r}.")
        return Schedule(constant, constant)
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a number in [{low:g}, {high:g}], a Schedule, a mapping of its arguments such as "
            f"{{'first': 1.0, 'last': 0.5}}, or a function of progress in [0, 1], got {value!r}."
        )
    _sample(value, name, low, high)
    return ProgressFunction(value)


def _read_schedule(value: Mapping[str, Any], name: str) -> Schedule:
    known = [field.name for field in fields(Schedule)]
    missing = [key for key in ("first", "last") if key not in value]
    unknown = [key for key in value if key not in known]
    if missing or unknown:
        raise ValueError(
            f"`{name}` as a mapping takes {', '.join(known)}, of which first and last are needed; got {dict(value)!r}."
        )
    try:
        return Schedule(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}`: {error}") from error
