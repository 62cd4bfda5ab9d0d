"""The export callback: when the files are written, and how the user's own metrics are compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_compress import registry
from lightning_compress.copying import standalone_copy
from lightning_compress.example_inputs import ExampleInputs, InputCapture
from lightning_compress.export.files import as_inputs, silence, spell
from lightning_compress.export.formats import Format, Judge, as_folder, as_formats, facts, write_file
from lightning_compress.export.verify import Comparison, ExportedFile, compare_outputs
from lightning_compress.training import callbacks, own_metrics, plain, refuse_sharding

# What would build the model anew, or bring the user's callbacks along, in the Trainer that only validates.
_NOT_AGAIN = ("setup", "teardown", "prepare_data", "configure_model")
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class ExportCompressed(Callback):
    """Write the trained model as files that other runtimes open, each checked against the model.

    At the end of ``fit``, by rank zero, after every callback's ``on_train_end`` (weights are averaged by then):
    ``model.onnx``, ``model.pt2``, ``model.safetensors``, of the module without the pruned channels and heads where
    there is one. Written is the LightningModule itself where its forward is called, else the child that its steps call
    (``self.net(x)``). Integers are stored as integers, the batch may have any size, and the metadata holds sparsity,
    bits, the last metrics, versions and the git revision. What became of each file is in the attribute `files`, and its
    size in ``trainer.callback_metrics``, as ``compress/onnx_bytes``, for a sweeper to make smaller.

    The inputs that an exporter needs are ``example_input_array``, else what the forward received in the last
    validation, else in the first training batch.

    A file is written under another name, compared, and renamed if it agrees; one that does not is deleted. An exporter
    that cannot follow the model, or a file that does not agree, is a warning: it does not end the run.

    Args:
        dir: The folder for the files. What an earlier run left there under these names is replaced.
        formats: Which files: ``"onnx"``, ``"pt2"`` (``torch.export``), ``"safetensors"`` (for `load_compressed`).
        verify: Whether to open each file in its own runtime and run the validation loop with it, on the CPU: once with
            the module as it is, and once for each file with the file in its place. Outputs and metrics have to agree
            (see :class:`~lightning_compress.export.verify.Comparison`). Without a validation loop, or with several
            processes, the outputs alone are compared.

    Raises:
        ImportError: If a package is missing that a format needs (``pip install "lightning-compress[export]"``).
        TypeError: If an argument is of another type.
        ValueError: If `formats` is empty or names an unknown one, or if `dir` is a file; in ``setup`` for strategies
            that shard parameters, and for two of these callbacks with one folder.

    Example::

        >>> ExportCompressed("files", formats=["pt2"]).formats
        ('pt2',)
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        formats: Sequence[Format] = ("onnx", "safetensors"),
        verify: bool = True,
    ) -> None:
        super().__init__()
        self.dir = as_folder(dir)
        self.formats = as_formats(plain(formats))
        if not isinstance(verify, bool):
            raise TypeError(f"`verify` must be True or False, got {verify!r} of type {type(verify).__name__}.")
        self.verify = verify
        self._state_key = self._generate_state_key(dir=str(self.dir))
        self._forget()

    def _forget(self) -> None:
        self.files: list[ExportedFile] = []
        self._capture: InputCapture | None = None
        self._seen: tuple[str, ExampleInputs] | ValueError | None = None

    @property
    def state_key(self) -> str:
        """Tell callbacks with different folders apart."""
        return self._state_key

    # --- before and during training -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what another run left; refuse what cannot work."""
        self._end_capture()
        if stage != "fit":
            return
        self._forget()
        refuse_sharding(trainer, self)
        alike = [other for other in callbacks(trainer) if isinstance(other, ExportCompressed)]
        if sum(other.dir.absolute() == self.dir.absolute() for other in alike) > 1:
            raise ValueError(f"Two ExportCompressed callbacks write into '{self.dir}': give one of them another `dir`.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be written."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by its callback connector
            checked = ", each compared with the model in its own runtime" if self.verify else ""
            rank_zero_info(
                f"ExportCompressed: {type(pl_module).__name__} as {', '.join(self.formats)} to {self.dir} when the fit "
                f"ends{checked}."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch what the forward receives, in the first batch of each validation."""
        if trainer.state.fn == "fit" and batch_idx == dataloader_idx == 0:
            self._watch(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the forward received."""
        self._end_capture()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the first batch if no validation has shown anything."""
        if batch_idx == 0 and not isinstance(self._seen, tuple):
            self._watch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the forward received."""
        self._end_capture()

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and pl_module.example_input_array is None:
            self._capture = InputCapture(pl_module)

    def _end_capture(self) -> None:
        if self._capture is None:
            return
        self._capture.remove()
        try:
            self._seen = self._capture.result()
        except ValueError as error:
            self._seen = self._seen or error
        self._capture = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._end_capture()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        self._end_capture()
        self._seen = None

    # --- after training -----------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, compare them, and say in one line what was written."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by its callback connector
            return
        smaller = registry.smaller_module(pl_module)
        try:
            if trainer.is_global_zero:
                self._export(trainer, pl_module, smaller or pl_module)
        finally:
            trainer.strategy.barrier("ExportCompressed")  # the others may want to read the files

    def _export(self, trainer: Trainer, pl_module: LightningModule, whole: nn.Module) -> None:
        try:
            name, inputs = self._inputs(pl_module)
        except ValueError as error:
            name, inputs = "", None
            if needy := [format for format in self.formats if format != "safetensors"]:
                rank_zero_warn(
                    f"ExportCompressed: {', '.join(needy)} not written, since no example inputs are known ({error}): "
                    f"give {type(pl_module).__name__} an `example_input_array`."
                )
        try:
            whole = standalone_copy(whole).cpu()
        except Exception as error:  # whatever deepcopy raises
            rank_zero_warn(
                f"ExportCompressed: nothing written, {type(whole).__name__} cannot be copied: {spell(error)}."
            )
            return
        module = whole.get_submodule(name)
        words = self._metadata(trainer, module, name)
        judge = self._judge(trainer, whole, name, inputs) if self.verify else None
        for format in self.formats:
            if inputs is None and format != "safetensors":
                continue
            try:
                self.files.append(write_file(module, inputs, self.dir, format, words, judge))
            except Exception as error:  # a run of hours does not end because of a file
                rank_zero_warn(f"ExportCompressed: model.{format} not written: {error}")
        if rejected := [str(file) for file in self.files if not file.agrees]:
            rank_zero_warn(f"ExportCompressed: not left in {self.dir}: {', '.join(rejected)}.")
        if written := [str(file) for file in self.files if file.agrees]:
            rank_zero_info(f"ExportCompressed: {', '.join(written)} written to {self.dir}.")
        # a sweeper asks an app for a metric, and the size of a file is one
        sizes = {f"compress/{file.format}_bytes": torch.tensor(float(file.bytes)) for file in self.files if file.agrees}
        trainer.callback_metrics.update(sizes)

    def _inputs(self, pl_module: LightningModule) -> tuple[str, ExampleInputs]:
        if pl_module.example_input_array is not None:
            return "", as_inputs(pl_module.example_input_array)
        if self._seen is None:
            raise ValueError("no batch was seen")
        if isinstance(self._seen, ValueError):
            raise self._seen
        return self._seen

    def _metadata(self, trainer: Trainer, module: nn.Module, name: str) -> dict[str, str]:
        words = facts(module)
        metrics = {
            key: float(value) if math.isfinite(value) else str(float(value))
            for key, value in own_metrics(trainer).items()
        }
        return words | {
            "versions": json.dumps(json.loads(words["versions"]) | {"lightning": lightning.__version__}),
            "metrics": json.dumps(metrics),
            "module": ".".join(filter(None, [type(trainer.lightning_module).__name__, name])),
            "steps": str(trainer.global_step),
        }

    # --- the user's own metrics ---------------------------------------------------------------------------------------

    def _judge(self, trainer: Trainer, whole: nn.Module, name: str, inputs: ExampleInputs | None) -> Judge:
        module = whole.get_submodule(name)
        own: dict[str, float] | None = None
        loaders = trainer.val_dataloaders if trainer.enable_validation else None
        # In several processes a metric would wait for the other processes, which do not run this.
        if inputs is not None and loaders is not None and trainer.world_size == 1:
            try:
                own, _ = _validate(trainer, whole, name, None)
            except Exception as error:  # whatever a validation needs that only the user's Trainer has
                rank_zero_warn(
                    f"ExportCompressed: metrics are not compared, the validation loop does not run by itself: "
                    f"{spell(error)}."
                )

        def judge(run: Callable[..., Any], comparison: Comparison) -> None:
            if inputs is not None:
                compare_outputs(module, run, [inputs], comparison)
            if own is None or comparison.problem() is not None:
                return
            calls, before = 0, comparison.rows

            def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                got = run(*args, **kwargs)
                comparison.add(module(*args, **kwargs), got)
                return got

            theirs, batches = _validate(trainer, whole, name, watched)
            if calls:
                # A step may call the module several times with the same rows.
                comparison.add_metrics(own, theirs, (comparison.rows - before) * batches // calls)

        return judge


def _validate(
    trainer: Trainer, whole: Any, name: str, forward: Callable[..., Any] | None
) -> tuple[dict[str, float], int]:
    """Validate a copy of the LightningModule, with another forward; returns metrics and the number of batches."""
    copied: Any = standalone_copy(whole)
    for hook in _NOT_AGAIN:
        setattr(copied, hook, lambda *args, **kwargs: None)
    copied.configure_callbacks = list
    data = trainer.datamodule  # type: ignore[attr-defined]
    for hook in _BATCH_HOOKS:
        if data is not None and is_overridden(hook, data):
            setattr(copied, hook, getattr(data, hook))
    if forward is not None:
        copied.get_submodule(name).forward = forward
    precision = str(trainer.precision)
    # Each time from the same random numbers, and those of the run stay as they are.
    with silence(), isolate_rng():
        validating = Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision if precision.endswith("-true") else "32-true",  # type: ignore[arg-type]
            logger=DummyLogger(),  # a validation step may log to `self.logger.experiment`
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=trainer.limit_val_batches,
            inference_mode=trainer.fit_loop.epoch_loop.val_loop.inference_mode,
        )
        found: dict[str, float] = {}
        for of_a_loader in validating.validate(copied, trainer.val_dataloaders, verbose=False):
            found |= {key: float(value) for key, value in of_a_loader.items()}
    return found, validating.validate_loop.batch_progress.total.completed
