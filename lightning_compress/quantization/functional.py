"""Rounding what a function returns, where no module does: the sum of a residual block, a concatenation, a product.

The user's forward runs as it is; a `TorchFunctionMode` around it sees the calls of the functions to be rounded.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Operators that have a reflected and an in-place form.
_OPERATORS = {"add", "sub", "mul", "div", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"}

# What tensors call Python's operators.
_OF_TENSORS = {"truediv": "div", "mod": "remainder"}

_running: list[Any] = []
"""The watched module whose own forward is running, innermost last; ``None`` within one that nobody watches."""


def function_name(target: Any) -> str:
    """Return the name under which a function, an operator and a method are the same: ``add`` for ``+``, ``+=``, …"""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "__get__":  # a property
        name = target.__self__.__name__
    name = name.strip("_")
    name = name[1:] if name[:1] in "ir" and name[1:] in _OPERATORS else name
    return _OF_TENSORS.get(name, name)


class _Own:
    """Within it, calls of functions are the quantizers' own affair: nobody watches."""

    def __enter__(self) -> None:
        _running.append(None)

    def __exit__(self, *exception: Any) -> None:
        _running.pop()


unwatched = _Own()


class FunctionalQuantizers(nn.Module):
    """The quantizers of the functions that a module's forward calls.

    Args:
        functions: The names of the watched functions.
        calls: How many calls of them the module's forward makes, for each of its runs in one forward pass.
        quantizers: By ``f"{run}_{index of the call}"``.
    """

    def __init__(self, functions: set[str], calls: list[int], quantizers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.functions, self.calls = functions, calls
        self.quantizers = nn.ModuleDict(quantizers)
        self.use = self.index = 0
        self.known: set[Any] = set()

    def is_idle(self, way: Any) -> bool:
        """Whether there is nothing to round, nor to hold against the trace: this way of calling has been already."""
        # Learned scales that are off still need their gradient of 0.
        waits = (getattr(q, "is_on", True) or q.scale is not None for q in self.quantizers.values())
        return (self.use, way) in self.known and not any(waits)

    def begin(self) -> None:
        """Begin to count the calls of one run."""
        self.index = 0

    def end(self, module: nn.Module, way: Any) -> None:
        """Hold a run against the trace, and go on to the next."""
        if self.index != self.calls[self.use]:
            raise RuntimeError(
                f"{type(module).__name__}.forward has called {', '.join(sorted(self.functions))} {self.index} times, "
                f"but {self.calls[self.use]} times when it was traced with the defaults of its arguments: which sum or "
                f"product is which? Move what depends on an argument into a module of its own, or give "
                f"QuantizationAwareTraining(activation_bits=None)."
            )
        self.known.add((self.use, way))
        self.use = (self.use + 1) % len(self.calls)

    def round(self, name: str, output: Any) -> Any:
        """Round what a watched function has returned."""
        if name not in self.functions:
            return output
        key = f"{self.use}_{self.index}"
        self.index += 1
        return self.quantizers[key](output) if key in self.quantizers and isinstance(output, Tensor) else output


class _Watch(TorchFunctionMode):
    def __init__(self, quantizers: FunctionalQuantizers) -> None:
        self.quantizers = quantizers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not _running or _running[-1] is not self.quantizers:
            return output
        with unwatched:
            return self.quantizers.round(function_name(func), output)


def _kind(value: Any) -> Any:
    """Return what of an argument a forward that can be traced may branch on."""
    return value if value is None or isinstance(value, bool) else type(value)


class _WatchedForward:
    """Stands in for a module's forward; a class of its own, so that the module can still be copied and pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for inspect.signature
        return types.MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        quantizers: Any = getattr(self.module, "functional_quantizers", None)
        way = (*map(_kind, args), *((name, _kind(kwargs[name])) for name in sorted(kwargs)))
        _running.append(quantizers)
        try:
            if quantizers is None or quantizers.is_idle(way):
                return type(self.module).forward(self.module, *args, **kwargs)
            quantizers.begin()
            with _Watch(quantizers):
                output = type(self.module).forward(self.module, *args, **kwargs)
            quantizers.end(self.module, way)
            return output
        finally:
            _running.pop()


def watch(module: nn.Module, quantizers: FunctionalQuantizers | None) -> None:
    """Round what functions return within a module's forward; ``None`` keeps its calls from the module around it."""
    if quantizers is not None:
        module.functional_quantizers = quantizers
    if "forward" not in module.__dict__:
        module.forward = _WatchedForward(module)


def is_watched(module: nn.Module) -> bool:
    """Return whether something stands in for a module's forward."""
    return isinstance(module.__dict__.get("forward"), _WatchedForward)


def unwatch(module: nn.Module) -> None:
    """Give a module its forward back."""
    if is_watched(module):
        del module.__dict__["forward"]
        module._modules.pop("functional_quantizers", None)
