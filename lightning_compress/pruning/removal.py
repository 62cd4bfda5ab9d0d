"""Cutting channels and heads out of a model: what can go is proven by trying it, then cut, checked, and loaded again.

Stable: `Slice`, `ChannelGroup`, `channel_groups`, `remove_pruned_channels`, `load_pruned`, `profile`.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_compress.attention import PlainMultiheadAttention
from lightning_compress.copying import standalone_copy
from lightning_compress.modules import clean_name, refuse_if_no_match
from lightning_compress.pruning.coupling import (
    Attention,
    ChannelGroup,
    Findings,
    PrunedMultiheadAttention,
    Slice,
    channel_layers,
    coupled_channels,
    find_attentions,
    heads_of,
    is_computed,
)
from lightning_compress.pruning.sharding import original_classes

__all__ = [
    "ChannelGroup",
    "Profile",
    "PrunedMultiheadAttention",
    "Slice",
    "channel_groups",
    "load_pruned",
    "profile",
    "removal_report",
    "remove_pruned_channels",
]

_PROOF = 1e-4  # how far the cut model may be from the masked one, relative to the largest output, with random weights
_CHECK = 1e-5  # the same, with the weights that it has


def channel_groups(
    module: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    kind: Literal["channel", "head"] = "channel",
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the channels that can be cut out of a model, and why the other layers' cannot.

    Layers are coupled by torch-pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900), heads are found by type
    and by the names of attributes. Each group is then tried on a copy with random weights, statistics and biases: some
    of its units are set to zero, and cut out; a group is returned only if both give the same outputs.

    The given module is not changed, run or set to another mode.

    Args:
        module: The model.
        example_inputs: What its `forward` takes: a tensor, a tuple of positional arguments, or a dict of keyword ones.
        include: ``fnmatch`` patterns on the qualified names of layers whose channels may go; all by default.
        exclude: Patterns on the names of layers that keep their channels; they still lose the inputs that went.
        kind: ``"channel"``: output neurons and filters; ``"head"``: attention heads.

    Returns:
        The groups, in the order of the model's layers, and for each layer that cannot be pruned the reason.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups, refused = channel_groups(net, torch.randn(3, 4))
        >>> [(group.name, group.units) for group in groups], refused
        ([('0', 8)], {'2': 'its width is that of an output of the model'})

    Raises:
        ValueError: If the example inputs do not run, or a pattern matches no module.
    """
    if kind not in ("channel", "head"):
        raise ValueError(f"`kind` must be 'channel' or 'head', got {kind!r}.")
    modules = {clean_name(name): child for name, child in module.named_modules(remove_duplicate=False)}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            refuse_if_no_match(pattern, modules, argument)

    chosen = _Selection(include, exclude)
    with _undisturbed():
        model = _copy(module)
        inputs = _Inputs(example_inputs, model)
        inputs.run_first(model)
        found = _find_channels(model, inputs, chosen) if kind == "channel" else _find_heads(model, chosen)
        model, inputs = _randomized(model, inputs)
        others = inputs.other_batch(model) if kind == "head" else []
        groups = _Proof(model, [inputs, *others]).prove(found)
    return groups, found.refused


