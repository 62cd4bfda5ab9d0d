"""The report callback: when a run is measured, and where the figures go."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

import lightning_compress
from lightning_compress import registry
from lightning_compress.example_inputs import ExampleInputs, InputCapture, is_compiled
from lightning_compress.export.files import write_whole
from lightning_compress.modules import clean_name
from lightning_compress.pruning.removal import profile
from lightning_compress.report import measure, plots, table
from lightning_compress.report.exported import exported_figures
from lightning_compress.report.measure import ParameterCount, StepTimes
from lightning_compress.report.page import report_page
from lightning_compress.report.similarity import layer_grams, similarities
from lightning_compress.report.work import multiply_adds
from lightning_compress.training import callbacks, is_sharded, own_metrics, plain, run_length, steps_done

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
"""The version of the layout of ``report.json``: keys are added without a new one, none is renamed or removed."""

_DEFLATED_AT_MOST = 256_000_000  # bytes; deflating more takes longer than a reader of the table wants to wait

_SAVED_AT_MOST = 4_000_000  # bytes of inputs in a checkpoint


@dataclass
class _Run:
    """What one fit needs until its end."""

    dir: str
    started: float
    is_sharded: bool
    steps: StepTimes = field(default_factory=StepTimes)
    step_started: float | None = None
    figures: dict[str, Any] | None = None
    planned_steps: int | None = None
    capture: InputCapture | None = None
    inputs: ExampleInputs | None = None
    inputs_of: str = ""
    inputs_from: str | None = None
    validated_sparsity: float | None = None
    left_out: str | None = None


class CompressionReport(Callback):
    """Say what was compressed, by how much and at what price: a table, ``report.json``, a page, loggers and pictures.

    All of it is measured at the end of ``fit`` and written in ``teardown``, by rank zero: the sparsity of every
    parameter and of what each technique claims, the last metrics, the size on disk, the time of a training step, the
    latency of the model before and after, the sparsity of the file that ``ModelCheckpoint`` calls the best, and bytes
    and latency of the files that ``ExportCompressed`` has written, wherever it stands in the list of callbacks. The
    keys are documented in ``docs/report.md``. Nothing of the model, of its metrics or of the random numbers is changed
    by measuring. After the fit, the content of ``report.json`` is also in the attribute ``figures``.

    Latency is the median time of a forward of the LightningModule in eval mode, at batch 1 and 64, on the inputs of
    ``example_input_array``, else on what the forward receives in the sanity check, else in the first training batch.
    Each measurement takes half a second at most, on a busy machine three times that. Compiled modules are measured
    uncompiled, sharded ones not at all.

    Args:
        dir: The folder for the files; by default the logger's folder, ``trainer.log_dir``.
        latency: Whether to measure latency.
        plots: Whether to write ``report.html`` and ``report.png``, and to give the pictures to loggers that take some
            (TensorBoard's, and those with ``log_image``). Pictures need matplotlib
            (``pip install "lightning-compress[plots]"``): where it is missing the page has the tables alone, and the
            table says so.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the folder is an empty string, or if a trainer has two of these callbacks.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> report = CompressionReport(latency=False)
        >>> trainer = Trainer(callbacks=[report], logger=False)
    """

    def __init__(self, dir: str | None = None, latency: bool = True, plots: bool = True) -> None:
        super().__init__()
        self.dir = _folder(plain(dir))
        self.latency = _switch(plain(latency), "latency")
        self.plots = _switch(plain(plots), "plots")
        self.figures: dict[str, Any] | None = None
        self._run: _Run | None = None
        self._history: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what another run left."""
        self._end_run()
        if stage != "fit":
            return
        if sum(isinstance(callback, CompressionReport) for callback in callbacks(trainer)) > 1:
            raise ValueError("The trainer has two CompressionReport callbacks, which report the same: remove one.")
        self.figures, self._history, self._before = None, [], {}
        directory = self.dir or trainer.log_dir or trainer.default_root_dir  # log_dir waits for all processes
        self._run = _Run(str(directory), time.perf_counter(), is_sharded(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model as it comes; a resumed run has these figures from its first part."""
        run = self._running
        counts = measure.count_parameters(pl_module)
        size = self._file_size(trainer, pl_module, deflate=False)
        if not self._before:
            self._before = {
                "parameters": sum(count.total for count in counts),
                "nonzero": sum(count.total - count.zeros for count in counts),
                "bytes": size and size.stored,
                "latency": None,
                "inputs": None,
            }
        if not self.latency:
            run.left_out = "CompressionReport(latency=False)"
        elif run.is_sharded:
            run.left_out = f"the parameters are sharded over processes ({type(trainer.strategy).__name__})"
        elif pl_module.example_input_array is not None:
            self._take_example(trainer, pl_module)
        elif is_compiled(pl_module):
            run.left_out = _unknown_inputs(pl_module, " of a compiled module")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch what the forward receives."""
        self._watch(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the latency of the model as it comes, before a step is taken."""
        self._take_captured(trainer, pl_module, "the sanity check", is_last_chance=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be measured; ask how long the run is; watch the first batch if there was no sanity check."""
        run = self._running
        run.planned_steps = run_length(trainer).steps
        without = f", without latency ({run.left_out})" if run.left_out is not None else ""
        rank_zero_info(f"CompressionReport: {_name(pl_module)} is measured when the fit ends{without}: {run.dir}.")
        self._watch(trainer, pl_module)

    # --- during training ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self._running.step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        run = self._running
        if run.step_started is not None:
            run.steps.add(time.perf_counter() - run.step_started)
        if run.capture is not None:
            self._take_captured(trainer, pl_module, "the first training batch", is_last_chance=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the sparsity that the metrics will be of: a guard may roll back before this callback's turn comes."""
        if self._run is not None and not trainer.sanity_checking:
            self._run.validated_sparsity = self._sparsity(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics."""
        if self._run is not None and not trainer.sanity_checking:
            self._note(trainer, self._run.validated_sparsity)
        if self._run is not None:
            self._note_representations(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the sparsity and the metrics where there is no validation."""
        if not trainer.enable_validation:
            self._note(trainer, self._sparsity(pl_module))

    # --- after training -----------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained model; this comes after every callback's ``on_train_end``."""
        run = self._running
        techniques = [_facts(technique) for technique in registry.techniques(pl_module)]
        counts = measure.count_parameters(pl_module)
        sparsity = _claimed_sparsity(counts, techniques)
        last = self._history[-1] if self._history else {}
        if (last.get("step"), last.get("sparsity")) != (trainer.global_step, sparsity):
            self._note(trainer, sparsity)
        if not trainer.is_global_zero:
            return

        zero_rows, histograms = measure.zero_rows(pl_module), self._histograms(pl_module, techniques)
        figures: dict[str, Any] = {
            "schema": SCHEMA,
            "module": _name(pl_module),
            "versions": {
                "lightning_compress": lightning_compress.__version__,
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "python": platform.python_version(),
            },
            "totals": _totals(counts, sparsity, techniques),
            "before": {key: self._before.get(key) for key in ("parameters", "nonzero", "bytes")},
            "techniques": [_summary(technique, counts) for technique in techniques],
            "parameters": [
                _row(count, techniques)
                | {"zero_rows": zero_rows.get(count.name, []), "histogram": histograms.get(count.name)}
                for count in counts
            ],
            "run": self._run_figures(trainer, pl_module),
            "metrics": _metrics(trainer),
            "size": self._size_figures(trainer, pl_module),
            "latency": self._latency_figures(trainer, pl_module),
            "multiply_adds": self._work_figures(trainer, pl_module),
            "removed": self._removed_figures(trainer, pl_module),
            "similarity": self._similarity_figures(trainer, pl_module),
            "checkpoints": list(_checkpoints(trainer, pl_module, counts, techniques, sparsity)),
            "history": self._history,
        }
        run.figures = figures

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._end_run()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report: by now the callbacks that export have written their files, wherever they stand in the list."""
        if self._run is not None and self._run.figures is not None:
            self._publish(trainer, pl_module, self._run.figures)
        self._end_run()

    def _end_run(self) -> None:
        if self._run is not None and self._run.capture is not None:
            self._run.capture.remove()
        self._run = None

    def _publish(self, trainer: Trainer, pl_module: LightningModule, figures: dict[str, Any]) -> None:
        run = self._running
        module = None if run.inputs is None else pl_module.get_submodule(run.inputs_of)
        figures["exported"] = exported_figures(_exported_files(trainer), module, run.inputs)
        figures = measure.plain_value(figures)
        figures["notes"] = measure.verdict(figures)
        if run.is_sharded and not any(hasattr(parameter, "full_tensor") for parameter in pl_module.parameters()):
            figures["notes"].append(
                f"{type(trainer.strategy).__name__} shards the model: only rank 0's part was counted."
            )
        self.figures = figures
        drawings, picture = {}, None
        if self.plots:
            try:
                drawings, picture = plots.drawings(figures), plots.picture(figures)
            except ImportError:
                figures["notes"].append(f"The plots were left out: matplotlib is not installed ({plots.INSTALL}).")
        json_path, png_path, html_path = (os.path.join(run.dir, f"report.{kind}") for kind in ("json", "png", "html"))
        figures["files"] = [json_path, *[png_path] * (picture is not None), *[html_path] * self.plots]
        if picture is not None:
            _write(png_path, picture)
        if self.plots:
            _write(html_path, report_page(figures, drawings).encode())
        _write(json_path, (json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        for logger in trainer.loggers:
            logger.log_metrics(_log_entries(figures), step=trainer.global_step)
            _show(logger, drawings, trainer.global_step)
        table.print_table(figures)

    # --- figures ------------------------------------------------------------------------------------------------------

    def _sparsity(self, pl_module: LightningModule) -> float | None:
        techniques = [_facts(technique) for technique in registry.techniques(pl_module)]
        return _claimed_sparsity(measure.count_parameters(pl_module, _claimed_names(techniques)), techniques)

    def _note(self, trainer: Trainer, sparsity: float | None) -> None:
        self._history.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "sparsity": sparsity,
                "metrics": _metrics(trainer),
            }
        )

    def _histograms(self, pl_module: LightningModule, techniques: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self._running.is_sharded:
            return {}
        compressed = {name for technique in techniques for name in technique["layers"]}
        return {
            clean_name(name): measure.histogram(parameter)
            for name, parameter in pl_module.named_parameters()
            if not isinstance(parameter, nn.parameter.UninitializedParameter)
            and parameter.is_floating_point()
            and (parameter.dim() > 1 or clean_name(name) in compressed)
        }

    def _run_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        run, median = self._running, self._running.steps.median()
        done = steps_done(trainer, pl_module)
        return {
            "steps": done,
            "planned_steps": run.planned_steps,
            "ended_early": run.planned_steps is not None and done < run.planned_steps,
            "epochs": trainer.current_epoch,
            "seconds": time.perf_counter() - run.started,
            "step_ms": None if median is None else median * 1e3,
            "steps_timed": run.steps.count,
        }

    def _file_size(self, trainer: Trainer, pl_module: LightningModule, deflate: bool) -> measure.FileSize | None:
        if self._running.is_sharded or not trainer.is_global_zero:
            return None
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in pl_module.parameters()):
            return None
        return measure.file_size(pl_module.state_dict(), deflate)

    def _size_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        size = self._file_size(trainer, pl_module, deflate=False)
        if size is None:
            return {"bytes": None, "deflated_bytes": None, "left_out": "the parameters are sharded over processes"}
        if size.stored > _DEFLATED_AT_MOST:
            reason = f"not deflated: more than {measure.spell_bytes(_DEFLATED_AT_MOST)}"
            return {"bytes": size.stored, "deflated_bytes": None, "left_out": reason}
        size = measure.file_size(pl_module.state_dict())
        return {"bytes": size.stored, "deflated_bytes": size.deflated, "left_out": None}

    def _latency_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        run, after = self._running, None
        if run.inputs is not None:
            after = self._measure(trainer, pl_module)
        elif run.left_out is None:
            run.left_out = _unknown_inputs(pl_module)
        inputs = run.inputs.describe() if run.inputs is not None else None
        return {
            "left_out": run.left_out,
            "of": ".".join(filter(None, [_name(pl_module), run.inputs_of])),
            "inputs": inputs,
            "inputs_before": self._before.get("inputs"),
            "inputs_from": run.inputs_from,
            "device": str(trainer.strategy.root_device),
            "threads": torch.get_num_threads(),
            "precision": str(trainer.precision),
            "compiled": any(is_compiled(module) for module in pl_module.modules()),
            "before": self._before.get("latency"),
            "after": after,
        }

    def _work_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int] | None:
        run = self._running
        if run.inputs is None or run.is_sharded:
            return None
        try:
            with self._evaluating(trainer, pl_module, run.inputs.resized(1)) as (module, own):
                total, nonzero = multiply_adds(module, own)
        except Exception:  # whatever a model raises: the report says so where it tells of latency
            return None
        return {"total": total, "nonzero": nonzero}

    def _removed_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        """Compare the masked model with the one from which its channels or heads are cut out."""
        smaller = registry.smaller_module(pl_module)
        if smaller is None:
            return None
        run, figures = self._running, {}
        for key, module in (("masked", pl_module), ("cut", smaller)):
            work, latency = None, None
            if run.inputs is not None:
                work = _multiply_adds(module.get_submodule(run.inputs_of), run.inputs.resized(1))
                latency = self._measure(trainer, pl_module, module)
            figures[key] = {
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
                "bytes": measure.file_size(module.state_dict(), deflate=False).stored,
                "multiply_adds": work,
                "latency": latency,
            }
        return figures

    # --- latency ------------------------------------------------------------------------------------------------------

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self._running
        if trainer.is_global_zero and run.left_out is None and run.inputs is None and run.capture is None:
            run.capture = InputCapture(pl_module)

    def _take_captured(self, trainer: Trainer, pl_module: LightningModule, source: str, is_last_chance: bool) -> None:
        run = self._running
        if run.capture is None:
            return
        run.capture.remove()
        try:
            run.inputs_of, run.inputs = run.capture.result()
        except ValueError as error:
            if is_last_chance:
                run.left_out = _unknown_inputs(pl_module, f" ({error})")
        else:
            run.inputs_from = source
            self._measure_before(trainer, pl_module)
        run.capture = None

    def _take_example(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self._running
        if not trainer.is_global_zero:
            return
        inputs = ExampleInputs.from_example(pl_module.example_input_array)
        try:
            run.inputs = inputs.resized(min(inputs.batch, max(measure.BATCHES))).to("cpu")
        except ValueError as error:
            run.left_out = f"`example_input_array` cannot be used: {error}"
            return
        run.inputs_from = "example_input_array"
        self._measure_before(trainer, pl_module)

    def _measure_before(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self._running
        if self._before.get("latency") is None and run.inputs is not None:
            self._before["latency"] = measure.plain_value(self._measure(trainer, pl_module))
            self._before["inputs"] = run.inputs.describe()

    def _measure(self, trainer: Trainer, pl_module: LightningModule, other: nn.Module | None = None) -> dict[str, Any]:
        device, context = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        assert self._running.inputs is not None
        with self._at_hand(trainer, pl_module, self._running.inputs, other) as (module, inputs):
            return measure.measure_latencies(module, inputs, device, context)

    @contextmanager
    def _at_hand(
        self, trainer: Trainer, pl_module: LightningModule, inputs: ExampleInputs, other: nn.Module | None = None
    ) -> Iterator[tuple[nn.Module, ExampleInputs]]:
        """Yield the module that is called and its inputs, both on the device and in the precision of training."""
        precision, device = trainer.precision_plugin, trainer.strategy.root_device
        inputs = inputs.map(precision.convert_input)
        inputs = ExampleInputs(*move_data_to_device((inputs.args, inputs.kwargs), device))
        whole = pl_module if other is None else other
        found_on = pl_module.device  # at the end of a fit, Lightning has moved the model to the CPU
        if found_on != device:
            whole.to(device)
        try:
            yield whole.get_submodule(self._running.inputs_of), inputs
        finally:
            if found_on != device:
                whole.to(found_on)

    # --- similarity ---------------------------------------------------------------------------------------------------

    def _grams(self, trainer: Trainer, pl_module: LightningModule, inputs: ExampleInputs) -> dict[str, Tensor]:
        prefix = f"{self._running.inputs_of}." if self._running.inputs_of else ""
        with self._evaluating(trainer, pl_module, inputs) as (module, own):
            return {prefix + name: matrix for name, matrix in layer_grams(module, own).items()}

    @contextmanager
    def _evaluating(
        self, trainer: Trainer, pl_module: LightningModule, inputs: ExampleInputs
    ) -> Iterator[tuple[nn.Module, ExampleInputs]]:
        with (
            self._at_hand(trainer, pl_module, inputs) as (module, own),
            measure.preserved(module),
            ExitStack() as stack,
        ):
            if any(is_compiled(child) for child in module.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks would have it compiled anew
            modes = [(child, child.training) for child in module.modules()]
            module.eval()
            try:
                with trainer.precision_plugin.forward_context():
                    yield module, own
            finally:
                for child, mode in modes:
                    child.training = mode

    def _note_representations(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how alike the layers find a batch's samples, as long as nothing is compressed."""
        run, compressing = self._running, [t for t in registry.techniques(pl_module) if t.layers()]
        if run.inputs is None or not compressing or any(technique.stage() for technique in compressing):
            return
        # A resumed run goes on with these inputs, which are saved for it.
        inputs = run.inputs.resized(min(run.inputs.batch, max(2, _SAVED_AT_MOST // max(run.inputs.row_bytes, 1))))
        self._before["alike"] = {
            "step": trainer.global_step,
            "args": list(inputs.args),
            "kwargs": dict(inputs.kwargs),
            "grams": self._grams(trainer, pl_module, inputs),
        }

    def _similarity_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        before = self._before.get("alike")
        if before is None or self._running.inputs is None:
            return None
        inputs = ExampleInputs(tuple(before["args"]), before["kwargs"])
        after = self._grams(trainer, pl_module, inputs)
        return {
            "step": before["step"],
            "samples": inputs.batch,
            "layers": similarities(before["grams"], after),
        }

    @property
    def _running(self) -> _Run:
        assert self._run is not None
        return self._run

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the figures of the model as it came: plain Python and tensors."""
        return {"history": copy.deepcopy(self._history), "before": copy.deepcopy(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the run that is resumed."""
        if self._run is not None:
            self._history = copy.deepcopy(state_dict["history"])
            self._before = copy.deepcopy(state_dict["before"])


# --- from techniques and counts to figures ---------------------------------------------------------------------------


def _facts(technique: registry.Technique) -> dict[str, Any]:
    return {
        "technique": technique.technique,
        "callback": type(technique).__name__,
        "stage": technique.stage(),
        "summary": technique.summary(),
        "skipped": dict(getattr(technique, "skipped", {})),
        "events": [dict(event) for event in getattr(technique, "events", [])],
        "layers": {name: dict(facts) for name, facts in technique.layers().items()},
    }


def _claimed_names(techniques: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the parameters for which some technique answers with a sparsity."""
    return [name for technique in techniques for name, facts in technique["layers"].items() if "sparsity" in facts]


def _named(counts: Iterable[ParameterCount], names: Iterable[str]) -> list[ParameterCount]:
    wanted = set(names)
    return [count for count in counts if wanted.intersection((count.name, *count.aliases))]


def _zeros_and_total(counts: Sequence[ParameterCount]) -> tuple[int, int]:
    return sum(count.zeros for count in counts), sum(count.total for count in counts)


def _claimed_sparsity(counts: Sequence[ParameterCount], techniques: Sequence[Mapping[str, Any]]) -> float | None:
    zeros, total = _zeros_and_total(_named(counts, _claimed_names(techniques)))
    return zeros / total if total else None


def _totals(
    counts: Sequence[ParameterCount], sparsity: float | None, techniques: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    zeros, total = _zeros_and_total(counts)
    claimed_zeros, claimed = _zeros_and_total(_named(counts, _claimed_names(techniques)))
    return {
        "parameters": total,
        "nonzero": total - zeros,
        "zeros": zeros,
        "sparsity": measure.share(zeros, total),
        "claimed": claimed,
        "claimed_zeros": claimed_zeros,
        "claimed_sparsity": sparsity,
    }


def _summary(technique: Mapping[str, Any], counts: Sequence[ParameterCount]) -> dict[str, Any]:
    claimed = _named(counts, technique["layers"])
    zeros, total = _zeros_and_total(claimed)
    return {
        **{key: technique[key] for key in ("technique", "callback", "stage", "summary", "skipped", "events")},
        "layers": len(claimed),
        "parameters": total,
        "zeros": zeros,
        "sparsity": measure.share(zeros, total),
    }


def _row(count: ParameterCount, techniques: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    facts: dict[str, dict[str, Any]] = {}
    for technique in techniques:
        for name in (count.name, *count.aliases):
            if name in technique["layers"]:
                facts.setdefault(technique["technique"], {}).update(technique["layers"][name])
    return {**asdict(count), "sparsity": count.sparsity, "techniques": facts}


def _metrics(trainer: Trainer) -> dict[str, float | None]:
    return {name: measure.plain_value(value) for name, value in own_metrics(trainer).items()}


def _multiply_adds(module: nn.Module, inputs: ExampleInputs) -> int | None:
    try:
        return profile(module, inputs.for_forward(module)).multiply_adds
    except ValueError:
        return None


def _checkpoints(
    trainer: Trainer,
    pl_module: LightningModule,
    counts: Sequence[ParameterCount],
    techniques: Sequence[Mapping[str, Any]],
    final: float | None,
) -> Iterable[dict[str, Any]]:
    """Say how compressed each file is that a ``ModelCheckpoint`` calls the best (neuralmagic/yolov5 #112)."""
    claimed = _named(counts, _claimed_names(techniques))
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if not path or not os.path.exists(path) or not techniques:
            continue
        entry: dict[str, Any] = {
            "path": str(path),
            "monitor": getattr(callback, "monitor", None),
            "sparsity": None,
            "final_sparsity": final,
            "not_begun": [],
            "left_out": None,
        }
        try:
            if os.path.isdir(path):
                raise ValueError("it is a folder of shards")
            checkpoint = measure.read_checkpoint(path)
            entry["not_begun"] = [
                technique.technique
                for technique in registry.techniques(pl_module)
                if technique.stage() > 0 and _has_begun(technique, checkpoint) is False
            ]
            if claimed:
                zeros, total = measure.checkpoint_zeros(checkpoint, claimed)
                if not total:
                    raise ValueError("it holds none of the compressed parameters")
                entry["sparsity"] = zeros / total
        except Exception as error:  # whatever torch.load raises: a report must not end a training
            entry["left_out"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if "Unsupported global" in str(error):
                entry["left_out"] = "torch.load refuses the objects that `save_hyperparameters` has put into it"
        yield entry


def _has_begun(technique: registry.Technique, checkpoint: Mapping[str, Any]) -> bool | None:
    """Return whether a technique had begun when a checkpoint was written, ``None`` where it shows in the weights."""
    has_begun = getattr(technique, "has_begun_in", None)
    return None if has_begun is None else has_begun(checkpoint)


def _exported_files(trainer: Trainer) -> list[Any]:
    """Return what the trainer's callbacks say of files that they have exported; see ``ExportedFile``."""
    files = [file for callback in callbacks(trainer) for file in getattr(callback, "files", None) or ()]
    return [file for file in files if all(hasattr(file, name) for name in ("format", "path", "bytes", "agrees"))]


def _show(logger: Logger, drawings: Mapping[str, Figure], step: int) -> None:
    """Give the pictures to a logger that takes some: TensorBoard's, and those with ``log_image``, as Wandb's."""
    try:
        add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
        for name, figure in drawings.items():
            if callable(add_image):
                add_image(f"compress/{name}", plots.pixels(figure), step, dataformats="HWC")
            elif callable(log_image := getattr(logger, "log_image", None)):
                log_image(key=f"compress/{name}", images=[plots.pixels(figure)], step=step)
    except Exception as error:  # whatever a logger's own packages raise: a picture must not end a training
        rank_zero_warn(f"CompressionReport: {type(logger).__name__} took no pictures: {type(error).__name__}: {error}")


def _log_entries(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures for loggers.

    No key may be another's folder: a store that keeps a metric in a file, as MLflow's does, cannot have both
    ``compress/sparsity`` and ``compress/sparsity/net.0.weight``.
    """
    totals, run, size, latency = figures["totals"], figures["run"], figures["size"], figures["latency"]
    entries = {
        "parameters": totals["parameters"],
        "nonzero_parameters": totals["nonzero"],
        "sparsity": totals["claimed_sparsity"],
        "sparsity_of_all": totals["sparsity"],
        "file_bytes": size["bytes"],
        "file_deflated_bytes": size["deflated_bytes"],
        "step_ms": run["step_ms"],
    }
    for moment in ("before", "after"):
        for batch, measured in (latency[moment] or {}).items():
            entries[f"latency_ms_{moment}_batch_{batch}"] = measured["ms"]
    for row in figures["parameters"]:
        if row["techniques"]:
            entries[f"layer_sparsity/{row['name']}"] = row["sparsity"]
    return {f"compress/{key}": float(value) for key, value in entries.items() if value is not None}


# --- small things -----------------------------------------------------------------------------------------------------


def _folder(value: object) -> str | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`dir` must be the path of a folder or None, got {value!r} of type {type(value).__name__}.")
    if value == "":
        raise ValueError("`dir` must be the path of a folder or None (the logger's folder), got ''.")
    return None if value is None else os.fspath(value)


def _switch(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r} of type {type(value).__name__}.")
    return value


def _name(pl_module: LightningModule) -> str:
    return type(pl_module).__name__


def _unknown_inputs(pl_module: LightningModule, why: str = "") -> str:
    return f"no example inputs{why} are known: give {_name(pl_module)} an `example_input_array`"


def _write(path: str, content: bytes) -> None:
    """Write a file that is whole or not there."""
    if "://" in path:
        filesystem = get_filesystem(path)
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        with filesystem.open(path, "wb") as file:  # an object store shows a file when it is whole
            file.write(content)
        return
    write_whole(path, lambda temporary: temporary.write_bytes(content))
