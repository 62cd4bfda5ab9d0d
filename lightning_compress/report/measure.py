"""What a model weighs and how long it takes: counts, bytes, latencies. Torch alone, usable in any loop."""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.example_inputs import ExampleInputs, is_compiled, spell_dtype
from lightning_compress.modules import clean_name

BATCHES = (1, 64)
"""The batch sizes at which latency is measured."""

_TOO_LONG = 5.0  # seconds that one forward may take; a slower one is left out, and the report says so


# Counts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCount:
    """How many values a parameter has, and how many of them are exactly zero.

    Args:
        name: Its qualified name, the first where several modules share it.
        shape: Its shape; of the whole parameter where it is sharded as a DTensor.
        dtype: ``"float32"``, …
        total: Its values.
        zeros: Those that are zero.
        aliases: Its other names.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    total: int
    zeros: int
    aliases: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """The share of zeros, in [0, 1]."""
        return share(self.zeros, self.total)


def count_parameters(module: nn.Module, names: Iterable[str] | None = None) -> list[ParameterCount]:
    """Return the count of every parameter of a module, shared (tied) ones once, in the order of their names.

    The zeros are counted on the parameters' device, which is waited for once. A parameter that is sharded as a DTensor
    is counted over all processes, so all of them must call this. One that is not initialized yet counts nothing.

    Args:
        module: The module.
        names: Count these alone; any of a shared parameter's names will do. ``None`` counts all.

    Example::

        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> _ = nn.init.zeros_(net[0].bias)
        >>> [(count.name, count.total, count.zeros) for count in count_parameters(net)]
        [('0.weight', 6, 0), ('0.bias', 2, 2)]
    """
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(clean_name(name))
    entries = [
        (parameter, own)
        for parameter, own in found.values()
        if not isinstance(parameter, nn.parameter.UninitializedParameter)
    ]
    if names is not None:
        wanted = set(names)
        entries = [(parameter, own) for parameter, own in entries if wanted.intersection(own)]
    zeros = count_zeros([parameter for parameter, _ in entries])
    return [
        ParameterCount(
            own[0], tuple(parameter.shape), spell_dtype(parameter.dtype), parameter.numel(), count, tuple(own[1:])
        )
        for (parameter, own), count in zip(entries, zeros, strict=True)
    ]


def count_zeros(tensors: Sequence[Tensor]) -> list[int]:
    """Return the number of exact zeros in each tensor, waiting once for a device.

    Example::

        >>> count_zeros([torch.eye(3), torch.ones(2)])
        [6, 0]
    """
    nonzero = [_count_nonzero(tensor) for tensor in tensors]
    counted: dict[torch.device, list[int]] = {}
    for device in {count.device for count in nonzero}:
        counted[device] = torch.stack([count for count in nonzero if count.device == device]).tolist()
    remaining = {device: iter(counts) for device, counts in counted.items()}
    return [tensor.numel() - next(remaining[count.device]) for tensor, count in zip(tensors, nonzero, strict=True)]


@torch.no_grad()
def _count_nonzero(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return torch.count_nonzero(tensor.detach())
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    count = torch.count_nonzero(tensor.to_local().detach()).to(mesh.device_type)
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in tensor.placements]
    return DTensor.from_local(count, mesh, placements, run_check=False).full_tensor()


@torch.no_grad()
def zero_rows(module: nn.Module) -> dict[str, list[int]]:
    """Return which rows of each weight are zero, by their positions in dimension 0: neurons and filters that are gone.

    Weights without such rows, vectors and sharded parameters are left out.

    Example::

        >>> layer = nn.Linear(2, 3)
        >>> _ = nn.init.zeros_(layer.weight[1])
        >>> zero_rows(layer)
        {'weight': [1]}
    """
    found = {}
    for name, parameter in module.named_parameters():
        is_whole = not isinstance(parameter, nn.parameter.UninitializedParameter)
        if is_whole and parameter.dim() > 1 and not hasattr(parameter, "full_tensor"):
            rows = (parameter == 0).flatten(1).all(1).nonzero().flatten().tolist()
            if rows:
                found[clean_name(name)] = rows
    return found


@torch.no_grad()
def histogram(values: Tensor, bins: int = 40) -> dict[str, Any] | None:
    """Return how often which values occur in a tensor, zeros, NaN and infinities left out; ``None`` without any other.

    The bins are equally wide and lie symmetrically around 0, so a gap in the middle is what pruning has left.

    Args:
        values: A tensor of any shape.
        bins: Their number, an even one.

    Example::

        >>> histogram(Tensor([0.0, 0.0, 1.0, -4.0, 4.0]), bins=4)
        {'limit': 4.0, 'counts': [1, 0, 1, 1]}
    """
    found = values.detach()[values.detach() != 0].float()
    found = found[found.isfinite()]
    if not found.numel():
        return None
    limit = float(found.abs().max())
    return {"limit": limit, "counts": [int(n) for n in torch.histc(found, bins, -limit, limit).tolist()]}


def share(part: int, whole: int) -> float:
    """Return `part` of `whole` as a number in [0, 1]; nothing of nothing is 0.

    Example::

        >>> share(3, 4), share(0, 0)
        (0.75, 0.0)
    """
    return part / whole if whole else 0.0


# Bytes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSize:
    """The bytes of a file as it is written, and of the same file deflated, as ``zip`` does it."""

    stored: int
    deflated: int | None = None


class _CountingFile:
    """A file that is measured and not kept."""

    def __init__(self, level: int) -> None:
        self.stored = 0
        self.deflated = 0
        self._compressor = zlib.compressobj(level) if level else None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.stored += size
        if self._compressor is not None:
            self.deflated += len(self._compressor.compress(data))
        return size

    def flush(self) -> None:
        pass

    def finish(self) -> FileSize:
        if self._compressor is None:
            return FileSize(self.stored)
        return FileSize(self.stored, self.deflated + len(self._compressor.flush()))


def file_size(state: Mapping[str, Any], deflate: bool = True) -> FileSize:
    """Return how large ``torch.save`` makes a state, on disk and deflated; nothing is written and nothing copied.

    Example::

        >>> size = file_size({"weight": torch.zeros(1000, 1000)})
        >>> 4_000_000 < size.stored < 4_010_000, size.deflated < 10_000
        (True, True)
    """
    file = _CountingFile(level=6 if deflate else 0)
    torch.save(state, cast(IO[bytes], file))
    return file.finish()


def read_checkpoint(path: str) -> dict[str, Any]:
    """Return what a Lightning checkpoint holds. The file is mapped, not read whole, and runs no code of its own.

    Raises:
        Exception: Whatever ``torch.load(weights_only=True)`` raises.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


