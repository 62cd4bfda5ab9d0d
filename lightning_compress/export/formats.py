"""All formats by one function: written under another name, checked in the format's own runtime, then renamed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lightning_compress
from lightning_compress.copying import standalone_copy
from lightning_compress.export.files import Inputs, as_inputs, spell
from lightning_compress.export.onnx import export_onnx
from lightning_compress.export.safetensors import save_compressed
from lightning_compress.export.torch_export import export_pt2
from lightning_compress.export.verify import Comparison, ExportedFile, compare_outputs, open_file
from lightning_compress.moments import one_of
from lightning_compress.quantization.layers import ActivationQuantizer, WeightQuantizer

Format = Literal["onnx", "pt2", "safetensors"]

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "safetensors": ("safetensors",)}
"""What each format needs, its runtime included."""

Judge = Callable[[Callable[..., Any], Comparison], None]
"""Runs an opened file and shows a `Comparison` what it finds."""


def export(
    module: nn.Module,
    example_inputs: Inputs,
    dir: str | os.PathLike[str],
    formats: Sequence[Format] = ("onnx", "safetensors"),
    verify: bool = True,
    metadata: Mapping[str, str] | None = None,
    batches: Iterable[Inputs] | None = None,
) -> list[ExportedFile]:
    """Write a model as ``model.onnx``, ``model.pt2``, ``model.safetensors``; returns how well each agrees with it.

    Each file is written under another name, run beside the model in its own runtime, and only then renamed: what stands
    under its name is whole, and does what the model does (see :class:`~lightning_compress.export.verify.Comparison`).

    Args:
        module: A module, quantized or not, on any device; it is left as it is.
        example_inputs: What its forward is called with: a tuple of arguments, a dict of keywords, or one tensor.
        dir: The folder for the files; it is made.
        formats: Which files: ``"onnx"``, ``"pt2"`` (``torch.export``), ``"safetensors"`` (for `load_compressed`).
        verify: Whether to compare them with the module.
        metadata: Words for the files, beside sparsity, bits, versions and git revision (see :func:`facts`).
        batches: What to compare on: inputs as `example_inputs` are; by default those.

    Raises:
        ImportError: If a package is missing that a format needs.
        RuntimeError: If an exporter cannot follow the forward.
        TypeError: If an argument is of another type.
        ValueError: If `formats` is empty or names an unknown one, if `dir` is a file; at the end, after all files, if
            some do not agree with the module: with the figures of each. These are not left behind.

    Example::

        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = export(nn.Linear(3, 2), torch.ones(4, 3), folder, formats=["safetensors"])
        >>> files[0].path.name, files[0].difference
        ('model.safetensors', 0.0)
    """
    folder, names = as_folder(dir), as_formats(formats)
    inputs, own = as_inputs(example_inputs), standalone_copy(module).cpu()
    given = [inputs] if batches is None else [as_inputs(batch) for batch in batches]
    words = facts(module) | {key: str(value) for key, value in (metadata or {}).items()}

    def judge(run: Callable[..., Any], comparison: Comparison) -> None:
        compare_outputs(own, run, given, comparison)

    files = [write_file(own, inputs, folder, name, words, judge if verify else None) for name in names]
    if rejected := [str(file) for file in files if not file.agrees]:
        raise ValueError(f"Not left in {folder}, since they do not do what the module does: {', '.join(rejected)}.")
    return files


def write_file(
    module: nn.Module,
    inputs: Inputs | None,
    folder: Path,
    format: str,
    metadata: Mapping[str, str],
    judge: Judge | None,
) -> ExportedFile:
    """Write one file, judge it under another name, and put it in its place if it agrees.

    Args:
        module: On the CPU and in eval mode.
        inputs: What its forward is called with; only safetensors need none.
        folder: Where to.
        format: One of `PACKAGES`.
        metadata: Words for the file.
        judge: What compares it; ``None`` takes it unseen.

    Raises:
        ImportError: If a package is missing.
        RuntimeError: If an exporter cannot follow the forward.
        ValueError: If the module is one that the format cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model.{format}"
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder) as elsewhere:
        written = Path(elsewhere) / path.name
        if format == "safetensors":
            save_compressed(module, written, metadata)
        else:
            assert inputs is not None
            write = export_onnx if format == "onnx" else export_pt2
            write(module, inputs, written, metadata=metadata)
        made = sorted(Path(elsewhere).iterdir(), key=lambda file: file == written)  # a large model's weights come first
        size = sum(file.stat().st_size for file in made)
        result = ExportedFile(format, path, size)
        if judge is not None:
            result = _judged(result, written, module, inputs, judge)
        if result.agrees:
            for file in made:
                os.replace(file, folder / file.name)
    return result


