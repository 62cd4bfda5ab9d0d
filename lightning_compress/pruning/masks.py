"""Masks: which weights are kept (True) and which are pruned (False). One byte a weight, one bit in a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_compress.pruning.sharding import table

_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as integers as wide as a dtype: all bits set where the entry is kept, none where it is pruned.

    Example::

        >>> as_bits(torch.tensor([True, False]), torch.float32)
        tensor([-1,  0], dtype=torch.int32)
    """
    return mask.to(_BITS_OF[dtype.itemsize]).neg_()


@torch.no_grad()
def zero_pruned_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the pruned entries of tensors to zero, in place.

    The bit patterns are multiplied, as integers, by 0 or 1. That gives a plain +0.0 for NaN and infinity too, where
    a product of floats would give NaN, and reads one byte a weight where a mask of floats reads four. With the masks of
    :func:`as_bits` it is twice as fast and reads four.

    Args:
        tensors: Floating-point tensors.
        masks: For each a tensor of its shape: bool and True where the entry is kept, or what :func:`as_bits` makes.

    Example::

        >>> weight = torch.tensor([1.0, -2.0, float("nan")])
        >>> zero_pruned_([weight], [torch.tensor([True, False, False])])
        >>> weight.tolist()
        [1.0, 0.0, 0.0]
    """
    if not tensors:
        return
    patterns = [tensor.view(_BITS_OF[tensor.element_size()]) for tensor in tensors]
    if masks[0].dtype == torch.bool:
        torch._foreach_mul_(patterns, list(masks))
    else:
        for pattern, mask in zip(patterns, masks, strict=True):
            pattern.bitwise_and_(mask)


@torch.no_grad()
def move_pruned_(tensors: Sequence[Tensor], into: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Move entries of tensors into others, in place: they become zero, and the others hold them and zeros elsewhere.

    An entry's bits are cleared by an exclusive or with the moved ones, which the cache still holds, instead of reading
    a second mask: three quarters of the time of copying the tensor and masking both.

    Args:
        tensors: Floating-point tensors.
        into: For each one of its shape and dtype, whose values are lost.
        masks: For each True where the entry is moved, as for :func:`zero_pruned_`.

    Example::

        >>> weight, copy = torch.tensor([1.0, -2.0]), torch.empty(2)
        >>> move_pruned_([weight], [copy], [torch.tensor([False, True])])
        >>> weight.tolist(), copy.tolist()
        ([1.0, 0.0], [0.0, -2.0])
    """
    for tensor, moved, mask in zip(tensors, into, masks, strict=True):
        pattern, moved = (x.view(_BITS_OF[x.element_size()]) for x in (tensor, moved))
        (torch.mul if mask.dtype == torch.bool else torch.bitwise_and)(pattern, mask, out=moved)
        pattern.bitwise_xor_(moved)


def pack(mask: Tensor) -> Tensor:
    """Return a mask as bytes that hold eight entries each, the first in the lowest bit.

    Example::

        >>> pack(torch.tensor([True, False, True])).tolist()
        [5]
    """
    bits = mask.detach().reshape(-1).to("cpu", torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask of a shape that :func:`pack` made bytes of.

    Example::

        >>> unpack(torch.tensor([5], dtype=torch.uint8), (1, 3)).tolist()
        [[True, False, True]]
    """
    bits = (packed.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(-1)[: torch.Size(shape).numel()].reshape(tuple(shape)).to(torch.bool)


@torch.no_grad()
def initial_mask(weight: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the mask with which pruning starts: the zeros of an already sparse tensor stay pruned.

    A tensor whose non-zero entries are all equal was written by an initializer (zeros, identity, Dirac) and not left
    behind by pruning: all of it is kept.

    Args:
        weight: The tensor, or this process's piece of it.
        group: The processes that hold the other pieces.

    Example::

        >>> initial_mask(torch.tensor([0.3, 0.0, -0.2])).tolist()
        [True, False, True]
        >>> initial_mask(torch.eye(2)).tolist()
        [[True, True], [True, True]]
    """
    mask = weight != 0
    if group is None and bool(mask.all()):
        return mask
    kept = weight[mask]
    lowest, highest = kept.aminmax() if kept.numel() else (torch.inf, -torch.inf)
    rows = table([weight.numel() - kept.numel(), kept.numel(), float(lowest), float(highest)], group)
    zeros, count = rows[:, :2].sum(0).tolist()
    is_constant = count != 1 and not rows[:, 2].amin() < rows[:, 3].amax()
    return torch.ones_like(mask) if zeros and is_constant and not rows.isnan().any() else mask


def free_surplus_(masks: Sequence[Tensor], surplus: int) -> None:
    """Keep again the last `surplus` pruned entries of several masks, in place.

    Example::

        >>> masks = [torch.tensor([True, False]), torch.tensor([False, False])]
        >>> free_surplus_(masks, 1)
        >>> [mask.tolist() for mask in masks]
        [[True, False], [False, True]]
    """
    for mask in reversed(masks):
        if surplus <= 0:
            return
        flat = mask.reshape(-1)
        pruned = (~flat).nonzero().squeeze(1)[-surplus:]
        flat[pruned] = True
        if flat.data_ptr() != mask.data_ptr():
            mask.copy_(flat.reshape(mask.shape))
        surplus -= pruned.numel()
