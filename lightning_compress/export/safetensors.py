"""One ``.safetensors`` file with a model's state, each tensor in the smallest of several forms, and the way back.

A tensor stands in the file under its own name: dense, as ever, or as a coded vector of bytes. The metadata entry
``lightning_compress`` (JSON) holds the format's ``version``, a ``crc32`` of all tensors' bytes (in the order of their
names), ``aliases`` (other name → name of the tensor), ``ranges`` (of the quantizers) and ``tensors``: what each coded
one is. That has

- ``shape``, ``dtype`` of the tensor;
- ``count``: how many entries are not zero;
- ``positions``: how it is coded which ones, as in :mod:`lightning_compress.export.packing`; without, the values of all
  entries are there;
- ``order``: ``"column"`` if the entries are those of the transposed matrix (shape[1] · …, shape[0]), in that order;
- ``values``: ``"raw"`` (bytes of the dtype; none for bool) or how the integers are coded;
- ``signs``, ``negative``: where some of the zeros are −0.0, how it is coded which of them, and how many;
- ``bytes``: the lengths of six parts: scales (float32), zero points (uint8), divisors (of the dtype), positions, signs,
  values;

and for a rounded weight, scale · (q − zero_point), also ``bits``, ``scheme``, ``granularity`` and ``axis``.
``"packed"`` integers are q − qmin in `bits` bits, Huffman codes are those of q − zero_point.
A folded layer with one scale for all channels divides them by what its batch norm multiplies them with.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.export import packing
from lightning_compress.export.files import write_whole
from lightning_compress.modules import clean_name
from lightning_compress.quantization import affine
from lightning_compress.quantization.layers import (
    ActivationQuantizer,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    Quantizer,
    WeightQuantizer,
    fold_factor,
)

Array = np.ndarray[Any, Any]

VERSION = 1
KEY = "lightning_compress"

_NATIVE = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
"""What every version of safetensors stores by itself."""

_MAGNITUDE = {
    torch.float16: 0x7FFF,
    torch.bfloat16: 0x7FFF,
    torch.float32: 0x7FFF_FFFF,
    torch.float64: 0x7FFF_FFFF_FFFF_FFFF,
}
"""All bits but the sign: without it, −0.0 is a zero."""

_NOTHING = packing.Code("", 0, bytes)
_PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")
_PARTS = 6
_SHOWN = 5  # names in a message


# --- writing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_compressed(module: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a module's state into one safetensors file, each tensor in its smallest form.

    Zeros are left out where that is smaller. A weight that a quantizer rounds (one that is on) is stored as the
    integers and their scales, with as many bits as they have or fewer; the ranges of activation quantizers go along.
    All else is stored as it is. A weight that several modules share is stored once: rounded, if one of them rounds it.

    The file is written under another name in the same folder and renamed, so that no crash leaves half of it.

    Args:
        module: Any module, on any device. It is not changed.
        path: Where to; folders are made.
        metadata: Goes into the file's metadata; what is not a string becomes JSON.

    Returns:
        The path.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: By name: for state that is no plain tensor (lazy, sharded, sparse, on the meta device, or a module's
            own ``extra_state``), for a shared weight that two modules round differently, and for metadata of the file's
            own key.
        TypeError: For metadata that JSON cannot hold.

    Example::

        >>> import tempfile
        >>> net = nn.Linear(100, 100)
        >>> _ = net.weight.data.mul_(torch.rand(100, 100) > 0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_compressed(net, f"{folder}/net.safetensors", {"epoch": 3})
        ...     path.stat().st_size < 0.2 * 40_400
        ...     again = load_compressed(path, nn.Linear(100, 100))
        True
        >>> torch.equal(again.weight, net.weight)
        True
    """
    library = _library()
    if KEY in (metadata or {}):
        raise ValueError(f"`metadata` has a key {KEY!r}, which is the file's own.")
    state = _state(module)
    rounded = {name: quantize for name, _, quantize in _rounded(module) if quantize is not None and name in state}
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(_place(name, tensor), []).append(name)

    tensors: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    ranges = _ranges(module)
    for names in groups.values():
        found = [(name, rounded[name]()) for name in names if name in rounded]
        for name, other in found[1:]:
            if not _same(other.values, found[0][1].values):
                raise ValueError(
                    f"{found[0][0]!r} and {name!r} are one tensor that is rounded in two ways: one file of the weights "
                    "cannot hold both. Give their quantizers the same bits, granularity and axis."
                )
        weight = found[0][1] if found else None
        tensor = (state[names[0]] if weight is None else weight.values).cpu().contiguous()
        # A learned scale is only with the integers: the loaded model may round with it again.
        is_forced = weight is not None and weight.integers is not None and weight.is_learned
        coded = _encode(tensor, weight, is_forced)
        if coded is not None:
            specs[names[0]], tensor = coded
        elif weight is not None and weight.is_learned:
            ranges[weight.name] = _as_json(weight.quantizer)
        tensors[names[0]] = tensor
    _separate(tensors)

    description = {
        "version": VERSION,
        "about": f"to be read with {__name__}.load_compressed",
        "crc32": _checksum(tensors),
        "tensors": specs,
        "aliases": {alias: names[0] for names in groups.values() for alias in names[1:]},
        "ranges": ranges,
    }
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    words[KEY] = json.dumps({key: value for key, value in description.items() if value != {}}, separators=(",", ":"))

    def write(temporary: Path) -> None:
        library.torch.save_file(tensors, temporary, metadata=words)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())

    return write_whole(path, write)


