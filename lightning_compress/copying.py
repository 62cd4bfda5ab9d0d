"""A copy of a module that stands alone."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def standalone_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy in eval mode without trainer, compiled code and hooks, nor methods marked ``stays_behind``.

    Hooks that are part of what a module computes, as those that round its tensors, say so by an attribute
    ``follows_module`` that is True: they stay.

    Args:
        module: The module, which is left as it is.
        memo: What stands for what in the copy, by ``id``, as for `copy.deepcopy`.

    Raises:
        Exception: Whatever `copy.deepcopy` raises.
    """
    memo = {} if memo is None else memo
    for child in module.modules():
        own = {
            number
            for hooks in (child._forward_hooks, child._forward_pre_hooks)
            for number, hook in hooks.items()
            if getattr(hook, "follows_module", False)
        }
        for key, value in vars(child).items():
            is_state = key.startswith("__composable_api_state_key")  # of `fully_shard`
            if (is_state or (key.startswith("_") and "hooks" in key)) and isinstance(value, dict):
                memo[id(value)] = type(value)({number: value[number] for number in value if number in own})
            elif key in ("_trainer", "_fabric", "_device_mesh") and value is not None:
                memo[id(value)] = None
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    for child in reversed(list(module.modules())):
        if isinstance(original := getattr(child, "_orig_mod", None), nn.Module):
            memo[id(child)] = copy.deepcopy(original, memo)
    copied: nn.Module = copy.deepcopy(module, memo)
    for child in copied.modules():
        child._compiled_call_impl = None  # of `module.compile()`
    for name in [name for name, value in vars(copied).items() if getattr(value, "stays_behind", False)]:
        del vars(copied)[name]  # a method that a callback wraps while it trains the original
    if vars(copied).get("_compiler_ctx") is not None:  # Lightning puts compiled functions, bound to the original, here
        for method in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(copied).pop(method, None)
        vars(copied)["_compiler_ctx"] = None
    if "_metric_attributes" in vars(copied):  # Lightning remembers metrics by the ids of the original's
        vars(copied)["_metric_attributes"] = None
    return copied.eval()
