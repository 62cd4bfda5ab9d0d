"""Losses between what layers of student and teacher return, and projectors between their shapes.

A new loss is one function of two tensors and one line in :data:`FEATURE_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.distillation import losses
from lightning_compress.distillation.losses import raised, unit
from lightning_compress.example_inputs import spell_shape
from lightning_compress.moments import ProgressFunction, Schedule, one_of, scheduled

# by the number of spatial dimensions
_CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLING = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of features of the same shape (FitNets: Romero et al. 2015, arXiv 1412.6550).

    Half precision is raised to float32, here and in all losses.

    Example::

        >>> hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0

    Raises:
        ValueError: If the shapes differ.
    """
    _refuse_other_shape(student, teacher)
    return F.mse_loss(raised(student), raised(teacher))


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of attention maps: where a layer responds, whatever its channels say.

    The map of a sample is the sum of squares over channels, flattened and divided by its L2 norm (Zagoruyko and
    Komodakis 2017, arXiv 1612.03928). Numbers of channels may differ; a teacher's map of another size is first brought
    to the student's by adaptive average pooling.

    Args:
        student: ``[B, C, L]``, ``[B, C, H, W]`` or ``[B, C, D, H, W]``. Channels are dimension 1, which they are not in
            a transformer's ``[B, T, D]``: use another loss there.
        teacher: Of as many dimensions.

    Example:
        The student's map is (1, 0), the teacher's (0, 1).

        >>> attention(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 1.0]]])).item()
        1.0

    Raises:
        ValueError: If there are no positions, or the numbers of dimensions differ.
    """
    if student.dim() != teacher.dim() or student.dim() not in (3, 4, 5):
        raise ValueError(
            f"The loss 'attention' compares maps [B, C, ...] of 1 to 3 spatial dimensions, got "
            f"{_spell(student, teacher)}. Name other layers, or use 'relation'."
        )

    def squares(features: Tensor) -> Tensor:
        return raised(features).square().sum(1, keepdim=True)

    own, other = squares(student), squares(teacher)
    if own.shape != other.shape:
        other = _POOLING[own.dim() - 2](own.shape[2:])(other)
    return F.mse_loss(F.normalize(own.flatten(1)), F.normalize(other.flatten(1)))


def relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the distances and angles between samples differ: RKD-D + 2 · RKD-A.

    Distances are divided by their mean over pairs of unlike samples, angles are cosines at each of three samples; both
    are compared by the Huber loss, whose mean is over all N² pairs and N³ triples, as in the authors' code (Park et al.
    2019, arXiv 1904.05068, lenscloth/RKD). Widths may differ. Two samples at one point have no direction. Memory grows
    with N²·D and N³.

    Args:
        student: ``[N, ...]``; what follows the first dimension is one vector for each sample.
        teacher: ``[N, ...]``.

    Example:
        Relations do not know the scale.

        >>> features = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> relation(features, 2.0 * features).item()
        0.0

    Raises:
        ValueError: If the numbers of samples differ.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"The loss 'relation' compares the same samples, got {_spell(student, teacher)}.")
    with torch.autocast(student.device.type, enabled=False):  # it would multiply in half precision
        (distances, angles), (their_distances, their_angles) = (
            _relations(raised(features).flatten(1)) for features in (student, teacher)
        )
    return F.smooth_l1_loss(distances, their_distances) + 2.0 * F.smooth_l1_loss(angles, their_angles)


def _relations(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Distances ``[N, N]`` over their mean, and cosines ``[N, N, N]``, the first index being the vertex."""
    gaps = vectors[None] - vectors[:, None]
    directions, lengths = unit(gaps), gaps.norm(dim=2)
    mean = lengths.sum() / (lengths > 0).sum().clamp(min=1)
    return lengths / mean.masked_fill(mean == 0, 1.0), directions @ directions.mT


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − the cosine between the vectors of student and teacher, in the mean over samples and positions.

    The vectors lie along the last of 2 or 3 dimensions (``[B, D]``, ``[B, T, D]``) and along dimension 1 of 4 and 5.

    Example::

        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0

    Raises:
        ValueError: If the shapes differ.
    """
    _refuse_other_shape(student, teacher)
    dim = -1 if student.dim() <= 3 else 1
    return losses.cosine(losses.rows_of(student, dim), losses.rows_of(teacher, dim))


def _refuse_other_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"The features must have one shape, got {_spell(student, teacher)}: put a projector between.")


def _spell(student: Tensor, teacher: Tensor) -> str:
    return f"{spell_shape(student.shape)} of the student and {spell_shape(teacher.shape)} of the teacher"


@dataclass(frozen=True)
class FeatureLoss:
    """A way to compare features.

    Args:
        function: A function of the student's and the teacher's features that returns a scalar.
        needs_projector: Whether both must have one shape.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    needs_projector: bool


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "hint": FeatureLoss(hint, needs_projector=True),
    "attention": FeatureLoss(attention, needs_projector=False),
    "relation": FeatureLoss(relation, needs_projector=False),
    "cosine": FeatureLoss(cosine, needs_projector=True),
}


