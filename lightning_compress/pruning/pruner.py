"""Gradual pruning without a Trainer: which units of which parameters are pruned, and the way there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.modules import Target
from lightning_compress.pruning import masks as masking
from lightning_compress.pruning import sharding
from lightning_compress.pruning.activations import input_norm
from lightning_compress.pruning.allocation import SCOPES, Share
from lightning_compress.pruning.granularity import Field
from lightning_compress.pruning.importance import Criterion
from lightning_compress.pruning.topk import select_smallest

_FEW = 2**20  # up to so many weights, masks of four bytes a weight may save time at every step


@dataclass
class Group:
    """Fields that share a final sparsity, by their positions."""

    sparsity: float
    members: list[int]


@dataclass
class _Path:
    """The way of one share from the units that are pruned at the start to those that are pruned at the end."""

    fields: list[int]
    size: int
    first: int  # pruned at the start, as it was asked for
    final: int
    start: int = 0  # and as it was found: an already sparse model brings more

    def count(self, done: float) -> int:
        """Return how many units are pruned when the share `done` of the way is behind."""
        return self.start + int((self.final - self.start) * done + 0.5)


class Pruner:
    """Holds the masks of parameters and moves them from their first sparsity to their last.

    Weights stay where they are: a pruned weight is a zero in the module's own parameter.

    Args:
        targets: The parameters.
        fields: The units that can be pruned in them.
        groups: Which fields get which final sparsity.
        criterion: How weights are scored.
        scope: ``"global"``, ``"layer"`` or ``"erk"``: how a group's sparsity is spread over its fields.
        initial_sparsity: The sparsity at the start of the ramp.
        seed: Of the random numbers that a criterion may ask for.
        feedback: Whether pruned weights go on learning until :meth:`settle`: the optimizer moves a copy of them, which
            every update ranks afresh together with the weights (Lin et al. 2020, arXiv 2006.07253).

    Attributes:
        root: The module that ``FullyShardedDataParallel`` (FSDP1) wraps, to be set before the start; DTensors (FSDP2)
            speak for themselves. Every process then holds the masks of its own pieces, and all of them must make the
            same calls.

    Example::

        >>> from lightning_compress.modules import select_parameters
        >>> from lightning_compress.pruning.granularity import Granularity, element_fields
        >>> from lightning_compress.pruning.importance import CRITERIA
        >>> layer = nn.Sequential(nn.Linear(4, 1))
        >>> _ = layer[0].weight.data.copy_(torch.tensor([[3.0, 1.0, -2.0, 4.0]]))
        >>> targets = select_parameters(layer)
        >>> fields, _ = element_fields(Granularity.parse("weight"), targets)
        >>> pruner = Pruner(targets, fields, [Group(0.5, [0])], CRITERIA["magnitude"], "global")
        >>> pruner.start()
        >>> pruner.update(1.0)
        True
        >>> layer[0].weight.tolist(), pruner.sparsity
        ([[3.0, 0.0, 0.0, 4.0]], 0.5)
    """

    def __init__(
        self,
        targets: Sequence[Target],
        fields: Sequence[Field],
        groups: Sequence[Group],
        criterion: Criterion,
        scope: str,
        initial_sparsity: float = 0.0,
        seed: int = 0,
        feedback: bool = False,
    ) -> None:
        self.targets, self.fields, self.seed = list(targets), list(fields), seed
        self.masks: list[Tensor] = []  # of the targets' entries
        self._enforced: list[tuple[int, Tensor]] = []  # targets with zeros, and their masks in the form for every step
        self._cleared: list[tuple[int, Tensor]] = []  # the same for gradients
        self.surplus = 0
        self.rescued: set[str] = set()
        self.without_signal: set[str] = set()
        self._criterion = criterion
        self._units: list[Tensor] = []  # masks of the fields' units; for single weights these are the targets' masks
        self._feedback = feedback
        self._initial: list[Tensor] | None = None  # those at the start, as long as all that was pruned since may return
        self._initially_pruned: list[int] = []
        self._copies: list[Tensor] = []  # for each target the values of pruned weights that learn, zero elsewhere
        self._copied: list[tuple[int, Tensor]] = []  # where they are
        self._dense: list[int] = []  # targets into which their copies are put back now
        self.root: nn.Module | None = None
        self._pieces: dict[int, sharding.Piece] = {}  # what this process holds of sharded parameters
        self._held: dict[int, nn.Parameter] = {}  # those parameters
        self._group: dist.ProcessGroup | None = None  # the processes that share them
        self._unit_group: dist.ProcessGroup | None = None  # those that share the fields' units
        self._grown: list[Tensor] | None = None
        self._signals: list[Tensor | None] = [None] * len(self.targets)
        self._updates = 0
        self._pruned = [0] * len(self.fields)
        self._pruned_entries = [0] * len(self.targets)
        self._paths: list[_Path] = []
        self._scope, self._groups = scope, list(groups)
        for group in groups:
            for begin, end in zip(
                self._shares(group, initial_sparsity), self._shares(group, group.sparsity), strict=True
            ):
                path = _Path([group.members[i] for i in end.members], end.size, begin.count, end.count)
                self._refuse_empty(path)
                self._paths.append(path)

    def _shares(self, group: Group, sparsity: float) -> list[Share]:
        return SCOPES[self._scope]([self.fields[i].shape for i in group.members], sparsity)

    def _refuse_empty(self, path: _Path) -> None:
        kept = path.size - path.final
        if kept < len(path.fields):
            names = ", ".join(f"'{self.fields[i].name}'" for i in path.fields[:3])
            raise ValueError(
                f"`final_sparsity` would leave {kept} of the {path.size} weights or units of "
                f"{names}{' …' * (len(path.fields) > 3)}: fewer than one for each layer. "
                f"Lower it, or add them to `exclude`."
            )

    # --- what is pruned ---------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """How many units there are: weights, blocks, channels or heads."""
        return sum(path.size for path in self._paths)

    @property
    def sparsity(self) -> float:
        """The share of the units that is pruned now."""
        return sum(self._pruned) / self.total

    @property
    def final_sparsity(self) -> float:
        """The share of the units that will be pruned at the end."""
        return sum(path.final for path in self._paths) / self.total

    @property
    def ratio(self) -> float:
        """The density at the end of the way over that at its start."""
        kept = self.total - sum(path.start for path in self._paths)
        return (self.total - sum(path.final for path in self._paths)) / kept

    @property
    def stage(self) -> float:
        """How much of the way is done, from 0 to 1."""
        way = sum(path.final - path.start for path in self._paths)
        done = sum(self._pruned) - sum(path.start for path in self._paths)
        return 1.0 if way <= 0 else min(max(done / way, 0.0), 1.0)

    def pruned(self) -> dict[str, tuple[int, int]]:
        """Return for each parameter how many of its entries are pruned, and how many it has."""
        return {
            target.name: (count, self._shape(i).numel())
            for i, (target, count) in enumerate(zip(self.targets, self._pruned_entries, strict=True))
        }

    # --- the way ------------------------------------------------------------------------------------------------------

    def aim(self, sparsity: float) -> None:
        """Set another final sparsity, in [0, 1], for all fields; one unit of each stays, and the way leads up only."""
        last = [share for group in self._groups for share in self._shares(group, sparsity)]
        for path, share in zip(self._paths, last, strict=True):
            path.final = max(min(share.count, path.size - len(path.fields)), path.start)

    @torch.no_grad()
    def preview(self) -> list[Tensor]:
        """Return the masks that the fields' units would have if an update went all of the way now.

        Raises:
            ValueError: If a score is NaN, with the parameter's name.
        """
        units, rescued = list(self._units), set(self.rescued)
        self._share_signals()
        for path in self._paths:
            missing = path.final - sum(self._pruned[i] for i in path.fields)
            kept = [self._units[i] for i in path.fields]
            if missing > 0 and (selected := self._choose(path, kept, missing)) is not None:
                for i, mask, out in zip(path.fields, kept, selected, strict=True):
                    units[i] = mask & ~out
        self.rescued = rescued
        return units

    @torch.no_grad()
    def start(self) -> None:
        """Begin afresh from the weights as they are; the zeros of an already sparse model stay."""
        self._locate()
        self._signals = [None] * len(self.targets)
        self._grown, self._updates, self.surplus = None, 0, 0
        self._initial, self._copies, self._dense = None, [], []
        self.rescued, self.without_signal = set(), set()
        self._units = [field.initial({i: self._weight(i) for i in field.members}) for field in self.fields]
        self._spread()
        for path in self._paths:
            existing = sum(self._pruned[i] for i in path.fields)
            if existing > path.final:
                if self._unit_group is not None:
                    names = ", ".join(self.fields[i].name for i in path.fields)
                    raise ValueError(
                        f"`final_sparsity` asks for {path.final} zeros in {names}, which have {existing} already: "
                        f"with sharded parameters it must not be lower."
                    )
                masking.free_surplus_([self._units[i] for i in path.fields], existing - path.final)
                self.surplus += existing - path.final
            path.start = min(max(path.first, existing), path.final)
        if self._feedback:
            self._initial = [mask.clone() for mask in self._units]
        self._spread()
        self._initially_pruned = self._pruned

    @torch.no_grad()
    def update(self, done: float) -> bool:
        """Prune the lowest scores until the share `done` of the way is behind.

        What is pruned stays so; while pruned weights learn, all but the zeros of the start are ranked afresh.

        Args:
            done: The share of the way, from 0 to 1.

        Returns:
            Whether all that was to go has gone; parameters without a signal keep what they have.

        Raises:
            ValueError: If a score is NaN, with the parameter's name. Nothing is pruned then.
        """
        chosen = []
        self._share_signals()
        if self._initial is not None and not self._copies:
            self._copies = [torch.zeros_like(self._weight(i)) for i in range(len(self.targets))]
            self._spread()
        with self._dense_weights():
            for path in self._paths:
                kept, counts = zip(*map(self._before_update, path.fields), strict=True)
                missing = max(path.count(done), sum(self._pruned[i] for i in path.fields)) - sum(counts)
                if missing > 0 and (selected := self._choose(path, kept, missing)) is not None:
                    chosen.append((path, kept, selected))
            self._updates += 1
            self._grown = None
            if not self._criterion.is_lasting:
                self._signals = [None] * len(self.targets)
            for path, kept, selected in chosen:
                for i, mask, out in zip(path.fields, kept, selected, strict=True):
                    self._units[i] = mask & out.logical_not_()
            if chosen:
                self._spread()
        if chosen:
            self.enforce()
        return all(path.count(done) <= sum(self._pruned[i] for i in path.fields) for path in self._paths)

    def _before_update(self, field: int) -> tuple[Tensor, int]:
        """Return the mask of the units among which an update chooses, and how many are pruned in it."""
        scored = self.fields[field].scored
        has_score = self._criterion.signal in (None, "random") or all(self._signals[i] is not None for i in scored)
        if self._initial is None or not has_score:
            return self._units[field], self._pruned[field]
        return self._initial[field], self._initially_pruned[field]

    def _choose(self, path: _Path, kept: Sequence[Tensor], missing: int) -> list[Tensor] | None:
        """Return which units go, as many as are missing or as there are with a score; ``None`` without any."""
        fields = [self.fields[i] for i in path.fields]
        if self._grown is not None:  # what has only just come back is small, and gets its chance
            kept = [mask & ~self._grown[i] for mask, i in zip(kept, path.fields, strict=True)]
        scores, is_absolute = self._scores(fields)
        # Without a signal there is no score, and such a field is left alone.
        known = [n for n, score in enumerate(scores) if score is not None]
        self.without_signal |= {field.name for field, score in zip(fields, scores, strict=True) if score is None}
        if not known:
            return None
        selected = [torch.zeros_like(mask) for mask in kept]
        candidates = {n: fields[n].candidates(_known(scores[n]), kept[n]) for n in known}

        def select() -> dict[int, Tensor]:
            available = sum(self._count_units(candidates.values()))
            out = select_smallest(
                [_known(scores[n]) for n in known],
                min(missing, available),
                candidates=list(candidates.values()),
                absolute=is_absolute,
                names=[fields[n].name for n in known],
                group=self._unit_group,
            )
            return dict(zip(known, out, strict=True))

        protected: set[int] = set()
        while True:
            found = select()
            counts = self._count_units([*(kept[n] for n in known), *(found[n] for n in known)])
            before_and_gone = zip(known, counts, counts[len(known) :], strict=False)
            emptied = {n for n, before, gone in before_and_gone if 0 < before == gone and n not in protected}
            if not emptied:
                for n in known:
                    selected[n] = found[n]
                return selected
            # A layer without a weight cuts the network: its best one stays, and another layer gives up one instead.
            protected |= emptied
            self.rescued |= {fields[n].name for n in emptied}
            for n in sorted(emptied):
                place, value = _largest(_known(scores[n]), kept[n], is_absolute)
                if sharding.holds_the_largest(value, self._unit_group):
                    candidates[n] = candidates[n].clone()
                    candidates[n][place] = False

    def _scores(self, fields: Sequence[Field]) -> tuple[list[Tensor | None], bool]:
        """Return the scores of units, ``None`` without a signal, and whether their absolute values are meant."""
        is_single = all(field.is_single for field in fields)
        is_absolute = self._criterion.is_absolute and is_single
        scores: list[Tensor | None] = []
        for field in fields:
            own: dict[int, Tensor] = {}
            for i in field.scored:
                signal = self._signal(i)
                if signal is None and self._criterion.signal is not None:
                    continue
                score = self._criterion.score(self._weight(i), signal)
                own[i] = score.abs() if self._criterion.is_absolute and not is_single else score
            scores.append(field.reduce(own) if len(own) == len(field.scored) else None)
        return scores, is_absolute

    def _signal(self, target: int) -> Tensor | None:
        if self._criterion.signal is None:
            return None
        if self._criterion.signal == "gradient":
            return self._signals[target]
        if self._criterion.signal == "activation":
            squares = self._signals[target]
            if squares is None:
                return None
            norms = input_norm(squares, self.targets[target], self._shape(target))
            return self._pieces[target].take(norms.expand(self._shape(target))) if target in self._pieces else norms
        seed = (self.seed * 1_000_003 + self._updates) * 10_007 + target
        numbers = torch.rand(self._shape(target), generator=torch.Generator().manual_seed(seed % 2**63))
        return self._own(target, numbers).to(self._parameter(target).device)

    # --- signals ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather_gradients(self, owned: Collection[int]) -> None:
        """Add what this optimizer step tells to the signals.

        Args:
            owned: The ``id`` of each parameter that the optimizer is about to change.
        """
        gather = self._criterion.gather
        if gather is None:
            return
        with self._dense_weights(self._all_but(owned)):
            for i in sorted({i for field in self.fields for i in field.scored}):
                gradient = self._gradient(i, owned)
                if gradient is None:
                    continue
                told = gather(self._weight(i), gradient)
                previous = self._signals[i]
                self._signals[i] = told.clone() if previous is None else previous.add_(told)

    @torch.no_grad()
    def add_squares(self, squares: Mapping[int, Tensor]) -> None:
        """Add the sums of squares of layers' inputs (see ``InputNorms``), by the target's position."""
        for i, told in squares.items():
            previous = self._signals[i]
            self._signals[i] = told.clone() if previous is None else previous.add_(told)

    def _share_signals(self) -> None:
        """Begin a signal where only other processes have one: without entries of a parameter there is no gradient."""
        if self._group is None or self._criterion.signal != "gradient":
            return
        is_known = sharding.table([signal is not None for signal in self._signals], self._group).any(0).tolist()
        for i, signal in enumerate(self._signals):
            if is_known[i] and signal is None:
                self._signals[i] = torch.zeros_like(self._weight(i))

    @torch.no_grad()
    def regrow(self, share: float, owned: Collection[int]) -> None:
        """Swap each layer's lowest-scoring kept weights for its pruned ones with the largest gradient (RigL).

        ``share · min(kept, pruned)`` weights are swapped; the sparsity stays what it is. A weight that comes back
        starts at zero, and the optimizer step that follows moves it; so none comes back whose gradient is zero. (Evci
        et al. 2020, arXiv 1911.11134.)

        Args:
            share: How many, in [0, 1).
            owned: The ``id`` of each parameter that the optimizer is about to change.
        """
        grown = self._grown or [torch.zeros_like(mask) for mask in self._units]
        self._share_signals()
        gradients = [self._gradient(field.members[0], owned) for field in self.fields]
        has_gradient = sharding.table([slopes is not None for slopes in gradients], self._group).any(0).tolist()
        for i, field in enumerate(self.fields):
            [score], is_absolute = self._scores([field])
            if score is None or not has_gradient[i]:
                continue
            kept, slopes = self._units[i], gradients[i]
            slopes = torch.zeros_like(score) if slopes is None else slopes
            gone = ~kept
            [could] = self._count_units([gone & (slopes != 0)])
            count = min(int(share * min(self._pruned[i], field.size - self._pruned[i])), could)
            if count == 0:
                continue
            names = [field.name]
            [dropped] = select_smallest(
                [score], count, candidates=[kept], absolute=is_absolute, names=names, group=self._group
            )
            stay = self._pruned[i] - count
            [stays] = select_smallest([slopes], stay, candidates=[gone], absolute=True, names=names, group=self._group)
            grown[i] = gone & ~stays
            kept.logical_and_(~dropped).logical_or_(grown[i])
        self._grown = grown
        self._spread()
        self.enforce(but=self._all_but(owned))

    # --- enforcing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def enforce(self, parameters: Sequence[nn.Parameter] | None = None, *, but: Collection[int] = ()) -> None:
        """Set the pruned weights to zero; the values of those that learn go into their copies first.

        Args:
            parameters: Other tensors of the same shapes to act on, in the targets' order; by default their own.
            but: The ``id`` of each of their own that is left alone, for it cannot have changed.
        """
        masks = self._enforced
        if parameters is None and self._dense:
            dense, self._dense = self._dense, []
            weights = [self._weight(i) for i in dense]
            masking.move_pruned_(weights, [self._copies[i] for i in dense], [self._copied[i][1] for i in dense])
            masks = [*(pair for pair in masks if pair[0] not in dense), *self._cleared]  # zeros that never learn
            if not masks:
                return
        due = [(i, mask) for i, mask in masks if not but or id(self._parameter(i)) not in but]
        weights = [self._weight(i) if parameters is None else sharding.local(parameters[i].detach()) for i, _ in due]
        masking.zero_pruned_(weights, [mask for _, mask in due])

    def clear_gradients(self, *, are_learning: bool = True) -> None:
        """Set the gradients of weights that stay pruned to zero, so that no optimizer gathers momentum there.

        Args:
            are_learning: Whether those of weights that learn while they are pruned are left as they are.
        """
        masks = self._cleared if are_learning else self._enforced
        if not masks:
            return
        gradients = [(self._parameter(i).grad, mask) for i, mask in masks]
        pairs = [(sharding.local(g), mask) for g, mask in gradients if g is not None and g.layout == torch.strided]
        masking.zero_pruned_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def put_back(self, but: Collection[int] = ()) -> None:
        """Add the copies of pruned weights to these, for an optimizer to move them, until :meth:`enforce`.

        Args:
            but: The ``id`` of each parameter that the optimizer will not change.
        """
        if not self._copies or self._dense:
            return
        self._dense = [i for i in range(len(self.targets)) if not but or id(self._parameter(i)) not in but]
        if self._dense:
            torch._foreach_add_([self._weight(i) for i in self._dense], [self._copies[i] for i in self._dense])

    @property
    def is_dense(self) -> bool:
        """Whether copies are in the weights now."""
        return bool(self._dense)

    @torch.no_grad()
    def fill(self, averages: Sequence[nn.Parameter]) -> None:
        """Give averages of weights the value of each weight that has just come back: they are zero there."""
        for i, parameter in enumerate(averages):
            average = sharding.local(parameter.detach())
            average.copy_(torch.where(average == 0, self._weight(i).to(average), average))

    @contextmanager
    def _dense_weights(self, but: Collection[int] = ()) -> Iterator[None]:
        self.put_back(but)
        try:
            yield
        finally:
            if self._dense:
                self.enforce(but=but)

    def _all_but(self, owned: Collection[int]) -> set[int]:
        return {id(self._parameter(i)) for i in range(len(self.targets))}.difference(owned)

    def settle(self) -> None:
        """Forget what pruned weights have learnt: from here on they stay zero."""
        if self._initial is not None:
            self._initial, self._copies = None, []
            self._spread()

    def _spread(self) -> None:
        """Derive the masks of entries from those of units, and count both."""
        self.masks = self._entries(self._units)
        self._pruned = self._count_pruned(self._units)
        entries = sharding.total(_count(self.masks), self._group)
        self._pruned_entries = [self._shape(i).numel() - count for i, count in enumerate(entries)]
        self._enforced = self._fast((i, mask) for i, mask in enumerate(self.masks) if self._pruned_entries[i])
        self._cleared, self._copied = self._enforced, []
        if self._initial is not None:
            may_learn = self._entries(self._initial)
            counts = zip(may_learn, _count(may_learn), strict=True)
            self._cleared = self._fast((i, mask) for i, (mask, count) in enumerate(counts) if count < mask.numel())
        if self._copies:
            self._copied = self._fast(enumerate(self._learning()))

    def _entries(self, units: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks of the targets' entries."""
        masks: dict[int, Tensor] = {}
        for field, part in zip(self.fields, units, strict=True):
            for i, mask in field.spread(part).items():
                masks[i] = masks[i] & mask if i in masks else mask
        return [masks[i] for i in range(len(self.targets))]

    def _learning(self) -> list[Tensor]:
        """Return which entries of the targets are pruned and may come back."""
        assert self._initial is not None
        return [may & ~mask for may, mask in zip(self._entries(self._initial), self.masks, strict=True)]

    def _fast(self, masks: Iterable[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """Return masks of targets in the form in which they are applied at every step."""
        if sum(mask.numel() for mask in self.masks) > _FEW:
            return list(masks)
        return [(i, masking.as_bits(mask, self._weight(i).dtype)) for i, mask in masks]

    def _count_pruned(self, units: Sequence[Tensor]) -> list[int]:
        """Return how many units of each field are pruned."""
        return [field.size - count for field, count in zip(self.fields, self._count_units(units), strict=True)]

    def _count_units(self, masks: Iterable[Tensor]) -> list[int]:
        """Return how many units are True in masks, over all processes that share them."""
        return sharding.total(_count(masks), self._unit_group)

    # --- sharded parameters -------------------------------------------------------------------------------------------

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a piece of the parameters."""
        return self._group is not None

    def agree(self, value: bool) -> bool:
        """Return whether something holds on all processes that share the parameters."""
        return bool(sharding.table([value], self._group).all())

    def _locate(self) -> None:
        named = [(target.name, target.parameter) for target in self.targets]
        pieces = {i: piece for i, piece in enumerate(sharding.locate(named, self.root)) if piece is not None}
        # A sharded parameter leaves its module while that computes; the optimizer keeps it, and so do we.
        self._pieces, self._held = pieces, {i: named[i][1] for i in pieces}
        self._group = next((piece.group for piece in pieces.values()), None)
        for field in self.fields:
            field.split(pieces)
        self._unit_group = self._group if any(field.piece is not None for field in self.fields) else None

    def _parameter(self, target: int) -> nn.Parameter:
        return self._held[target] if target in self._held else self.targets[target].parameter

    def _shape(self, target: int) -> torch.Size:
        """Return the shape of a whole parameter."""
        return torch.Size(self._pieces[target].shape) if target in self._pieces else self._parameter(target).shape

    def _weight(self, target: int) -> Tensor:
        return sharding.local(self._parameter(target).detach())

    def _gradient(self, target: int, owned: Collection[int]) -> Tensor | None:
        parameter = self._parameter(target)
        return None if parameter.grad is None or id(parameter) not in owned else sharding.local(_dense(parameter.grad))

    def _own(self, target: int, whole: Tensor) -> Tensor:
        return self._pieces[target].take(whole) if target in self._pieces else whole

    def _whole(self, target: int, part: Tensor) -> Tensor:
        return self._pieces[target].gather(part) if target in self._pieces else part

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return masks as packed bits, signals, the values of pruned weights that learn, and where the way began.

        Tensors and plain Python only.
        """
        if self._dense:  # the optimizer broke off
            self.enforce()
        self._share_signals()
        is_entries = self._criterion.signal == "gradient"
        return {
            "masks": self._packed(self._units),
            "initial": None if self._initial is None else self._packed(self._initial),
            "copies": {
                self.targets[i].name: self._whole(i, self._copies[i])[self._whole(i, learns)]
                for i, learns in enumerate(self._learning() if self._copies else ())
            },
            "grown": None if self._grown is None else self._packed(self._grown),
            "signals": {
                self.targets[i].name: (self._whole(i, signal) if is_entries else signal).clone()
                for i, signal in enumerate(self._signals)
                if signal is not None
            },
            "start": [path.start for path in self._paths],
            "updates": self._updates,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: If the masks are those of other parameters, by name.
        """
        names = [field.name for field in self.fields]
        if list(state["masks"]) != names or len(state["start"]) != len(self._paths):
            odd = sorted(set(state["masks"]).symmetric_difference(names)) or names
            raise ValueError(f"The checkpoint's masks belong to other parameters or another `scope`: {', '.join(odd)}.")
        for field in self.fields:
            if (found := list(state["masks"][field.name]["shape"])) != list(field.shape):
                raise ValueError(f"The checkpoint's mask of '{field.name}' has shape {found}, not {list(field.shape)}.")
        self._locate()
        self._units = self._unpacked(state["masks"])
        self._grown = None if state["grown"] is None else self._unpacked(state["grown"])
        places = {target.name: i for i, target in enumerate(self.targets)}
        self._signals = [None] * len(self.targets)
        for name, signal in state["signals"].items():
            i = places[name]
            signal = self._own(i, signal) if self._criterion.signal == "gradient" else signal
            self._signals[i] = signal.to(self._parameter(i).device, copy=True)
        for path, start in zip(self._paths, state["start"], strict=True):
            path.start = start
        self._updates, self.seed = state["updates"], state["seed"]
        self._dense, self._initial, self._copies = [], None, []
        self._spread()
        if not self._feedback or (state["initial"] is None and self.stage == 1.0):
            return
        # what was pruned before weights learnt, by another setting, stays pruned
        self._initial = self._unpacked(state["masks"] if state["initial"] is None else state["initial"])
        self._initially_pruned = self._count_pruned(self._initial)
        self._copies = [torch.zeros_like(self._weight(places[name])) for name in state["copies"]]
        self._spread()
        for i, learns in enumerate(self._learning() if self._copies else ()):
            copy, values = self._copies[i], state["copies"][self.targets[i].name]
            whole = copy.new_zeros(self._shape(i))
            whole[self._whole(i, learns)] = values.to(whole)
            copy.copy_(self._own(i, whole))

    def _packed(self, masks: Sequence[Tensor]) -> dict[str, Any]:
        out = {}
        for field, part in zip(self.fields, masks, strict=True):
            mask = part if field.piece is None else field.piece.gather(part)
            out[field.name] = {"bits": masking.pack(mask), "shape": list(mask.shape)}
        return out

    def _unpacked(self, packed: Mapping[str, Any]) -> list[Tensor]:
        masks = []
        for field in self.fields:
            weight = self._weight(field.members[0])
            mask = masking.unpack(packed[field.name]["bits"], field.shape)
            part = (mask if field.piece is None else field.piece.take(mask)).to(weight.device)
            if part.shape == weight.shape:  # in the weight's memory format
                part = torch.empty_like(weight, dtype=torch.bool).copy_(part)
            masks.append(part)
        return masks


def _largest(score: Tensor, candidates: Tensor, is_absolute: bool) -> tuple[tuple[Tensor, ...], float]:
    """Return where the largest candidate is, and its score; −∞ where there is none."""
    values = (score.abs() if is_absolute else score).masked_fill(~candidates, -torch.inf)
    if not values.numel():
        return (), -torch.inf
    place = torch.unravel_index(values.argmax(), values.shape)
    return place, float(values[place])


def _count(masks: Iterable[Tensor]) -> list[int]:
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout != torch.strided else tensor