def remove_pruned_channels(
    module: nn.Module,
    example_inputs: Any,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    groups: Sequence[ChannelGroup] | None = None,
) -> nn.Module:
    """Cut the channels and heads that are zero out of a module, in place, and return it.

    A unit goes if all of its `outputs` are zero: its weights, its bias, and the scale and shift of a batch norm behind
    it. One stays in each group. The cut is tried on a copy first: on the example inputs, and on random ones of another
    batch size, the outputs must be those of the given module within 1e-5 of their largest value. If they are not, or
    anything else fails, the given module is left as it was.

    Parameters stay the objects that they are, so tied ones stay tied and optimizers go on; they have smaller shapes
    afterwards. Gradients are cut with them.

    Args:
        module: The model, with masked channels or heads.
        example_inputs: What its `forward` takes: a tensor, a tuple of positional arguments, or a dict of keyword ones.
        optimizer: Optimizers whose state (momentum, moments) is cut along.
        groups: What :func:`channel_groups` returned; found anew by default, channels and heads alike.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:5].zero_(), net[0].bias[:5].zero_()
        >>> remove_pruned_channels(net, torch.randn(3, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )

    Raises:
        ValueError: If the example inputs do not run, the smaller module would answer otherwise, or an optimizer's state
            cannot be cut. The module is as it was then.

    Warns:
        UserWarning: If nothing is zero throughout, or something is that cannot be cut out, by name and with the reason.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    for name, parameter in module.named_parameters():
        if isinstance(parameter.detach(), DTensor):
            raise ValueError(
                f"Channels and heads cannot be cut: '{name}' is sharded over processes. Load the checkpoint into the "
                f"model as it was built, and cut there."
            )
    refused: dict[str, str] = {}
    with _undisturbed():
        if groups is None:
            channels, refused = channel_groups(module, example_inputs)
            heads, refused_heads = channel_groups(module, example_inputs, kind="head")
            groups, refused = [*channels, *heads], {**refused, **refused_heads}
            told = {part.name.rpartition(".")[0] for group in groups for part in group.outputs}
            told.update(name for group in groups for name in group.layers)
            refused = {name: reason for name, reason in refused.items() if name not in told}
        tensors = _tensors_by_name(module)
        gone = {group: dead for group in groups if bool((dead := _dead(group, tensors)).any())}
        if gone:
            model = _copy(module)
            inputs = _Inputs(example_inputs, model)
            inputs.run_first(model)
            _check(model, inputs, gone)
    stay = _zero_but_refused(module, refused)
    if not gone or stay:
        which = "; ".join(f"'{name}' ({reason})" for name, reason in list(stay.items())[:5])
        warnings.warn(
            f"No channel or head of {type(module).__name__} is zero throughout and can be cut out: it stays as it is."
            if not stay
            else f"Channels or heads that are zero cannot be cut out of {which}: they stay.",
            stacklevel=2,
        )
    if gone:
        states = _cut_states(module, gone, optimizers)
        with torch.no_grad():
            cut(module, gone)
        for state, key, value in states:
            state[key] = value
    return module


def load_pruned(module: nn.Module, state_dict_or_path: Mapping[str, Any] | str | PathLike[str]) -> nn.Module:
    """Load weights from which channels or heads were cut, into the original module, in place, and return it.

    Layers get the shapes that the file has, and their attributes follow; then it is loaded strictly.

    Args:
        module: The model as it was built, before anything was cut.
        state_dict_or_path: A `state_dict`, or the path of one or of a Lightning checkpoint.

    Example::

        >>> smaller = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> load_pruned(net, smaller.state_dict())[0]
        Linear(in_features=4, out_features=3, bias=True)

    Raises:
        ValueError: If names are missing or unexpected, or a shape cannot come from the module's by cutting. The module
            is as it was then.
    """
    state = state_dict_or_path
    if not isinstance(state, Mapping):
        state = torch.load(state, map_location="cpu", weights_only=True)
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    given = {clean_name(name): value for name, value in state.items()}
    names = {clean_name(name): name for name in module.state_dict()}
    _refuse_other_names(module, given, names)
    tensors = _tensors_by_name(module)
    new: dict[str, Tensor] = {}
    for name, value in given.items():
        tensor = tensors.get(name)
        if tensor is not None and isinstance(value, Tensor) and tensor.shape != value.shape:
            if tensor.dim() != value.dim() or any(n > w for n, w in zip(value.shape, tensor.shape, strict=True)):
                raise ValueError(
                    f"'{name}' has shape {tuple(value.shape)} in what is to be loaded and {tuple(tensor.shape)} in the "
                    f"module: it must be the original one, before anything was cut."
                )
            new[name] = torch.empty(value.shape, dtype=tensor.dtype, device=tensor.device)
    bare = list(_bare_norms(module))
    undo = _assign(module, new, {}, {})
    try:
        module.load_state_dict({names[name]: value for name, value in given.items()}, strict=True)
    except BaseException:
        undo()
        raise
    for norm, layer in bare:
        norm.num_features = layer.out_channels
    return module


def _bare_norms(
    module: nn.Module,
) -> Iterator[tuple[nn.modules.instancenorm._InstanceNorm, nn.modules.conv._ConvNd]]:
    """Yield the instance norms of which no tensor tells the width, and the convolution before each."""
    last: nn.modules.conv._ConvNd | None = None
    for child in module.modules():
        if isinstance(child, nn.modules.conv._ConvNd):
            last = child
        elif isinstance(child, nn.modules.instancenorm._InstanceNorm) and last is not None:
            is_bare = child.weight is None and child.running_mean is None
            if is_bare and child.num_features == last.out_channels:
                yield child, last


def _refuse_other_names(module: nn.Module, given: Mapping[str, Any], names: Mapping[str, str]) -> None:
    missing, unexpected = names.keys() - given.keys(), given.keys() - names.keys()
    if not missing and not unexpected:
        return
    told = [f"{what} {_list(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    prefixes = {name[: -len(own)] for own in names for name in given if name.endswith(f".{own}")}
    fitting = [prefix for prefix in sorted(prefixes) if all(f"{prefix}{own}" in given for own in names)]
    hint = f" All of its names are there behind '{fitting[0]}': give that part alone." if fitting else ""
    raise ValueError(f"What is to be loaded does not fit {type(module).__name__}: {'; '.join(told)}.{hint}")


def _list(names: Collection[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Report --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What a model is made of.

    Args:
        parameters: How many values its parameters have, tied ones counted once.
        multiply_adds: How many multiplications one forward needs, in linear and convolutional layers and attention.
        widths: The output channels of each layer, and the heads of each attention, by name.
    """

    parameters: int
    multiply_adds: int
    widths: dict[str, int]


