"""Parameters of which each process holds a piece: DTensors (FSDP2), and flat parameters that are split (FSDP1).

A :class:`Piece` says where in a parameter this process's entries lie; all else follows from that, for both alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

# --- what lies where --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Where in a parameter the entries lie that this process holds.

    Args:
        shape: The shape of the whole parameter.
        dim: The dimension along which it is split, ``None`` where it was flattened first.
        bounds: Where, along it, the piece of each process begins; and where the last one ends.
        rank: The number of this process.
        group: The processes; ``None`` to try a split within one process.

    Example::

        >>> piece = Piece((2, 3), None, (0, 4, 6), 1)
        >>> whole = torch.arange(6).reshape(2, 3)
        >>> piece.take(whole).tolist(), replace(piece, dim=1, bounds=(0, 2, 3)).take(whole).tolist()
        ([4, 5], [[2], [5]])
    """

    shape: tuple[int, ...]
    dim: int | None
    bounds: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None

    @property
    def start(self) -> int:
        """Where the piece begins."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.bounds[self.rank + 1]

    @property
    def numel(self) -> int:
        """How many entries the whole parameter has."""
        return torch.Size(self.shape).numel()

    def take(self, whole: Tensor) -> Tensor:
        """Return the piece of a tensor of the whole shape, which may be expanded."""
        if self.dim is not None:
            return whole.narrow(self.dim, self.start, self.stop - self.start).contiguous()
        first, last = self._rows
        entries = whole.narrow(0, first, last - first).reshape(-1)
        begin = self.start - first * self._row
        return entries[begin : begin + self.stop - self.start].clone()

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole of which each process gives its piece."""
        before, length, after = self._view
        whole = part.new_zeros((before, length, after))
        whole[:, self.start : self.stop] = part.reshape(before, -1, after)
        return _joined(whole, self.group).reshape(self.shape)

    def aligned(self, spans: Mapping[int, int]) -> Piece:
        """Return the piece of whole rows, where each `spans[dim]` consecutive ones along a dimension stay together.

        The process that holds the first entry of them gets all.

        Example::

            >>> Piece((4, 3), None, (0, 4, 12), 0).aligned({0: 2})
            Piece(shape=(4, 3), dim=0, bounds=(0, 2, 4), rank=0, group=None)
        """
        dim = self.dim or 0
        span = spans.get(dim, 1)
        step = span * (self._row if self.dim is None else 1)
        return replace(self, dim=dim, bounds=tuple(-(-bound // step) * span for bound in self.bounds))

    def recut(self, part: Tensor, to: Piece) -> Tensor:
        """Return this process's piece in another split of the parameter; only what changes hands is sent."""
        is_flat = self.dim is None or to.dim is None
        before, length, after = (1, self.numel, 1) if is_flat else self._view
        bounds, others = self._scaled(length), to._scaled(length)
        if bounds == others:
            return part.reshape(to._local_shape)
        part, start = part.reshape(before, bounds[self.rank + 1] - bounds[self.rank], after), bounds[self.rank]
        out = part.new_zeros((before, others[to.rank + 1] - others[to.rank], after))
        _overlay(out, others[to.rank], part, start)
        sections = _sections(bounds, others)
        sizes = [high - low for low, high in sections]
        sent = part.new_zeros((before, sum(sizes), after))
        for (low, _), section in zip(sections, sent.split(sizes, 1), strict=True):
            _overlay(section, low, part, start)
        for (low, _), section in zip(sections, _joined(sent, self.group).split(sizes, 1), strict=True):
            _overlay(out, others[to.rank], section, low)
        return out.reshape(to._local_shape)

    def sum_along(self, part: Tensor, dim: int) -> Tensor:
        """Return, for each position along a dimension of the whole, the sum over the entries of the piece."""
        split, first = self.dim or 0, self.start
        if self.dim is None:  # the rows that it touches, filled up with zeros
            first, last = self._rows
            rows = part.new_zeros((last - first) * self._row)
            begin = self.start - first * self._row
            rows[begin : begin + part.numel()] = part
            part = rows.reshape(last - first, *self.shape[1:])
        sums = part.movedim(dim, 0).flatten(1).sum(1) if part.dim() > 1 else part
        if dim != split:
            return sums
        out = sums.new_zeros(self.shape[dim])
        out[first : first + len(sums)] = sums
        return out

    @property
    def _row(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    @property
    def _rows(self) -> tuple[int, int]:
        return self.start // self._row, -(-self.stop // self._row)

    @property
    def _view(self) -> tuple[int, int, int]:
        """The whole as a box whose second dimension is split."""
        if self.dim is None:
            return 1, self.numel, 1
        lengths = [torch.Size(part).numel() for part in (self.shape[: self.dim], self.shape[self.dim + 1 :])]
        return lengths[0], self.shape[self.dim], lengths[1]

    @property
    def _local_shape(self) -> tuple[int, ...]:
        count = self.stop - self.start
        return (count,) if self.dim is None else (*self.shape[: self.dim], count, *self.shape[self.dim + 1 :])

    def _scaled(self, length: int) -> list[int]:
        return [bound * (length // self._view[1]) for bound in self.bounds]


def _sections(bounds: Sequence[int], others: Sequence[int]) -> list[tuple[int, int]]:
    """Return what lies between the cuts of one split and those of another, in order.

    Example::

        >>> _sections([0, 3, 5, 9], [0, 4, 8, 9])
        [(3, 4), (5, 8)]
    """
    sections: list[tuple[int, int]] = []
    for low, high in sorted((min(pair), max(pair)) for pair in zip(bounds, others, strict=True)):
        low = max(low, sections[-1][1]) if sections else low
        if low < high:
            sections.append((low, high))
    return sections


def _overlay(out: Tensor, out_start: int, part: Tensor, start: int) -> None:
    """Copy what two stretches of the second dimension have in common."""
    low, high = max(out_start, start), min(out_start + out.shape[1], start + part.shape[1])
    if low < high:
        out[:, low - out_start : high - out_start] = part[:, low - start : high - start]


def locate(named: Sequence[tuple[str, nn.Parameter]], root: nn.Module | None = None) -> list[Piece | None]:
    """Return which piece of each parameter this process holds, ``None`` where it holds all of them.

    Args:
        named: Parameters and their names.
        root: The module that ``FullyShardedDataParallel`` has wrapped, or any that holds such.

    Raises:
        ValueError: If they are split in unlike ways, by name: what one process decides must count once.
    """
    flat = _flat_places(root)
    splits = [_split(name, parameter, flat.get(id(parameter))) for name, parameter in named]
    groups = [None if split is None else split.group for split in splits]
    for (name, _), group in zip(named, groups, strict=True):
        if group is not groups[0]:
            raise ValueError(
                f"'{named[0][0]}' and '{name}' are sharded over other processes than each other. "
                f"Shard all pruned parameters alike (`fully_shard` of the whole module does), or add one to `exclude`."
            )
    if not groups or groups[0] is None:
        return [None] * len(named)
    sizes = table([_known(split).size for split in splits], groups[0]).long().T.tolist()
    pieces: list[Piece | None] = []
    for (name, _), split, own in zip(named, splits, sizes, strict=True):
        split = _known(split)
        piece = Piece(split.shape, split.dim, (0, *accumulate(own)), groups[0].rank(), split.group)
        if piece.bounds[-1] != piece._view[1] or split.start not in (None, piece.start):
            raise ValueError(f"'{name}' of shape {split.shape} is split over its processes in an unknown way, {own}.")
        pieces.append(piece)
    return pieces


@dataclass(frozen=True)
class _Split:
    """How one process sees that a parameter is split."""

    shape: tuple[int, ...]
    dim: int | None
    size: int
    group: dist.ProcessGroup
    start: int | None = None


def _split(name: str, parameter: nn.Parameter, flat: _Split | None) -> _Split | None:
    if flat is not None or not isinstance(parameter, DTensor):
        return flat
    sharded = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if not sharded:
        return None
    placement = parameter.placements[sharded[0]]
    if len(sharded) > 1 or not isinstance(placement, Shard):
        raise ValueError(f"'{name}' is placed as {parameter.placements}: one sharded dimension can be pruned.")
    dim = placement.dim % parameter.dim()
    size = parameter.to_local().shape[dim]
    return _Split(tuple(parameter.shape), dim, size, parameter.device_mesh.get_group(sharded[0]))


def _flat_places(root: nn.Module | None) -> dict[int, _Split]:
    """Return where the original parameters lie in FSDP1's flat ones, by their ids."""
    places = {}
    for handle in _handles(root):
        if not handle.uses_sharded_strategy:
            continue
        flat, group = handle.flat_param, handle.process_group
        for parameter, info, shape, contiguous, name in zip(
            flat._params, flat._shard_param_infos, flat._shapes, flat._contiguities, flat._fqns, strict=True
        ):
            if not contiguous:
                raise ValueError(
                    f"'{name}' was not contiguous (channels_last) when `FullyShardedDataParallel` flattened it. "
                    f"Make it so before, or use ModelParallelStrategy with `fully_shard` (FSDP2)."
                )
            size, start = (info.numel_in_shard, info.intra_param_start_idx) if info.in_shard else (0, None)
            places[id(parameter)] = _Split(tuple(shape), None, size, group, start)
    return places


def _handles(root: nn.Module | None) -> Iterator[Any]:
    """Yield what FSDP1 knows of each of its flat parameters; torch has no public way to ask."""
    for module in root.modules() if root is not None else ():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            if not handle._use_orig_params:
                raise ValueError(
                    "FullyShardedDataParallel(use_orig_params=False) hides the parameters, so that none of them can be "
                    "pruned: leave `use_orig_params` at True."
                )
            yield handle


def _known(split: _Split | None) -> _Split:
    assert split is not None
    return split


# --- modules ----------------------------------------------------------------------------------------------------------


def reshard(root: nn.Module) -> None:
    """Have ``fully_shard`` put every parameter back into its parts: after a forward pass some still lie there whole."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_shapes(root: nn.Module | None) -> Iterator[None]:
    """Let modules show parameters of their whole shapes, without data, where FSDP1 has flattened them."""
    shown: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for handle in _handles(root):
            flat, stand_ins = handle.flat_param, {}
            for parameter, shape in zip(flat._params, flat._shapes, strict=True):
                stand_ins[id(parameter)] = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
            for attribute, module, *_ in (*flat._param_infos, *flat._shared_param_infos):
                parameter = module._parameters[attribute]
                if id(parameter) in stand_ins:
                    shown.append((module, attribute, parameter))
                    module._parameters[attribute] = stand_ins[id(parameter)]
        yield
    finally:
        for module, attribute, parameter in shown:
            module._parameters[attribute] = parameter


@contextmanager
def original_classes(root: nn.Module) -> Iterator[None]:
    """Give modules the classes that they had before ``fully_shard``, which cannot be copied."""
    sharded = [(module, type(module)) for module in root.modules() if isinstance(module, FSDPModule)]
    try:
        for module, kind in sharded:
            module.__class__ = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
        yield
    finally:
        for module, kind in sharded:
            module.__class__ = kind


# --- tensors ----------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total(counts: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Return the sum of counts over a group of processes."""
    if group is None:
        return list(counts)
    numbers = torch.tensor(list(counts), dtype=torch.int64, device=_device(group))
    dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def table(values: Iterable[float], group: dist.ProcessGroup | None) -> Tensor:
    """Return what each process gave, one row for each, in float64."""
    row = torch.tensor(list(values), dtype=torch.float64)
    if group is None:
        return row[None]
    rows = torch.zeros(group.size(), len(row), dtype=torch.float64, device=_device(group))
    rows[group.rank()] = row.to(rows.device)
    dist.all_reduce(rows, group=group)
    return rows.cpu()


def add_up(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of the processes' vectors, in the order of the processes: each gets the same to the last bit."""
    if group is None:
        return part
    rows = part.new_zeros((group.size(), *part.shape))
    rows[group.rank()] = part
    return _joined(rows, group).sum(0)


def holds_the_largest(value: float, group: dist.ProcessGroup | None) -> bool:
    """Return whether this process holds the largest value; the first one where several do."""
    return group is None or int(table([value], group)[:, 0].argmax()) == group.rank()


def _joined(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Join tensors of which each entry is zero on all processes but one: their bytes add up."""
    if group is None or not tensor.numel():
        return tensor
    joined = tensor.to(_device(group, tensor.device)).contiguous()
    dist.all_reduce(joined.view(-1).view(torch.uint8), group=group)
    return joined.to(tensor.device)


def _device(group: dist.ProcessGroup, own: torch.device | None = None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return own if own is not None and own.type == "cuda" else torch.device("cuda")
    return torch.device("cpu") if own is None else own
