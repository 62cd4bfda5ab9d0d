"""How many weights each parameter loses: the scopes global, layer and erk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Share:
    """Parameters among which the lowest scores are found together, and how many of their entries are to go.

    Args:
        members: The parameters' positions in the list that was given.
        size: How many entries they have.
        count: How many of these are to be pruned.
    """

    members: list[int]
    size: int
    count: int


def global_shares(shapes: Sequence[Sequence[int]], sparsity: float) -> list[Share]:
    """Return one share for all parameters: scores compete across layers.

    Example::

        >>> global_shares([(4, 5), (10, 2)], 0.5)
        [Share(members=[0, 1], size=40, count=20)]
    """
    size = sum(math.prod(shape) for shape in shapes)
    return [Share(list(range(len(shapes))), size, _round(sparsity * size))]


def layer_shares(shapes: Sequence[Sequence[int]], sparsity: float) -> list[Share]:
    """Return a share for each parameter, every one with the same sparsity.

    Example::

        >>> [share.count for share in layer_shares([(4, 5), (10, 1)], 0.5)]
        [10, 5]
    """
    return _shares([math.prod(shape) for shape in shapes], [sparsity] * len(shapes))


def erk_shares(shapes: Sequence[Sequence[int]], sparsity: float) -> list[Share]:
    """Return a share for each parameter by the Erdős–Rényi-kernel rule, which keeps small layers denser.

    The density of a parameter of shape (out, in, …kernel) is proportional to (out + in + Σ kernel) / (out·in·Π kernel)
    (Evci et al. 2020, arXiv 1911.11134). A layer for which the rule asks for more than all of its weights stays dense,
    and the others share what that frees by one common factor, so that the whole has the sparsity that was asked for.

    Example::

        >>> [share.count for share in erk_shares([(10, 10), (100, 100)], 0.5)]
        [0, 5050]
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    to_keep = (1.0 - sparsity) * sum(sizes)
    dense: set[int] = set()
    while True:
        others = [i for i in range(len(sizes)) if i not in dense]
        factor = (to_keep - sum(sizes[i] for i in dense)) / max(sum(raw[i] * sizes[i] for i in others), 1e-30)
        too_dense = {i for i in others if factor * raw[i] > 1.0}
        if not too_dense:
            break
        dense |= too_dense
    return _shares(sizes, [0.0 if i in dense else 1.0 - factor * raw[i] for i in range(len(sizes))])


SCOPES: dict[str, Callable[[Sequence[Sequence[int]], float], list[Share]]] = {
    "global": global_shares,
    "layer": layer_shares,
    "erk": erk_shares,
}


def _shares(sizes: Sequence[int], sparsities: Sequence[float]) -> list[Share]:
    """Round so that each count is within one, and their sum within one half, of what was asked for."""
    shares, asked, given = [], 0.0, 0
    for i, (size, sparsity) in enumerate(zip(sizes, sparsities, strict=True)):
        asked += sparsity * size
        count = min(max(_round(asked) - given, 0), size)
        if sparsity == 0.0:
            count = 0
        given += count
        shares.append(Share([i], size, count))
    return shares


def _round(value: float) -> int:
    # 0.7 · 10 is 7.000000000000001 and 0.29 · 100 is 28.999999999999996: neither may move a count.
    return math.floor(round(value, 6) + 0.5)