def _judged(file: ExportedFile, written: Path, module: nn.Module, inputs: Inputs | None, judge: Judge) -> ExportedFile:
    comparison, problem = Comparison(module, file.format), None
    try:
        judge(open_file(file.format, written, module, () if inputs is None else inputs), comparison)
    except Exception as error:  # whatever a runtime raises: a file that does not run is none
        problem = f"it cannot be run ({spell(error)})"
    return replace(
        file,
        tolerance=None if comparison.difference is None else comparison.tolerance,
        difference=comparison.difference,
        within=comparison.within,
        equal_classes=comparison.equal_classes,
        metrics=comparison.metrics,
        problem=problem or comparison.problem(),
    )


def facts(module: nn.Module) -> dict[str, str]:
    """Return what a file should say of the model in it: sparsity, bits, versions, git revision.

    Sparsity is the share of zeros in all weights that are matrices or kernels, shared ones counted once; bits are
    listed where quantizers are on; the git revision is that of the working directory, ``-dirty`` if files have changed,
    and left out if there is none.

    Example::

        >>> net = nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> facts(net)["sparsity"]
        '0.25'
    """
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    zeros, total = sum(int((matrix == 0).sum()) for matrix in matrices), sum(matrix.numel() for matrix in matrices)
    words = {"sparsity": f"{zeros / max(total, 1):.6g}"}
    for name, kind in (("weight_bits", WeightQuantizer), ("activation_bits", ActivationQuantizer)):
        if bits := {child.bits for child in module.modules() if isinstance(child, kind) and child.is_on}:
            words[name] = ", ".join(map(str, sorted(bits)))
    words["versions"] = json.dumps({"lightning_compress": lightning_compress.__version__, "torch": torch.__version__})
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        words["git_revision"] = described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return words


def as_formats(formats: object) -> tuple[str, ...]:
    """Return formats as a tuple without repetitions.

    Raises:
        ImportError: If a package is missing that one of them needs.
        TypeError: If it is no list of words.
        ValueError: If it is empty, or names an unknown format.
    """
    if isinstance(formats, str) or not isinstance(formats, Sequence):
        raise TypeError(f"`formats` must be a list of {', '.join(map(repr, PACKAGES))}, got {formats!r}.")
    if not formats:
        raise ValueError(f"`formats` must name at least one of {', '.join(map(repr, PACKAGES))}, got {formats!r}.")
    names = tuple(dict.fromkeys(one_of(name, PACKAGES, "formats") for name in formats))
    for name in names:
        for package in PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"`formats` names '{name}', which needs the package {package}: "
                    f"pip install 'lightning-compress[export]'",
                    name=package,
                )
    return names


def as_folder(dir: object) -> Path:
    """Return a folder's path; it need not exist.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, a file, or on another machine.
    """
    if not isinstance(dir, (str, os.PathLike)):
        raise TypeError(f"`dir` must be the path of a folder, got {dir!r} of type {type(dir).__name__}.")
    if not os.fspath(dir):
        raise ValueError("`dir` must be the path of a folder, got ''.")
    if "://" in os.fspath(dir):
        raise ValueError(f"`dir` must be a folder of this machine, got {os.fspath(dir)!r}: copy the files there later.")
    if Path(dir).exists() and not Path(dir).is_dir():
        raise ValueError(f"`dir` must be a folder, and {os.fspath(dir)!r} is a file.")
    return Path(dir)
