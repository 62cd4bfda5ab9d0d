"""A ``.pt2`` file: ``torch.export`` of a model, with integer weights where they are quantized."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_compress.export.files import Inputs, as_inputs, named_inputs, silence, spell, write_whole
from lightning_compress.quantization.integer import integer_module


def export_pt2(
    module: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    dynamic_batch: bool = True,
) -> Path:
    """Write a model as a file that ``torch.export.load`` reads, without this package; returns the path.

    A quantized model's weights are int8 in the file. All operators in it are torch's own.

    Args:
        module: A module, quantized or not; it is left as it is.
        example_inputs: What its forward is called with: a tuple of arguments, a dict of keywords, or one tensor.
        path: The file, usually ``….pt2``. It is written whole or not at all.
        metadata: Words that are kept in the file (``torch.export.load(path, extra_files={"metadata": ""})``, as JSON).
        dynamic_batch: Whether dimension 0 of the inputs may have any size.

    Raises:
        RuntimeError: If ``torch.export`` cannot follow the forward.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_pt2(nn.Linear(3, 2), torch.zeros(1, 3), f"{folder}/linear.pt2")
        ...     torch.export.load(path).module()(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    copied = integer_module(module).cpu()
    inputs = as_inputs(example_inputs).map(torch.zeros_like)  # the file keeps them, and need not show data
    arguments = named_inputs(copied, inputs, dynamic_batch, torch.export.Dim.DYNAMIC)
    with silence():
        try:
            with torch.no_grad():
                program = torch.export.export(copied, **arguments, strict=False)
        except Exception as error:
            raise RuntimeError(f"torch.export cannot follow {type(module).__name__} ({spell(error)}).") from error
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # this machine's paths, in most of a small file
        extra = {"metadata": json.dumps(dict(metadata))} if metadata else None
        return write_whole(path, lambda file: torch.export.save(program, file, extra_files=extra))
