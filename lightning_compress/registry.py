"""Where the callbacks of one model meet.

A technique registers what it does to which parameters; the report, the guard and other techniques read it there, so
that no callback has to know another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import nn


@runtime_checkable
class Technique(Protocol):
    """What a technique tells the others about itself.

    It may also have: ``finish(module)`` and ``pruned_module`` (see :func:`smaller_module`); ``skipped``, why modules
    were left as they are, by name; ``has_begun_in(checkpoint)``, whether it had begun when a Lightning checkpoint was
    written, where the weights alone do not show it; ``can_roll_back`` and ``can_hold`` (see the functions of
    these names).
    """

    technique: str
    """The technique's name: ``"pruning"``, ``"quantization"``, …"""

    def stage(self) -> float:
        """Return how far its compression is: 0 before it begins, 1 once it has reached its target."""

    def summary(self) -> str:
        """Return one line that says what it did."""

    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the facts for each parameter that it changes: ``{"net.0.weight": {"sparsity": 0.9}}``."""

    def snapshot(self) -> dict[str, Any]:
        """Return what :meth:`rollback` needs to come back to this point: masks, ranges, where the ramp stands."""

    def rollback(self, state: Mapping[str, Any]) -> None:
        """Come back to a point that :meth:`snapshot` was taken at; the module's own tensors are back already."""


class _Entry:
    def __init__(self) -> None:
        self.techniques: list[Technique] = []
        self.claims: dict[tuple[str, int], Technique] = {}
        self.holders: list[object] = []


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def register(module: nn.Module, technique: Technique, parameters: Iterable[tuple[str, nn.Parameter]] = ()) -> None:
    """Make a technique known, and claim the parameters that it alone may change.

    Raises:
        ValueError: If another object of the same technique has claimed one of the parameters, by the parameter's name.
    """
    entry = _entries.setdefault(module, _Entry())
    parameters = list(parameters)
    for name, parameter in parameters:
        owner = entry.claims.get((technique.technique, id(parameter)))
        if owner is not None and owner is not technique:
            raise ValueError(
                f"Two {type(technique).__name__} callbacks claim the parameter '{name}'. "
                f"Give them disjoint `include` and `exclude` patterns."
            )
    if technique not in entry.techniques:
        entry.techniques.append(technique)
    for _, parameter in parameters:
        entry.claims[technique.technique, id(parameter)] = technique


def release(module: nn.Module, technique: Technique) -> None:
    """Forget a technique, its claims and its hold."""
    entry = _entries.get(module)
    if entry is None:
        return
    hold(module, technique, False)
    entry.techniques = [other for other in entry.techniques if other is not technique]
    entry.claims = {key: owner for key, owner in entry.claims.items() if owner is not technique}


def hold(module: nn.Module, holder: object, is_held: bool) -> None:
    """Stop the ramps of all techniques where they stand, or let them go on once nobody else holds them.

    Example::

        >>> module, one, other = nn.Linear(2, 2), object(), object()
        >>> hold(module, one, True)
        >>> hold(module, other, True)
        >>> hold(module, one, False)
        >>> is_held(module)
        True
    """
    entry = _entries.setdefault(module, _Entry())
    entry.holders = [other for other in entry.holders if other is not holder] + [holder] * is_held


def is_held(module: nn.Module) -> bool:
    """Return whether the ramps have to stand still."""
    entry = _entries.get(module)
    return entry is not None and bool(entry.holders)


def can_roll_back(module: nn.Module) -> bool:
    """Return whether somebody keeps a point to return to, so that weights that are NaN need not end the run."""
    return any(getattr(technique, "can_roll_back", False) for technique in techniques(module))


def can_hold(module: nn.Module) -> bool:
    """Return whether somebody may hold the ramps, so that they can go on until they are held."""
    return any(getattr(technique, "can_hold", False) for technique in techniques(module))


def smaller_module(module: nn.Module) -> nn.Module | None:
    """Return the physically smaller module that a technique has made of a trained one, ``None`` where there is none.

    A technique that cuts something out has a method ``finish(module)`` that makes it and an attribute `pruned_module`.
    """
    made = []
    for technique in techniques(module):
        if (finish := getattr(technique, "finish", None)) is not None:
            finish(module)
            made.append(getattr(technique, "pruned_module", None))
    modules = [smaller for smaller in made if smaller is not None]
    return min(modules, key=lambda smaller: sum(p.numel() for p in smaller.parameters()), default=None)


def suffix(module: nn.Module, technique: Technique) -> str:
    """Return what tells the metrics of several objects of one technique apart: ``""`` for the only one, else ``"_0"``.

    Example::

        >>> class Prunes:
        ...     technique = "pruning"
        >>> module, first, second = nn.Linear(2, 2), Prunes(), Prunes()
        >>> register(module, first)
        >>> alone = suffix(module, first)
        >>> register(module, second)
        >>> alone, suffix(module, second)
        ('', '_1')
    """
    alike = [other for other in techniques(module) if other.technique == technique.technique]
    return f"_{alike.index(technique)}" if len(alike) > 1 else ""


def techniques(module: nn.Module) -> list[Technique]:
    """Return the techniques that act on a module, in the order in which they registered."""
    entry = _entries.get(module)
    return list(entry.techniques) if entry is not None else []
