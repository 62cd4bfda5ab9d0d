"""What the formats have in common: inputs, silence, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.example_inputs import ExampleInputs

Inputs = ExampleInputs | tuple[Any, ...] | dict[str, Any] | Tensor


def as_inputs(example_inputs: Inputs) -> ExampleInputs:
    """Return inputs as `ExampleInputs`, on the CPU, detached."""
    if not isinstance(example_inputs, ExampleInputs):
        example_inputs = ExampleInputs.from_example(example_inputs)
    return example_inputs.map(lambda tensor: tensor.detach().cpu())


def named_inputs(module: nn.Module, inputs: ExampleInputs, dynamic_batch: bool, dim: Any) -> dict[str, Any]:
    """Return ``args``, ``kwargs`` and ``dynamic_shapes`` as ``torch.export`` takes them; `dim` stands for the batch.

    Raises:
        ValueError: If the batch is to be dynamic and the inputs share none.
    """
    if dynamic_batch:
        # A batch of 1 would be taken for a constant.
        inputs = inputs.resized(max(inputs.batch, 2))
    values = inputs.for_forward(module)

    def shape(leaf: Any) -> Any:
        return {0: dim} if isinstance(leaf, Tensor) and leaf.dim() else None

    # By the parameters' names: `*args` and `**kwargs` are one each.
    bound = dict(inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs).arguments)
    shapes = torch.utils._pytree.tree_map(shape, bound) if dynamic_batch else None
    if isinstance(values, dict):
        return {"args": (), "kwargs": values, "dynamic_shapes": shapes}
    return {"args": values, "kwargs": {}, "dynamic_shapes": shapes}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep an exporter's prints, logs and warnings from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Write a file under a temporary name and put it in its place: what is there is whole, also after a crash.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(f"{folder}/new/a.txt", lambda path: path.write_text("all"), ).read_text()
        'all'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's are for their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def spell(error: BaseException) -> str:
    """Return the innermost reason of an exporter's error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")
