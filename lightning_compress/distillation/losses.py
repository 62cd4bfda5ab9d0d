"""Losses between what student and teacher say of the same classes: functions of rows, and a module for any shape.

A new loss is one function of logits ``[N, C]`` and one line in :data:`LOSSES`. It takes ``temperature`` or ``labels``
where it needs them, by these names, and returns the mean over rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.example_inputs import spell_shape
from lightning_compress.moments import ProgressFunction, Schedule, number, one_of, scheduled


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · KL(p ‖ q), p and q the teacher's and the student's softmax at temperature T.

    T² keeps the size of the gradients whatever T is (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: Logits ``[N, C]``; half precision is raised to float32, here and in all losses.
        teacher: Logits of the same shape. A class at −inf in both counts for nothing.
        temperature: T > 0; the higher, the softer.

    Example:
        Half of p is where q has a quarter, half where q has three: ½ ln 2 + ½ ln ⅔ = ½ ln 4/3.

        >>> round(kl(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)).item(), 4), round(math.log(4 / 3) / 2, 4)
        (0.1438, 0.1438)
    """
    return _divergence(_log_softmax(teacher, temperature), _log_softmax(student, temperature), temperature**2)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · KL(q ‖ p), which lets the student leave out what it cannot follow (Gu et al. 2024, arXiv 2306.08543).

    Shapes and precision as in :func:`kl`.

    Example::

        >>> round(reverse_kl(torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])).item(), 4)
        0.1438
    """
    return kl(teacher, student, temperature)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Return T² · (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with the mixture m = β p + (1 − β) q.

    The generalized Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649); T² as in :func:`kl`. As β goes
    to 0 or 1, the divergence over β or 1 − β goes to :func:`kl` or :func:`reverse_kl`.

    Args:
        student: Logits ``[N, C]``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        beta: The teacher's share of the mixture, in (0, 1).

    Example:
        Two that never agree are ln 2 apart.

        >>> round(jensen_shannon(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])).item(), 4)
        0.6931

    Raises:
        ValueError: If `beta` is not within (0, 1).
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"`beta` must lie in (0, 1), got {beta!r}. The ends are the losses 'kl' and 'reverse_kl'.")
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    scale = temperature**2
    return _divergence(log_p, log_m, beta * scale) + _divergence(log_q, log_m, (1.0 - beta) * scale)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the logits (Ba and Caruana 2014, arXiv 1312.6184).

    Example::

        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    return F.mse_loss(raised(student), raised(teacher))


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross entropy of the student against the teacher's first choice (Touvron et al. 2021, 2012.12877).

    Example::

        >>> round(hard(torch.zeros(1, 2), torch.tensor([[5.0, 1.0]])).item(), 4)  # ln 2
        0.6931
    """
    return F.cross_entropy(raised(student), teacher.argmax(dim=1))


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Return T² · (α TCKD + β NCKD), the two parts of :func:`kl` with weights of their own.

    TCKD is KL(p ‖ q) of two classes, the labelled one and all others together; NCKD that of the others among
    themselves, which :func:`kl` weighs with what the teacher leaves to them (Zhao et al. 2022, arXiv 2203.08679).

    Args:
        student: Logits ``[N, C]``.
        teacher: Logits of the same shape.
        labels: The true classes, integers ``[N]`` in [0, C).
        temperature: T > 0.
        alpha: The weight of the labelled class.
        beta: The weight of the others.

    Example:
        With two classes there is one other, and TCKD is the divergence.

        >>> student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
        >>> round(dkd(student, teacher, torch.tensor([0])).item(), 4)
        0.1438
    """
    if student.shape[1] == 1:
        return kl(student, teacher, temperature)  # there is no other class
    labels = labels.long()[:, None]

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = _log_softmax(logits, temperature)
        others = log_p.scatter(1, labels, -math.inf)
        return torch.cat([log_p.gather(1, labels), others.logsumexp(1, keepdim=True)], dim=1), _log_softmax(others)

    (q, q_others), (p, p_others) = parts(student), parts(teacher)
    scale = temperature**2
    return _divergence(p, q, alpha * scale) + _divergence(p_others, q_others, beta * scale)


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return T² · (β (1 − ρ over the classes of each row) + γ (1 − ρ over the rows of each class)).

    ρ is the mean of Pearson's correlations of p and q: the student may differ from the teacher in scale and offset
    (Huang et al. 2022, arXiv 2205.10536). What does not vary has ρ = 0 and no gradient: equal logits, and every class
    where there is one row.

    Args:
        student: Logits ``[N, C]``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        beta: The weight of the relation between classes.
        gamma: The weight of the relation between rows.

    Example:
        All is reversed, so that both correlations are −1.

        >>> round(dist(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 1.0]])).item(), 4)
        4.0
    """
    q, p = (F.softmax(raised(logits) / temperature, dim=1) for logits in (student, teacher))
    between_classes, between_rows = 1.0 - _correlation(q, p), 1.0 - _correlation(q.T, p.T)
    return temperature**2 * (beta * between_classes + gamma * between_rows)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − the cosine of the angle between the rows ``[N, D]``, which may be any embeddings; 1 where one is zero.

    Example::

        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    return 1.0 - (unit(raised(student)) * unit(raised(teacher))).sum(1).mean()


