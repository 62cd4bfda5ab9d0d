"""Targets other than a sparsity: as much as a guard lets pass, or a size, work or time of the model that is left."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.pruning.coupling import ChannelGroup
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.removal import _copy, cut, profile
from lightning_compress.report.measure import median_latency

CEILING = 0.999
"""The sparsity at which a search ends, if one unit of each layer is left there."""

MEASURES = {"size": "bytes", "macs": "multiply-adds", "latency": "latency"}

_TURNS = 5  # in which the dense and the smaller model are timed
_TURN = 0.03  # seconds for each of them in each turn


# As far as a guard lets it ------------------------------------------------------------------------------------------


def even_in_log(t: float, ratio: float) -> float:
    """Return (1 − ρᵗ) / (1 − ρ): the share of the way that is done where the density shrinks by equal factors.

    Args:
        t: How far the search is, in [0, 1].
        ratio: ρ, the density at the end over that at the start, in (0, 1]; 1 is a way of no length.

    Example::

        >>> [round(even_in_log(t, 0.01), 3) for t in (0.0, 0.5, 1.0)]  # densities 1, 0.1 and 0.01
        [0.0, 0.909, 1.0]
    """
    return 1.0 if ratio >= 1.0 else (1.0 - ratio**t) / (1.0 - ratio)


@dataclass
class Search:
    """Goes on evenly while nobody holds it: half as fast after each hold, twice as fast after a quarter without one.

    Args:
        position: How far it is, from 0 to 1.
        pace: How fast it goes: 1, which it never exceeds, is the whole way in the time that was planned.
        unheld: For how much of the planned time it has gone on since the last hold or change of pace.
        is_held: Whether it was held when it was last moved.

    Example::

        >>> search = Search()
        >>> for is_held in (False, True, True, False):
        ...     search.advance(0.25, is_held)
        >>> search
        Search(position=0.375, pace=1.0, unheld=0.0, is_held=False)
    """

    position: float = 0.0
    pace: float = 1.0
    unheld: float = 0.0
    is_held: bool = False

    def advance(self, planned: float, is_held: bool) -> None:
        """Move on by a share of the planned time, or stand still."""
        if is_held:
            self._stop()
        else:
            self.is_held = False
            self.position = min(self.position + self.pace * planned, 1.0)
            self.unheld += planned
            if self.unheld >= 0.25:
                self.pace, self.unheld = min(2.0 * self.pace, 1.0), 0.0

    def return_to(self, position: float) -> None:
        """Go back to where all was well, and stand still there."""
        self._stop()
        self.position = position

    def _stop(self) -> None:
        if not self.is_held and self.position > 0.0:
            self.pace /= 2.0
        self.unheld, self.is_held = 0.0, True


# The model that is left ---------------------------------------------------------------------------------------------


def fewest_units(
    pruner: Pruner, share_left: Callable[[Sequence[Tensor]], float], goal: float
) -> tuple[int, float] | None:
    """Find by bisection how few units have to go, of which the pruner chooses the lowest scores, and aim it at them.

    Args:
        pruner: The pruner, without feedback.
        share_left: What is left, in [0, 1], of masks of the fields' units; of more zeros less is left.
        goal: How much may be left.

    Returns:
        How many units are to go and what they leave; ``None`` if nothing reaches the goal, one unit of each field kept.

    Example::

        >>> from lightning_compress.modules import select_parameters
        >>> from lightning_compress.pruning.granularity import Granularity, element_fields
        >>> from lightning_compress.pruning.importance import CRITERIA
        >>> from lightning_compress.pruning.pruner import Group
        >>> targets = select_parameters(nn.Sequential(nn.Linear(4, 2)))
        >>> fields, _ = element_fields(Granularity.parse("weight"), targets)
        >>> pruner = Pruner(targets, fields, [Group(0.0, [0])], CRITERIA["magnitude"], "global")
        >>> pruner.start()
        >>> fewest_units(pruner, lambda kept: kept[0].float().mean().item(), 0.3)  # 0.3 of 8 are 2.4
        (6, 0.25)
    """
    shares: dict[int, float] = {}

    def fits(count: int) -> bool:
        pruner.aim(count / pruner.total)
        shares[count] = share_left(pruner.preview())
        return shares[count] <= goal

    low, high = round(pruner.sparsity * pruner.total), pruner.total
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    pruner.aim(high / pruner.total)
    return high, shares[high]


class Removal:
    """Tells what is left of a model's size, work or time once units are cut out, by cutting them out of a copy.

    Args:
        module: The model, which is left as it is. Sharded parameters are gathered: all processes make one then.
        called: The name of the child whose forward takes the inputs, ``""`` for the module itself.
        inputs: What the forward takes.
        groups: The groups of channels or heads.
        measure: ``"size"``: the bytes of the tensors in the ``state_dict``, shared ones once; ``"macs"``: the
            multiply-adds of a forward (see :func:`~lightning_compress.pruning.removal.profile`); ``"latency"``: the
            median time of a forward at batch 1, in eval mode, in float32 where the model is in half precision, on the
            model's device.

    Raises:
        ValueError: For latency, if the inputs cannot be cut to one row.

    Example::

        >>> from lightning_compress.pruning.removal import channel_groups
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups, _ = channel_groups(net, torch.randn(3, 4))
        >>> removal = Removal(net, "", ExampleInputs((torch.randn(3, 4),)), groups, "macs")
        >>> removal.share([torch.arange(8) < 2])  # 2 of 8 neurons stay
        0.25
    """

    def __init__(
        self, module: nn.Module, called: str, inputs: ExampleInputs, groups: Sequence[ChannelGroup], measure: str
    ) -> None:
        self._model, self._called, self._groups, self._measure = _copy(module), called, list(groups), measure
        self._inputs = inputs
        if measure == "latency":
            self._whole_model = _copy(module)
            self._inputs = _one_row(inputs, self._model, type(module).__name__)
        else:
            with suppress(ValueError):  # of inputs that have no rows; the ratio is the same for all of them
                self._inputs = inputs.resized(min(inputs.batch, 2))
            self._whole = self._value()

    @torch.no_grad()
    def share(self, kept: Sequence[Tensor]) -> float:
        """Return what is left, as a share of the whole model's.

        Args:
            kept: For each group a mask of its units, True for those that stay; one for all blocks of a group.
        """
        gone = {group: (~mask).cpu().repeat(group.blocks) for group, mask in zip(self._groups, kept, strict=True)}
        undo = cut(self._model, gone)
        try:
            return self._share_of_time() if self._measure == "latency" else self._value() / self._whole
        finally:
            undo()

    def _value(self) -> int:
        if self._measure == "size":
            tensors = [value for value in self._model.state_dict().values() if isinstance(value, Tensor)]
            return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
        part = self._model.get_submodule(self._called)
        return profile(part, self._inputs.for_forward(part)).multiply_adds

    def _share_of_time(self) -> float:
        """Return the median of ratios: what else the machine does in a turn slows both models down."""
        both = [model.get_submodule(self._called) for model in (self._model, self._whole_model)]
        ratios = []
        for _ in range(_TURNS):
            smaller, whole = (median_latency(model, self._inputs, budget=_TURN).seconds for model in both)
            ratios.append(smaller / whole)
        return statistics.median(ratios)


def _one_row(inputs: ExampleInputs, model: nn.Module, name: str) -> ExampleInputs:
    """Return the first row of the inputs, on the device of a model in float32."""
    try:
        row = inputs.resized(1)
    except ValueError as error:
        raise ValueError(
            f"`target_latency` is measured at batch 1, but {error}. Set `example_input_array` in {name}, or give "
            f"`target_macs`."
        ) from None
    row = row.map(lambda tensor: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor)
    return row.to(next(model.parameters()).device)
