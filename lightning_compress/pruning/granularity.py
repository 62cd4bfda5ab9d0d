"""What is pruned: single weights, N:M patterns, blocks, channels or heads.

A field is a set of units that can be pruned one by one. It sums the scores of weights up to scores of units, and
spreads a mask of units out to masks of the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_compress.modules import Target
from lightning_compress.pruning.masks import initial_mask

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
        shape: The shape of its units.
    """

    def __init__(self, name: str, members: Sequence[int], shape: Sequence[int]) -> None:
        self.name, self.members, self.shape = name, list(members), tuple(shape)
        self.scored = self.members

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return the scores of units from those of the members' entries; a tensor of the shape :attr:`shape`."""
        return scores[self.members[0]]

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return for each member the mask of its entries."""
        return {self.members[0]: mask}

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask with which pruning starts: what an already sparse model has lost stays so."""
        return initial_mask(weights[self.members[0]])

    def candidates(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Return which of the kept units may go, True for those."""
        return mask

    @property
    def is_entries(self) -> bool:
        """Whether the units are the single entries of one parameter."""
        return type(self).reduce is Field.reduce

    @property
    def size(self) -> int:
        """How many units there are."""
        return torch.Size(self.shape).numel()


class PatternField(Field):
    """N:M: along the input dimension, at most M − N of each M consecutive weights go."""

    def __init__(self, name: str, member: int, shape: Sequence[int], dim: int, keep: int, of: int) -> None:
        super().__init__(name, [member], shape)
        self.dim, self.drop, self.of = dim, of - keep, of

    def candidates(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Return the lowest of each M that may still go; ties are taken in order."""
        kept = self._groups(mask)
        ranked = self._groups(scores).to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
        order = ranked.masked_fill(~kept, -torch.inf).argsort(dim=1, stable=True)
        may_go = torch.zeros_like(kept).scatter_(1, order[:, : self.drop], True) & kept
        return self._ungroup(may_go, mask)

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask of the zeros that are there, at most M − N in each M."""
        mask = super().initial(weights)
        pruned = ~self._groups(mask)
        return self._ungroup(~(pruned & (pruned.cumsum(1) <= self.drop)), mask)

    def _groups(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, -1).reshape(-1, self.of)

    def _ungroup(self, groups: Tensor, like: Tensor) -> Tensor:
        return groups.reshape(like.movedim(self.dim, -1).shape).movedim(-1, self.dim).contiguous()


class BlockField(Field):
    """Blocks of R output rows by C inputs, at each place of a kernel; the scores in a block are summed."""

    def __init__(self, name: str, member: int, shape: Sequence[int], rows: int, columns: int) -> None:
        super().__init__(name, [member], (shape[0] // rows, shape[1] // columns, *shape[2:]))
        self.rows, self.columns = rows, columns

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return the sum over each block."""
        score = scores[self.members[0]]
        rows, columns, *kernel = score.shape
        blocks = (rows // self.rows, self.rows, columns // self.columns, self.columns)
        return score.reshape(*blocks, *kernel).sum((1, 3))

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return the mask of entries: each block's bit at all of its places."""
        return {self.members[0]: mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)}

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask of the blocks that are zero throughout."""
        entries = initial_mask(weights[self.members[0]])
        return self.reduce({self.members[0]: entries.to(torch.float32)}) > 0


class ChannelField(Field):
    """Channels or heads: a unit is all that makes one, in every parameter that is coupled to it.

    Where several query heads share a key and value head, a unit is one query head of each.
    """

    def __init__(self, group: ChannelGroup, members: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
        every = sorted({members[part.name] for part in group.outputs})
        super().__init__(group.name, every, (group.units // group.blocks,))
        self.scored = sorted({members[part.name] for part in group.outputs if part.scored})
        self._parts = [
            (members[part.name], part.dim, _across(part.index, group.blocks), part.scored) for part in group.outputs
        ]
        self._shapes = {members[part.name]: tuple(shapes[part.name]) for part in group.outputs}

    def reduce(self, scores: Mapping[int, Tensor]) -> Tensor:
        """Return for each unit the sum over its weights; biases and norms do not count."""
        sums = [
            _rows(scores[member], dim).sum(1)[index.to(scores[member].device)].sum(1)
            for member, dim, index, is_scored in self._parts
            if is_scored
        ]
        return torch.stack(sums).sum(0)

    def spread(self, mask: Tensor) -> dict[int, Tensor]:
        """Return the masks of the parameters; what a parameter has outside of the units is kept."""
        out: dict[int, Tensor] = {}
        for member, dim, index, _ in self._parts:
            shape = self._shapes[member]
            rows = torch.ones(shape[dim], dtype=torch.bool, device=mask.device)
            rows[index.to(mask.device)[~mask].reshape(-1)] = False
            entries = rows.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
            out[member] = out[member] & entries if member in out else entries.contiguous()
        return out

    def initial(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the mask of the units of which something is left."""
        alive = [
            _rows(weights[member] != 0, dim).any(1)[index.to(weights[member].device)].any(1)
            for member, dim, index, _ in self._parts
        ]
        return torch.stack(alive).any(0)


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor as a matrix whose rows lie along `dim`."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


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
