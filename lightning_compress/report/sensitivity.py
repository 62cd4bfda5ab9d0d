"""How much each layer matters, before anything is trained: what the metric is when that layer alone is compressed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_compress.modules import Target, select_parameters
from lightning_compress.moments import number, one_of
from lightning_compress.pruning.topk import select_smallest
from lightning_compress.quantization.affine import affine_parameters, fake_quantize, integer_range

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["sparsity", "bits"]


@dataclass(frozen=True)
class Trial:
    """The metric with one parameter compressed and all others as they are.

    Args:
        parameter: The parameter's qualified name.
        kind: ``"sparsity"``, the share of its smallest weights set to zero, or ``"bits"``, what it is rounded to.
        level: The sparsity in (0, 1), or the bits.
        metric: What the model then reaches.
    """

    parameter: str
    kind: Kind
    level: float
    metric: float


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found.

    Args:
        monitor: The metric's name.
        mode: ``"max"`` where more is better, else ``"min"``.
        baseline: The metric of the model as it is.
        trials: One for each parameter and level.
    """

    monitor: str
    mode: str
    baseline: float
    trials: tuple[Trial, ...]

    def loss(self, trial: Trial) -> float:
        """Return by how much a trial is worse than the model as it is; below 0 it is better.

        Example::

            >>> trial = Trial("net.0.weight", "bits", 2, 0.75)
            >>> Sensitivity("val_acc", "max", 0.875, (trial,)).loss(trial)
            0.125
        """
        return (self.baseline - trial.metric) * (1.0 if self.mode == "max" else -1.0)

    @property
    def parameters(self) -> list[str]:
        """The parameters' names, the most sensitive first: by the largest loss among their trials."""
        worst: dict[str, float] = {}
        for trial in self.trials:
            loss = self.loss(trial)
            loss = math.inf if math.isnan(loss) else loss
            worst[trial.parameter] = max(worst.get(trial.parameter, -math.inf), loss)
        return sorted(worst, key=lambda name: -worst[name])

    @property
    def levels(self) -> list[tuple[Kind, float]]:
        """The kinds and levels that were tried, in order."""
        return list(dict.fromkeys((trial.kind, trial.level) for trial in self.trials))

    def table(self) -> Table:
        """Return a table for `rich`: a row for each parameter, the most sensitive first."""
        from rich.table import Table

        table = Table(title=f"{self.monitor} is {self.baseline:.4g}; with one layer compressed:")
        table.add_column("parameter", overflow="fold")
        for kind, level in self.levels:
            table.add_column(_spell(kind, level), justify="right")
        found = {(trial.parameter, trial.kind, trial.level): trial for trial in self.trials}
        for name in self.parameters:
            table.add_row(name, *(f"{found[name, kind, level].metric:.4g}" for kind, level in self.levels))
        return table

    def picture(self) -> bytes:
        """Return a PNG: the loss of the metric for each parameter and level.

        Raises:
            ImportError: Without matplotlib (``pip install "lightning-compress[plots]"``).
        """
        from matplotlib.figure import Figure

        names, levels = self.parameters, self.levels
        found = {(trial.parameter, trial.kind, trial.level): self.loss(trial) for trial in self.trials}
        figure = Figure(figsize=(2.5 + 0.7 * len(levels), 1.2 + 0.3 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        losses = [[found[name, kind, level] for kind, level in levels] for name in names]
        image = axes.imshow(losses, aspect="auto", cmap="viridis_r", vmin=0.0)
        axes.set_xticks(range(len(levels)), [_spell(kind, level) for kind, level in levels])
        axes.set_yticks(range(len(names)), names)
        for row, values in enumerate(losses):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color="#D55E00")
        figure.colorbar(image, label=f"loss of {self.monitor}")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON; a metric that is no number is ``None``."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "baseline": self.baseline,
            "trials": [
                {**vars(trial), "metric": trial.metric if math.isfinite(trial.metric) else None}
                for trial in self.trials
            ],
        }