def standardize(logits: Tensor) -> Tensor:
    """Return each row with mean 0 and standard deviation 1, so that only its form is distilled, not its scale.

    Logit standardization (Sun et al. 2024, arXiv 2403.01427), σ the root of the mean square as in the paper's equation
    (its code divides by C − 1 instead). A row of equal logits becomes zero.

    Args:
        logits: ``[N, C]``.

    Example::

        >>> standardize(torch.tensor([[1.0, 5.0]])).round(decimals=4).tolist()
        [[-1.0, 1.0]]
    """
    return F.layer_norm(raised(logits), logits.shape[1:], eps=1e-8)  # the gradient at equal logits stays below 1e4


def raised(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where it was in less.

    Example::

        >>> raised(torch.zeros(1, dtype=torch.bfloat16)).dtype, raised(torch.zeros(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return tensor if tensor.dtype in _LOWEST else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float64)}


def unit(vectors: Tensor) -> Tensor:
    """Return vectors along the last dimension with length 1; a zero vector stays zero, with a gradient of 0.

    Example::

        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6..., 0.8...], [0.0, 0.0]]
    """
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.masked_fill(lengths == 0, math.inf)


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of rows; finite, so that 0 · log 0 is 0 where a class is at −inf."""
    logits = raised(logits)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(1).clamp(min=_LOWEST[logits.dtype])


def _divergence(log_p: Tensor, log_q: Tensor, scale: float = 1.0) -> Tensor:
    """The mean over rows, times `scale`."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (scale / log_q.shape[0])


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    (a, is_a_flat), (b, is_b_flat) = _centered(a), _centered(b)
    lengths = a.norm(dim=1) * b.norm(dim=1) + 1e-8  # as in the authors' code
    return ((a * b).sum(1) / lengths.masked_fill(is_a_flat | is_b_flat, math.inf)).mean()


def _centered(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without their means, and which of them are no more than the rounding of a constant."""
    means = rows.mean(1, keepdim=True)
    gaps = rows - means
    rounding = 8.0 * torch.finfo(rows.dtype).eps * math.sqrt(rows.shape[1]) * means.abs()
    return gaps, gaps.norm(dim=1) <= rounding[:, 0]


@dataclass(frozen=True)
class Loss:
    """A way to compare logits.

    Args:
        function: A function of student and teacher ``[N, C]``, and of ``temperature`` and ``labels`` where it has them,
            that returns a scalar, the mean over rows.
        needs_labels: Whether it cannot do without ``labels``.
        needs_classes: Whether it says nothing of a single number.
    """

    function: Callable[..., Tensor]
    needs_labels: bool = False
    needs_classes: bool = True


LOSSES: dict[str, Loss] = {
    "kl": Loss(kl),
    "reverse_kl": Loss(reverse_kl),
    "jensen_shannon": Loss(jensen_shannon),
    "mse": Loss(mse, needs_classes=False),
    "hard": Loss(hard),
    "dkd": Loss(dkd, needs_labels=True),
    "dist": Loss(dist),
    "cosine": Loss(cosine),
}


class LogitLoss(nn.Module):
    """The mean of a loss over the positions of outputs of any shape.

    One dimension holds the classes, all others are positions (samples, tokens, pixels), and each position counts the
    same: logits ``[4, 7, 11]`` give what ``[28, 11]`` give. Positions whose label is `ignore_index` do not count; where
    none is left the loss is 0.

    Args:
        function: A name in :data:`LOSSES`, or a function of rows as :class:`Loss` describes it.
        dim: The dimension of the classes. ``None`` is the last of 2 and 3 dimensions (``[B, C]``, ``[B, T, C]``),
            dimension 1 of 4 and 5 (``[B, C, H, W]``), and ``[B]`` is one number a sample, as ``[B, 1]``.
            ``[B, C, T]`` needs ``dim=1``, and ``[B, H, W, C]`` needs ``dim=-1``.
        ignore_index: The label of positions that do not count.
        labels: A function of the batch that returns the labels, integers of the shape of the positions, for a batch in
            which :func:`find_labels` does not find them, or finds others. Whoever holds the batch calls it.
        standardize: Whether both outputs go through :func:`standardize` first.
        temperature: This loss's own temperature in [0.01, 1000], whatever the caller says.
        options: Further arguments of the function by name: ``{"alpha": 1.0, "beta": 8.0}`` for ``"dkd"``.

    Example::

        >>> loss = LogitLoss("mse")
        >>> student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]])
        >>> loss(student, teacher).item(), loss(student, teacher, labels=torch.tensor([[0, -100]])).item()
        (5.0, 1.0)

    Raises:
        ValueError: If a name, the temperature or an option is not allowed.
        TypeError: If an argument is of another type.
    """

    def __init__(
        self,
        function: str | Callable[..., Tensor] = "kl",
        dim: int | None = None,
        ignore_index: int = -100,
        labels: Callable[[Any], Tensor] | None = None,
        standardize: bool = False,
        temperature: float | None = None,
        options: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(function, str):
            known = LOSSES[one_of(function, LOSSES, "function")]
        elif callable(function) and not isinstance(function, type):
            known = Loss(function, _needs(function, "labels"), needs_classes=False)
        else:
            raise TypeError(f"`function` must be one of {', '.join(LOSSES)} or a function of rows, got {function!r}.")
        if labels is not None and not callable(labels):
            raise TypeError(f"`labels` must be a function of the batch that returns them, got {labels!r}.")
        self.name = _name_of(function)
        self.needs_labels = known.needs_labels
        self.needs_classes = known.needs_classes
        self.dim = dim
        self.ignore_index = ignore_index
        self.labels = labels
        self.standardize = standardize
        self.temperature = None if temperature is None else number(temperature, "temperature", 0.01, 1000.0)
        self.options = {key: number(value, f"options['{key}']") for key, value in (options or {}).items()}
        self._function = partial(known.function, **self.options) if self.options else known.function
        self._takes = taken_by(self._function)
        allowed = [name for name in list(_keywords(known.function))[2:] if name not in ("temperature", "labels")]
        for key in self.options:
            if key not in allowed:
                raise ValueError(f"`options` of '{self.name}' must be among {allowed}, got '{key}'.")
        if self.options and isinstance(function, str):  # a value that the function refuses, it refuses here
            call(self._function, torch.zeros(1, 2), torch.zeros(1, 2), 1.0, torch.zeros(1, dtype=torch.long))

    def forward(
        self, student: Tensor, teacher: Tensor, temperature: float = 1.0, labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student: The student's output.
            teacher: The teacher's output, of the same shape.
            temperature: T > 0, for the losses that have one.
            labels: Integers of the shape of the positions.

        Raises:
            ValueError: If shapes do not fit, if there is one class, or if the loss needs labels and has none.
        """
        if self.dim is None and student.dim() == 2 and student.shape == teacher.shape and student.shape[1] > 1:
            positions = student.shape[:1]  # as most are: rows already
        else:
            student, teacher, positions = self._rows(student, teacher)
        if labels is None and self.needs_labels:
            raise ValueError(
                f"The loss '{self.name}' needs labels, integers of shape {list(positions)}, and got none. They are "
                f"looked for in the batch under {', '.join(LABEL_NAMES)}, or in its tuple. "
                f"Give LogitLoss('{self.name}', labels=lambda batch: ...), or use a loss without labels, such as 'kl'."
            )
        student, teacher = raised(student), raised(teacher)
        if labels is not None:
            if labels.shape != positions or labels.dtype not in _INTEGERS:
                raise ValueError(
                    f"`labels` must be integers of the shape of the positions, {list(positions)}, got {labels.dtype} "
                    f"of shape {list(labels.shape)}."
                )
            labels = labels.flatten()
            if len(labels) and labels.min().item() <= self.ignore_index:  # the quickest way to see that all count
                counts = labels != self.ignore_index
                student, teacher, labels = student[counts], teacher[counts], labels[counts]
            if self.needs_labels and len(labels) and not 0 <= labels.min() <= labels.max() < student.shape[1]:
                raise ValueError(
                    f"`labels` must lie in [0, {student.shape[1]}), got {labels.min():d} to {labels.max():d}: "
                    f"LogitLoss('{self.name}', ignore_index=...) names the one of positions that do not count."
                )
        if not len(student):
            return student.sum()  # 0, with a gradient of 0
        if self.standardize:
            student, teacher = standardize(student), standardize(teacher)
        if self.temperature is not None:
            temperature = self.temperature
        if self._takes == ("temperature",):  # most
            return self._function(student, teacher, temperature=temperature)
        return call(self._function, student, teacher, temperature, labels, self._takes)

    def _rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Both outputs as rows, and the shape of their positions."""
        dim = class_dim(student, self.dim)
        positions = student.shape[:dim] + student.shape[dim + 1 :]
        if dim == student.dim() == teacher.dim():
            student, teacher = student[:, None], teacher[:, None]
        if student.shape != teacher.shape:
            self._refuse_shapes(student, teacher, dim)
        if self.needs_classes and student.shape[dim] == 1:
            raise ValueError(
                f"The loss '{self.name}' compares classes, and the student returns one number for each sample: use "
                f"'mse', or a function of both outputs."
            )
        return rows_of(student, dim), rows_of(teacher, dim), positions

    def _refuse_shapes(self, student: Tensor, teacher: Tensor, dim: int) -> NoReturn:
        if student.dim() == teacher.dim() and student.shape[dim] != teacher.shape[dim]:
            raise ValueError(
                f"The student has {student.shape[dim]} classes and the teacher {teacher.shape[dim]} (dimension {dim} "
                f"of {spell_shape(student.shape)} and {spell_shape(teacher.shape)}): both must know the same classes. "
                f"Where the classes stand in another dimension, give LogitLoss(dim=...)."
            )
        raise ValueError(
            f"Student and teacher must return outputs of the same shape, got {spell_shape(student.shape)} and "
            f"{spell_shape(teacher.shape)}: wrap the teacher in a module that gives the student's shape."
        )

    def extra_repr(self) -> str:
        return f"'{self.name}'"


def class_dim(output: Tensor, dim: int | None = None) -> int:
    """Return the dimension of the classes in an output, counted from 0, as `LogitLoss` finds it.

    Of ``[B]`` it is the one that it lacks.

    Example::

        >>> class_dim(torch.zeros(4, 7, 11)), class_dim(torch.zeros(4, 11, 7), dim=-2), class_dim(torch.zeros(4))
        (2, 1, 1)

    Raises:
        ValueError: If the output has no such dimension, or more than 5 and `dim` is not given.
    """
    if dim is None and 1 <= output.dim() <= 5:
        return 2 if output.dim() == 3 else 1
    if dim is None or not -output.dim() <= dim < output.dim():
        raise ValueError(
            f"`dim` must name the dimension of the classes in an output of shape {list(output.shape)}, got {dim!r}."
        )
    return dim % output.dim()


def rows_of(output: Tensor, dim: int) -> Tensor:
    """Return an output as rows ``[N, C]``, C its dimension `dim`.

    Example::

        >>> rows_of(torch.zeros(4, 11, 7), 1).shape
        torch.Size([28, 11])
    """
    is_row = output.dim() == 2 and dim == 1  # already, and a view would be one more node of the graph
    return output if is_row else output.movedim(dim, -1).reshape(-1, output.shape[dim])


LABEL_NAMES = ("labels", "label", "targets", "target", "y")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def find_labels(batch: Any, positions: Sequence[int]) -> Tensor | None:
    """Return the labels in a batch: integers of exactly the shape of the positions, ``None`` where there are none.

    They are looked for under :data:`LABEL_NAMES`, in that order, as keys of a mapping or attributes of an object; in a
    tuple or list, the last element that fits is taken. Floats, booleans and one-hot labels are none. Nobody can tell
    labels that belong to the position before (as in causal language models, where they are shifted by one) from
    others: ``LogitLoss(labels=...)`` shifts them.

    Args:
        batch: What the loader gives.
        positions: The shape of an output without its dimension of classes: ``[B]``, ``[B, T]``, ``[B, H, W]``.

    Example::

        >>> find_labels((torch.zeros(2, 5), torch.tensor([1, 0])), [2])
        tensor([1, 0])
        >>> find_labels({"x": torch.tensor([1, 0])}, [2]) is None
        True
    """
    candidates: list[Any] = []
    if isinstance(batch, Mapping):
        candidates = [batch.get(name) for name in LABEL_NAMES]
    elif type(batch) not in (tuple, list):  # which have no such attributes
        candidates = [getattr(batch, name, None) for name in LABEL_NAMES]
    if isinstance(batch, (tuple, list)):
        candidates += batch[::-1]
    shape = tuple(positions)
    for value in candidates:
        if isinstance(value, Tensor) and value.shape == shape and value.dtype in _INTEGERS:
            return value
    return None


@dataclass(frozen=True)
class WeightedLoss:
    """A loss of student and teacher outputs, its name among others, and its weight, which may change in the run.

    What the loss takes beside the outputs is read once, since reading a signature costs as much as a small loss.
    """

    name: str
    loss: Callable[..., Tensor]
    weight: Schedule | ProgressFunction
    takes: tuple[str, ...]


def as_losses(value: Any) -> list[WeightedLoss]:
    """Return what a user wrote as losses with weights; a loss without one weighs 1.

    Names come from :data:`LOSSES`, from the function or from the module's class; a second of the same name is called
    ``kl_2``.

    Args:
        value: A name, a module or function of student and teacher; a list of these or of pairs ``[loss, weight]``; or a
            mapping from names to weights. A weight is 0 or more, in any form that
            :func:`~lightning_compress.moments.scheduled` reads.

    Example::

        >>> [(loss.name, loss.weight.first) for loss in as_losses(["kl", ["dist", 0.5], LogitLoss("kl", dim=1)])]
        [('kl', 1.0), ('dist', 0.5), ('kl_2', 1.0)]

    Raises:
        ValueError: If a name is unknown, a weight below 0, or nothing is given.
        TypeError: If something is neither a name nor callable.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, Mapping):
        items = list(value.items())
    pairs = [tuple(item) if isinstance(item, (list, tuple)) else (item, 1.0) for item in items]
    if not pairs:
        raise ValueError(f"`losses` must name a loss, one of {', '.join(LOSSES)}; got {value!r}.")
    losses: list[WeightedLoss] = []
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"`losses` takes pairs [loss, weight], got {pair!r}.")
        given, weight = pair
        if isinstance(given, str):
            loss: Callable[..., Tensor] = LogitLoss(one_of(given, LOSSES, "losses"))
        elif callable(given) and not isinstance(given, type):
            loss = given
        else:
            raise TypeError(
                f"`losses` takes a name ({', '.join(LOSSES)}), a module or function of student and teacher, a list of "
                f"these or of pairs [loss, weight], or a mapping from names to weights; got {given!r}."
            )
        name = first = _name_of(loss)
        taken = [other.name for other in losses]
        count = 1
        while name in taken:
            count += 1
            name = f"{first}_{count}"
        losses.append(WeightedLoss(name, loss, scheduled(weight, f"losses['{name}']", low=0.0), taken_by(loss)))
    return losses