@dataclass
class _Rounded:
    """A rounded weight: the numbers, and the integers that stand for them, if they do exactly."""

    name: str  # of the quantizer
    quantizer: WeightQuantizer
    values: Tensor
    scale: Tensor
    zero_point: Tensor
    divisor: Tensor
    integers: Tensor | None = None  # q − zero_point

    @property
    def is_learned(self) -> bool:
        return self.quantizer.scale is not None


def _rounded(module: nn.Module) -> Iterator[tuple[str, WeightQuantizer, Callable[[], _Rounded] | None]]:
    """Yield the names of weights with their quantizers, and what rounds them if the quantizer is on."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = clean_name(prefix) + "." if clean_name(prefix) else ""
        if isinstance(child, QuantizedLayer):
            pairs = [("weight", "weight_quantizer")]
        elif isinstance(child, QuantizedMultiheadAttention):
            pairs = [(f"{name}_weight", f"{name}_quantizer") for name in _PROJECTIONS]
        else:
            continue
        for attribute, quantizer_name in pairs:
            weight, quantizer = getattr(child, attribute), getattr(child, quantizer_name, None)
            if not isinstance(weight, Tensor) or not isinstance(quantizer, WeightQuantizer):
                continue

            def quantize(
                child: nn.Module = child,
                weight: Tensor = weight,
                quantizer: WeightQuantizer = quantizer,
                name: str = dot + quantizer_name,
            ) -> _Rounded:
                return _quantize(child, weight, quantizer, name)

            yield dot + attribute, quantizer, quantize if quantizer.is_on and weight.numel() else None


def _quantize(layer: nn.Module, weight: Tensor, quantizer: WeightQuantizer, name: str) -> _Rounded:
    values, divisor = weight, weight.new_empty(0)
    if isinstance(layer, QuantizedLayer):
        values = layer.quantized_weight()
        if layer.folded and quantizer.granularity == "tensor":
            divisor = fold_factor(layer.folded[0], weight, quantizer.axis)
            weight = weight * divisor
    else:
        values = quantizer(weight)
    scale, zero_point = (tensor.cpu() for tensor in quantizer.parameters_of(weight))
    # A rounded −0.0 is the integer 0, and a plain zero.
    values, divisor = values.detach().cpu() + 0.0, divisor.cpu()
    rounded = _Rounded(name, quantizer, values, scale, zero_point, divisor)
    wide = values.double() * divisor.double() if divisor.numel() else values.double()
    axis, granularity = quantizer.axis, quantizer.granularity
    integers = torch.round(wide / _spread(scale, values.shape, granularity, axis))
    zeros = _spread(zero_point, values.shape, granularity, axis)
    if bool(((integers + zeros >= quantizer.qmin) & (integers + zeros <= quantizer.qmax)).all()):  # NaN is in no range
        integers = integers.to(torch.int32)
        if torch.equal(_dequantize(integers, scale, divisor, values.dtype, granularity, axis), values):
            rounded.integers = integers
    return rounded


def _spread(values: Tensor, shape: torch.Size, granularity: str | int, axis: int) -> Tensor:
    """Return what channels, groups or all weights share so that it broadcasts against the weight."""
    if granularity == "tensor":
        return values.reshape([1] * len(shape))
    if granularity == "channel":
        return values.reshape([-1 if dimension == axis else 1 for dimension in range(len(shape))])
    return values.repeat_interleave(int(granularity)).reshape(shape)


def _dequantize(
    integers: Tensor, scale: Tensor, divisor: Tensor, dtype: torch.dtype, granularity: str | int, axis: int
) -> Tensor:
    """Return scale · integer, computed as the fake-quantized layers do."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = _spread(scale, integers.shape, granularity, axis)
    values = (integers.to(wide) * scale.to(wide)).to(dtype)
    return values / divisor + 0.0 if divisor.numel() else values


