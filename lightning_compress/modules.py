"""Which modules and parameters a pattern means. Shared (tied) parameters are counted once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

WEIGHTED = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
"""The module types that a technique acts on where the user gives no name."""

# What wrappers put into a name; users write the names of the model that they wrote.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


@dataclass(eq=False)
class Target:
    """A parameter that a technique acts on.

    Args:
        name: Its qualified name, the first where several modules share it: ``"net.0.weight"``.
        module_name: The qualified name of the module that holds it.
        module: That module.
        attribute: Its name in the module.
        aliases: The other names that it has.
    """

    name: str
    module_name: str
    module: nn.Module
    attribute: str
    aliases: list[str] = field(default_factory=list)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module holds it now, also after a move to another device has replaced it."""
        return getattr(self.module, self.attribute)


def clean_name(name: str) -> str:
    """Return a qualified name without what ``torch.compile``, FSDP and activation checkpointing put into it.

    Example::

        >>> clean_name("net._orig_mod.0")
        'net.0'
    """
    return _WRAPPERS.sub("", name).rstrip(".")


def as_patterns(value: str | Sequence[str] | None, name: str) -> tuple[str, ...] | None:
    """Return patterns as a tuple of strings; one string is one pattern.

    Raises:
        TypeError: If it is neither a string nor a sequence of strings.
        ValueError: If the sequence is empty or holds an empty string.
    """
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`{name}` must be a name pattern such as 'backbone.*', or a list of them, got {value!r}.")
    if not patterns or not all(patterns):
        raise ValueError(f"`{name}` must name something: give patterns such as 'backbone.*', or None; got {value!r}.")
    return tuple(patterns)


def select_parameters(
    module: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    parameters: Sequence[str] = ("weight",),
    types: tuple[type[nn.Module], ...] = WEIGHTED,
) -> list[Target]:
    """Return the parameters that patterns mean, in the order of ``module.named_modules()``, tied ones once.

    `include` and `exclude` are ``fnmatch`` patterns on the qualified names of modules. Only modules of `types` are
    taken; a pattern without wildcards names its module whatever the type is. A parameter that an excluded module shares
    is left alone under its other names too. Within a module, ``"weight"`` stands for every parameter that has the word
    in its name (``weight_ih_l0``, ``in_proj_weight``), and vectors count as weights nowhere (the weight of a norm).

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> [target.name for target in select_parameters(net)]
        ['0.weight', '2.weight']
        >>> [target.name for target in select_parameters(net, exclude=["2"])]
        ['0.weight']

    Raises:
        ValueError: If a pattern matches no module (with the closest names), if a pattern or all together leave nothing,
            or if a parameter is reparametrized or not yet initialized.
    """
    modules = {clean_name(name): child for name, child in module.named_modules(remove_duplicate=False)}
    del modules[""]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            refuse_if_no_match(pattern, modules, argument)

    taken: dict[int, Target] = {}
    excluded: set[int] = set()
    fruitful: set[str] = set()
    for name, child in modules.items():
        matching = [pattern for pattern in include or ("*",) if fnmatchcase(name, pattern)]
        is_excluded = any(fnmatchcase(name, pattern) for pattern in exclude or ())
        if not is_excluded and not matching:
            continue
        named_outright = name in matching
        if not (is_excluded or named_outright or isinstance(child, types)):
            continue
        if is_excluded:
            excluded.update(id(parameter) for parameter in child.parameters(recurse=False))
            continue
        found = _own_parameters(name, child, parameters)
        if found:
            fruitful.update(matching)
        for attribute, parameter in found:
            full_name = f"{name}.{attribute}"
            if id(parameter) in taken:
                taken[id(parameter)].aliases.append(full_name)
            else:
                taken[id(parameter)] = Target(full_name, name, child, attribute)

    for pattern in include or ():
        if pattern not in fruitful and not all(
            any(fnmatchcase(name, out) for out in exclude or ()) for name in modules if fnmatchcase(name, pattern)
        ):
            raise ValueError(_nothing_to_do(pattern, modules, parameters))
    targets = [target for key, target in taken.items() if key not in excluded]
    if not targets:
        raise ValueError(
            f"Nothing to act on: {type(module).__name__} has no parameter {_spell(parameters)} that "
            f"`include={include}` and `exclude={exclude}` leave. "
            f"By default these module types count: {_spell(t.__name__ for t in types)}."
        )
    return targets


