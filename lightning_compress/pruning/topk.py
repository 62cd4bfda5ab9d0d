"""The k smallest of the scores in many tensors: exact, without a sort and without a copy of the scores.

Three steps, each over blocks of a few hundred thousand scores, so that temporaries stay in the cache:

1. A strided sample gives two values that almost surely enclose the k-th smallest score.
2. One pass counts the scores below them and gathers the few between. `_radix_select` finds the k-th among
   those, 16 bits of their bit patterns at a time. Should the sample have misled (it costs time, never
   exactness), the same radix selection reads all scores instead.
3. One comparing pass writes the masks; ties at the threshold are taken by position.

All that ranks must agree on are sums of counts, so shards over ranks need `all_reduce` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["kth_smallest", "select_smallest"]

_BLOCK = 2**18  # scores handled at a time on a CPU; 16 times that on a GPU, whose kernels start slowly
_SAMPLE = 2**18  # scores sampled to place the bracket
_SMALL = 2**20  # that few candidates (4 MiB) are gathered whole
_DIGIT = 16  # bits of a key that one round of the radix selection settles
_SIGMAS = 6.0  # half-width of the bracket, in standard deviations of the sample's quantile
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def select_smallest(
    scores: Sequence[Tensor],
    k: int,
    *,
    candidates: Sequence[Tensor] | None = None,
    absolute: bool = False,
    names: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Mark exactly the ``k`` smallest of all scores: one bool mask for each tensor, ``True`` where chosen.

    Tensors are ranked together, by value, whatever their shapes, strides and floating dtypes (in float64
    where any of them is float64, else in float32: neither rounds). ``-0.0`` equals ``0.0``. Of equal scores
    those come first that are first in (rank, tensor, row-major position).

    Reads the scores about twice, O(n), and never sorts. Needs 1 byte a score for the masks, less than
    1/2 byte a score for the few it gathers (usually 1/20), and a few MiB.

    >>> select_smallest([torch.tensor([3.0, -1.0]), torch.tensor([0.5, -4.0, 7.0])], 2)
    [tensor([False,  True]), tensor([False,  True, False])]
    >>> select_smallest([torch.tensor([3.0, -1.0]), torch.tensor([0.5, -4.0, 7.0])], 2, absolute=True)
    [tensor([False,  True]), tensor([ True, False, False])]

    Args:
        scores: Floating point tensors of any shape; they are not changed.
        k: How many to choose, from 0 to the number of candidates.
        candidates: Bool tensors of the scores' shapes. Only what stands under ``True`` can be chosen; the
            rest is ignored, NaN too. ``None``: everything.
        absolute: Rank by ``|score|``.
        names: What errors call the tensors.
        group: The scores are disjoint shards over this group's ranks (of DTensors, pass the local tensors).
            Every rank calls with the same ``k``, which counts over all ranks, and gets its own shards' masks.
            Lists may differ in length and be empty. ``None``: this process alone.

    Raises:
        ValueError: ``k`` is out of range, a candidate's score is NaN (the tensor is named), or lengths,
            shapes or devices do not fit together.
        TypeError: A score is not floating point, or a candidate mask is not bool.
    """
    shard = _Shard(scores, candidates, absolute, names, group)
    shard.check_k(k, least=0)
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    if k == 0:
        shard.refuse_nan()
        return [mask.fill_(False) for mask in masks]

    threshold, rank, ties = _search(shard, k)
    wanted = shard.share_of_ties(rank, ties)
    compare, wanted = (torch.le, 0) if wanted == ties else (torch.lt, wanted)
    for score, mask, candidate in zip(shard.scores, masks, shard.candidates, strict=True):
        for block, chosen, *allowed in _blocks(score, mask, *candidate):
            values = shard.values(block)
            compare(values, threshold, out=chosen)
            if wanted:  # some of the ties, not all: from the front
                equal = values == threshold
                for where in allowed:
                    equal &= where
                positions = equal.nonzero().squeeze(1)[:wanted]
                chosen[positions] = True
                wanted -= len(positions)
            for where in allowed:
                chosen &= where
    return masks


