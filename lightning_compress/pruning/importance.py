"""Scores: how much a weight matters. The lowest go first.

A new criterion is one function and one line in :data:`CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """A way to score weights.

    A signal is gathered while the model trains, a weight is scored from its value and its signal when the masks move:

    - ``"gradient"``: the sum of ``gather(weight, gradient)`` over optimizer steps, with the gradients that the
      optimizer sees (unscaled, accumulated, reduced over ranks, before clipping), of the weight's shape;
    - ``"activation"``: ‖x‖, the norm of each input of the layer over the training batches and positions, of a shape
      that broadcasts with the weight;
    - ``"random"``: uniform numbers in [0, 1), of the weight's shape, the same on all ranks.

    Args:
        score: A function of the weight and of its signal (``None`` without one) that returns scores of the weight's
            shape.
        signal: What is gathered, ``None`` for nothing.
        gather: What an optimizer step adds to the signal ``"gradient"``, a function of weight and gradient.
        is_absolute: Whether the absolute value of what `score` returns is meant.
        is_lasting: Whether the signal is summed over the whole run, and not afresh after each update of the masks.

    Example:
        The user's own criterion: small weights with small gradients go first.

        >>> import torch
        >>> own = Criterion(lambda w, g: w.abs() + g, signal="gradient", gather=lambda w, g: g.abs())
        >>> own.score(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 0.5])).tolist()
        [4.0, 2.5]
    """

    score: Callable[[Tensor, Tensor | None], Tensor]
    signal: Literal["gradient", "activation", "random"] | None = None
    gather: Callable[[Tensor, Tensor], Tensor] | None = None
    is_absolute: bool = False
    is_lasting: bool = False

    def __post_init__(self) -> None:
        if self.signal not in (None, "gradient", "activation", "random"):
            raise ValueError(f"`signal` must be 'gradient', 'activation', 'random' or None, got {self.signal!r}.")
        if (self.signal == "gradient") != (self.gather is not None):
            raise ValueError("`gather` says what a step adds to the signal 'gradient': give both, or neither.")


def magnitude(weight: Tensor, signal: Tensor | None) -> Tensor:
    """Return the weight, for |w| (Han et al. 2015, arXiv 1506.02626)."""
    return weight


def gathered(weight: Tensor, signal: Tensor | None) -> Tensor:
    """Return the signal itself, be it a sum of |∂L/∂w|, of |w·∂L/∂w| or of −w·∂L/∂w, or random."""
    assert signal is not None
    return signal


def activation_weight(weight: Tensor, signal: Tensor | None) -> Tensor:
    """Return |w|·‖x‖ for each connection (Sun et al. 2024, arXiv 2306.11695).

    Example::

        >>> import torch
        >>> activation_weight(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]])).tolist()
        [[3.0, 2.0]]
    """
    assert signal is not None
    return weight.abs() * signal


def absolute_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return |∂L/∂w|."""
    return gradient.abs()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return |w·∂L/∂w|, to first order the change of the loss without w (Molchanov et al. 2019, arXiv 1906.10771)."""
    return (weight * gradient).abs()


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return −w·∂L/∂w, above zero where the weight moves away from zero (Sanh et al. 2020, arXiv 2005.07683)."""
    return -weight * gradient


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, is_absolute=True),
    "gradient": Criterion(gathered, "gradient", absolute_gradient),
    "gradient_weight": Criterion(gathered, "gradient", taylor),
    "activation_weight": Criterion(activation_weight, "activation"),
    "movement": Criterion(gathered, "gradient", movement, is_lasting=True),
    "random": Criterion(gathered, "random"),
}
