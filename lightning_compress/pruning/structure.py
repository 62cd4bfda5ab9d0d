"""Channels and heads as fields of a pruner: which parameters they are made of, and the smaller module at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.modules import Target, clean_name
from lightning_compress.pruning.coupling import ChannelGroup, Slice
from lightning_compress.pruning.granularity import ChannelField, Field
from lightning_compress.pruning.removal import _copy, channel_groups, remove_pruned_channels


class _Called(nn.Module):
    """The part of a module that is called, under the name that it has there."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, module.get_submodule(name))
        self._name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self._name)(*args, **kwargs)


def find_groups(
    module: nn.Module,
    called: str,
    inputs: ExampleInputs,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    kind: str,
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups of channels or heads, and why other layers cannot be pruned.

    Args:
        module: The model.
        called: The name of the child whose forward takes the inputs, ``""`` for the module itself.
        inputs: What the forward takes.
        include: Patterns on the names of layers.
        exclude: The same, for layers to leave alone.
        kind: ``"channel"`` or ``"head"``.

    Raises:
        ValueError: If nothing is left to prune, with the reasons.
    """
    whole = _Called(module, called) if called else module
    kind = cast(Literal["channel", "head"], kind)
    groups, refused = channel_groups(
        whole,
        inputs.for_forward(module.get_submodule(called) if called else module),
        include=include,
        exclude=exclude,
        kind=kind,
    )
    groups = [group for group in groups if group.units // group.blocks > 1]
    is_given = include is not None or any("its width is that of an output" not in reason for reason in refused.values())
    if not groups and (is_given or not refused):
        reasons = "; ".join(f"'{name}' ({reason})" for name, reason in refused.items())
        raise ValueError(
            f"`granularity='{kind}'` fits no layer of {type(module).__name__}: {reasons or 'none is left'}."
        )
    return groups, refused


def make_fields(module: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[list[Target], list[Field]]:
    """Return the parameters that groups are made of, and a field for each group."""
    owners = {clean_name(name): child for name, child in module.named_modules(remove_duplicate=False)}
    targets: list[Target] = []
    places: dict[str, int] = {}
    for group in groups:
        for part in group.outputs:
            if part.name not in places:
                holder, _, attribute = part.name.rpartition(".")
                places[part.name] = len(targets)
                targets.append(Target(part.name, holder, owners[holder], attribute))
    shapes = {name: targets[i].parameter.shape for name, i in places.items()}
    return targets, [ChannelField(group, places, shapes) for group in groups]


def smaller_copy(module: nn.Module, called: str, inputs: ExampleInputs, groups: Sequence[ChannelGroup]) -> nn.Module:
    """Return a copy of a module without its pruned channels and heads; it answers as the module does.

    Raises:
        ValueError: If it would not.
    """
    smaller = _copy(module)
    whole = _Called(smaller, called) if called else smaller
    remove_pruned_channels(whole, inputs.for_forward(module.get_submodule(called) if called else module), groups=groups)
    try:
        with torch.no_grad():
            given = inputs.to(next(whole.parameters()).device)
            whole(*given.args, **given.kwargs)  # the removal has been checked without what rounds
    except Exception as error:
        raise ValueError(f"what rounds the weights does not fit those that are left: {error}") from error
    if called:
        smaller.set_submodule(called, whole.get_submodule(called))
    # The copy is in eval mode and float32, so that it can be tried; what comes back is as the module is.
    own = {clean_name(name): tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in (*smaller.named_parameters(), *smaller.named_buffers()):
        source = own[clean_name(name)]
        tensor.requires_grad_(source.requires_grad).data = tensor.data.to(source.dtype)
    return smaller.train(module.training)


def groups_to_state(groups: Sequence[ChannelGroup]) -> list[dict[str, Any]]:
    """Return groups as plain Python and tensors."""
    return [
        {
            **vars(group),
            "outputs": [dict(vars(part)) for part in group.outputs],
            "inputs": [dict(vars(part)) for part in group.inputs],
        }
        for group in groups
    ]


def groups_from_state(state: Sequence[Mapping[str, Any]]) -> list[ChannelGroup]:
    """Return the groups that :func:`groups_to_state` wrote."""
    return [
        ChannelGroup(
            **{
                **group,
                "outputs": tuple(Slice(**part) for part in group["outputs"]),
                "inputs": tuple(Slice(**part) for part in group["inputs"]),
                "layers": tuple(group["layers"]),
            }
        )
        for group in state
    ]
