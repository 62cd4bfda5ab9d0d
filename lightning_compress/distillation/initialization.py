"""The student starts from the teacher's weights: whole layers, or the most important channels of wider ones."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.copying import standalone_copy
from lightning_compress.example_inputs import ExampleInputs, spell_shape
from lightning_compress.modules import clean_name, refuse_if_no_match
from lightning_compress.pruning.coupling import ChannelGroup, find_attentions
from lightning_compress.pruning.removal import channel_groups, cut
from lightning_compress.pruning.structure import make_fields

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Copied:
    """What of a student starts from the teacher. Each of its parameters and buffers is in one of the three.

    Tied ones count once, under the name by which they were found.

    Args:
        copied: The name in the teacher of each that was taken whole.
        narrowed: The same, where only the most important channels or heads were taken.
        left: Why each of the others stays as it is.
    """

    copied: dict[str, str]
    narrowed: dict[str, str]
    left: dict[str, str]

    def describe(self) -> str:
        """Return the numbers, and what is left, in one line.

        Example::

            >>> Copied({"a.weight": "a.weight"}, {}, {"b.weight": "wider than the teacher's"}).describe()
            "copied 1 of 2 tensors from the teacher; left: 'b.weight' (wider than the teacher's)"
        """
        took = len(self.copied) + len(self.narrowed)
        text = f"copied {took} of {took + len(self.left)} tensors from the teacher"
        if self.narrowed:
            text += f", {len(self.narrowed)} of them narrowed to its most important channels"
        if self.left:
            text += "; left: " + _list([f"'{name}' ({reason})" for name, reason in self.left.items()])
        return text


@torch.no_grad()
def copy_weights(
    student: nn.Module,
    teacher: nn.Module,
    mapping: Mapping[str, str] | None = None,
    example: ExampleInputs | None = None,
) -> Copied:
    """Copy the teacher's weights into the student, in place, and return what was copied from where.

    Meant for before training. Whatever ``state_dict`` holds is copied, values only: devices, dtypes and
    ``requires_grad`` stay, random numbers are not drawn, and the teacher is not changed.

    Without a `mapping` the names decide. One side, or each, may have a prefix that the other lacks (``net.fc1.weight``
    in a LightningModule, ``fc1.weight`` in the plain model): of all pairs of "no prefix" and the names of children the
    one is taken by which most names match, then most shapes, then the shortest. A child stands for the whole on both
    sides only where it holds more than half of its side.

    A `mapping` says which of the teacher's layers each of the student's layers starts from, with all that is below; of
    two nested ones the inner decides. The rest is copied by name, except for the neighbours of a mapped layer in the
    same ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict``: where a student's ``layers.1`` is the teacher's
    ``layers.2``, equal numbers mean nothing. Every second layer is how DistilBERT starts (Sanh et al. 2019, arXiv
    1910.01108).

    Where the student's layers are narrower, the channels and heads of the teacher that matter most are taken, the same
    ones in all that share or read them: the layers before an addition, batch norms, the inputs of what follows. The
    score of a unit is the L2 norm of the weights that make it, over all layers that make it together (Fang et al. 2023,
    arXiv 2301.12900). A student that is narrower everywhere, of the same depth, then computes what the teacher without
    the other channels computes. Which channels go together is found by `pruning.removal.channel_groups`; widths over
    which a layer norm or the model's output runs cannot be cut.

    Args:
        student: The model to change.
        teacher: The model to copy from.
        mapping: ``{"student.layer": "teacher.layer"}``, qualified names of modules, ``""`` for the whole model.
        example: What the teacher's ``forward`` takes. Needed only where the student is narrower.

    Example::

        >>> teacher = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = teacher[0].weight.data.copy_(torch.tensor([[1.0], [5.0], [-3.0]]))
        >>> student = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> copy_weights(student, teacher, example=ExampleInputs((torch.randn(4, 1),))).describe()
        'copied 4 of 4 tensors from the teacher, 3 of them narrowed to its most important channels'
        >>> student[0].weight.tolist()
        [[5.0], [-3.0]]

    Raises:
        TypeError: If `mapping` does not map names to names.
        ValueError: If no names match, a name in `mapping` is unknown, two mapped layers have nothing in common or have
            shapes that do not fit, a parameter is not initialized yet, or the teacher does not run on `example`. The
            student is as it was then.
    """
    own, given = _entries(student), _entries(teacher)
    left: dict[str, str] = {}
    mapped = _mapped(student, teacher, own, given, mapping, left)
    pairs = {**mapped, **{name: source for name, source in _by_name(own, given).items() if name not in mapped | left}}
    if not pairs:
        raise ValueError(
            f"None of the names of {type(student).__name__} ({_list(map(repr, own))}) is among those of the teacher "
            f"{type(teacher).__name__} ({_list(map(repr, given))}). Map layers: {{'student.layer': 'teacher.layer'}}."
        )
    sources: Mapping[str, Tensor] = given
    reasons: Mapping[str, str] = {}
    if example is not None and any(_is_narrower(own[name], given[source]) for name, source in pairs.items()):
        sources, reasons = _narrowed(student, teacher, own, given, pairs, example)

    copied: dict[str, str] = {}
    narrowed: dict[str, str] = {}
    plan: dict[int, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys((*pairs, *own)):
        tensor, source = own[name], pairs.get(name)
        if id(tensor) in plan:
            continue
        if source is None:
            left.setdefault(name, "the teacher has none of that name")
        elif tensor.shape == sources[source].shape:
            plan[id(tensor)] = tensor, sources[source]
            (copied if tensor.shape == given[source].shape else narrowed)[name] = source
        else:
            left[name] = _reason(tensor, given[source], example, reasons.get(source))
            if name in mapped:
                raise ValueError(
                    f"`mapping`: '{name}' ({spell_shape(tensor.shape)}) cannot start from the teacher's '{source}' "
                    f"({spell_shape(given[source].shape)}): {left[name]}. Map layers that fit, or leave this one out."
                )
    for tensor, value in plan.values():
        tensor.copy_(value)
    stays = {id(own[name]): name for name in reversed(left) if id(own[name]) not in plan}
    return Copied(copied, narrowed, {name: left[name] for name in reversed(stays.values())})


def _entries(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that ``state_dict`` holds themselves, by the names that the user gave them."""
    state = {clean_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    entries = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, tensor in entries.items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"'{name}' of {type(module).__name__} is not initialized yet. Run one batch through it first."
            )
    return entries