def sensitivity(
    module: nn.Module,
    data: Any,
    monitor: str | None = None,
    mode: str = "max",
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    bits: Sequence[int] = (8, 4, 3, 2),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainer: Any = None,
) -> Sensitivity:
    """Return how a metric falls as each layer alone is pruned, and as it alone is rounded.

    Meant for a trained model, before it is compressed: which layers to ``exclude``, to give another sparsity, or more
    bits. Nothing is trained. A layer's smallest weights are set to zero, or its weights are rounded symmetrically for
    each output channel; the model is validated, and the weights are put back. It takes one validation for each layer
    and level, and one more.

    Args:
        module: A LightningModule; or any module, where `data` is a function.
        data: A LightningDataModule or dataloader to validate on; or a function of the module that returns the metric.
        monitor: The name of a metric that ``validation_step`` logs. ``None`` takes the only one there is.
        mode: ``"max"`` where more is better, ``"min"`` where less is.
        sparsities: The sparsities to try, each in (0, 1).
        bits: The bits to try, each from 2 to 8.
        include: Patterns on the names of modules; by default all linear, convolutional, attention and recurrent ones.
        exclude: Patterns on the names of modules to leave out.
        trainer: The Trainer to validate with; by default a quiet one.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(Tensor([[1.0, 4.0]]))
        >>> def total(net):
        ...     return net(Tensor([[1.0, 1.0]])).item()
        >>> found = sensitivity(net, total, "total", sparsities=[0.5], bits=[])
        >>> found.baseline, found.trials[0].metric
        (5.0, 4.0)

    Raises:
        ValueError: If a level is out of range, a pattern matches nothing, or the metric is not logged.
    """
    one_of(mode, ("max", "min"), "mode")
    levels: list[tuple[Kind, float]] = []
    for level in sparsities:
        if not 0.0 < number(level, "sparsities", 0.0, 1.0) < 1.0:
            raise ValueError(f"`sparsities` must lie between 0 and 1, both excluded, got {level!r}.")
        levels.append(("sparsity", float(level)))
    for width in bits:
        if isinstance(width, bool) or width not in range(2, 9):
            raise ValueError(f"`bits` must be whole numbers from 2 to 8, got {width!r}.")
        levels.append(("bits", int(width)))
    targets = select_parameters(module, include, exclude)
    if callable(data) and not hasattr(data, "__iter__"):
        evaluate, name = data, monitor or "the metric"
        baseline = float(evaluate(module))
    else:
        from lightning_compress.training import validation

        name, baseline, evaluate = validation(module, data, monitor, trainer)
    trials = []
    for target in targets:
        for kind, level in levels:
            with _compressed(target, kind, level):
                trials.append(Trial(target.name, kind, level, float(evaluate(module))))
    return Sensitivity(name, mode, baseline, tuple(trials))


@contextmanager
def _compressed(target: Target, kind: str, level: float) -> Iterator[None]:
    weight = target.parameter.data
    kept = weight.clone()
    try:
        weight.copy_(_pruned(kept, level) if kind == "sparsity" else _rounded(kept, int(level), _channels(target)))
        yield
    finally:
        weight.copy_(kept)


def _pruned(weight: Tensor, sparsity: float) -> Tensor:
    [out] = select_smallest([weight], round(sparsity * weight.numel()), absolute=True)
    return weight.masked_fill(out, 0.0)


def _channels(target: Target) -> int:
    """Return the dimension of the output channels."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return int(isinstance(target.module, transposed))


def _rounded(weight: Tensor, bits: int, dim: int) -> Tensor:
    others = [i for i in range(weight.dim()) if i != dim]
    low, high = weight.amin(others, keepdim=True), weight.amax(others, keepdim=True)
    scale, zero_point = affine_parameters(low, high, bits, "symmetric")
    return fake_quantize(weight, scale, zero_point, *integer_range(bits, "symmetric"))


def _spell(kind: str, level: float) -> str:
    return f"{100 * level:g} %" if kind == "sparsity" else f"{level:g} bits"
