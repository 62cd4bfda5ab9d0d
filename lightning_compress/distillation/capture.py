"""What the student computes while its own ``training_step`` runs: the outputs that are distilled, and its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_compress.example_inputs import as_calls, reset_compiled
from lightning_compress.modules import named_module

Select = int | str | Callable[[Any], Tensor]  # `int` first: jsonargparse takes the first that fits


@dataclass
class Call:
    """One call of the captured module.

    Args:
        args: What it was given.
        kwargs: What it was given by keyword.
        output: What it returned.
        answer: What `ask` returned when the call began, ``None`` where it was not asked.
        is_old: Whether a backward pass has been made since.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    answer: Any = None
    is_old: bool = False


class OutputCapture:
    """Keeps what a module is called with and what it returns, from the forward passes that are made anyway.

    Only calls within :meth:`recording` count. Which module is meant: the one with the given name; else `root` itself
    where it is called; else the outermost of its submodules that have parameters (``self.net(batch)``). That is found
    in the first recording, and from then on only that module has a hook.

    Args:
        root: The module that everything is part of.
        name: The qualified name of the module whose output is meant; ``""`` is `root`, ``None`` finds it.
        features: Names of modules whose outputs are kept as well.
        ask: Called with the arguments of each call with gradients as it begins, once it is known which module is meant.
            What comes from it is kept with the call.

    Raises:
        ValueError: For a name that does not exist, with the closest ones.

    Example::

        >>> root = nn.ModuleDict({"net": nn.Linear(3, 2), "loss": nn.CrossEntropyLoss()})
        >>> capture = OutputCapture(root)
        >>> with capture.recording():
        ...     _ = root["loss"](root["net"](torch.zeros(4, 3)), torch.zeros(4, dtype=torch.long))
        >>> [call.output.shape for call in capture.take()], capture.name
        ([torch.Size([4, 2])], 'net')
    """

    def __init__(
        self,
        root: nn.Module,
        name: str | None = None,
        features: Sequence[str] = (),
        ask: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        self.name = name
        self._ask = ask
        self._root = root
        self._features = list(features)
        self.is_recording = False
        self._depth = 0
        # of calls that have not returned, the answers, or in the search the arguments; there are calls within calls
        self._begun: list[Any] = []
        self._calls: list[Call] = []
        self._found: dict[str, list[Call]] = {}  # by the outermost modules' names, while the search goes on
        self._kept: dict[str, tuple[Tensor, int]] = {}  # with the version of the tensor
        self._handles: list[Any] = []
        self._redirected: AbstractContextManager[None] | None = None
        self._is_direct: bool | None = None  # whether the root's forward is called past all hooks
        reset_compiled(self._root)
        self._watch_features()
        if name is None:
            self._search()
        else:
            self._watch(name)

    # --- hooks --------------------------------------------------------------------------------------------------------
    # They are functions, and not methods: a copy of the module that somebody makes must not copy the capture.

    def _watch(self, name: str) -> None:
        capture = self

        @torch.compiler.disable
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if capture.is_recording:  # DistributedDataParallel calls the root around `training_step`
                ask = capture._ask
                capture._begun.append(ask(args, kwargs) if ask is not None and torch.is_grad_enabled() else None)

        @torch.compiler.disable
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if capture.is_recording:
                capture._calls.append(Call(args, kwargs, output, capture._begun.pop()))

        module = named_module(self._root, name, "module")
        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(module.register_forward_hook(keep, with_kwargs=True))

    def _watch_features(self) -> None:
        capture = self

        def hook(name: str) -> Callable[..., None]:
            @torch.compiler.disable
            def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if capture.is_recording and torch.is_grad_enabled():
                    tensor = first_tensor(output, name)
                    capture._kept[name] = tensor, tensor._version

            return keep

        for name in self._features:
            module = named_module(self._root, name, "features")
            self._handles.append(module.register_forward_hook(hook(name)))

    def _search(self) -> None:
        for name, module in self._root.named_modules():
            is_meant = next(module.parameters(), None) is not None and not _is_metric(module)
            if is_meant and not isinstance(module, torch.jit.ScriptModule) and "_orig_mod" not in name.split("."):
                # what a compiled module wraps is called within it, by compiled code
                before, after = self._search_hooks(name)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _search_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        capture = self

        @torch.compiler.disable
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not capture.is_recording:
                return
            if capture._depth == 0 or name == "":  # nobody is asked yet, and the call may change its inputs in place
                capture._begun.append(tree_map(_copied, (args, kwargs)))
            capture._depth += 1

        @torch.compiler.disable
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not capture.is_recording:
                return
            capture._depth -= 1
            # A LightningModule may be called within another call of its own: all of them are meant.
            if capture._depth == 0 or name == "":
                given, given_by_name = capture._begun.pop()
                capture._found.setdefault(name, []).append(Call(given, given_by_name, output))

        return enter, leave

    # --- use ----------------------------------------------------------------------------------------------------------

    def recording(self) -> OutputCapture:
        """Let the calls within ``with capture.recording():`` count, those of the bare ``forward`` too."""
        return self

    def __enter__(self) -> None:
        self.is_recording, self._depth = True, 0
        # Whether the root is called past its hooks shows in the first recording, and costs later ones nothing.
        if self._is_direct is not False and not self.name:
            self._redirected = as_calls(self._root, self._see_direct_call)
            self._redirected.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.is_recording = False
        if self._redirected is not None:
            redirected, self._redirected = self._redirected, None
            redirected.__exit__(*error)
            if self.has_calls:
                self._is_direct = bool(self._is_direct)

    def _see_direct_call(self) -> None:
        self._is_direct = True

    @property
    def has_calls(self) -> bool:
        """Whether there is something to take."""
        return bool(self._calls or self._found)

    def take(self) -> list[Call]:
        """Return the calls since the last time, and forget them.

        Where some were made after the last backward pass, they alone: the graphs of others may be gone.

        Raises:
            ValueError: If the module was not called, or if it is not clear which one is meant, by name.
        """
        if self.name is None:
            self._choose()
        taken, self._calls = self._calls, []
        calls = [call for call in taken if not call.is_old] or taken
        if not calls:
            what = f"'{self.name}'" if self.name else f"{type(self._root).__name__}'s own forward"
            raise ValueError(f"`training_step` never calls {what}, whose output is to be distilled. {_WAY_OUT}")
        self._is_direct = bool(self._is_direct)
        return calls

    def _choose(self) -> None:
        found, self._found = self._found, {}
        if not found:
            raise ValueError(
                f"`training_step` of {type(self._root).__name__} calls neither the module itself nor a submodule that "
                f"has parameters: there is no output to distil. {_WAY_OUT}"
            )
        if "" not in found and len(found) > 1:
            names = " and ".join(f"'{name}'" for name in found)
            raise ValueError(f"`training_step` calls {names}: say which output is distilled. {_WAY_OUT}")
        self.name = "" if "" in found else next(iter(found))
        self.remove()
        reset_compiled(self._root)
        self._watch_features()
        self._watch(self.name)
        self._calls = found[self.name]

    def features(self) -> dict[str, Tensor]:
        """Return the latest outputs of the watched features, and forget them.

        Raises:
            ValueError: If one of them was not computed, by name.
        """
        kept, self._kept = self._kept, {}
        for name in self._features:
            if name not in kept:
                raise ValueError(
                    f"`features` names '{name}', which `training_step` never calls with gradients. Reentrant "
                    f"activation checkpointing hides them: set `use_reentrant=False`."
                )
        return {name: unchanged(*kept[name], name, "student") for name in self._features}

    def mark(self) -> None:
        """Remember that a backward pass has been made after the calls so far."""
        for call in chain(self._calls, *self._found.values()):
            call.is_old = True

    def forget(self) -> None:
        """Let go of all that is kept."""
        self._begun, self._calls, self._found, self._kept = [], [], {}, {}

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


_WAY_OUT = (
    "Give `module` the name of the student's module that makes it, 'net' for `self.net`, or call `self(...)` in "
    "`training_step`: no hook sees `self.forward(...)`."
)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def unchanged(tensor: Tensor, version: int, name: str, whose: str) -> Tensor:
    """Return a feature as it was returned; refuse it where a later layer has changed it in place."""
    if tensor._version != version:
        raise ValueError(
            f"`features` names '{name}', whose output a later layer of the {whose} changes in place: name that layer, "
            f"or set its `inplace=False`."
        )
    return tensor


def first_tensor(output: Any, name: str) -> Tensor:
    """Return a tensor as it is, and the first one of a tuple or list."""
    found = next((value for value in output if isinstance(value, Tensor)), None) if _is_row(output) else output
    if not isinstance(found, Tensor):
        raise ValueError(f"`features` names '{name}', which returns {type(output).__name__} and no tensor.")
    return found


def select_output(output: Any, select: Select | None = None) -> Tensor:
    """Return the logits in what a module returns.

    Args:
        output: A tensor, or a tuple, mapping, dataclass or other object that holds it.
        select: A key or attribute, an index, or a function of the output. By default a tensor is itself, and of
            anything else it is ``logits`` or the only floating-point tensor in it.

    Raises:
        ValueError: If there is no such tensor, or no telling which one is meant.

    Example::

        >>> select_output({"logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 5)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor) and not callable(select):
        return output
    chosen: Any
    if callable(select):
        chosen = select(output)
    elif select is None:
        chosen = _only_tensor(output)
    elif isinstance(select, int):
        chosen = output[select] if _is_row(output) and -len(output) <= select < len(output) else None
    else:
        chosen = _fields(output).get(select)
    if not isinstance(chosen, Tensor):
        has = ", ".join(map(repr, _fields(output))) or (f"{len(output)} elements" if _is_row(output) else "nothing")
        raise ValueError(
            f"no logits were found in an output of type {type(output).__name__} (it has {has}): give `output` the key, "
            f"the index, or a function that takes them out."
        )
    return chosen


def _only_tensor(output: Any) -> Tensor | None:
    named = _fields(output)
    if isinstance(logits := named.get("logits"), Tensor):
        return logits
    values = list(output) if _is_row(output) else list(named.values())
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim()]
    return tensors[0] if len(tensors) == 1 else None


def _is_row(output: Any) -> bool:
    return isinstance(output, (tuple, list))


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    return {} if isinstance(output, (Tensor, tuple, list)) or not hasattr(output, "__dict__") else dict(vars(output))
