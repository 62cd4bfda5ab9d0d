"""Whether a file does what the model does: it is opened in its own runtime, and run beside the model."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.copying import standalone_copy
from lightning_compress.example_inputs import ExampleInputs, named_arguments
from lightning_compress.export.files import Inputs, as_inputs
from lightning_compress.export.safetensors import load_compressed
from lightning_compress.pruning.removal import tensors_of
from lightning_compress.quantization.layers import ActivationQuantizer, Quantizer, WeightQuantizer

SHARE = 0.99
"""Of a model with rounded activations: the share of the numbers that have to lie within the tolerance."""

BEYOND = 4.0
"""Of such a model: how many tolerances the others may be off. A sum in another order rounds to a neighbour."""

_FLOAT_METRIC, _ROUNDED_METRIC = 1e-3, 1e-2


@dataclass(frozen=True)
class ExportedFile:
    """What became of a file, and how well it agrees with the model.

    Args:
        format: ``"onnx"``, ``"pt2"`` or ``"safetensors"``.
        path: Its final name; if it does not agree, there is no such file, or one of an earlier export.
        bytes: Its size, that of a second file with the weights included.
        tolerance: See :func:`tolerance`; ``None`` where nothing was compared.
        difference: The largest difference of an output, as a share of the output's span (zero included).
        within: The share of the numbers within the tolerance, in the output tensor where it is lowest.
        equal_classes: The share of rows with the same largest entry, where the first output is (batch, classes).
        metrics: The model's own, by name: (of the model, of the file).
        problem: Why it does not agree; ``None`` if it does, or was not verified.

    Example::

        >>> file = ExportedFile("onnx", Path("a/model.onnx"), 1200, 3.5e-4, 2e-6, 1.0, 1.0, {"val_acc": (0.5, 0.5)})
        >>> file.agrees, str(file)
        (True, 'model.onnx (1,200 bytes; outputs within 2e-06 of their span, 100 % equal classes, val_acc 0.5 = 0.5)')
    """

    format: str
    path: Path
    bytes: int
    tolerance: float | None = None
    difference: float | None = None
    within: float | None = None
    equal_classes: float | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the file was left under its name."""
        return self.problem is None

    def __str__(self) -> str:
        words = []
        if self.problem is not None:
            words.append(self.problem)
        elif self.difference is not None:
            words.append(f"outputs within {self.difference:.2g} of their span")
        if self.equal_classes is not None:
            words.append(f"{100 * self.equal_classes:.4g} % equal classes")
        for name, (own, other) in self.metrics.items():
            spelled = f"{own:.4g}", f"{other:.4g}"
            words.append(f"{name} {spelled[0]} {'=' if spelled[0] == spelled[1] else '→'} {spelled[1]}")
        return f"{self.path.name} ({'; '.join(filter(None, [f'{self.bytes:,} bytes', ', '.join(words)]))})"


# --- runtimes ---------------------------------------------------------------------------------------------------------


def open_file(
    format: str, path: str | os.PathLike[str], module: nn.Module, example_inputs: Inputs
) -> Callable[..., Any]:
    """Open a file in its own runtime; returns a function that is called as the module is, and returns what it returns.

    ONNX runs in onnxruntime, in the optimized graph on the CPU; ``pt2`` as ``torch.export.load`` reads it;
    ``safetensors`` in a copy of the module from which all state was taken before.

    Args:
        format: ``"onnx"``, ``"pt2"`` or ``"safetensors"``.
        path: The file.
        module: What it was made of, on the CPU and in eval mode. It is run once for the structure of its output.
        example_inputs: What it was made with. Arguments that are no tensors are constants of the file.

    Raises:
        ImportError: If the runtime is not installed.
        Exception: Whatever the runtime raises for a file that is none.
    """
    if format == "safetensors":
        return _open_safetensors(Path(path), module)
    inputs = as_inputs(example_inputs)
    if format == "onnx":
        return _open_onnx(Path(path), module, inputs)
    return _open_pt2(Path(path), module, inputs)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def _open_pt2(path: Path, module: nn.Module, inputs: ExampleInputs) -> Callable[..., Any]:
    program = torch.export.load(path).module()
    names = list(inputs.for_forward(module)) if inputs.kwargs else None

    @torch.no_grad()
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = _bound(module, args, kwargs)
        if names is None:
            return program(*bound.args[: len(inputs.args)])
        given = named_arguments(bound)
        return program(**{name: given[name] for name in names})

    return run