@torch.no_grad()
def kth_smallest(
    scores: Sequence[Tensor],
    k: int,
    *,
    candidates: Sequence[Tensor] | None = None,
    absolute: bool = False,
    names: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Return the ``k``-th smallest of all scores, counted from 1: the largest that `select_smallest` chooses.

    Arguments and errors are those of `select_smallest`, except that ``k`` starts at 1. The value is exact.

    >>> kth_smallest([torch.tensor([3.0, -1.0]), torch.tensor([0.5])], 2)
    0.5
    """
    shard = _Shard(scores, candidates, absolute, names, group)
    shard.check_k(k, least=1)
    return _search(shard, k)[0]


class _Shard:
    """This rank's scores and candidates, read in blocks, and sums over the ranks that hold the others."""

    def __init__(
        self,
        scores: Sequence[Tensor],
        candidates: Sequence[Tensor] | None,
        absolute: bool,
        names: Sequence[str] | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        for argument, given in (("candidates", candidates), ("names", names)):
            if given is not None and len(given) != len(scores):
                raise ValueError(f"`{argument}` must be as many as `scores`, {len(scores)}; got {len(given)}")
        self.names = [f"scores[{i}]" for i in range(len(scores))] if names is None else list(names)
        masks: Sequence[Tensor | None] = [None] * len(scores) if candidates is None else candidates
        for name, score, mask in zip(self.names, scores, masks, strict=True):
            if not score.is_floating_point():
                raise TypeError(f"`scores` must be floating point, got {score.dtype} for {name}")
            if mask is not None and mask.dtype != torch.bool:
                raise TypeError(f"`candidates` must be bool, got {mask.dtype} for {name}")
            if mask is not None and (mask.shape, mask.device) != (score.shape, score.device):
                raise ValueError(
                    f"`candidates` must match the scores: {name} is {tuple(score.shape)} on {score.device}, "
                    f"its candidates are {tuple(mask.shape)} on {mask.device}"
                )
        self.scores = [score.detach() for score in scores]
        # No or one mask for each tensor: what loops over blocks needs no second form.
        self.candidates: list[tuple[Tensor, ...]] = [() if mask is None else (mask,) for mask in masks]
        self.absolute = absolute
        self.group = group
        self.device = scores[0].device if scores else torch.device("cpu")
        numel = sum(score.numel() for score in scores)
        count = numel
        if candidates:
            count = int(torch.stack([mask.count_nonzero().to(self.device) for mask in candidates]).sum())
        wide = any(score.dtype == torch.float64 for score in scores)
        self.room = max(_SMALL, numel // 32)
        self.numel, self.count, wide_ranks = self.sum(torch.tensor([numel, count, wide])).tolist()
        self.dtype = torch.float64 if wide_ranks else torch.float32

    def check_k(self, k: int, least: int) -> None:
        if not isinstance(k, int) or not least <= k <= self.count:
            allowed = f"an int from {least} to the number of candidates, {self.count}"
            raise ValueError(f"`k` must be {allowed}; got {k}")

    def sum(self, counts: Tensor) -> Tensor:
        """Sum over the ranks; ``counts`` itself stays as it is."""
        if self.group is None:
            return counts
        total = counts.to("cuda" if dist.get_backend(self.group) == "nccl" else counts.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(counts.device)

    def share_of_ties(self, wanted: int, ties: int) -> int:
        """Return how many of the ``wanted`` ties are among this rank's: lower ranks give theirs first."""
        if self.group is None:
            return wanted
        rank = dist.get_rank(self.group)
        held = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64)
        held[rank] = ties
        before = int(self.sum(held)[:rank].sum())
        return min(max(wanted - before, 0), ties)

    def values(self, block: Tensor) -> Tensor:
        """Return what a block is ranked by."""
        block = block.to(self.dtype)
        return block.abs() if self.absolute else block

    def keys(self, values: Tensor) -> Tensor:
        """Return integers in the order of the values, 0 for both zeros.

        A float is a sign and a magnitude, an integer a two's complement: the key of a negative float is
        minus the bits of its magnitude.
        """
        integers = values.view(_INTEGER[values.dtype])
        if self.absolute:
            return integers
        signs = integers >> (torch.iinfo(integers.dtype).bits - 1)  # 0 or -1
        return (integers & torch.iinfo(integers.dtype).max).bitwise_xor_(signs).sub_(signs)

    def candidate_values(self, index: int, stride: int = 1) -> Iterator[Tensor]:
        """Yield what can be chosen of each block of a tensor, or of every ``stride``-th entry of it."""
        for block, *allowed in _blocks(self.scores[index], *self.candidates[index]):
            values = self.values(block[::stride])
            yield values[allowed[0][::stride]] if allowed else values

    def all_candidate_values(self, stride: int = 1) -> Iterator[Tensor]:
        for index in range(len(self.scores)):
            yield from self.candidate_values(index, stride)

    def gather(self, pieces: Iterable[Tensor]) -> Tensor:
        """Join pieces; there may be none, or of several devices."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([empty, *(piece.to(self.device) for piece in pieces)])

    def refuse_nan(self) -> None:
        """Raise, on every rank, if one of them has NaN among its candidates."""
        found = [
            name
            for index, name in enumerate(self.names)
            if any(_has_nan(values) for values in self.candidate_values(index))
        ]
        if self.sum(torch.tensor(len(found))).item():
            where = found[0] if found else "another rank"
            raise ValueError(f"`scores` must not be NaN where they can be chosen, got NaN in {where}")


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching flat pieces of tensors of one shape, in row-major order; of contiguous ones, views."""
    first = tensors[0]
    size = _BLOCK if first.device.type == "cpu" else 16 * _BLOCK
    if all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
    elif first.numel() <= size:
        yield tuple(tensor.reshape(-1) for tensor in tensors)
    elif len(first) == 1:
        yield from _blocks(*(tensor[0] for tensor in tensors))
    else:
        rows = max(1, size * len(first) // first.numel())
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield from _blocks(*parts)


def _search(shard: _Shard, k: int) -> tuple[float, int, int]:
    """Return the k-th smallest value, how many of its ties are among the k, and how many this rank holds."""
    if shard.count <= _SMALL:
        below, inside = 0, shard.gather(shard.all_candidate_values())
    else:
        below, inside = _between(shard, *_bracket(shard, k))
    # NaN is neither below nor above a bracket, so it is always gathered: no pass has to look for it.
    failed = below < 0 or _has_nan(inside)
    below, size, failures = shard.sum(torch.tensor([below, len(inside), failed])).tolist()
    if not failures and 0 < k - below <= size:
        return _radix_select(shard, lambda: inside.split(_BLOCK), k - below)
    shard.refuse_nan()
    return _radix_select(shard, shard.all_candidate_values, k)


def _bracket(shard: _Shard, k: int) -> tuple[float, float]:
    """Return two values that enclose the k-th smallest, unless the sample misleads."""
    # An odd stride samples every column of rows whose length is a power of two.
    sample = shard.gather(shard.all_candidate_values(shard.numel // _SAMPLE | 1))
    sample = sample[sample == sample]  # NaN is found later
    size = int(shard.sum(torch.tensor(len(sample))))
    share = k / shard.count
    slack = 1 + _SIGMAS * math.sqrt(size * share * (1 - share))
    first, last = math.floor(size * share - slack), math.ceil(size * share + slack)
    low = _radix_select(shard, lambda: sample.split(_BLOCK), first)[0] if first >= 1 else -math.inf
    high = _radix_select(shard, lambda: sample.split(_BLOCK), last)[0] if last <= size else math.inf
    return low, high


def _between(shard: _Shard, low: float, high: float) -> tuple[int, Tensor]:
    """Count this rank's candidates below ``low`` and gather those in [low, high]; (-1, none) if too many."""
    below = torch.zeros((), dtype=torch.int64, device=shard.device)
    pieces: list[Tensor] = []
    room = shard.room
    for score, candidate in zip(shard.scores, shard.candidates, strict=True):
        for block, *allowed in _blocks(score, *candidate):
            values = shard.values(block)
            under = values < low
            inside = (values > high).logical_or_(under).logical_not_()
            for where in allowed:
                under &= where
                inside &= where
            below += under.count_nonzero().to(shard.device)
            pieces.append(_pick(values, inside))
            room -= len(pieces[-1])
            if room < 0:
                return -1, shard.gather([])
    return int(below), shard.gather(pieces)


def _pick(values: Tensor, inside: Tensor) -> Tensor:
    """Return ``values[inside]``: looking at 8 flags at a time is several times faster where few are set."""
    if len(values) % 8 == 0:
        words = inside.view(torch.int64).nonzero().squeeze(1)
        values, inside = values.view(-1, 8)[words], inside.view(-1, 8)[words]
    return values[inside]


def _radix_select(shard: _Shard, blocks: Callable[[], Iterable[Tensor]], rank: int) -> tuple[float, int, int]:
    """Find the value of ``rank`` (from 1) among the blocks, free of NaN, of all processes, digit by digit.

    Each round counts the next digit of those keys that begin like the answer, so ``blocks`` is read
    twice for float32 and four times for float64. Returns the value, its rank among its ties, and how many of
    the ties are in this process.
    """
    bits = shift = torch.finfo(shard.dtype).bits
    prefix = 0
    while shift:
        before, shift = shift, max(shift - _DIGIT, 0)
        base = 2 ** (before - shift)
        start = -(base // 2) if before == bits else prefix * base  # the first digit has a sign
        held = torch.zeros(base + 2, dtype=torch.int64, device=shard.device)
        for values in blocks():
            # Keys that begin otherwise fall into the two outer counts.
            digits = (shard.keys(values) >> shift).clamp_(start - 1, start + base).sub_(start - 1)
            held += torch.bincount(digits, minlength=base + 2).to(shard.device)
        held = held[1:-1]
        upto = shard.sum(held).cumsum(0)
        digit = int(torch.searchsorted(upto, rank))
        rank -= int(upto[digit - 1]) if digit else 0
        prefix = start + digit
    magnitude = torch.tensor(abs(prefix), dtype=_INTEGER[shard.dtype]).view(shard.dtype).item()
    return math.copysign(magnitude, prefix), rank, int(held[digit])


def _has_nan(values: Tensor) -> bool:
    return len(values) > 0 and bool(values.amax().isnan())  # several times faster than values.isnan().any()
