"""What a module's forward is called with: given as an example, or seen at its first call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

LARGEST_BATCH = 64  # that much of what is seen is kept


@dataclass(frozen=True)
class ExampleInputs:
    """What a module's forward is called with.

    Example::

        >>> inputs = ExampleInputs((torch.zeros(5, 3),), {"scale": 2.0})
        >>> inputs.batch, inputs.resized(64).args[0].shape, inputs.resized(1).describe()
        (5, torch.Size([64, 3]), 'float32 1×3, scale=2.0')
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_example(cls, example: Any) -> ExampleInputs:
        """Read Lightning's ``example_input_array``: a tuple is positional, a dict keywords, all else one argument."""
        if isinstance(example, dict):
            return cls(kwargs=dict(example))
        return cls(tuple(example) if isinstance(example, tuple) else (example,))

    @property
    def batch(self) -> int:
        """The size of dimension 0, which all tensors share; numbers and tensors without dimensions have none.

        Raises:
            ValueError: If there is no tensor, if the sizes differ, or if something is neither tensor nor plain value.
        """
        sizes: list[int] = []
        for leaf in tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor):
                sizes += [leaf.shape[0]] if leaf.dim() else []
            elif not isinstance(leaf, (Real, str, type(None))):
                raise ValueError(f"an input of type {type(leaf).__name__} cannot be cut to another batch size")
        if not sizes or not sizes[0]:
            raise ValueError("the inputs hold no tensor with a batch dimension")
        if len(set(sizes)) > 1:
            raise ValueError(f"the inputs share no batch dimension: dimension 0 is {_spell_list(sorted(set(sizes)))}")
        return sizes[0]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of the batch, in all tensors together.

        Raises:
            ValueError: As for `batch`.
        """
        leaves = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves) // self.batch

    def resized(self, size: int) -> ExampleInputs:
        """Return the same inputs with another batch size: the rows from the first on, again and again.

        Raises:
            ValueError: As for `batch`.
        """
        batch = self.batch

        def resize(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim():
                return leaf
            return leaf.detach()[torch.arange(size, device=leaf.device) % batch]

        return ExampleInputs(tree_map(resize, self.args), tree_map(resize, self.kwargs))

    def for_forward(self, module: nn.Module) -> Any:
        """Return the inputs as one value: a tuple of positional arguments, or a dict where some go by keyword.

        Example::

            >>> ExampleInputs((1,), {"input2": 2}).for_forward(nn.Bilinear(1, 1, 1))
            {'input1': 1, 'input2': 2}
        """
        if not self.kwargs:
            return self.args
        return named_arguments(inspect.signature(module.forward).bind(*self.args, **self.kwargs))

    def to(self, device: torch.device | str) -> ExampleInputs:
        """Return the same inputs on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """Return the inputs with every tensor changed."""

        def apply(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        return ExampleInputs(tree_map(apply, self.args), tree_map(apply, self.kwargs))

    def describe(self) -> str:
        """Return the types and shapes in one line."""

        def spell(leaf: Any) -> str:
            if not isinstance(leaf, Tensor):
                return repr(leaf)
            return f"{spell_dtype(leaf.dtype)} {spell_shape(leaf.shape)}".rstrip()

        words = [", ".join(map(spell, tree_leaves(value))) for value in self.args]
        return ", ".join(
            words + [f"{name}={', '.join(map(spell, tree_leaves(value)))}" for name, value in self.kwargs.items()]
        )


class InputCapture:
    """Keeps what a module's forward receives at its first call; :meth:`remove` takes the hooks away.

    A call of the module counts, and one of its ``forward`` past all hooks, as many a ``training_step`` makes it. Where
    the module itself is not called, but one of its children that have parameters is (``self.net(x)`` in a
    ``training_step``), that child's inputs are kept. At most `LARGEST_BATCH` rows are copied, to the CPU.
    Compiled and scripted modules get no hook, since a hook would have them compiled again.

    Example::

        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> capture = InputCapture(net)
        >>> _ = net(torch.zeros(5, 3))
        >>> capture.remove()
        >>> name, inputs = capture.result()
        >>> name, inputs.describe()
        ('', 'float32 5×3')
    """

    def __init__(self, module: nn.Module) -> None:
        self._type = type(module).__name__
        self._found: dict[str, ExampleInputs | ValueError] = {}
        self._direct = _DirectForward.of(module) if _can_be_watched(module) else None
        self._handles = [
            child.register_forward_pre_hook(self._hook(name, child.forward), with_kwargs=True)
            for name, child in [("", module), *module.named_children()]
            if _can_be_watched(child)
        ]
        self._keep = self._hook("", module.forward)
        if self._direct is not None:
            self._direct.watchers.append(self._keep)

    def _hook(self, name: str, forward: Any) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Under DDP Lightning puts `training_step` in the place of `forward` for a moment: that call is not meant.
            if name in self._found or module.forward != forward:
                return
            try:
                inputs = ExampleInputs(args, kwargs)
                self._found[name] = inputs.resized(min(inputs.batch, LARGEST_BATCH)).to("cpu")
            except ValueError as error:
                self._found[name] = error

        return keep

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        if self._direct is not None:
            self._direct.release(self._keep)
            self._direct = None

    def result(self) -> tuple[str, ExampleInputs]:
        """Return the name of the module that was called (``""`` is the module itself) and its inputs.

        Raises:
            ValueError: If nothing was called, if several children were, or if the inputs have no batch dimension.
        """
        if not self._found:
            raise ValueError(f"the forward of {self._type} was not seen")
        name = "" if "" in self._found else next(iter(self._found))
        if name and len(self._found) > 1:
            called = _spell_list([f"'{child}'" for child in self._found])
            raise ValueError(f"{self._type}'s own forward is not called, and several of its modules are: {called}")
        found = self._found[name]
        if isinstance(found, ValueError):
            raise found
        return name, found


class _DirectForward:
    """Stands in for a module's forward while somebody watches it: no hook sees ``self.forward(x)``."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, vars(module).get("forward")
        self.__wrapped__ = module.forward  # where inspect.signature looks
        self.watchers: list[Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]] = []

    @classmethod
    def of(cls, module: nn.Module) -> _DirectForward:
        """Return the one that stands there already, or put one there."""
        found = vars(module).get("forward")
        if not isinstance(found, cls):
            vars(module)["forward"] = found = cls(module)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for watcher in tuple(self.watchers):
            watcher(self.module, args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def release(self, watcher: Callable[..., None]) -> None:
        """Give the module its forward back, once nobody watches it."""
        self.watchers.remove(watcher)
        if not self.watchers and vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]
            if self.own is not None:
                vars(self.module)["forward"] = self.own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copy of the module is watched by nobody
        return copy.deepcopy(self.__wrapped__, memo)


@contextmanager
def as_calls(module: nn.Module, told: Callable[[], None]) -> Iterator[None]:
    """Let ``module.forward(x)`` within be ``module(x)``, so that hooks see it; `told` is called where that is so.

    Compiled and scripted modules stay as they are.

    Example::

        >>> net, calls = nn.Linear(3, 2), []
        >>> _ = net.register_forward_hook(lambda module, args, output: calls.append("hook"))
        >>> with as_calls(net, lambda: calls.append("direct")):
        ...     _ = net.forward(torch.zeros(3)), net(torch.zeros(3))
        >>> calls, "forward" in vars(net)
        (['direct', 'hook', 'hook'], False)
    """
    if not _can_be_watched(module):
        yield
        return
    attributes, own, forward = vars(module), vars(module).get("forward"), module.forward
    depth = 0  # of calls of the module, which have had their hooks

    def direct(*args: Any, **kwargs: Any) -> Any:
        if depth:
            return forward(*args, **kwargs)
        told()
        return module(*args, **kwargs)

    def enter(*args: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*args: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]
    attributes["forward"] = direct
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own


def _can_be_watched(module: nn.Module) -> bool:
    is_script = isinstance(module, torch.jit.ScriptModule)
    return not is_script and not is_compiled(module) and next(module.parameters(), None) is not None


def named_arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return bound arguments by name, those that ``**kwargs`` takes under their own.

    Example::

        >>> named_arguments(inspect.signature(lambda x, **more: None).bind(1, y=2))
        {'x': 1, 'y': 2}
    """
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has the module's forward: as a wrapper, in place, or as Lightning keeps it.

    Example::

        >>> is_compiled(nn.Linear(3, 2)), is_compiled(torch.compile(nn.Linear(3, 2)))
        (False, True)
    """
    return (
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


def reset_compiled(*modules: nn.Module) -> bool:
    """Have Dynamo compile anew if one of the modules is compiled, and return whether one is.

    It overlooks hooks that come or go after it has compiled a module, or another of the same code.
    """
    is_any = any(is_compiled(part) for module in modules for part in module.modules())
    if is_any:
        torch.compiler.reset()
    return is_any


def spell_shape(shape: Sequence[int]) -> str:
    """Return a shape as people write it.

    Example::

        >>> spell_shape((300, 784))
        '300×784'
    """
    return "×".join(str(size) for size in shape)


def spell_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spell_list(words: Sequence[Any]) -> str:
    return " and ".join(filter(None, [", ".join(map(str, words[:-1])), str(words[-1])]))