def checkpoint_zeros(checkpoint: Mapping[str, Any], counts: Iterable[ParameterCount]) -> tuple[int, int]:
    """Return the zeros and the values that some parameters have in a Lightning checkpoint's ``state_dict``.

    Parameters that the file lacks count nothing.

    Raises:
        KeyError: Without a ``state_dict``.
    """
    state = {clean_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    tensors = []
    for count in counts:
        tensors += [state[name] for name in (count.name, *count.aliases) if name in state][:1]
    return sum(count_zeros(tensors)), sum(tensor.numel() for tensor in tensors)


# Time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """A median time in seconds, of how many repeats, and the shortest of them."""

    seconds: float
    repeats: int
    fastest: float


def median_latency(
    module: nn.Module,
    inputs: ExampleInputs,
    budget: float = 0.5,
    repeats: int = 100,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Latency:
    """Return the median time of a module's forward, in eval mode and without gradients, after a warm-up.

    The module is left as it was found: see :func:`preserved`. A compiled module is measured uncompiled.

    Args:
        module: The module, on the device to measure.
        inputs: What its forward is called with, on the same device.
        budget: Seconds after which no further repeat begins; one is always made.
        repeats: The most repeats.
        context: Entered around each forward, and measured with it: autocast, for example.

    Example::

        >>> latency = median_latency(nn.Linear(3, 2), ExampleInputs((torch.zeros(5, 3),)), repeats=10)
        >>> latency.repeats, 0 < latency.seconds < 0.1
        (10, True)
    """
    device = next((leaf.device for leaf in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, Tensor)), None)

    def seconds() -> float:
        _wait_for(device)
        start = time.perf_counter()
        with context():
            module(*inputs.args, **inputs.kwargs)
        _wait_for(device)
        return time.perf_counter() - start

    with ExitStack() as stack:
        stack.enter_context(preserved(module))
        stack.enter_context(torch.no_grad())
        if any(is_compiled(child) for child in module.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for child in module.modules():
            child.__dict__["training"] = False  # not eval(): what a user's own train() does could not be undone
        return median_time(seconds, budget, repeats)


def median_time(seconds: Callable[[], float], budget: float = 0.5, repeats: int = 100) -> Latency:
    """Return the median of times, after a warm-up.

    Args:
        seconds: Does once what is measured, and returns how long it took.
        budget: Seconds after which no further repeat begins; one is always made.
        repeats: The most repeats.

    Example::

        >>> times = iter([9.0, 3.0, 1.0, 2.0])
        >>> median_time(lambda: next(times), repeats=3)  # the first is the warm-up, which ends early since it is long
        Latency(seconds=2.0, repeats=3, fastest=1.0)
    """
    end = time.perf_counter() + budget
    for _ in range(3):
        if seconds() > budget / 10:
            break
    times = [seconds()]
    while len(times) < repeats and time.perf_counter() < end:
        times.append(seconds())
    return Latency(statistics.median(times), len(times), min(times))


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Put back, on leaving, what forwards can change: buffers, attributes (metric states, counters), random numbers.

    Parameters are not covered. Attributes of each module that are tensors, lists, dicts or sets are put back as the
    same objects with their former content, all others as the same objects.

    Example::

        >>> norm = nn.BatchNorm1d(2)
        >>> with preserved(norm):
        ...     _ = norm(torch.rand(4, 2))
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    modules = list(module.modules())
    saved = [(_Saved(child._buffers), _Saved(child.__dict__, _is_state)) for child in modules]
    devices = sorted({leaf.device.index for leaf in module.parameters() if leaf.device.type == "cuda"})
    python_random, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_random = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_random)
        if numpy is not None:
            numpy.random.set_state(numpy_random)
        for buffers, attributes in saved:
            buffers.restore()
            attributes.restore()


def _is_state(key: str) -> bool:
    return key not in ("_parameters", "_buffers", "_modules") and not key.endswith(("_hooks", "_hooks_with_kwargs"))


class _Saved:
    """The content of a dictionary, and of the containers and tensors in it."""

    def __init__(self, target: dict[str, Any], is_meant: Callable[[str], bool] = lambda key: True) -> None:
        self._target = target
        self._is_meant = is_meant
        self._values = {key: value for key, value in target.items() if is_meant(key)}
        self._tensors = [
            (value, value.detach().clone())
            for value in self._values.values()
            if isinstance(value, Tensor) and not value.is_inference()
        ]
        self._containers = [
            (value, value.copy()) for value in self._values.values() if type(value) in (list, dict, set)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, content in self._tensors:
            if not torch.equal(tensor, content):  # batch norm changes its buffers without a new `_version`
                tensor.copy_(content)
        for container, content in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for key in [key for key in self._target if self._is_meant(key) and key not in self._values]:
            del self._target[key]
        self._target.update(self._values)


def measure_latencies(
    module: nn.Module,
    inputs: ExampleInputs,
    device: torch.device | str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, dict[str, Any]]:
    """Return the latency in milliseconds of a module's forward at each batch size, as :func:`latencies` does.

    Example::

        >>> measured = measure_latencies(nn.Linear(3, 2), ExampleInputs((torch.zeros(5, 3),)), "cpu")
        >>> list(measured), list(measured["64"])
        (['1', '64'], ['ms', 'fastest_ms', 'repeats', 'unsure'])
    """
    return latencies(lambda batch: median_latency(module, inputs.resized(batch).to(device), context=context))


def latencies(measure: Callable[[int], Latency]) -> dict[str, dict[str, Any]]:
    """Return the latency in milliseconds at each batch size of `BATCHES`; one that cannot be measured says why.

    Other processes can only make a forward slower. So a measurement that looks disturbed is made up to three times and
    the lowest median counts; it is ``unsure`` if that looks disturbed too: more than twice the fastest forward, or more
    than 1.5 times as long for each row as at batch 1.

    Example::

        >>> latencies(lambda batch: Latency(batch / 1000, 9, batch / 1000))["64"]
        {'ms': 64.0, 'fastest_ms': 64.0, 'repeats': 9, 'unsure': False}
    """
    result: dict[str, dict[str, Any]] = {}
    for_a_row = math.inf
    for batch in BATCHES:
        expected = for_a_row * batch
        if _TOO_LONG < expected < math.inf:
            result[str(batch)] = {"ms": None, "left_out": f"one forward would take about {expected:.0f} s"}
            continue
        try:
            latency = measure(batch)
            for _ in range(2):
                if not _is_disturbed(latency, expected) or latency.repeats == 1:
                    break
                latency = min(latency, measure(batch), key=lambda it: it.seconds)
        except Exception as error:  # whatever a model raises: a report must not end a training
            result[str(batch)] = {"ms": None, "left_out": f"{type(error).__name__}: {_first_line(error)}"}
            continue
        for_a_row = min(for_a_row, latency.seconds / batch)
        result[str(batch)] = {
            "ms": latency.seconds * 1e3,
            "fastest_ms": latency.fastest * 1e3,
            "repeats": latency.repeats,
            "unsure": _is_disturbed(latency, expected),
        }
    return result


def _is_disturbed(latency: Latency, expected: float) -> bool:
    return latency.seconds > 2.0 * latency.fastest or latency.seconds > 1.5 * expected


class StepTimes:
    """The times of steps, in bounded memory: beyond 20,000 of them every second one is dropped.

    Example::

        >>> times = StepTimes(warmup=1)
        >>> for seconds in (9.0, 1.0, 2.0, 3.0):
        ...     times.add(seconds)
        >>> times.median(), times.count
        (2.0, 3)
    """

    def __init__(self, warmup: int = 10, most: int = 20_000) -> None:
        self._warmup = warmup
        self._most = most
        self._stride = 1
        self._seen = 0
        self._times = array("d")

    def add(self, seconds: float) -> None:
        """Take one step's time."""
        if self._seen % self._stride == 0:
            self._times.append(seconds)
            if len(self._times) > self._most:
                self._times, self._stride = self._times[::2], 2 * self._stride
        self._seen += 1

    @property
    def count(self) -> int:
        """How many steps the median is of: all but the warm-up, which is at most the first half."""
        return self._seen - min(self._warmup, self._seen // 2)

    def median(self) -> float | None:
        """Return the median in seconds, ``None`` without a step."""
        warmup = -(-(self._seen - self.count) // self._stride)
        return statistics.median(self._times[warmup:]) if self._times else None


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        getattr(torch, device.type).synchronize()


# Words ---------------------------------------------------------------------------------------------------------------


def verdict(figures: Mapping[str, Any]) -> list[str]:
    """Return plain sentences on what is really smaller and faster, and what only could be.

    Args:
        figures: The content of ``report.json``.

    Example::

        >>> figures = {"totals": {"zeros": 90, "parameters": 100}, "before": {"parameters": 100}}
        >>> verdict(figures)
        ['The zeros are stored dense and computed dense: in this format the model is neither smaller nor faster.']
    """
    totals, before, size = figures["totals"], figures["before"], figures.get("size", {})
    rows = figures.get("parameters", ())
    sentences = []
    removed = before.get("parameters", 0) - totals["parameters"]
    if removed > 0:
        sentences.append(
            f"{removed:,} parameters are physically gone ({before['parameters']:,} before, "
            f"{totals['parameters']:,} now): the model is really smaller."
        )
    if share(totals["zeros"], totals["parameters"]) >= 0.01:
        which, what = "The zeros", "in this format the model is neither smaller nor faster"
        if removed > 0:
            which, what = "The zeros that are left", "they save nothing in this format"
        sentence = f"{which} are stored dense and computed dense: {what}"
        if size.get("deflated_bytes") and size["deflated_bytes"] < 0.9 * size["bytes"]:
            sentence += (
                f"; deflated, the file takes {spell_bytes(size['deflated_bytes'])} instead of "
                f"{spell_bytes(size['bytes'])}"
            )
        sentences.append(f"{sentence}.")
        work = figures.get("multiply_adds")
        if work and 0 < work["nonzero"] < 0.99 * work["total"]:
            sentences.append(
                f"What only could be: {work['nonzero']:,} of {work['total']:,} multiply-adds have a weight that is not "
                f"zero, so a runtime that left out all others would need {work['total'] / work['nonzero']:.3g} × fewer."
            )
    elif removed <= 0 and not figures.get("techniques"):
        sentences.append("Nothing was compressed: no technique acted on this model.")
    bits = sorted({facts["bits"] for row in rows for facts in row["techniques"].values() if facts.get("bits", 32) < 32})
    if bits:
        spelled = " and ".join(map(str, bits))
        where = (
            "the exported files hold integers" if figures.get("exported") else "a file of integers is made by export"
        )
        sentences.append(
            f"Weights are rounded to {spelled} bits as the model runs, which takes time, and still stored as floats "
            f"here: {where}."
        )
    sentences += [_spell_exported(file, figures) for file in figures.get("exported", ())]
    if cut := figures.get("removed"):
        sentences.append(_spell_removed(cut["masked"], cut["cut"]))
    for technique in figures.get("techniques", ()):
        if skipped := technique.get("skipped"):
            reasons = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:6])
            sentences.append(f"{technique['callback']} left as they are: {reasons}.")
    if any(_is_claimed(row) for row in rows):
        alone = [row for row in rows if len(row["shape"]) > 1 and not _is_claimed(row)]
        if alone:
            names = [row["name"] for row in alone[:6]] + ["…"] * (len(alone) > 6)
            total = sum(row["total"] for row in alone)
            sentences.append(f"Not made sparse, {total:,} values: {', '.join(names)}.")
    return sentences


def _spell_exported(file: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    stored = figures["before"].get("bytes")
    sentence = f"{os.path.basename(file['path'])} takes {spell_bytes(file['bytes'])}"
    if stored and file["bytes"] < stored:
        sentence += f", {stored / file['bytes']:.3g} × less than the state_dict before ({spell_bytes(stored)})"
    elif stored:
        sentence += f": it is no smaller than the state_dict before ({spell_bytes(stored)})"
    before = (figures.get("latency") or {}).get("before") or {}
    for batch, measured in (file["latency"] or {}).items():
        if measured["ms"]:
            sentence += f"; at batch {batch} {file['runtime']} takes {spell_milliseconds(measured['ms'])}"
            if (before.get(batch) or {}).get("ms"):
                sentence += f" (PyTorch before: {spell_milliseconds(before[batch]['ms'])})"
    return f"{sentence}."


def _spell_removed(masked: Mapping[str, Any], cut: Mapping[str, Any]) -> str:
    parts = [f"{cut['parameters']:,} of {masked['parameters']:,} parameters", f"a file of {spell_bytes(cut['bytes'])}"]
    if masked["multiply_adds"] and cut["multiply_adds"]:
        parts.append(f"{cut['multiply_adds']:,} of {masked['multiply_adds']:,} multiply-adds")
    for batch, measured in (cut["latency"] or {}).items():
        before = masked["latency"][batch]
        if measured["ms"] and before["ms"]:
            times = f"{spell_milliseconds(measured['ms'])} instead of {spell_milliseconds(before['ms'])}"
            parts.append(f"at batch {batch} {times} ({before['ms'] / measured['ms']:.2g} ×)")
    return f"With the pruned units really cut out (`pruned_module`): {', '.join(parts)}."


def _is_claimed(row: Mapping[str, Any]) -> bool:
    return any("sparsity" in facts for facts in row["techniques"].values())


def plain_value(value: Any) -> Any:
    """Return a value as JSON can hold it: tensors and numpy's numbers as Python's, NaN and infinity as ``None``.

    Example::

        >>> plain_value({"sparsity": torch.tensor(0.5), "shape": (2, 3), "loss": float("nan")})
        {'sparsity': 0.5, 'shape': [2, 3], 'loss': None}
    """
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_value(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays, numpy's scalars
        return plain_value(value.tolist())
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if number - number == 0.0 else None
    return str(value)


def spell_bytes(size: int) -> str:
    """Return a size as people write it, in powers of a thousand.

    Example::

        >>> spell_bytes(812), spell_bytes(1_070_000)
        ('812 B', '1.07 MB')
    """
    number, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1000.0, units[1:]
    return f"{number:.3g} {units[0]}"


def spell_milliseconds(ms: float) -> str:
    """Return a time as people write it.

    Example::

        >>> spell_milliseconds(0.0421), spell_milliseconds(12.34), spell_milliseconds(1234.5)
        ('0.042 ms', '12.3 ms', '1.23 s')
    """
    if ms >= 999.5:
        return f"{ms / 1000.0:.3g} s"
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.3g} ms"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