def call(
    loss: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    labels: Tensor | None,
    takes: Sequence[str] | None = None,
) -> Tensor:
    """Return ``loss(student, teacher)``, with ``temperature`` and ``labels`` where it takes them.

    Example::

        >>> call(lambda student, teacher, temperature: temperature * (student - teacher), 5.0, 3.0, 4.0, None)
        8.0
    """
    given: dict[str, Any] = {}
    names = taken_by(loss) if takes is None else takes
    if "temperature" in names:
        given["temperature"] = temperature
    if "labels" in names:
        given["labels"] = labels
    return loss(student, teacher, **given)


def taken_by(loss: Callable[..., Any]) -> tuple[str, ...]:
    """Return which of ``temperature`` and ``labels`` a loss's signature names.

    Example::

        >>> taken_by(mse), taken_by(dkd)
        ((), ('temperature', 'labels'))
    """
    keywords = _keywords(loss)
    return tuple(name for name in ("temperature", "labels") if name in keywords)


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that can be given by keyword; of a module, those of its forward."""
    try:
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except ValueError:  # a builtin without a signature
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _needs(function: Callable[..., Any], name: str) -> bool:
    keywords = _keywords(function)
    return name in keywords and keywords[name].default is inspect.Parameter.empty


def _name_of(loss: str | Callable[..., Any]) -> str:
    if isinstance(loss, str):
        return loss
    if isinstance(loss, LogitLoss):
        return loss.name
    if isinstance(loss, partial):
        return _name_of(loss.func)
    return getattr(loss, "__name__", type(loss).__name__).strip("<>")