def profile(module: nn.Module, example_inputs: Any) -> Profile:
    """Return the size of a model and the work of one forward with the example inputs.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> profile(net, torch.randn(1, 4))
        Profile(parameters=58, multiply_adds=48, widths={'0': 8, '2': 2})
    """
    total = 0

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal total
        total += layer_multiply_adds(layer, [*args, *kwargs.values()], out)

    widths = {}
    for name, layer in channel_layers(module):
        if isinstance(layer, (nn.Linear, nn.Bilinear)):
            widths[name] = layer.out_features
        elif isinstance(layer, nn.modules.conv._ConvNd):
            widths[name] = layer.out_channels
        elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            widths[name] = layer.hidden_size
    widths |= {attention.name: attention.heads for attention in find_attentions(module)[0]}
    with _undisturbed():
        model = _copy(module)
        for _, layer in channel_layers(model):
            layer.register_forward_hook(count, with_kwargs=True)
        inputs = _Inputs(example_inputs, model)
        inputs.run_first(model)
    return Profile(sum(parameter.numel() for parameter in module.parameters()), total, widths)


def removal_report(before: Profile, after: Profile) -> str:
    """Return a few lines that say what was cut.

    Example::

        >>> print(removal_report(Profile(58, 48, {"0": 8, "2": 2}), Profile(23, 18, {"0": 3, "2": 2})))
        parameters     58 -> 23  (2.5 × fewer)
        multiply-adds  48 -> 18  (2.7 × fewer)
        0              8 -> 3
    """
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("multiply-adds", before.multiply_adds, after.multiply_adds),
    ]
    cut_layers = [(name, old, after.widths.get(name, old)) for name, old in before.widths.items()]
    cut_layers = [(name, old, new) for name, old, new in cut_layers if old != new]
    wide = max(len(name) for name, _, _ in [*rows, *cut_layers])
    lines = [f"{name:{wide}}  {old:,} -> {new:,}  ({old / max(new, 1):.1f} × fewer)" for name, old, new in rows]
    return "\n".join(lines + [f"{name:{wide}}  {old:,} -> {new:,}" for name, old, new in cut_layers])


def layer_multiply_adds(layer: nn.Module, args: Sequence[Any], out: Any) -> int:
    """Return how many multiplications a layer's forward needs; 0 for what is neither linear, convolution nor attention.

    Args:
        layer: The layer.
        args: What its forward was called with, keywords last.
        out: What it returned.

    Example::

        >>> layer_multiply_adds(nn.Linear(4, 2), [torch.zeros(3, 4)], torch.zeros(3, 2))
        24
    """
    if isinstance(layer, nn.Linear):
        return out.numel() * layer.in_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        kernel = torch.Size(layer.kernel_size).numel()
        if layer.transposed:
            return args[0].numel() * layer.out_channels // layer.groups * kernel
        return out.numel() * layer.in_channels // layer.groups * kernel
    if isinstance(layer, nn.MultiheadAttention):
        query, key, value = args[:3]
        inner = layer.num_heads * layer.head_dim
        batch = query.shape[0 if layer.batch_first else 1] if query.dim() == 3 else 1
        length, keys = query.numel() // (query.shape[-1] * batch), key.numel() // (key.shape[-1] * batch)
        projections = (query.numel() + key.numel() + value.numel() + query.numel()) * inner
        return projections + 2 * batch * length * keys * inner
    return 0


# Finding what can go -------------------------------------------------------------------------------------------------


@dataclass
class _Selection:
    """Which layers a user's patterns mean."""

    include: Sequence[str] | None
    exclude: Sequence[str] | None

    def excludes(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude or ())

    def takes(self, name: str) -> bool:
        included = self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not self.excludes(name)


def _find_channels(model: nn.Module, inputs: _Inputs, chosen: _Selection) -> Findings:
    layers = dict(channel_layers(model))
    try:
        with torch.enable_grad():
            found = coupled_channels(model, inputs.run)
    except Exception as error:  # the graph knows only what its authors have thought of
        reason = f"torch-pruning's dependency graph cannot be built ({_spell(error)})"
        return Findings(refused={name: reason for name in layers if chosen.takes(name)})
    groups = []
    for group in found.groups:
        left_out = [name for name in group.layers if name in layers and not chosen.takes(name)]
        left_out += [name for part in group.outputs if chosen.excludes(name := part.name.rpartition(".")[0])]
        if left_out:
            reason = f"its channels are coupled with those of '{left_out[0]}', which is not to be pruned"
            found.refused.update(dict.fromkeys(group.layers, reason))
        else:
            groups.append(group)
    found.groups = groups
    in_groups = {name for group in groups for name in group.layers}
    reasons = {
        name: found.refused.get(name) or _unreached(child)
        for name, child in layers.items()
        if name not in in_groups and chosen.takes(name)
    }
    found.refused = reasons
    return found


