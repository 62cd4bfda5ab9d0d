"""What is pruned: single weights, N:M patterns, blocks, channels or heads.

A field is a set of units that can be pruned one by one. It sums the scores of weights up to scores of units, and
spreads a mask of units out to masks of the parameters. Where each process holds a piece of a parameter, what goes into
a field and comes out of it are those pieces, and its units are a piece of all units, or the same on all processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_compress.modules import Target
from lightning_compress.pruning import sharding
from lightning_compress.pruning.masks import initial_mask
from lightning_compress.pruning.sharding import Piece

if TYPE_CHECKING:
    from lightning_compress.pruning.coupling import ChannelGroup

_PATTERN = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")
_BLOCK = re.compile(r"block:([1-9][0-9]*)x([1-9][0-9]*)")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Granularity:
    """A granularity as it was read: its kind, and two numbers where it has them (N and M, or rows and columns)."""

    kind: str
    first: int = 1
    second: int = 1

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Read ``"weight"``, ``"2:4"``, ``"block:4x1"``, ``"channel"`` or ``"head"``.

        Example::

            >>> Granularity.parse("2:4")
            Granularity(kind='pattern', first=2, second=4)

        Raises:
            ValueError: If it is none of these, or if N is not below M.
        """
        if text in ("weight", "channel", "head"):
            return cls(text)
        if match := _BLOCK.fullmatch(str(text)):
            return cls("block", int(match[1]), int(match[2]))
        if (match := _PATTERN.fullmatch(str(text))) and int(match[1]) < int(match[2]):
            return cls("pattern", int(match[1]), int(match[2]))
        raise ValueError(
            f"`granularity` must be 'weight', N:M with N < M such as '2:4' (N of each M weights are kept), "
            f"'block:RxC' such as 'block:4x1', 'channel' or 'head', got {text!r}."
        )

    @property
    def is_structured(self) -> bool:
        """Whether whole channels or heads go, and can be cut out of the model."""
        return self.kind in ("channel", "head")

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself sets, ``None`` where it is free."""
        return 1.0 - self.first / self.second if self.kind == "pattern" else None


class Field:
    """Single weights: every entry of one parameter is a unit.

    Args:
        name: The field's name.
        members: The positions, among all targets, of the parameters that it covers.
        shape: The shape of its units, all of them.
    """

    is_single = True
    """Whether a unit is one weight, and candidates are all that is left."""

    def __init__(self, name: str, members: Sequence[int], shape: Sequence[int]) -> None:
        self.name, self.members, self.shape = name, list(members), tuple(shape)
        self.scored = self.members
        self.piece: Piece | None = None  # which of the units this process holds; None: all

    def split(self, pieces: Mapping[int, Piece]) -> None:
        """Take note of which piece of each member this process holds; of the others, all."""
        self.piece = pieces.get(self.members[0])

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return the scores of units from those of the members' entries."""
        return scores[self.members[0]]

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return for each member the mask of its entries."""
        return {self.members[0]: mask}

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask with which pruning starts: what an already sparse model has lost stays so."""
        return initial_mask(weights[self.members[0]], None if self.piece is None else self.piece.group)

    def candidates(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Return which of the kept units may go, True for those."""
        return mask

    @property
    def size(self) -> int:
        """How many units there are."""
        return torch.Size(self.shape).numel()


class _JoinedField(Field):
    """Units that need several entries of one parameter. None is cut in two by the split over processes."""

    is_single = False

    def __init__(self, name: str, member: int, shape: Sequence[int], spans: Mapping[int, int]) -> None:
        super().__init__(name, [member], shape)
        self._spans = spans  # how many entries along a dimension stay together
        self._held: Piece | None = None
        self._aligned: Piece | None = None

    def split(self, pieces: Mapping[int, Piece]) -> None:
        """Take note of which piece of the member this process holds."""
        self._held = self._aligned = self.piece = pieces.get(self.members[0])
        if self._held is not None:
            self._aligned = self._held.aligned(self._spans)
            self.piece = self._piece_of_units(self._aligned)

    def _piece_of_units(self, aligned: Piece) -> Piece:
        return aligned

    def _take(self, entries: Tensor) -> Tensor:
        if self._held is None or self._aligned is None:
            return entries
        return self._held.recut(entries, self._aligned)

    def _give(self, entries: Tensor) -> Tensor:
        if self._held is None or self._aligned is None:
            return entries
        return self._aligned.recut(entries, self._held)


class PatternField(_JoinedField):
    """N:M: along the input dimension, at most M − N of each M consecutive weights go."""

    def __init__(self, name: str, member: int, shape: Sequence[int], dim: int, keep: int, of: int) -> None:
        super().__init__(name, member, shape, {dim: of})
        self.dim, self.drop, self.of = dim, of - keep, of

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return the scores themselves."""
        return self._take(scores[self.members[0]])

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return the mask itself."""
        return {self.members[0]: self._give(mask)}

    def candidates(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Return the lowest of each M that may still go; ties are taken in order."""
        kept = self._groups(mask)
        ranked = self._groups(scores).to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
        order = ranked.masked_fill(~kept, -torch.inf).argsort(dim=1, stable=True)
        may_go = torch.zeros_like(kept).scatter_(1, order[:, : self.drop], True) & kept
        return self._ungroup(may_go, mask)

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask of the zeros that are there, at most M − N in each M."""
        mask = self._take(super().initial(weights))
        pruned = ~self._groups(mask)
        return self._ungroup(~(pruned & (pruned.cumsum(1) <= self.drop)), mask)

    def _groups(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, -1).reshape(-1, self.of)

    def _ungroup(self, groups: Tensor, like: Tensor) -> Tensor:
        return groups.reshape(like.movedim(self.dim, -1).shape).movedim(-1, self.dim).contiguous()


class BlockField(_JoinedField):
    """Blocks of R output rows by C inputs, at each place of a kernel; the scores in a block are summed."""

    def __init__(self, name: str, member: int, shape: Sequence[int], rows: int, columns: int) -> None:
        super().__init__(name, member, (shape[0] // rows, shape[1] // columns, *shape[2:]), {0: rows, 1: columns})
        self.rows, self.columns = rows, columns

    def _piece_of_units(self, aligned: Piece) -> Piece:
        span = self._spans.get(aligned.dim or 0, 1)
        return replace(aligned, shape=self.shape, bounds=tuple(bound // span for bound in aligned.bounds))

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return the sum over each block."""
        score = self._take(scores[self.members[0]])
        rows, columns, *kernel = score.shape
        blocks = (rows // self.rows, self.rows, columns // self.columns, self.columns)
        return score.reshape(*blocks, *kernel).sum((1, 3))

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return the mask of entries: each block's bit at all of its places."""
        return {self.members[0]: self._give(mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1))}

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask of the blocks that are zero throughout."""
        entries = super().initial(weights)
        return self.reduce({self.members[0]: entries.to(torch.float32)}) > 0


class ChannelField(Field):
    """Channels or heads: a unit is all that makes one, in every parameter that is coupled to it.

    Where several query heads share a key and value head, a unit is one query head of each. Every process holds all
    units: their scores are few, and summed over the pieces.
    """

    is_single = False

    def __init__(self, group: ChannelGroup, members: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
        every = sorted({members[part.name] for part in group.outputs})
        super().__init__(group.name, every, (group.units // group.blocks,))
        self.scored = sorted({members[part.name] for part in group.outputs if part.scored})
        self._parts = [
            (members[part.name], part.dim, _across(part.index, group.blocks), part.scored) for part in group.outputs
        ]
        self._shapes = {members[part.name]: tuple(shapes[part.name]) for part in group.outputs}
        self._pieces: Mapping[int, Piece] = {}

    def split(self, pieces: Mapping[int, Piece]) -> None:
        """Take note of which piece of each member this process holds."""
        self._pieces = {member: pieces[member] for member in self.members if member in pieces}

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return for each unit the sum over its weights; biases and norms do not count."""
        return self._sums(scores, [part for part in self._parts if part[3]])

    def _sums(self, entries: Mapping[int, Tensor], parts: Sequence[tuple[int, int, Tensor, bool]]) -> Tensor:
        rows = [self._rows(entries[member], member, dim) for member, dim, *_ in parts]
        if self._pieces:
            sizes, group = [len(part) for part in rows], next(iter(self._pieces.values())).group
            rows = list(sharding.add_up(torch.cat(rows), group).split(sizes))
        return torch.stack(
            [row[index.to(row.device)].sum(1) for row, (_, _, index, _) in zip(rows, parts, strict=True)]
        ).sum(0)

    def _rows(self, entries: Tensor, member: int, dim: int) -> Tensor:
        """Return the sum over each row of a parameter, as far as this process holds it."""
        if member in self._pieces:
            return self._pieces[member].sum_along(entries, dim)
        return entries.movedim(dim, 0).reshape(entries.shape[dim], -1).sum(1)

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return the masks of the parameters; what a parameter has outside of the units is kept."""
        out: dict[int, Tensor] = {}
        for member, dim, index, _ in self._parts:
            shape = self._shapes[member]
            rows = torch.ones(shape[dim], dtype=torch.bool, device=mask.device)
            rows[index.to(mask.device)[~mask].reshape(-1)] = False
            entries = rows.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
            if member in self._pieces:
                entries = self._pieces[member].take(entries)
            out[member] = out[member] & entries if member in out else entries.contiguous()
        return out

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask of the units of which something is left."""
        return self._sums({i: (weights[i] != 0).to(torch.float32) for i in self.members}, self._parts) > 0


def _across(index: Tensor, blocks: int) -> Tensor:
    """Return the places of units of which each takes one of every block.

    Example::

        >>> _across(torch.tensor([[0], [1], [2], [3]]), 2).tolist()
        [[0, 2], [1, 3]]
    """
    width = index.shape[1]
    return index.reshape(blocks, -1, width).transpose(0, 1).reshape(-1, blocks * width)


def element_fields(granularity: Granularity, targets: Sequence[Target]) -> tuple[list[Field], dict[str, str]]:
    """Return a field for each target that can carry the granularity, and why each of the others cannot.

    Example::

        >>> from lightning_compress.modules import select_parameters
        >>> targets = select_parameters(nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 8)))
        >>> fields, skipped = element_fields(Granularity.parse("2:4"), targets)
        >>> [field.name for field in fields], skipped
        (['1.weight'], {'0.weight': 'its 10 inputs do not divide by 4'})
    """
    fields: list[Field] = []
    skipped: dict[str, str] = {}
    for i, target in enumerate(targets):
        shape, name = tuple(target.parameter.shape), target.name
        first, second = granularity.first, granularity.second
        if granularity.kind == "weight":
            fields.append(Field(name, [i], shape))
        elif len(shape) < 2:
            skipped[name] = "it is a vector"
        elif granularity.kind == "pattern":
            dim = 0 if isinstance(target.module, _TRANSPOSED) else 1
            if shape[dim] % second:
                skipped[name] = f"its {shape[dim]} inputs do not divide by {second}"
            else:
                fields.append(PatternField(name, i, shape, dim, first, second))
        elif shape[0] % first or shape[1] % second:
            skipped[name] = f"its shape {shape} does not divide into blocks of {first}x{second}"
        else:
            fields.append(BlockField(name, i, shape, first, second))
    return fields, skipped