def _own_parameters(name: str, module: nn.Module, kinds: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    reparametrized = _reparametrized(module)
    for attribute in reparametrized:
        if _is_kind(attribute, kinds):
            raise ValueError(
                f"'{name}.{attribute}' is computed from other parameters (weight_norm, spectral_norm, "
                f"torch.nn.utils.parametrize or prune). Remove that first, or add '{name}' to `exclude`."
            )
    found = []
    for attribute, parameter in module.named_parameters(recurse=False):
        if not _is_kind(attribute, kinds):
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"'{name}.{attribute}' is not initialized yet. Run one batch through the model before `trainer.fit`, "
                f"or add '{name}' to `exclude`."
            )
        is_vector = parameter.dim() < 2
        if is_vector and "bias" not in attribute:
            continue
        if not torch.is_floating_point(parameter) or not parameter.numel():
            continue
        found.append((attribute, parameter))
    return found


def _reparametrized(module: nn.Module) -> list[str]:
    names = list(getattr(module, "parametrizations", {}))
    own = dict(module.named_parameters(recurse=False))
    names += [name[: -len("_orig")] for name in own if name.endswith("_orig")]  # prune and the older spectral_norm
    names += [
        name[: -len("_v")] for name in own if name.endswith("_v") and f"{name[:-2]}_g" in own
    ]  # older weight_norm
    return names


def _is_kind(attribute: str, kinds: Sequence[str]) -> bool:
    """Whether a parameter's name is meant: the name itself, a pattern, or one of the words that it is made of."""
    return any(fnmatchcase(attribute, kind) or kind in attribute.split("_") for kind in kinds)


def named_module(root: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the module of a qualified name; ``""`` is the root, and a compiled module answers for what it wraps.

    Example::

        >>> named_module(nn.Sequential(nn.Linear(4, 2)), "0", "module")
        Linear(in_features=4, out_features=2, bias=True)

    Raises:
        ValueError: If there is none, with the closest names.
    """
    modules: dict[str, nn.Module] = {}
    for own, child in root.named_modules(remove_duplicate=False):
        modules.setdefault(clean_name(own), child)
    if name not in modules:
        raise ValueError(
            f"`{argument}` names '{name}', and {type(root).__name__} has no such module. "
            f"The closest names: {_spell(_closest(name, modules))}."
        )
    return modules[name]


def refuse_if_no_match(pattern: str, modules: dict[str, nn.Module], argument: str) -> None:
    """Raise ``ValueError`` where a pattern matches none of the names of modules, with the closest of them."""
    if not any(fnmatchcase(name, pattern) for name in modules):
        raise ValueError(
            f"`{argument}` pattern '{pattern}' matches no module. "
            f"The closest names: {_spell(_closest(pattern, modules))}."
        )


def _closest(pattern: str, names: Iterable[str]) -> list[str]:
    names = [name for name in names if name]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    close = close or difflib.get_close_matches(pattern.replace("*", "").strip("."), names, n=3, cutoff=0.2)
    return close or names[:3]


def _nothing_to_do(pattern: str, modules: dict[str, nn.Module], parameters: Sequence[str]) -> str:
    matched = [name for name in modules if fnmatchcase(name, pattern)]
    holder = type(modules[matched[0]]).__name__
    hint = (
        f" To reach what is inside, write '{pattern}.*'."
        if len(matched) == 1 and any(name.startswith(f"{matched[0]}.") for name in modules)
        else ""
    )
    return (
        f"`include` pattern '{pattern}' matches {_spell(matched[:3])} ({holder}), which has no parameter "
        f"{_spell(parameters)} to act on.{hint}"
    )


def shorten(names: Sequence[str]) -> str:
    """Return names in one line, the middle left out where they are more than six.

    Example::

        >>> shorten(["a", "b"]), shorten(list("abcdefg"))
        ('a, b', 'a, b, c, …, g')
    """
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, …, {names[-1]}"


def _spell(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