@dataclass(frozen=True)
class FeaturePair:
    """A layer of the student that learns from a layer of the teacher.

    Args:
        student: The qualified name of the student's layer.
        teacher: The qualified name of the teacher's layer.
        loss: A name in :data:`FEATURE_LOSSES`.
        weight: What the loss is multiplied with, 0 or more.
    """

    student: str
    teacher: str
    loss: str
    weight: Schedule | ProgressFunction


def parse_features(value: Mapping[str, Any]) -> list[FeaturePair]:
    """Read which layers learn from which.

    Args:
        value: ``{"student.layer": "teacher.layer"}`` for a hint of weight 1, or ``{"student.layer": {"layer":
            "teacher.layer", "loss": "attention", "weight": 0.5}}``. The weight is 0 or more, in any form that
            :func:`~lightning_compress.moments.scheduled` reads.

    Example::

        >>> [pair] = parse_features({"net.0": {"layer": "body.2", "loss": "relation", "weight": 0.5}})
        >>> pair.student, pair.teacher, pair.loss, pair.weight.first
        ('net.0', 'body.2', 'relation', 0.5)

    Raises:
        ValueError: If a key or loss is unknown, or a weight is below 0.
        TypeError: If something is of another type.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"`features` must be a mapping {{'student.layer': 'teacher.layer'}}, got {value!r}.")
    pairs = []
    for student, given in value.items():
        name = f"features['{student}']"
        settings = {"layer": given} if isinstance(given, str) else given
        if not isinstance(settings, Mapping) or not isinstance(settings.get("layer"), str):
            raise TypeError(
                f"`{name}` must be the name of the teacher's layer, or a mapping such as "
                f"{{'layer': 'net.0', 'loss': 'attention', 'weight': 0.5}}, got {given!r}."
            )
        for key in settings:
            one_of(key, ("layer", "loss", "weight"), name)
        loss = one_of(settings.get("loss", "hint"), FEATURE_LOSSES, f"{name}['loss']")
        weight = scheduled(settings.get("weight", 1.0), f"{name}['weight']", low=0.0)
        pairs.append(FeaturePair(student, settings["layer"], loss, weight))
    return pairs


class Projector(nn.Sequential):
    """Brings the student's features to the teacher's shape, computing in the precision of its own weights."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(next(self.parameters()).dtype))


def make_projector(student_shape: Sequence[int], teacher_shape: Sequence[int], seed: int) -> Projector | None:
    """Return a module from the student's shape of features to the teacher's, ``None`` where they agree.

    The first dimension is the batch and does not matter. ``[B, D]`` takes a linear layer over D. ``[B, C, H, W]``, and
    likewise one or three spatial dimensions, take a 1×1 convolution over C; where spatial sizes differ they become the
    teacher's, by adaptive average pooling if none has to grow, else by linear interpolation. Three dimensions can
    be ``[B, T, D]`` or ``[B, C, L]``: where dimension 1 agrees, the last is the width and takes a linear layer; else
    where the last agrees, dimension 1 is the width and takes a convolution.

    Weights are drawn as torch's own layers draw them, from a generator of its own, and biases are 0; the global random
    state is not touched.

    Args:
        student_shape: The shape of the student's features, batch included.
        teacher_shape: The shape of the teacher's.
        seed: The generator's seed.

    Example::

        >>> make_projector((8, 16, 32), (8, 16, 64), seed=0)
        Projector(
          (0): Linear(in_features=32, out_features=64, bias=True)
        )
        >>> make_projector((8, 16), (8, 16), seed=0) is None
        True

    Raises:
        ValueError: If no such module exists: numbers of dimensions differ, are below 2 or above 5, or neither of two
            dimensions agrees in three.
    """
    own, other = tuple(student_shape)[1:], tuple(teacher_shape)[1:]
    if own == other:
        return None
    refusal = (
        f"No projector leads from the student's {spell_shape(student_shape)} to the teacher's "
        f"{spell_shape(teacher_shape)}"
    )
    way_out = "Name layers whose outputs are alike, or use the loss 'attention' or 'relation'."
    if len(own) != len(other) or len(own) not in (1, 2, 3, 4):
        raise ValueError(f"{refusal}: both must have the same number of dimensions, 2 to 5. {way_out}")
    if len(own) == 2 and own[0] != other[0] and own[1] != other[1]:
        raise ValueError(f"{refusal}: of [B, T, D] or [B, C, L], one dimension must agree. {way_out}")
    if len(own) == 1 or (len(own) == 2 and own[0] == other[0]):
        return Projector(_initialized(nn.utils.skip_init(nn.Linear, own[-1], other[-1]), seed))
    size, spatial = other[1:], len(own) - 1
    layers: list[nn.Module] = [
        _initialized(nn.utils.skip_init(_CONVOLUTION[spatial], own[0], other[0], kernel_size=1), seed)
    ]
    if any(mine < theirs for mine, theirs in zip(own[1:], size, strict=True)):
        layers.append(nn.Upsample(size, mode=_INTERPOLATION[spatial]))
    elif own[1:] != size:  # it commutes with the convolution, and leaves less to convolve
        layers.insert(0, _POOLING[spatial](size))
    return Projector(*layers)


def _initialized(layer: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(parameter)
    return layer
