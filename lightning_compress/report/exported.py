"""What the files weigh that an export has written, and how fast their own runtime is with them."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.example_inputs import ExampleInputs, named_arguments
from lightning_compress.report.measure import Latency, latencies, median_time

if TYPE_CHECKING:
    from lightning_compress.export.verify import ExportedFile


def exported_figures(
    files: Iterable[ExportedFile], module: nn.Module | None = None, inputs: ExampleInputs | None = None
) -> list[dict[str, Any]]:
    """Return path, bytes, metrics and latency of each file that was left under its name.

    An ONNX file runs in onnxruntime on the CPU, with as many threads as torch has; the latency of other formats is that
    of the module in PyTorch, and is not measured again.

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
            "latency": None
            if file.format != "onnx" or module is None or inputs is None
            else onnx_latencies(file.path, module, inputs),
        }
        for file in files
        if file.agrees
    ]


def onnx_latencies(path: str | os.PathLike[str], module: nn.Module, inputs: ExampleInputs) -> dict[str, dict[str, Any]]:
    """Return the latency of an ONNX file in onnxruntime; see :func:`~lightning_compress.report.measure.latencies`.

    Args:
        path: The file.
        module: What it was made of: the order of its forward's arguments is the order of the file's inputs.
        inputs: What the forward is called with. Arguments that are no tensors are constants of the file.
    """
    session: Any = None

    def measure(batch: int) -> Latency:
        nonlocal session
        import onnxruntime

        if session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        resized = inputs.resized(batch)
        given = named_arguments(inspect.signature(module.forward).bind(*resized.args, **resized.kwargs))
        tensors = [leaf.numpy() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        feed = dict(zip([entry.name for entry in session.get_inputs()], tensors, strict=True))

        def seconds() -> float:
            start = time.perf_counter()
            session.run(None, feed)
            return time.perf_counter() - start

        return median_time(seconds)

    return latencies(measure)
