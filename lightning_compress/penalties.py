"""Penalties that make weights sparse: their values, their gradients, and the proximal operators of two of them.

All take lists of tensors, and change them in place with batched (``torch._foreach``) operations. Where a penalty is one
of groups, the first dimension of a tensor counts the groups, and the rest is what each is made of (see :func:`groups`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# --- values -----------------------------------------------------------------------------------------------------------


def l1(weights: list[Tensor]) -> Tensor:
    """Return Σ|w|.

    Example::

        >>> l1([torch.tensor([1.0, -2.0]), torch.tensor([[0.0]])]).item()
        3.0
    """
    return _sum(_absolute_sums(weights))


def l2(weights: list[Tensor]) -> Tensor:
    """Return Σw², without the ½ that some put before it.

    Example::

        >>> l2([torch.tensor([1.0, -2.0])]).item()
        5.0
    """
    return _sum([norm.square() for norm in _norms(weights)])


def group_lasso(weights: list[Tensor]) -> Tensor:
    """Return Σ √|g|·‖w_g‖₂ over the groups g of |g| weights (Yuan and Lin 2006).

    Example::

        >>> group_lasso([torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])]).item()
        10.0
    """
    return _sum([norm.sum() * _root(weight) for norm, weight in zip(_group_norms(weights), weights, strict=True)])


def hoyer(weights: list[Tensor]) -> Tensor:
    """Return Σ (Σ|w|)² / Σw², a term for each tensor; 0 for one of zeros (Yang et al. 2020, arXiv 1908.09979).

    The term of n weights is 1 where a single one is left, n where all are equal, and does not depend on their scale.

    Example::

        >>> hoyer([torch.ones(4), torch.tensor([0.0, -7.0])]).item()
        5.0
    """
    pairs = zip(_absolute_sums(weights), _norms(weights), strict=True)
    return _sum([(first / _above_zero(second)).square() for first, second in pairs])


# --- gradients --------------------------------------------------------------------------------------------------------


def add_l1_(gradients: list[Tensor], weights: list[Tensor], strength: float) -> None:
    """Add strength·sign(w), 0 where w is 0.

    Example::

        >>> gradient = torch.ones(3)
        >>> add_l1_([gradient], [torch.tensor([2.0, 0.0, -3.0])], 0.5)
        >>> gradient
        tensor([1.5000, 1.0000, 0.5000])
    """
    for run in _runs(weights):
        torch._foreach_add_(gradients[run], torch._foreach_sign(weights[run]), alpha=strength)


def add_l2_(gradients: list[Tensor], weights: list[Tensor], strength: float) -> None:
    """Add strength·2w.

    Example::

        >>> gradient = torch.ones(2)
        >>> add_l2_([gradient], [torch.tensor([2.0, -3.0])], 0.5)
        >>> gradient
        tensor([ 3., -2.])
    """
    torch._foreach_add_(gradients, weights, alpha=2.0 * strength)


def add_group_lasso_(gradients: list[Tensor], weights: list[Tensor], strength: float) -> None:
    """Add strength·√|g|·w / ‖w_g‖₂, 0 for a group of zeros.

    Example::

        >>> gradient = torch.zeros(2, 4)
        >>> add_group_lasso_([gradient], [torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])], 0.5)
        >>> gradient[0]
        tensor([0.6000, 0.8000, 0.0000, 0.0000])
    """
    norms = _group_norms(weights)
    factors = [
        (strength * _root(weight) / norm).masked_fill_(norm == 0, 0.0).to(gradient.dtype)
        for gradient, weight, norm in zip(gradients, weights, norms, strict=True)
    ]
    torch._foreach_addcmul_(gradients, weights, factors)


def add_hoyer_(gradients: list[Tensor], weights: list[Tensor], strength: float) -> None:
    """Add strength·2(sign(w)·r − w·r²) with r = Σ|w| / Σw²; 0 for a tensor of zeros.

    Example::

        >>> gradient = torch.zeros(2)
        >>> add_hoyer_([gradient], [torch.tensor([3.0, 1.0])], 1.0)  # r = 0.4
        >>> gradient
        tensor([-0.1600,  0.4800])
    """
    pairs = zip(_absolute_sums(weights), _norms(weights), strict=True)
    ratios = [first / _above_zero(second).square() for first, second in pairs]
    signs = _like([2.0 * strength * ratio for ratio in ratios], gradients)
    sizes = _like([-2.0 * strength * ratio.square() for ratio in ratios], gradients)
    for run in _runs(weights):
        torch._foreach_addcmul_(gradients[run], torch._foreach_sign(weights[run]), signs[run])
    torch._foreach_addcmul_(gradients, weights, sizes)


# --- proximal operators -----------------------------------------------------------------------------------------------


def soft_threshold_(weights: list[Tensor], threshold: float) -> None:
    """Turn w into sign(w)·max(|w| − threshold, 0), what minimizes (v − w)²/2 + threshold·|v|.

    Example::

        >>> weight = torch.tensor([3.0, -0.5, -2.0])
        >>> soft_threshold_([weight], 1.0)
        >>> weight
        tensor([ 2.,  0., -1.])
    """
    for run in _runs(weights):
        within = torch._foreach_clamp_max(weights[run], threshold)
        torch._foreach_clamp_min_(within, -threshold)
        torch._foreach_sub_(weights[run], within)


def soft_threshold_groups_(weights: list[Tensor], threshold: float) -> None:
    """Turn w_g into w_g·max(1 − threshold·√|g| / ‖w_g‖₂, 0): a group that falls below goes as a whole.

    Example::

        >>> weight = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
        >>> soft_threshold_groups_([weight], 0.5)
        >>> weight
        tensor([[2.4000, 3.2000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    factors = [
        (1.0 - threshold * _root(weight) / norm).clamp_min_(0.0).masked_fill_(norm == 0, 0.0).to(weight.dtype)
        for weight, norm in zip(weights, _group_norms(weights), strict=True)
    ]
    torch._foreach_mul_(weights, factors)


# --- groups -----------------------------------------------------------------------------------------------------------


def groups(tensor: Tensor, module: nn.Module, attribute: str) -> list[Tensor]:
    """Return views of a weight, or of its gradient, whose first dimension counts output neurons, filters or heads.

    Outputs lie in dimension 0, ``(out, in, …)``, but for transposed convolutions, which give a view for each of their
    ``groups``. Of an `nn.MultiheadAttention` a group is one head: its rows of the query's, the key's and the value's
    projection, or of each one for itself where they are parameters of their own.

    Example::

        >>> attention = nn.MultiheadAttention(8, num_heads=2)
        >>> [tuple(view.shape) for view in groups(attention.in_proj_weight, attention, "in_proj_weight")]
        [(2, 3, 4, 8)]
        >>> upsampling = nn.ConvTranspose1d(4, 6, kernel_size=3, groups=2)
        >>> [tuple(view.shape) for view in groups(upsampling.weight, upsampling, "weight")]
        [(3, 2, 3), (3, 2, 3)]
    """
    if isinstance(module, nn.MultiheadAttention):
        if attribute == "in_proj_weight":
            return [tensor.unflatten(0, (3, module.num_heads, -1)).transpose(0, 1)]
        return [tensor.unflatten(0, (module.num_heads, -1))]
    if isinstance(module, _TRANSPOSED):
        return [part.transpose(0, 1) for part in tensor.unflatten(0, (module.groups, -1)).unbind()]
    return [tensor]


# --- all of them ------------------------------------------------------------------------------------------------------


class Penalty(NamedTuple):
    """A penalty Ω, and how it acts.

    Args:
        value: Returns Ω of a list of weights.
        add_gradient_: Adds strength·∂Ω/∂w to gradients; ``None`` for a penalty that shrinks the weights itself.
        shrink_: The proximal operator of threshold·Ω.
        unit: What Ω is a sum over: single weights, groups of them, or whole tensors.
    """

    value: Callable[[list[Tensor]], Tensor]
    add_gradient_: Callable[[list[Tensor], list[Tensor], float], None] | None = None
    shrink_: Callable[[list[Tensor], float], None] | None = None
    unit: Literal["weight", "group", "tensor"] = "weight"


PENALTIES: dict[str, Penalty] = {
    "l1": Penalty(l1, add_l1_),
    "l2": Penalty(l2, add_l2_),
    "group_lasso": Penalty(group_lasso, add_group_lasso_, unit="group"),
    "batchnorm_scale": Penalty(l1, add_l1_),
    "hoyer": Penalty(hoyer, add_hoyer_, unit="tensor"),
    "proximal_l1": Penalty(l1, shrink_=soft_threshold_),
    "proximal_group_lasso": Penalty(group_lasso, shrink_=soft_threshold_groups_, unit="group"),
}


# --- small things -----------------------------------------------------------------------------------------------------


def _runs(weights: list[Tensor], most: int = 2**22) -> Iterator[slice]:
    """Cut a list into runs of at most so many weights, or of one tensor: a copy of a run is soon made, and reused.

    Example::

        >>> list(_runs([torch.zeros(n) for n in (2, 2, 9, 1)], most=4))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    start = count = 0
    for place, weight in enumerate(weights):
        if count and count + weight.numel() > most:
            yield slice(start, place)
            start, count = place, 0
        count += weight.numel()
    yield slice(start, len(weights))


def _absolute_sums(weights: list[Tensor]) -> list[Tensor]:
    # On a CPU `vector_norm` of order 1 is four times slower, and off by 3e-4 for two million weights.
    return [weight.abs().sum(dtype=_precise(weight)) for weight in weights]


def _norms(weights: list[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(weight, dtype=_precise(weight)) for weight in weights]


def _group_norms(weights: list[Tensor]) -> list[Tensor]:
    return [
        torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True, dtype=_precise(weight))
        for weight in weights
    ]


def _precise(weight: Tensor) -> torch.dtype:
    """The type to sum in: float32 holds what half precision cannot."""
    return torch.promote_types(weight.dtype, torch.float32)


def _above_zero(norm: Tensor) -> Tensor:
    # The square of the smallest one has to be a number too.
    return norm.clamp_min(math.sqrt(torch.finfo(norm.dtype).tiny))


def _root(weight: Tensor) -> float:
    """√|g|."""
    return math.sqrt(weight.numel() / len(weight))


def _like(scalars: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    return [scalar.to(tensor.dtype) for scalar, tensor in zip(scalars, tensors, strict=True)]


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
