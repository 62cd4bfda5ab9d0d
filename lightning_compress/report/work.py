"""How much one forward has to compute, and how much of it could be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.pruning.coupling import channel_layers
from lightning_compress.pruning.removal import layer_multiply_adds
from lightning_compress.report.measure import count_zeros


@torch.no_grad()
def multiply_adds(module: nn.Module, inputs: ExampleInputs) -> tuple[int, int]:
    """Return the multiplications of one forward, and those whose weight is not zero.

    Counted are linear and convolutional layers and ``nn.MultiheadAttention``, of which all multiplications count as
    such, since it multiplies activations too. The module is called once, in the mode that it is in.

    Example::

        >>> layer = nn.Linear(4, 2)
        >>> _ = nn.init.zeros_(layer.weight[0])
        >>> multiply_adds(layer, ExampleInputs((torch.zeros(3, 4),)))
        (24, 12)
    """
    found: list[tuple[int, float]] = []
    layers = [layer for _, layer in channel_layers(module)]
    weights = [getattr(layer, "weight", None) for layer in layers]
    zeros = iter(count_zeros([weight for weight in weights if isinstance(weight, nn.Parameter)]))

    def hook(dense: float) -> Callable[..., None]:
        def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            found.append((layer_multiply_adds(layer, [*args, *kwargs.values()], out), dense))

        return count

    handles = []
    for layer, weight in zip(layers, weights, strict=True):
        dense = 1.0 - next(zeros) / weight.numel() if isinstance(weight, nn.Parameter) else 1.0
        handles.append(layer.register_forward_hook(hook(dense), with_kwargs=True))
    try:
        module(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(work for work, _ in found), round(sum(work * dense for work, dense in found))
