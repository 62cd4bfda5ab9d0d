"""Parameters that lie in parts on several processes (FSDP2's ``fully_shard``: DTensors)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def reshard(module: nn.Module) -> None:
    """Have ``fully_shard`` put every parameter back into its parts: after a forward pass some still lie there whole."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def group_of(named: Iterable[tuple[str, Tensor]]) -> dist.ProcessGroup | None:
    """Return the processes over which parameters are sharded, ``None`` where they are not.

    Raises:
        ValueError: If they are sharded in unlike ways, by name: what one process decides must count once.
    """
    groups = {name: _group(name, tensor) for name, tensor in named}
    if len({id(group) for group in groups.values()}) > 1:
        first = next(iter(groups))
        other = next(name for name, group in groups.items() if group is not groups[first])
        raise ValueError(
            f"'{first}' and '{other}' are sharded over other processes than each other. "
            f"Shard all pruned parameters alike (`fully_shard` of the whole module does), or add one to `exclude`."
        )
    return next(iter(groups.values()), None)


def _group(name: str, tensor: Tensor) -> dist.ProcessGroup | None:
    if not isinstance(tensor, DTensor):
        return None
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or not tensor.placements[sharded[0]].is_shard():
        raise ValueError(f"'{name}' is placed as {tensor.placements}: one sharded dimension can be pruned.")
    return tensor.device_mesh.get_group(sharded[0])


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole of a bool or float tensor of which each process holds the part that it holds of `like`."""
    if not isinstance(like, DTensor):
        return part
    numbers = part.to(torch.uint8) if part.dtype == torch.bool else part
    whole = DTensor.from_local(
        numbers, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return whole.to(part.dtype)


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that all processes hold, split as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    numbers = whole.to(torch.uint8) if whole.dtype == torch.bool else whole
    part = distribute_tensor(numbers.to(like.device), like.device_mesh, like.placements).to_local()
    return part.to(whole.dtype)


def total(counts: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Return the sum of counts over a group of processes."""
    if group is None:
        return list(counts)
    numbers = torch.tensor(list(counts), dtype=torch.int64, device=_device(group))
    dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def holds_the_largest(value: float, group: dist.ProcessGroup | None) -> bool:
    """Return whether this process holds the largest value; the first one where several do."""
    if group is None:
        return True
    values = torch.full((group.size(),), -torch.inf, dtype=torch.float64, device=_device(group))
    values[group.rank()] = value
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return int(values.argmax()) == group.rank()


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
