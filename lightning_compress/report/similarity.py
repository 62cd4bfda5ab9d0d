"""How alike two models' inner representations are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.modules import WEIGHTED, clean_name


def gram(features: Tensor) -> Tensor:
    """Return the centred Gram matrix of features ``[N, ...]``, float64 ``[N, N]``: how alike the samples are.

    Example::

        >>> gram(torch.tensor([[1.0], [3.0]])).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    flat = features.detach().flatten(1).double()
    flat = flat - flat.mean(0)
    return flat @ flat.T


def cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two centred Gram matrices, in [0, 1].

    ⟨K, L⟩ / (‖K‖·‖L‖) (Kornblith et al. 2019, arXiv 1905.00414): 1 where one representation is a rotation and scaling
    of the other, whatever their widths are. NaN where all samples are alike in one of them. With few samples and wide
    layers it is biased upwards.

    Example::

        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> round(cka(gram(x), gram(5.0 * x.flip(1))), 6)
        1.0
    """
    return float((first * second).sum() / (first.norm() * second.norm()))


@torch.no_grad()
def layer_grams(module: nn.Module, inputs: ExampleInputs) -> dict[str, Tensor]:
    """Return the centred Gram matrix of what each weighted layer returns, by the layer's name, on the CPU.

    The module is called once, in the mode that it is in. A layer whose output is no tensor with a sample in each row of
    the batch is left out, and so is one that is not called; of several calls the last counts.

    Example::

        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> {name: matrix.shape for name, matrix in layer_grams(net, ExampleInputs((torch.randn(4, 3),))).items()}
        {'0': torch.Size([4, 4])}
    """
    found: dict[str, Tensor] = {}
    batch = inputs.batch

    def keep(name: str, output: object) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and len(output) == batch:
            found[name] = gram(output).cpu()

    def hook(name: str) -> Callable[..., None]:
        return lambda child, args, output: keep(name, output)

    handles = [
        child.register_forward_hook(hook(clean_name(name)))
        for name, child in module.named_modules()
        if isinstance(child, WEIGHTED)
    ]
    try:
        module(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def similarities(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the :func:`cka` of each layer that both have."""
    return {name: cka(matrix, after[name]) for name, matrix in before.items() if name in after}
