"""What a teacher has answered, kept on disk by sample, so that it is asked once and not in every epoch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_compress.distillation.teacher import EMATeacher, Teacher
from lightning_compress.example_inputs import spell_dtype, spell_shape
from lightning_compress.modules import clean_name

_VERSION = 1
_KEYS = ("index", "indices", "idx", "sample_index")
_CHUNK = 2**20  # values whose fingerprints are computed at a time
_TOLERANCE = 1e-6  # of a fingerprint: the last bit of a float32 may differ where inputs are computed on a device


class TeacherCache:
    """Keeps the outputs of a teacher by the index of the sample, in a folder, and computes each once.

    The folder holds ``meta.json`` and, mapped into memory, ``outputs.bin`` (size × shape of an output),
    ``fingerprints.bin`` (a float64 for each sample's input) and ``known.bin`` (a byte for each sample). It grows as it
    is filled, outlives the run, survives its end at any moment, and may be shared by processes.

    Args:
        folder: The folder; it is made where there is none.
        size: The number of samples in the dataset.
        teacher: The teacher that the outputs are of.

    Example::

        >>> teacher = Teacher([torch.nn.Identity()])
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache(folder, 10, teacher)
        ...     first = cache.lookup(torch.tensor([7, 3]), x, lambda: 10 * x)
        ...     cache.lookup(torch.tensor([3, 7]), x.flip(0), lambda: 1 / 0)
        tensor([[20.],
                [10.]])

    Raises:
        ValueError: If the folder is that of another teacher or dataset, or the teacher changes while it trains.
    """

    def __init__(self, folder: str | Path, size: int, teacher: Teacher) -> None:
        if isinstance(teacher, EMATeacher):
            raise ValueError("`teacher='ema'` changes at each step, so nothing of it can be kept: leave `cache` out.")
        if size < 1:
            raise ValueError(f"`cache` needs the number of samples, at least 1, got {size}.")
        self._folder = Path(folder)
        self._own = {"version": _VERSION, "size": size, "teacher": _hash(teacher)}
        self._size = size
        self._shape: tuple[int, ...] | None = None
        self._folder.mkdir(parents=True, exist_ok=True)
        has_outputs = (self._folder / "outputs.bin").exists()  # made after meta.json, so looked for before
        if (self._folder / "meta.json").exists():
            self._open()
        elif has_outputs:
            raise ValueError(f"`cache='{folder}'` holds outputs and no meta.json that says of what. {_WAY_OUT}")

    def lookup(self, indices: Tensor, inputs: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return the outputs for a batch: stored ones where all are known, else computed, and then stored.

        Args:
            indices: The samples' indices in the dataset, shape (batch,), integers in [0, size).
            inputs: What the teacher gets, tensors in any nest; those whose dimension 0 is the batch are remembered by a
                fingerprint.
            compute: Returns the teacher's output for the whole batch, a tensor (batch, …).

        Raises:
            ValueError: If an index lies outside, if a sample is known with another input, or if the output is not what
                the folder holds.
            TypeError: If the output is no tensor, or the indices are no integers.
        """
        if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            what = f"{spell_dtype(indices.dtype)} of shape {tuple(indices.shape)}"
            raise TypeError(f"`cache` needs sample indices as integers of shape (batch,), got {what}.")
        rows = indices.detach().cpu().long()
        outside = rows[(rows < 0) | (rows >= self._size)]
        if len(outside):
            raise ValueError(
                f"`cache` holds {self._size} samples, so indices lie in [0, {self._size - 1}], got {int(outside[0])}: "
                f"give indices into the training dataset."
            )
        prints, device = _fingerprints(inputs, len(rows))
        known = self._known[rows] if self._shape is not None else torch.zeros(len(rows), dtype=torch.bool)
        new = rows[~known]
        if len(new):
            output = compute()
            self._check(output, len(rows))
            self._outputs[new] = output.detach().cpu()[~known]
            self._fingerprints[new] = prints[~known]
        is_other = ~torch.isclose(self._fingerprints[rows], prints, rtol=0.0, atol=_TOLERANCE)
        if is_other.any():
            raise ValueError(
                f"`cache='{self._folder}'` knows sample {int(rows[is_other][0])} with another input: the data are "
                f"augmented at random, or the indices are not those of the samples, as where a DataLoader without "
                f"`state_dict` was resumed within an epoch. Leave `cache` out, or take the randomness out of the data; "
                f"if the data have changed, delete the folder."
            )
        self._known[new] = True  # last, so that a run that ends before leaves nothing half written
        return self._outputs[rows].to(device)

    def _check(self, output: Any, batch: int) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"`cache` keeps one tensor for a batch, and the teacher's output is {type(output)}.")
        if not output.dim() or len(output) != batch:
            raise ValueError(
                f"`cache` keeps an output for each of {batch} samples, and the teacher's output has shape "
                f"{tuple(output.shape)}: its dimension 0 must be the batch."
            )
        if self._shape is None:
            self._create(output)
        if (output.shape[1:], output.dtype) != (self._shape, self._dtype):
            holds, got = (_spell(*pair) for pair in ((self._shape, self._dtype), (output.shape[1:], output.dtype)))
            raise ValueError(f"`cache='{self._folder}'` holds outputs {holds}, and the teacher gives {got}. {_WAY_OUT}")

    def _create(self, output: Tensor) -> None:
        meta = {**self._own, "shape": list(output.shape[1:]), "dtype": spell_dtype(output.dtype)}
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix="meta", suffix=".tmp")
        with open(descriptor, "w") as file:
            json.dump(meta, file, indent=1)
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(name, self._folder / "meta.json")
        os.unlink(name)
        self._open()

    def _open(self) -> None:
        meta = json.loads((self._folder / "meta.json").read_text())
        for key, what in (("version", "version of its files"), ("size", "number of samples"), ("teacher", "teacher")):
            if meta.get(key) != self._own[key]:
                raise ValueError(
                    f"`cache='{self._folder}'` was written with another {what}: {meta.get(key)} there, "
                    f"{self._own[key]} now. {_WAY_OUT}"
                )
        self._shape, self._dtype = torch.Size(meta["shape"]), getattr(torch, meta["dtype"])
        self._outputs = self._map("outputs.bin", self._dtype, *self._shape)
        self._fingerprints = self._map("fingerprints.bin", torch.float64)
        self._known = self._map("known.bin", torch.bool)

    def _map(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        # A file that is missing or too short is filled up with zeros, by whichever process comes first.
        count = self._size * torch.Size(shape).numel()
        flat = torch.from_file(str(self._folder / name), shared=True, size=count, dtype=dtype)
        return flat.reshape(self._size, *shape)


def sample_indices(batch: Any, loader: Any, batch_idx: int) -> tuple[Tensor | None, str]:
    """Return the indices of a batch's samples in the dataset, or None and the reason why they cannot be known.

    They are what the batch holds under ``index``, ``indices``, ``idx`` or ``sample_index``, a key or an attribute; else
    they follow from the number of the batch where a ``DataLoader`` reads a dataset from first to last.

    Args:
        batch: The batch.
        loader: What it came from.
        batch_idx: Its number in the epoch, 0-based.

    Example::

        >>> loader = DataLoader(torch.zeros(5, 1), batch_size=2)
        >>> sample_indices(torch.zeros(1, 1), loader, 2)
        (tensor([4]), '')
    """
    for key in _KEYS:
        found = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
        if isinstance(found, Tensor) and found.dim() == 1 and found.dtype in (torch.int64, torch.int32):
            return found, ""
    has_order = (
        isinstance(loader, DataLoader)
        and type(loader.sampler) is SequentialSampler
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_size is not None  # else the batch sampler is the user's
    )
    if has_order:
        start = batch_idx * loader.batch_size
        return torch.arange(start, min(start + loader.batch_size, len(loader.sampler))), ""
    sampler = getattr(loader, "sampler", None)
    source = type(loader).__name__ + (f" with a {type(sampler).__name__}" if sampler is not None else "")
    return None, (
        f"the batch holds no 1-D integer tensor {', '.join(repr(key) for key in _KEYS)}, and {source} need not give "
        f"the samples in the order of the dataset. Let the dataset return a dict with its 'index', or use "
        f"DataLoader(shuffle=False)."
    )


_WAY_OUT = "Give another folder, or delete this one."


def _spell(shape: torch.Size | None, dtype: torch.dtype) -> str:
    return f"{spell_dtype(dtype)} {spell_shape(shape or ())}".rstrip()


def _hash(teacher: Teacher) -> str:
    """Return a hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for module in teacher.modules:
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            digest.update(f"{clean_name(name)} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _fingerprints(inputs: Any, batch: int) -> tuple[Tensor, torch.device]:
    """Return a number for each sample, on the CPU, and the inputs' device.

    A weighted sum, in float64, of the values over their norm, and the norm's logarithm: so the tolerance is the same
    for values of any size, and large ones do not hide small ones in another tensor.
    """
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == batch]
    if not tensors:
        raise ValueError(f"`cache` remembers each sample's input, and none of the inputs is a tensor of {batch} rows.")
    total = torch.zeros(batch, dtype=torch.float64)
    for number, tensor in enumerate(tensors, 1):
        tensor = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()  # which has no float64
        rows = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(batch, -1)
        width = rows.shape[1]
        weights = _scatter(torch.arange(1, width + 1, dtype=torch.float64, device=rows.device) ** 2) - 0.5
        parts = [_fingerprint(part, weights) for part in rows.split(max(_CHUNK // max(width, 1), 1))]
        total += number * torch.cat(parts).cpu()
    return total, tensors[0].device


def _fingerprint(rows: Tensor, weights: Tensor) -> Tensor:
    if rows.is_floating_point():
        values = rows.nan_to_num(0.0, 1e3, -1e3).double()  # masks are made of −inf
    else:
        values = _scatter(rows.double())  # neighbouring integers come to lie far apart
    norm = torch.linalg.vector_norm(values, dim=1).clamp(1e-300, 1e300)
    return values @ weights / norm + norm.log()


def _scatter(numbers: Tensor) -> Tensor:
    """Return the fractions of multiples of the golden ratio: integers spread evenly over [0, 1)."""
    return (numbers * 0.6180339887498949).frac()