def _open_safetensors(path: Path, module: nn.Module) -> Callable[..., Any]:
    copied = standalone_copy(module).requires_grad_(False)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    return load_compressed(path, copied)


def onnx_session(path: str | os.PathLike[str]) -> Any:
    """Open an ONNX file in onnxruntime, on the CPU, with as many threads as torch has; returns the session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path, module: nn.Module, inputs: ExampleInputs) -> Callable[..., Any]:
    session = onnx_session(path)
    names = [entry.name for entry in session.get_inputs()]
    order = tree_flatten(named_arguments(_bound(module, inputs.args, inputs.kwargs)))[1]
    with torch.no_grad():
        leaves, structure = tree_flatten(module(*inputs.args, **inputs.kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(places) != len(session.get_outputs()):
        raise ValueError(f"the file has {len(session.get_outputs())} outputs, and the module {len(places)}")

    def run(*args: Any, **kwargs: Any) -> Any:
        # The graph has the tensors only, in the order of the example's.
        values = order.flatten_up_to(named_arguments(_bound(module, args, kwargs)))
        given = [leaf for leaf in values if isinstance(leaf, Tensor)]
        if len(given) != len(names):
            raise ValueError(f"the file takes {len(names)} tensors, and was given {len(given)}")
        feed = {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, given, strict=True)}
        found = list(leaves)
        for place, output in zip(places, session.run(None, feed), strict=True):
            found[place] = torch.as_tensor(output)
        return tree_unflatten(found, structure)

    return run


# --- comparing --------------------------------------------------------------------------------------------------------


def tolerance(module: nn.Module, format: str = "") -> tuple[float, bool]:
    """Return how far outputs may differ, as a share of their span, and whether activations are rounded.

    A model that computes with floats: √ε of its coarsest type (3.5e-4 for float32). One whose activations are rounded
    to b bits: two steps of such a range, 2 / (2^b − 1), b the fewest bits: a sum in another order can round to the
    neighbouring integer, and residual chains pass that on. Where weights have a scale for each 16, 32, 64, … of them,
    onnxruntime rounds what they are multiplied with to 8 bits, unasked, so an ``"onnx"`` file has 8 at most.

    Example::

        >>> share, is_rounded = tolerance(nn.Linear(2, 2))
        >>> f"{share:.2g}", is_rounded
        ('0.00035', False)
    """
    quantizers = [child for child in module.modules() if isinstance(child, Quantizer) and child.is_on]
    bits = [quantizer.bits for quantizer in quantizers if isinstance(quantizer, ActivationQuantizer)]
    if format == "onnx" and any(_is_multiplied_in_bytes(quantizer) for quantizer in quantizers):
        bits.append(8)
    if bits:
        return 2.0 / (2 ** min(bits) - 1), True
    floats = {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}
    epsilon = max(torch.finfo(dtype).eps for dtype in floats | {torch.float32})
    return math.sqrt(epsilon), False


def _is_multiplied_in_bytes(quantizer: Quantizer) -> bool:
    """Whether onnxruntime has a kernel for such groups (MatMulNBits); it takes them to be a power of two."""
    group = quantizer.granularity if isinstance(quantizer, WeightQuantizer) else None
    return isinstance(group, int) and group >= 16 and group.bit_count() == 1


@dataclass
class _Output:
    """One tensor of the output, over all batches."""

    low: float = 0.0
    high: float = 0.0
    largest: float = 0.0
    within: int = 0
    count: int = 0


class Comparison:
    """Compares the outputs of a file with those of its module, batch by batch.

    A number agrees if it differs by no more than :func:`tolerance` · span, the span being max − min of that output of
    the module, zero included, in the batches so far. Infinities and NaN have to be the same; integers too. All numbers
    of every output have to agree; of a model with rounded activations 99 % have to, and the others within four
    tolerances. A metric may differ by 0.001 · max(1, |metric|), with rounded activations by 0.01 · max(1, |metric|),
    and by one row: 1 over their number.

    Example::

        >>> comparison = Comparison(nn.Linear(2, 2))
        >>> comparison.add(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
        >>> comparison.difference, comparison.equal_classes, comparison.problem()
        (0.5, 1.0, 'outputs differ by 0.5 of their span (allowed: 0.00035)')
    """

    def __init__(self, module: nn.Module, format: str = "") -> None:
        self.tolerance, self.is_rounded = tolerance(module, format)
        self.rows = 0
        self.metrics: dict[str, tuple[float, float]] = {}
        self._outputs: list[_Output] = []
        self._equal_classes = self._classified = 0
        self._shapes: str | None = None
        self._unequal: list[str] = []

    def add(self, expected: Any, got: Any) -> None:
        """Take a batch's outputs: of the module, and of the file."""
        ours, theirs = list(tensors_of(expected)), list(tensors_of(got))
        if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
            shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (ours, theirs)]
            self._shapes = f"outputs have the shapes {shapes[1]} instead of {shapes[0]}"
            return
        self._outputs = self._outputs or [_Output() for _ in ours]
        for output, own, other in zip(self._outputs, ours, theirs, strict=True):
            self._compare(output, own.detach().cpu(), other.detach().cpu())
        self.rows += ours[0].shape[0] if ours and ours[0].dim() else 1
        if ours and ours[0].dim() == 2 and ours[0].shape[1] > 1 and ours[0].is_floating_point():
            self._equal_classes += int((ours[0].cpu().argmax(1) == theirs[0].cpu().argmax(1)).sum())
            self._classified += len(ours[0])

    def _compare(self, output: _Output, own: Tensor, other: Tensor) -> None:
        output.count += own.numel()
        if not own.is_floating_point() or not own.numel():
            same = own == other
            output.within += int(same.sum())
            if not bool(same.all()):
                output.largest = math.inf if not self.is_rounded else output.largest
            return
        own, other = own.double(), other.double()
        finite = own[own.isfinite()]
        if finite.numel():
            output.low, output.high = min(output.low, float(finite.min())), max(output.high, float(finite.max()))
        same = (own == other) | (own.isnan() & other.isnan())
        error = torch.where(same, 0.0, (own - other).abs().nan_to_num(math.inf))
        output.within += int((error <= self.tolerance * self._span(output)).sum())
        output.largest = max(output.largest, float(error.max()))

    def add_metrics(self, own: Mapping[str, float], other: Mapping[str, float], rows: int) -> None:
        """Take the metrics of the module and of the file on that many rows of data."""
        self.metrics |= {name: (value, other[name]) for name, value in own.items() if name in other}
        share = _ROUNDED_METRIC if self.is_rounded else _FLOAT_METRIC
        for name, (ours, theirs) in self.metrics.items():
            allowed = share * max(1.0, abs(ours)) + 1.0 / max(rows, 1)
            is_same = ours == theirs or (math.isnan(ours) and math.isnan(theirs))
            if not is_same and not (math.isfinite(ours) and abs(ours - theirs) <= allowed):
                self._unequal.append(f"{name} is {theirs:.4g} instead of {ours:.4g}")

    @staticmethod
    def _span(output: _Output) -> float:
        return output.high - output.low or 1.0

    @property
    def difference(self) -> float | None:
        """The largest difference, as a share of the span; ``None`` if nothing was compared."""
        return max((output.largest / self._span(output) for output in self._outputs), default=None)

    @property
    def within(self) -> float | None:
        """The share of the numbers within the tolerance, in the output where it is lowest."""
        return min((output.within / output.count for output in self._outputs if output.count), default=None)

    @property
    def equal_classes(self) -> float | None:
        """The share of rows whose largest entry is the same one, where the first output is (batch, classes)."""
        return self._equal_classes / self._classified if self._classified else None

    def problem(self) -> str | None:
        """Return why the file does not do what the module does, ``None`` if it does."""
        difference, within = self.difference or 0.0, 1.0 if self.within is None else self.within
        if self._shapes is not None:
            return self._shapes
        if self.is_rounded and (within < SHARE or difference > BEYOND * self.tolerance):
            return (
                f"outputs differ by up to {difference:.2g} of their span, {100 * within:.4g} % by no more than "
                f"{self.tolerance:.2g} (allowed: {BEYOND * self.tolerance:.2g}, {100 * SHARE:.4g} %)"
            )
        if not self.is_rounded and difference > self.tolerance:
            return f"outputs differ by {difference:.2g} of their span (allowed: {self.tolerance:.2g})"
        return ", ".join(self._unequal) or None


@torch.no_grad()
def compare_outputs(
    module: nn.Module, run: Callable[..., Any], batches: Iterable[Inputs], comparison: Comparison
) -> None:
    """Run a file beside its module, which is on the CPU and in eval mode, on each batch of inputs."""
    for batch in batches:
        inputs = as_inputs(batch)
        comparison.add(module(*inputs.args, **inputs.kwargs), run(*inputs.args, **inputs.kwargs))