def _unreached(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "attention has no channels of its own; its heads can be pruned (granularity 'head')"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)):
        return f"there is no dependency rule for {type(module).__name__}"
    if is_computed(module):
        return "its weight is computed from other parameters (weight_norm, parametrize, prune): remove that first"
    return "the example inputs do not reach it, or no gradient passes through it"


def _find_heads(model: nn.Module, chosen: _Selection) -> Findings:
    found = Findings()
    tensors = _tensors_by_name(model)
    known, refused = find_attentions(model)
    found.refused = {name: reason for name, reason in refused.items() if chosen.takes(name)}
    for attention in known:
        names = (attention.name, *attention.projections)
        if any(map(chosen.takes, names)) and not any(map(chosen.excludes, (*names, attention.output))):
            group = heads_of(attention, tensors)
            if group is not None:
                found.groups.append(group)
            else:
                is_shared = attention.key_heads < attention.heads
                found.refused[attention.name] = "it has one head" + " for each of keys and values" * is_shared
    return found


def _dead(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return which units to cut, a mask: those that are zero throughout, equally many of each block, and not all."""
    alive = torch.zeros(group.units, dtype=torch.bool)
    for part in group.outputs:
        if part.name not in tensors:
            raise ValueError(f"`groups` are those of another module: it has no '{part.name}'.")
        tensor = tensors[part.name].detach()
        lines = (tensor != 0).movedim(part.dim, 0).flatten(1).any(1) if tensor.dim() > 1 else tensor != 0
        alive |= lines.cpu()[part.index.cpu()].any(1)
    dead = ~alive.reshape(group.blocks, -1)
    count = min(int(dead.sum(1).min()), dead.shape[1] - 1)
    return (dead & (dead.cumsum(1) <= count)).reshape(-1)


def _zero_but_refused(module: nn.Module, refused: Mapping[str, str]) -> dict[str, str]:
    """Return the refused layers that have rows of zeros, and the reasons."""
    stay = {}
    for name, layer in channel_layers(module):
        weight = getattr(layer, "weight", None)
        if name in refused and isinstance(weight, Tensor):
            is_transposed = getattr(layer, "transposed", False)
            zero = (weight.detach() == 0).movedim(1 if is_transposed else 0, 0).flatten(1).all(1)
            bias = getattr(layer, "bias", None)
            if isinstance(bias, Tensor) and bias.shape == zero.shape:
                zero &= bias.detach() == 0
            if bool(zero.any()) and not bool(zero.all()):
                stay[name] = refused[name]
    tensors = _tensors_by_name(module)
    for attention in find_attentions(module)[0]:
        group = heads_of(attention, tensors) if attention.name in refused else None
        if group is not None and bool(_dead(group, tensors).any()):
            stay[attention.name] = refused[attention.name]
    return stay


# Proof ---------------------------------------------------------------------------------------------------------------


class _Proof:
    """Tries groups on a copy of the model: masked and cut, it must answer alike."""

    def __init__(self, model: nn.Module, inputs: Sequence[_Inputs]) -> None:
        self.model, self.inputs = model, inputs
        self.generator = torch.Generator().manual_seed(0)
        self.trains = self._trains()[0]

    def prove(self, found: Findings) -> list[ChannelGroup]:
        """Return the groups that pass; write why the others do not."""
        certain = [group for group in found.groups if group.name not in found.doubtful]
        passed = self._passing(certain, found.refused)
        is_whole = len(passed) == len(certain)
        for group in found.groups:
            if group.name in found.doubtful and (more := self._passing([group], found.refused)):
                passed, is_whole = passed + more, False
        if not is_whole and len(passed) > 1:
            passed = self._passing_together(passed, found.refused)
        return [group for group in found.groups if group in passed]

    def _passing(self, groups: list[ChannelGroup], refused: dict[str, str]) -> list[ChannelGroup]:
        """Try all at once, and halves of what fails."""
        reason = self._fault(groups) if groups else None
        if reason is None:
            return groups
        if len(groups) == 1:
            refused.update(dict.fromkeys(groups[0].layers, reason))
            return []
        middle = len(groups) // 2
        return self._passing(groups[:middle], refused) + self._passing(groups[middle:], refused)

    def _passing_together(self, groups: list[ChannelGroup], refused: dict[str, str]) -> list[ChannelGroup]:
        if self._fault(groups) is None:
            return groups
        together: list[ChannelGroup] = []
        for group in groups:
            reason = self._fault([*together, group])
            if reason is None:
                together.append(group)
            else:
                refused.update(dict.fromkeys(group.layers, reason))
        return together

    def _fault(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Return what goes wrong when one unit of each group is cut out, and when half of them are."""
        for share in (0.0, 0.5):
            gone = {group: self._some(group, share) for group in groups}
            if (reason := difference(self.model, self.inputs, gone, _PROOF)) is not None:
                return reason
        undo = cut(self.model, gone)
        works, error = self._trains()  # some layers run in this mode only
        undo()
        return None if works or not self.trains else f"the model does not train without some of them ({error})"

    def _trains(self) -> tuple[bool, str]:
        """Return whether the model runs in training mode, and why not."""
        try:
            self.inputs[0].run(self.model.train())
        except Exception as error:
            return False, _spell(error)
        finally:
            self.model.eval()
        return True, ""

    def _some(self, group: ChannelGroup, share: float) -> Tensor:
        """Return which units to try, a mask: of each block at least one, and not all."""
        length = group.units // group.blocks
        count = min(max(1, int(length * share)), length - 1)
        order = torch.rand(group.blocks, length, generator=self.generator).argsort(dim=1)
        return (order < count).reshape(-1)


def _check(model: nn.Module, inputs: _Inputs, gone: Mapping[ChannelGroup, Tensor]) -> None:
    """Raise if a copy of the module answers otherwise when units that are zero are cut out."""
    both = [inputs, *inputs.other_batch(model)]
    reason = difference(model, both, gone, _CHECK)
    if reason is None:
        return
    try:  # rounding differs with the number of terms, and adds up in deep models
        if difference(model.double(), [given.double() for given in both], gone, _CHECK) is None:
            return
    except Exception:
        pass
    model.float()
    alone = [group for group, units in gone.items() if difference(model, both, {group: units}, _CHECK) is not None]
    names = _list([group.name for group in alone or gone])
    raise ValueError(
        f"The channels or heads of {names} that are zero cannot be cut out: {reason}. The module was not changed; "
        f"give the `groups` without them to cut the rest."
    )


def difference(
    model: nn.Module, inputs: Sequence[_Inputs], gone: Mapping[ChannelGroup, Tensor], tolerance: float
) -> str | None:
    """Compare a model without units to itself with their outputs zero; return what differs, ``None`` if nothing."""
    with _unrounded(model):
        return _difference(model, inputs, gone, tolerance)


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Switch off what rounds (any child with a switch `is_on`): a sum in another order may round to another integer."""
    rounding = [child for child in model.modules() if getattr(child, "is_on", None) is True]
    for child in rounding:
        child.is_on = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for child in rounding:
            child.is_on = True  # type: ignore[assignment]


def _difference(
    model: nn.Module, inputs: Sequence[_Inputs], gone: Mapping[ChannelGroup, Tensor], tolerance: float
) -> str | None:
    with _zeroed(model, gone):
        masked = [given.run(model) for given in inputs]
    try:
        undo = cut(model, gone)
    except _Unfit as error:
        return str(error)
    try:
        smaller = [given.run(model) for given in inputs]
    except Exception as error:
        return f"the model does not run without some of them ({_spell(error)})"
    finally:
        undo()
    for before, after in zip(masked, smaller, strict=True):
        if (reason := _compare(before, after, tolerance)) is not None:
            return reason
    return None


def _compare(before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float) -> str | None:
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return "its width is that of an output of the model"
    for expected, got in zip(before, after, strict=True):
        same = (expected == got) | (expected.isnan() & got.isnan())
        if bool(same.all()):
            continue
        if not expected.is_floating_point() and not expected.is_complex():
            return "without them the model gives another answer"
        finite = expected[expected.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        error = float((expected - got).abs()[~same].max())
        if not error <= tolerance * scale:
            return (
                f"without them the model gives another answer than with zeros (by {error:.2g} of {scale:.2g}): "
                f"something makes a value of a zero (such as a sigmoid), or takes a statistic over the channels"
            )
    return None


def _spell(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")


def _randomized(model: nn.Module, inputs: _Inputs) -> tuple[nn.Module, _Inputs]:
    """Return the model with values at which a constant that only looks like zero shows up."""
    noisy = inputs.noisy()
    for change in (_randomize_all, _randomize_constants):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed)
        outputs = noisy.run(changed)
        if all(bool(tensor.isfinite().any()) for tensor in outputs):  # where all is NaN, all is alike
            return changed, noisy
    return model, inputs


def _randomize_all(model: nn.Module) -> None:
    for child, name, tensor in _floating(model):
        if isinstance(tensor, nn.Parameter):
            if tensor.dim() > 1 and "weight" in name:
                fan_in = 1 if isinstance(child, nn.Embedding) else tensor[0].numel()
                gain = 2.0 if isinstance(child, nn.modules.conv._ConvNd) else 1.0
                tensor.copy_(torch.randn(tensor.shape) * (gain / fan_in) ** 0.5)
            else:
                tensor.add_((torch.randn(tensor.shape) * 0.1).to(tensor))
    _randomize_constants(model)


def _randomize_constants(model: nn.Module) -> None:
    for child, name, tensor in _floating(model):
        is_norm = "norm" in type(child).__name__.lower()
        if name == "running_var" or (name == "weight" and is_norm):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
        elif name == "running_mean" or (name.endswith("bias") and tensor.dim() == 1):
            tensor.copy_(torch.randn(tensor.shape) * 0.3)


def _floating(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the parameters and buffers of a model that are floating point, shared ones once, with their holders."""
    seen: set[int] = set()
    for child in model.modules():
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                yield child, name, tensor


# Copies and runs -----------------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave random numbers, warnings and torch's switches as they were; meanwhile compute plainly, and in silence."""
    on_gpu = torch.cuda.is_initialized()
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    is_fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(random.setstate, state)
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy_state)
        stack.callback(torch.backends.mha.set_fastpath_enabled, is_fast)
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no submodule, and takes whole attention only
        for place, switch, value in _precision_switches():
            stack.callback(setattr, place, switch, getattr(place, switch))
            setattr(place, switch, value)
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()))
        for context in (torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)):
            stack.enter_context(context)
        if on_gpu:
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _seed()
        yield


