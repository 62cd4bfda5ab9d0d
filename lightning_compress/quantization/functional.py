"""Rounding what a function returns, where no module does: the sum of a residual block, a concatenation, a product.

The user's forward runs as it is; a `TorchFunctionMode` around it sees the calls of the functions to be rounded.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Operators that have a reflected and an in-place form.
_OPERATORS = {"add", "sub", "mul", "div", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"}

# What tensors call Python's operators.
_OF_TENSORS = {"truediv": "div", "mod": "remainder"}

ATTENTION = "scaled_dot_product_attention"

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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what `torch.nn.functional.scaled_dot_product_attention` does, with rounded probabilities.

    Scores stay float, for masks of −∞ are added to them.

    Args:
        query: (…, heads, queries, width).
        key: (…, heads, keys, width).
        value: (…, heads, keys, width of values).
        attn_mask: Broadcasts against (…, heads, queries, keys): True where a query may look, or floats to add.
        dropout_p: The share of probabilities to drop.
        is_causal: Whether query i sees keys 0 to i alone.
        scale: The factor of the scores, 1 / √width if None.
        enable_gqa: Whether several heads of queries share one of keys and values.
        rounded: What rounds the probabilities, in [0, 1].

    Example::

        >>> q = k = torch.zeros(1, 2, 4)
        >>> attend(q, k, torch.tensor([[[1.0], [3.0]]]), rounded=torch.round)  # two probabilities of 0.5 become 0
        tensor([[[0.],
                 [0.]]])
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:  # compared anew: a matrix would be in the file
        queries, keys = (torch.arange(length, device=scores.device) for length in scores.shape[-2:])
        scores = scores.masked_fill(keys > queries.unsqueeze(-1), -torch.inf)
    elif attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    probabilities = scores.softmax(-1)
    if attn_mask is not None:  # a row that sees nothing attends to nothing
        probabilities = probabilities.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return rounded(F.dropout(probabilities, dropout_p)) @ value


class FunctionalQuantizers(nn.Module):
    """The quantizers of the functions that a module's forward calls.

    Args:
        functions: The names of the watched functions.
        calls: How many calls of them the module's forward makes, for each of its runs in one forward pass.
        quantizers: By ``f"{run}_{index of the call}"``; those of an attention's probabilities have ``_probabilities``
            behind that.
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

    def attends(self, name: str) -> nn.Module | None:
        """Return what rounds the probabilities of the attention that is called now, if that is what is called."""
        key = f"{self.use}_{self.index}_probabilities"
        if name != ATTENTION or key not in self.quantizers:
            return None
        quantizer = self.quantizers[key]
        return quantizer if getattr(quantizer, "is_on", not isinstance(quantizer, nn.Identity)) else None

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
        kwargs = kwargs or {}
        if not _running or _running[-1] is not self.quantizers:
            return func(*args, **kwargs)
        name = function_name(func)
        probabilities = self.quantizers.attends(name)
        if probabilities is None:
            output = func(*args, **kwargs)
        with unwatched:
            if probabilities is not None:
                output = attend(*args, **kwargs, rounded=probabilities)
            return self.quantizers.round(name, output)


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
