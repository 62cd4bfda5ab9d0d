"""What the files weigh that an export has written, and how fast their own runtimes are with them."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.example_inputs import ExampleInputs, named_arguments
from lightning_compress.export.verify import ExportedFile, onnx_session
from lightning_compress.report.measure import Latency, latencies, median_time

RUNTIMES = {"onnx": "onnxruntime", "pt2": "torch.export"}
"""What opens a file of a format. A safetensors file is opened by the module itself, whose latency is known."""


def exported_figures(
    files: Iterable[ExportedFile], module: nn.Module | None = None, inputs: ExampleInputs | None = None
) -> list[dict[str, Any]]:
    """Return path, bytes, metrics, runtime and latency of each file that was left under its name.

    Args:
        files: What an export says of its files.
        module: What they were made of, or a module with the same forward; ``None`` measures no latency.
        inputs: What its forward is called with.
    """
    return [
        {
            "format": file.format,
            "path": str(file.path),
            "bytes": file.bytes,
            "metrics": {name: of_the_file for name, (_, of_the_file) in file.metrics.items()},
            "runtime": RUNTIMES.get(file.format),
            "latency": None
            if file.format not in RUNTIMES or module is None or inputs is None
            else file_latencies(file.format, file.path, module, inputs),
        }
        for file in files
        if file.agrees
    ]


def file_latencies(
    format: str, path: str | os.PathLike[str], module: nn.Module, inputs: ExampleInputs
) -> dict[str, dict[str, Any]]:
    """Return a file's latency in its own runtime, on the CPU, with as many threads as torch has.

    Args:
        format: Of `RUNTIMES`.
        path: The file.
        module: What it was made of: the order of its forward's arguments is the order of the file's inputs.
        inputs: What the forward is called with. Arguments that are no tensors are constants of an ONNX file.

    Returns:
        What :func:`~lightning_compress.report.measure.latencies` does.
    """
    prepare: Callable[[ExampleInputs], Callable[[], Any]] | None = None

    def measure(batch: int) -> Latency:
        nonlocal prepare
        if prepare is None:
            prepare = (_open_onnx if format == "onnx" else _open_pt2)(path, module)
        run = prepare(inputs.resized(batch))

        def seconds() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        with torch.no_grad():
            return median_time(seconds)

    return latencies(measure)


def _open_onnx(path: str | os.PathLike[str], module: nn.Module) -> Callable[[ExampleInputs], Callable[[], Any]]:
    session = onnx_session(path)
    names = [entry.name for entry in session.get_inputs()]

    def prepare(inputs: ExampleInputs) -> Callable[[], Any]:
        given = named_arguments(inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs))
        tensors = [leaf.numpy() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        return partial(session.run, None, dict(zip(names, tensors, strict=True)))

    return prepare


def _open_pt2(path: str | os.PathLike[str], module: nn.Module) -> Callable[[ExampleInputs], Callable[[], Any]]:
    program = torch.export.load(path).module()

    def prepare(inputs: ExampleInputs) -> Callable[[], Any]:
        given = inputs.for_forward(module)
        return partial(program, **given) if isinstance(given, dict) else partial(program, *given)

    return prepare