def _precision_switches() -> list[tuple[Any, str, Any]]:
    """Return what computes float32 in TF32 or bfloat16, and the value with which it does not."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    if hasattr(cuda, "fp32_precision"):
        operations = (cuda, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        return [(operation, "fp32_precision", "ieee") for operation in operations]
    return [(cuda, "allow_tf32", False), (cudnn, "allow_tf32", False)]  # before torch 2.9


def _seed() -> None:
    # torch.manual_seed would also seed devices that are not initialized yet, for good.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(0)


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode, in float32, with gradients, and without hooks, trainer or compiled code.

    Of parameters that are sharded (DTensors) it holds the whole; all processes have to call this then.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"Channels and heads cannot be cut: '{name}' is not initialized yet.")
        if isinstance(tensor := parameter.detach(), DTensor):
            memo[id(parameter)] = nn.Parameter(tensor.full_tensor(), parameter.requires_grad)
    try:
        with original_classes(module):
            model = standalone_copy(module, memo)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied, so nothing can be tried ({_spell(error)})."
        ) from error
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        model = model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


class _Inputs:
    """The inputs of a model, and the way to call it with them."""

    def __init__(self, example: Any, model: nn.Module) -> None:
        first = next(model.parameters(), torch.zeros(0))

        def place(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(first.device)
            return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

        self.example = _map(example, place)

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return the tensors among the model's outputs, with the same random numbers each time."""
        _seed()
        example = _map(self.example, torch.clone)
        if isinstance(example, dict):
            out = model(**example)
        elif isinstance(example, tuple):
            out = model(*example)
        else:
            out = model(example)
        return list(tensors_of(out))

    def run_first(self, model: nn.Module) -> None:
        """Run the model, and raise if it does not take these inputs or gives nothing to compare."""
        name = type(model).__name__
        try:
            outputs = self.run(model)
        except Exception as error:
            raise ValueError(
                f"`example_inputs` do not run through {name} in eval mode ({_spell(error)}). Give what its `forward` "
                f"takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments."
            ) from error
        if not outputs:
            raise ValueError(f"{name} returns no tensor for `example_inputs`, so nothing could be checked.")

    def noisy(self) -> _Inputs:
        """Return the same inputs, with noise in the place of constant ones, which would hide much."""
        return self._mapped(lambda tensor: torch.randn_like(tensor) if _is_flat(tensor) else tensor)

    def double(self) -> _Inputs:
        """Return the same inputs in float64."""
        return self._mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def other_batch(self, model: nn.Module) -> list[_Inputs]:
        """Return random inputs, one more than there are where the model takes that; none if it takes no others."""
        sizes: list[int] = [tensor.shape[0] for tensor in tensors_of(self.example) if tensor.dim()]
        for size in (sizes[0] + 1, sizes[0]) if sizes else ():
            other = self._mapped(lambda tensor, size=size: _resampled(tensor, sizes[0], size))
            try:
                other.run(model)
            except Exception:  # a batch size may be written into the model
                continue
            return [other]
        return []

    def _mapped(self, change: Callable[..., Tensor]) -> _Inputs:
        other = copy.copy(self)
        other.example = _map(self.example, change)
        return other