def _encode(tensor: Tensor, weight: _Rounded | None, is_forced: bool) -> tuple[dict[str, Any], Tensor] | None:
    """Return the smallest coded form of a tensor: what it is, and its bytes; None if the tensor itself is smaller."""
    spec: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    head = [b"", b"", b""]
    is_rounded = weight is not None and weight.integers is not None
    if weight is not None and weight.integers is not None:
        quantizer = weight.quantizer
        spec |= {"bits": quantizer.bits, "scheme": quantizer.scheme, "granularity": quantizer.granularity}
        spec |= {"axis": quantizer.axis} if quantizer.axis else {}
        zeros = weight.zero_point.numpy()
        head = [_bytes(weight.scale), zeros.astype(np.uint8).tobytes() if zeros.any() else b"", _bytes(weight.divisor)]
        entries = weight.integers.numpy()
        spread = _spread(weight.zero_point, tensor.shape, quantizer.granularity, quantizer.axis)
        levels = (weight.integers + spread - quantizer.qmin).numpy()
    else:
        entries = levels = _items(tensor)

    best: tuple[int, dict[str, Any], list[packing.Code]] | None = None
    is_matrix = tensor.dim() > 1 and tensor.numel() > 0
    for order in ("row", "column") if is_matrix else ("row",):
        flat = _ordered(entries, tensor.shape, order)
        bare = flat & _MAGNITUDE[tensor.dtype] if tensor.dtype in _MAGNITUDE and not is_rounded else flat
        mask = _is_set(bare)
        count = int(mask.sum())
        for is_sparse in (False, True):
            if (is_sparse and count == len(mask)) or (order == "column" and not is_sparse):
                continue
            found = {**spec, "count": count}
            chosen = flat[mask] if is_sparse else flat
            if is_rounded:
                level = _ordered(levels, tensor.shape, order)
                level, bits = level[mask] if is_sparse else level, spec["bits"]
                packed = packing.Code("packed", -(-len(level) * bits // 8), partial(packing.pack, level, bits))
                values = min(packed, packing.huffman(chosen), key=_size)
            elif tensor.dtype == torch.bool and is_sparse and not (chosen > 1).any():
                values = packing.Code("raw", 0, bytes)
            else:
                values = packing.Code("raw", chosen.nbytes, chosen.tobytes)
            codes = [_NOTHING, _NOTHING, values]
            if is_sparse:
                codes[0] = min(packing.code_positions(mask), key=_size)
                signs = _is_set(flat[~mask])
                found["positions"] = codes[0].name
                if signs.any():
                    codes[1] = min(packing.code_positions(signs), key=_size)
                    found |= {"signs": codes[1].name, "negative": int(signs.sum())}
            found |= {"values": values.name, **({"order": order} if order != "row" else {})}
            found["bytes"] = [len(part) for part in head] + [code.size for code in codes]
            size = sum(found["bytes"]) + len(json.dumps(json.dumps(found)))  # quotes are escaped there
            if best is None or size < best[0]:
                best = size, found, codes
    assert best is not None
    size, spec, codes = best
    if not is_forced and tensor.dtype in _NATIVE and size >= tensor.numel() * tensor.element_size():
        return None
    data = b"".join([*head, *(code.encode() for code in codes)])
    return spec, torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _size(code: packing.Code) -> int:
    return code.size


def _is_set(entries: Array) -> packing.Flags:
    """Return which entries have a bit that is not 0."""
    return np.asarray(entries != 0 if entries.ndim == 1 else entries.any(1), np.bool_)


def _items(tensor: Tensor) -> Array:
    """Return the bit patterns of a contiguous tensor, flat: (numel,), or (numel, bytes) of other widths."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    width = tensor.element_size()
    return data.view(f"<u{width}") if width in (1, 2, 4, 8) else data.reshape(-1, width)


def _ordered(entries: Array, shape: torch.Size, order: str) -> Array:
    """Return entries (of a shape, or flat) as a flat array in an order."""
    tail = entries.shape[1:] if entries.shape != tuple(shape) else ()
    if order == "row":
        return entries.reshape(-1, *tail)
    return np.ascontiguousarray(entries.reshape(shape[0], -1, *tail).swapaxes(0, 1)).reshape(-1, *tail)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _place(name: str, tensor: Tensor) -> Any:
    """Return what two names of one tensor have in common."""
    if not tensor.numel():
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return a.shape == b.shape and a.dtype == b.dtype and _bytes(a.cpu()) == _bytes(b.cpu())


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy what shares memory without being the same tensor, in place: safetensors wants each to have its own."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensors[name] = tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(cast(Any, tensors[name].reshape(-1).view(torch.uint8).numpy()), value)
    return value


# --- ranges -----------------------------------------------------------------------------------------------------------


def _number(value: float, dtype: torch.dtype) -> float:
    """Return the number with the fewest digits that is the same in a dtype."""
    return float(str(np.float32(value))) if dtype == torch.float32 else value


def _as_json(quantizer: Quantizer) -> dict[str, Any]:
    state: dict[str, Any] = {"bits": quantizer.bits}
    for name, value in quantizer.state().items():
        if isinstance(value, Tensor):
            numbers = [_number(number, value.dtype) for number in value.flatten().tolist()]
            state[name] = numbers if value.dim() else numbers[0]
        else:
            state[name] = value
    return state


def _ranges(module: nn.Module) -> dict[str, Any]:
    return {
        clean_name(name): _as_json(quantizer)
        for name, quantizer in module.named_modules()
        if isinstance(quantizer, ActivationQuantizer)
    }


# --- reading ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_compressed(path: str | os.PathLike[str], module: nn.Module) -> nn.Module:
    """Put the state that :func:`save_compressed` wrote into a module, bit for bit.

    A weight that was stored as integers becomes scale · (q − zero_point): the numbers that the quantized model computed
    with. Ranges and learned scales go to the quantizers of these names, where the module has them; switches stay as
    they are. (A quantizer that is on rounds the loaded weight again, which can differ in the last bit if its scheme is
    affine: load into the plain module for the exact numbers.)

    Args:
        path: The file.
        module: A module with tensors of the same names, shapes and dtypes. It may share weights that the saved one
            did not, if their values are the same. Nothing of it is changed if anything does not fit.

    Returns:
        The module.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
        ValueError: If the file is incomplete, damaged, of an unknown version or from elsewhere, or if the module does
            not fit: by name.
    """
    values, description = _read(Path(path))
    state = _state(module)
    _compare(values, state, module, path)
    quantizers = _fitting(module, description, path)
    # load_state_dict of a wrapped (compiled) module wants its own names
    names = {name: clean_name(name) for name in module.state_dict()}
    module.load_state_dict({name: values[clean] for name, clean in names.items()})
    for quantizer, ranges in quantizers:
        quantizer.load_state(ranges)
    return module


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors of a file and its description."""
    library = _library()
    try:
        with library.safe_open(path, "pt") as file:
            words = file.metadata() or {}
            if KEY not in words:
                raise ValueError(f"{path} has no entry {KEY!r} in its metadata: save_compressed did not write it.")
            description = json.loads(words[KEY])
            version = description.get("version")
            if version != VERSION:
                raise ValueError(
                    f"{path} is of version {version!r} of the format, and this is lightning_compress for version "
                    f"{VERSION}: upgrade lightning_compress."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}).") from error
    if _checksum(tensors) != description["crc32"]:
        raise ValueError(f"{path} is damaged: its checksum does not fit.")
    description = {"tensors": {}, "aliases": {}, "ranges": {}, **description}
    for name, spec in description["tensors"].items():
        try:
            parts = _parts(tensors[name], spec)
            spec["scale"] = torch.from_numpy(np.frombuffer(parts[0], "<f4").astype(np.float32))
            tensors[name] = _decode(parts, spec)
        except (ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {name!r} cannot be decoded ({error}).") from error
    for alias, name in description["aliases"].items():
        tensors[alias] = tensors[name]
    return tensors, description


def _parts(data: Tensor, spec: Mapping[str, Any]) -> list[bytes]:
    lengths, parts, begin = spec["bytes"], [], 0
    if len(lengths) != _PARTS or sum(lengths) != data.numel():
        raise ValueError(f"parts of {lengths} bytes in {data.numel()}")
    content = data.numpy().tobytes()
    for length in lengths:
        parts.append(content[begin : begin + length])
        begin += length
    return parts


def _decode(parts: list[bytes], spec: Mapping[str, Any]) -> Tensor:
    shape, dtype = torch.Size(spec["shape"]), getattr(torch, spec["dtype"])
    total, is_sparse = math.prod(shape), "positions" in spec
    where = packing.read_positions(spec["positions"], parts[3], spec["count"], total) if is_sparse else slice(None)
    count = spec["count"] if is_sparse else total
    if spec["values"] == "raw":
        width = dtype.itemsize
        items = np.zeros((total, width), np.uint8)
        is_true = dtype == torch.bool and is_sparse and not parts[5]
        items[where] = 1 if is_true else np.frombuffer(parts[5], np.uint8).reshape(count, width)
        if "signs" in spec:
            zeros = np.delete(np.arange(total), where)
            negative = packing.read_positions(spec["signs"], parts[4], spec["negative"], len(zeros))
            items[zeros[negative], -1] = 0x80
        items = _ordered_back(items, shape, spec)
        return torch.from_numpy(items.reshape(-1)).view(dtype).reshape(shape)

    granularity, axis, bits = spec["granularity"], spec.get("axis", 0), spec["bits"]
    integers = np.zeros(total, np.int32)
    if spec["values"] == "huffman":
        integers[where] = packing.unhuffman(parts[5], count)[0]
    elif spec["values"] == "packed":
        integers[where] = packing.unpack(parts[5], bits, count)
        integers[where] += affine.integer_range(bits, spec["scheme"])[0]
        if parts[1]:
            zero_points = torch.from_numpy(np.frombuffer(parts[1], np.uint8).astype(np.int32))
            spread = _spread(zero_points, shape, granularity, axis).expand(shape).numpy()
            integers[where] -= _ordered(spread, shape, spec.get("order", "row"))[where]
    else:
        raise ValueError(f"no code of integers is called {spec['values']!r}")
    ordered = torch.from_numpy(_ordered_back(integers, shape, spec)).reshape(shape)
    divisor = torch.frombuffer(bytearray(parts[2]), dtype=dtype) if parts[2] else torch.empty(0, dtype=dtype)
    if parts[2]:
        divisor = _spread(divisor, shape, "channel", axis)
    return _dequantize(ordered, spec["scale"], divisor, dtype, granularity, axis)


def _ordered_back(items: Array, shape: torch.Size, spec: Mapping[str, Any]) -> Array:
    if spec.get("order", "row") == "row":
        return items
    return np.ascontiguousarray(items.reshape(-1, shape[0], *items.shape[1:]).swapaxes(0, 1))


def _compare(values: Mapping[str, Tensor], state: Mapping[str, Tensor], module: nn.Module, path: Any) -> None:
    """Refuse a module that the values of a file do not fit."""
    problems = []
    for words, names in (
        ("only the file has", values.keys() - state.keys()),
        ("only the module has", state.keys() - values.keys()),
    ):
        if names:
            shown = ", ".join(repr(name) for name in sorted(names)[:_SHOWN])
            problems.append(f"{words} {shown}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""))
    misfits: list[str] = []
    groups: dict[Any, str] = {}
    for name in sorted(values.keys() & state.keys()):
        value, tensor = values[name], state[name]
        if value.shape != tensor.shape:
            misfits.append(f"{name!r} is {tuple(value.shape)} in the file and {tuple(tensor.shape)} in the module")
        elif value.dtype != tensor.dtype:
            misfits.append(f"{name!r} is {value.dtype} in the file and {tensor.dtype} in the module")
        else:
            first = groups.setdefault(_place(name, tensor), name)
            if value is not values[first] and not _same(value, values[first]):
                misfits.append(f"{first!r} and {name!r} are one tensor in the module and two in the file")
    if len(misfits) > _SHOWN:
        misfits[_SHOWN:] = [f"{len(misfits) - _SHOWN} more"]
    if problems + misfits:
        raise ValueError(f"{path} does not fit this {type(module).__name__}: {'; '.join(problems + misfits)}.")


def _fitting(module: nn.Module, description: Mapping[str, Any], path: Any) -> list[tuple[Quantizer, dict[str, Any]]]:
    """Return the quantizers of a module with what the file has for them."""
    found: dict[str, tuple[Quantizer, dict[str, Any]]] = {}
    specs, names = description["tensors"], {**{name: name for name in description["tensors"]}, **description["aliases"]}
    for name, quantizer, _ in _rounded(module):
        spec = specs.get(names.get(name), {})
        if "bits" in spec and quantizer.scale is not None:
            state = {"bits": spec["bits"], "scale": spec["scale"], "is_initialized": True}
            found[f"the quantizer of {name!r}"] = quantizer, state
    for name, child in module.named_modules():
        if isinstance(child, Quantizer) and clean_name(name) in description["ranges"]:
            found[repr(clean_name(name))] = child, description["ranges"][clean_name(name)]
    result = []
    for name, (owner, state) in found.items():
        own = owner.state()
        ours = f"{owner.bits} bits{', learned' * ('scale' in own)}"
        theirs = f"{state['bits']} bits{', learned' * ('scale' in state)}"
        if ours != theirs:
            raise ValueError(f"{path} does not fit: {name} has {theirs} in the file and {ours} in the module.")
        for key, value in own.items():
            if isinstance(value, Tensor) and key in state:
                state = {**state, key: torch.as_tensor(state[key], dtype=value.dtype)}
                if value.shape != state[key].shape:
                    raise ValueError(
                        f"{path} does not fit: the {key} of {name} is {tuple(state[key].shape)} in the file and "
                        f"{tuple(value.shape)} in the module."
                    )
        result.append((owner, {key: state[key] for key in own if key in state}))
    return result


# --- both -------------------------------------------------------------------------------------------------------------


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state by its plain names.

    Raises:
        ValueError: If any of it is no plain tensor.
    """
    state = {clean_name(name): value for name, value in module.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            what = f"a {type(value).__name__}"
        elif nn.parameter.is_lazy(value):
            what = "not initialized: run the module once"
        elif hasattr(value, "full_tensor"):
            what = "sharded: gather the state first"
        elif value.is_meta:
            what = "on the meta device"
        elif value.layout != torch.strided or value.is_quantized:
            what = f"a tensor of layout {value.layout}, {value.dtype}"
        else:
            continue
        raise ValueError(f"{name!r} is no plain tensor of numbers that a file could hold; it is {what}.")
    return state


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files of this kind need safetensors: pip install 'lightning_compress[export]'", name="safetensors"
        ) from error
    return safetensors