# Which tensor starts from which --------------------------------------------------------------------------------------


def _by_name(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the student's names and the teacher's that are the same behind the best pair of prefixes."""
    best: dict[str, str] = {}
    best_rank = (0, 0, 0)
    for prefix, names in _prefixed(own).items():
        for other, sources in _prefixed(given).items():
            if prefix and other and not (2 * len(names) > len(own) and 2 * len(sources) > len(given)):
                continue
            pairs = {prefix + rest: other + rest for rest in names if rest in sources}
            equal = sum(own[name].shape == given[source].shape for name, source in pairs.items())
            rank = len(pairs), equal, -len(prefix + other)
            if pairs and rank > best_rank:
                best, best_rank = pairs, rank
    return best


def _prefixed(names: Iterable[str]) -> dict[str, dict[str, None]]:
    """Return what follows each prefix that a name may have: none, or the name of a child."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for name in names:
        child, dot, rest = name.partition(".")
        found[""][name] = None
        if dot:
            found[f"{child}."][rest] = None
    return found


def _mapped(
    student: nn.Module,
    teacher: nn.Module,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    mapping: Mapping[str, str] | None,
    left: dict[str, str],
) -> dict[str, str]:
    """Return the names below mapped layers, the student's and the teacher's; write what stays on that account."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping) or not all(isinstance(name, str) for pair in mapping.items() for name in pair):
        raise TypeError(f"`mapping` must map names of layers, {{'student.layer': 'teacher.layer'}}, got {mapping!r}.")
    if not mapping:
        raise ValueError("`mapping` must name a pair of layers; give None to copy by matching names.")
    modules = _modules(student)
    for known, names in ((modules, mapping.keys()), (_modules(teacher), mapping.values())):
        named = {name: child for name, child in known.items() if name}
        for name in filter(None, names):
            refuse_if_no_match(glob.escape(name), named, "mapping")

    pairs: dict[str, str] = {}
    common: Counter[str] = Counter()
    containers = [found for layer in mapping if (found := _container(layer, modules)) is not None]
    for name in own:
        layer = max((layer for layer in mapping if _is_below(name, layer)), key=len, default=None)
        if layer is not None:
            rest = name[len(layer) :].lstrip(".")
            source = f"{mapping[layer]}.{rest}".lstrip(".")
            if source in given:
                pairs[name] = source
                common[layer] += 1
            else:
                left[name] = f"the teacher has no '{source}'"
        elif around := [container for container in containers if _is_below(name, container)]:
            left[name] = f"others in '{max(around, key=len)}' are mapped"
    for layer, source in mapping.items():
        if not common[layer]:
            raise ValueError(
                f"`mapping`: '{layer}' and the teacher's '{source}' have no parameter or buffer in common. "
                f"Map layers of the same kind."
            )
    return pairs


def _container(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the innermost list of modules that a layer is in."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(modules[name], _CONTAINERS):
            return name
    return None


def _is_below(name: str, layer: str) -> bool:
    return not layer or name.startswith(f"{layer}.")


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): child for name, child in module.named_modules(remove_duplicate=False)}


# Channels of a wider teacher -----------------------------------------------------------------------------------------


def _is_narrower(tensor: Tensor, source: Tensor) -> bool:
    return tensor.shape != source.shape and not _is_wider(tensor, source)


def _is_wider(tensor: Tensor, source: Tensor) -> bool:
    return tensor.dim() != source.dim() or any(a > b for a, b in zip(tensor.shape, source.shape, strict=True))


def _reason(tensor: Tensor, source: Tensor, example: ExampleInputs | None, reason: str | None) -> str:
    if tensor.dim() != source.dim():
        return f"of other dimensions than the teacher's, {spell_shape(source.shape)}"
    if _is_wider(tensor, source):
        return "wider than the teacher's"
    if tensor.shape == source.shape:
        return "what meets here is narrower than in the teacher"
    if example is None:
        return "narrower than the teacher's; give `example_input_array`"
    return f"narrower than the teacher's: {reason or 'what it lacks is no channel that can be cut'}"


def _narrowed(
    student: nn.Module,
    teacher: nn.Module,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    pairs: Mapping[str, str],
    example: ExampleInputs,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the teacher without the channels and heads that the student lacks, and why others stay."""
    groups: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    kinds: tuple[Literal["channel", "head"], ...] = ("channel", "head")
    for kind in kinds:
        more, why = channel_groups(teacher, example.for_forward(teacher), kind=kind)
        groups += more
        refused |= why
    reasons = {
        source: refused[layer]
        for name, source in pairs.items()
        if (layer := source.rpartition(".")[0]) in refused and own[name].shape[:1] != given[source].shape[:1]
    }

    first: dict[int, str] = {}  # groups know a tied tensor by its first name
    for name, tensor in given.items():
        first.setdefault(id(tensor), name)
    meet: dict[str, list[str]] = defaultdict(list)
    for name, source in pairs.items():
        meet[first[id(given[source])]].append(name)
    sizes, own_sizes = _unit_sizes(teacher), _unit_sizes(student)
    uses = Counter((part.name, part.dim) for group in groups for part in (*group.outputs, *group.inputs))

    chosen: dict[ChannelGroup, int] = {}
    for group in groups:
        parts = [(part, name) for part in (*group.outputs, *group.inputs) for name in meet.get(part.name, ())]
        wanted = {
            group.units - (given[part.name].shape[part.dim] - own[name].shape[part.dim]) / part.index.shape[1]
            for part, name in parts
            if own[name].dim() == given[part.name].dim() and uses[part.name, part.dim] == 1  # not where several meet
        }
        if not wanted or wanted == {group.units}:
            continue
        count = min(wanted)
        if any(own_sizes.get(name) != sizes.get(part.name) for part, name in parts):
            reason = "the student's heads, or groups of channels under one norm, are of another size"
        elif len(wanted) > 1:
            numbers = " and ".join(f"{number:g}" for number in sorted(wanted))
            reason = f"the student's layers differ in how many of the channels of '{group.name}' they have ({numbers})"
        elif count < 1 or not count.is_integer() or count % group.blocks:
            reason = f"it does not have a whole number of the units of '{group.name}'"
        else:
            chosen[group] = int(count)
            continue
        reasons |= {part.name: reason for part, _ in parts}

    smaller = standalone_copy(teacher)
    cut(smaller, _least_important(smaller, chosen))
    return _entries(smaller), reasons


def _unit_sizes(module: nn.Module) -> dict[str, int]:
    """Return what shapes do not tell of a layer, by the name of a weight: features of a head, channels under a norm."""
    norms = {
        f"{name}.weight".lstrip("."): child.num_channels // child.num_groups
        for name, child in _modules(module).items()
        if isinstance(child, nn.GroupNorm)
    }
    return norms | {f"{attention.output}.weight": attention.size for attention in find_attentions(module)[0]}


def _least_important(module: nn.Module, chosen: Mapping[ChannelGroup, int]) -> dict[ChannelGroup, Tensor]:
    """Return for each group a mask of the units that go, so that so many stay; of equal ones the first stay."""
    targets, fields = make_fields(module, list(chosen))
    squares = {i: target.parameter.detach().float().square() for i, target in enumerate(targets)}
    gone = {}
    for (group, count), units in zip(chosen.items(), fields, strict=True):
        order = units.reduce(squares).argsort(descending=True, stable=True)
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[order[: count // group.blocks].cpu()] = False
        gone[group] = mask.repeat(group.blocks)
    return gone


def _list(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