def _is_flat(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())


def _resampled(tensor: Tensor, batch: int, size: int) -> Tensor:
    """Return values like those of a tensor, in a batch of another size; masks and the like keep their values."""
    if not tensor.dim() or tensor.shape[0] != batch:
        return tensor
    rows = torch.arange(size, device=tensor.device) % batch
    tensor = tensor[rows]
    if tensor.is_floating_point() and tensor.unique().numel() > 2 and bool(tensor.isfinite().all()):
        return tensor.mean() + tensor.std() * torch.randn_like(tensor)
    if tensor.dtype in (torch.int32, torch.int64) and tensor.numel():
        flat = tensor.reshape(-1)
        return flat[torch.randperm(flat.numel(), device=flat.device)].reshape(tensor.shape)
    return tensor


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output: a tensor, or a list, tuple, mapping or dataclass of such.

    Example::

        >>> [t.item() for t in tensors_of({"a": torch.tensor(1), "b": [torch.tensor(2), None]})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


# Cutting -------------------------------------------------------------------------------------------------------------


class _Unfit(Exception):
    """A tensor or layer that cannot be made smaller."""


def cut(module: nn.Module, gone: Mapping[ChannelGroup, Tensor]) -> Callable[[], None]:
    """Cut units out of a module, in place, and return what undoes it.

    Parameters and buffers stay the objects that they are, with less data; attributes such as `out_channels` follow.

    Args:
        module: The module.
        gone: For each group a mask of the units to cut, True for those that go.
    """
    tensors = _tensors_by_name(module)
    keep, counts = _kept(gone, module)
    new = {}
    for name, dims in keep.items():
        data = tensors[name].detach()
        for dim, positions in dims.items():
            data = data.index_select(dim, positions.to(data.device))
        new[name] = data
    return _assign(module, new, counts, keep)


def _with_scales(outputs: Iterable[Slice], tensors: Mapping[str, Tensor], owners: Mapping[str, Any]) -> Iterator[Slice]:
    """Yield the outputs, and beside a weight the scales that a quantizer has learned for its channels."""
    for part in outputs:
        yield part
        # "conv.weight" has "conv.weight_quantizer", "attention.in_proj_weight" has "attention.in_proj_quantizer".
        name = f"{part.name.removesuffix('_weight')}_quantizer.scale"
        scale = tensors.get(name)
        if scale is not None and owners[name].axis == part.dim and len(scale) == tensors[part.name].shape[part.dim] > 1:
            yield replace(part, name=name, dim=0)


def _kept(
    gone: Mapping[ChannelGroup, Tensor], module: nn.Module
) -> tuple[dict[str, dict[int, Tensor]], dict[str, int]]:
    """Return the positions that stay of each tensor and dimension, and what integer attributes lose."""
    tensors, owners = _tensors_by_name(module), _owners(module)
    lost: dict[tuple[int, int], Tensor] = {}
    first: dict[int, str] = {}
    counts: dict[str, int] = {}
    for group, units in gone.items():
        if not bool(units.any()):
            continue
        for part in (*_with_scales(group.outputs, tensors, owners), *group.inputs):
            positions = part.index[units.to(part.index.device)].reshape(-1)
            if part.name not in tensors:
                counts[part.name] = counts.get(part.name, 0) + positions.numel()
                continue
            tensor = tensors[part.name]
            first.setdefault(id(tensor), part.name)
            key = (id(tensor), part.dim)
            mask = lost.setdefault(key, torch.zeros(tensor.shape[part.dim], dtype=torch.bool))
            mask[positions] = True
    keep: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (tensor_id, dim), mask in lost.items():
        keep[first[tensor_id]][dim] = (~mask).nonzero().squeeze(1)
    return keep, counts


def _cut_states(
    module: nn.Module, gone: Mapping[ChannelGroup, Tensor], optimizers: Sequence[Optimizer]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return what to write where in the optimizers' states: each tensor in the shape of its parameter, cut like it."""
    tensors = _tensors_by_name(module)
    keep, _ = _kept(gone, module)
    names = {id(tensors[name]): name for name in keep}
    writes: list[tuple[dict[str, Any], str, Tensor]] = []
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
            raise ValueError("The state of LBFGS, which mixes all parameters, cannot be cut. Make a new optimizer.")
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                continue
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.numel() == 1:
                    continue
                shape = tuple(parameter.shape)
                pairs = list(zip(value.shape, shape, strict=False))
                if value.dim() != len(shape) or any(own not in (1, full) for own, full in pairs):
                    raise ValueError(
                        f"The state '{key}' that {type(optimizer).__name__} keeps for '{name}' has shape "
                        f"{tuple(value.shape)}, the parameter {shape}: it cannot be cut along. Remove channels without "
                        f"`optimizer`, and make a new one."
                    )
                for dim, positions in keep[name].items():
                    if value.shape[dim] == shape[dim]:
                        value = value.index_select(dim, positions.to(value.device))
                writes.append((state, key, value))
    return writes


def _assign(
    module: nn.Module,
    new: Mapping[str, Tensor],
    counts: Mapping[str, int],
    keep: Mapping[str, Mapping[int, Tensor]],
) -> Callable[[], None]:
    """Give tensors new data, and set the attributes that follow from their shapes."""
    undo: list[Callable[[], None]] = []

    def roll_back() -> None:
        while undo:
            undo.pop()()

    def set_attribute(owner: nn.Module, name: str, value: Any) -> None:
        old = getattr(owner, name)
        undo.append(lambda: object.__setattr__(owner, name, old))
        object.__setattr__(owner, name, value)

    tensors = _tensors_by_name(module)
    owners = _owners(module)
    known, _ = find_attentions(module)
    try:
        for name, data in new.items():
            tensor = tensors[name]
            grad = tensor.grad
            undo.append(partial(_set_data, tensor, tensor.data, grad))
            if grad is not None:
                for dim, positions in keep.get(name, {}).items():
                    grad = grad.index_select(dim, positions.to(grad.device))
            _set_data(tensor, data, grad if grad is not None and grad.shape == data.shape else None)
        changed = {id(tensors[name]) for name in new}
        for name, tensor in tensors.items():
            if id(tensor) in changed:
                for attribute, value in _widths(owners[name], name).items():
                    set_attribute(owners[name], attribute, value)
        for name, count in counts.items():
            path, _, attribute = name.rpartition(".")
            owner = _module_by_name(module, path)
            set_attribute(owner, attribute, getattr(owner, attribute) - count)
        for attention in known:
            _fit_attention(attention, module, set_attribute)
    except BaseException:
        roll_back()
        raise
    return roll_back


def _set_data(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None
    tensor.data = data
    tensor.grad = grad


def _widths(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the attributes of a layer that follow from the new shape of a tensor that it holds."""
    attribute = name.rpartition(".")[2]
    tensor: Tensor = getattr(module, attribute)
    shape = tuple(tensor.shape)
    if isinstance(module, nn.Linear) and attribute == "weight":
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        per_in, per_out = module.in_channels // module.groups, module.out_channels // module.groups
        ins, outs = (1, 0) if not module.transposed else (0, 1)
        groups = module.groups
        if module.groups > 1 and 1 in (per_in, per_out):  # whole groups go
            groups = shape[0] // (per_in if module.transposed else per_out)
        if module.transposed:
            return {"in_channels": shape[ins], "out_channels": shape[outs] * groups, "groups": groups}
        return {"in_channels": shape[ins] * groups, "out_channels": shape[outs], "groups": groups}
    if isinstance(module, nn.GroupNorm) and attribute == "weight":
        width = module.num_channels // module.num_groups
        return {"num_channels": shape[0], "num_groups": shape[0] // width}
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return {"num_features": shape[0]} if attribute in ("weight", "running_mean") else {}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(module, nn.Embedding) and attribute == "weight":
        return {"embedding_dim": shape[1]}
    if isinstance(module, nn.LSTM) and attribute == "weight_ih_l0":
        return {"input_size": shape[1]}
    return {}


def _fit_attention(
    attention: Attention, module: nn.Module, set_attribute: Callable[[nn.Module, str, Any], None]
) -> None:
    """Set the numbers of heads of an attention module to what its output layer now joins."""
    output = _module_by_name(module, attention.output)
    assert isinstance(output, nn.Linear)
    rest = output.weight.shape[1]
    if rest == attention.heads * attention.size:
        return
    heads, uneven = divmod(rest, attention.size)
    if uneven or heads % (attention.key_heads if attention.key_heads < attention.heads else 1):
        raise _Unfit(f"'{attention.name}' would not keep whole heads")
    owner = attention.module
    if isinstance(owner, nn.MultiheadAttention):
        set_attribute(owner, "num_heads", heads)
        # The fused kernels of the encoder layer know no such attention; this flag of torch's keeps them away.
        set_attribute(owner, "_qkv_same_embed_dim", False)
        if not isinstance(owner, PlainMultiheadAttention):  # one that rounds copes with fewer heads as it is
            set_attribute(owner, "__class__", PrunedMultiheadAttention)
        for child in module.modules():
            if isinstance(child, nn.TransformerEncoder):
                set_attribute(child, "use_nested_tensor", False)
                set_attribute(child, "enable_nested_tensor", False)
        return
    key_heads = heads if attention.key_heads == attention.heads else attention.key_heads
    for name, value in attention.attributes(heads, key_heads).items():
        set_attribute(owner, name, value)


def _tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    pairs = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {clean_name(name): tensor for name, tensor in pairs}


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    """Return for the name of each tensor the module that holds it."""
    owners = {}
    for path, child in module.named_modules(remove_duplicate=False):
        for name in [*child._parameters, *child._buffers]:
            owners[clean_name(f"{path}.{name}" if path else name)] = child
    return owners


def _module_by_name(module: nn.Module, name: str) -> nn.Module:
    found = {clean_name(path): child for path, child in module.named_modules(remove_duplicate=False)}
    return found[name]


@contextmanager
def _zeroed(module: nn.Module, gone: Mapping[ChannelGroup, Tensor]) -> Iterator[None]:
    """Set the outputs of units to zero for a while."""
    tensors = _tensors_by_name(module)
    saved: dict[str, Tensor] = {}
    try:
        for group, units in gone.items():
            for part in group.outputs:
                tensor = tensors[part.name].detach()
                saved.setdefault(part.name, tensor.clone())
                positions = part.index[units.to(part.index.device)].reshape(-1)
                tensor.index_fill_(part.dim, positions.to(tensor.device), 0.0)
        yield
    finally:
        for name, value in saved.items():
            tensors[name].detach().copy_(value)
