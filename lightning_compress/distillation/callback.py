"""The distillation callback: a teacher joins an existing training run."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress import registry
from lightning_compress.distillation.cache import TeacherCache, sample_indices
from lightning_compress.distillation.capture import OutputCapture, Select, select_output
from lightning_compress.distillation.features import FEATURE_LOSSES, FeaturePair, make_projector, parse_features
from lightning_compress.distillation.initialization import Copied, copy_weights
from lightning_compress.distillation.losses import LogitLoss, as_losses, call, class_dim, find_labels
from lightning_compress.distillation.teacher import EMATeacher, Teacher, load, merge
from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.modules import named_module
from lightning_compress.moments import ScheduledLike, one_of, scheduled
from lightning_compress.training import is_sharded, plain, refuse_sharding, run_length, steps_done


@dataclass(frozen=True)
class _Values:
    """What changes during the run, as functions of the step."""

    temperature: Callable[[int], float]
    weight: Callable[[int], float]
    losses: list[Callable[[int], float]]
    features: list[Callable[[int], float]]


class KnowledgeDistillation(Callback):
    """Train a model to do what a teacher does, beside its own loss.

    In each training step, right before the student's forward pass, the teacher gets what that is given; right after
    ``training_step`` the loss becomes (1 − weight) · loss of ``training_step`` + weight · distillation. The student
    makes no forward pass of its own for it, and needs no change. Where ``training_step`` makes several passes with
    gradients, their mean is taken. The teacher is a guest: in eval mode, without gradients, on the student's device,
    and in no checkpoint, optimizer or ``state_dict``.

    Args:
        teacher: A module or LightningModule; the path of a Lightning checkpoint of the student's own class; a dict with
            ``_target_`` for Hydra to instantiate; ``"ema"`` or ``"ema:0.99"``, the student's own moving average; or a
            list of all but the last, whose logits are averaged.
        losses: ``"kl"`` (softened by the temperature T, times T²), ``"mse"`` of the logits, ``"hard"`` (the teacher's
            decisions as labels), ``"dkd"``, ``"dist"``, ``"reverse_kl"``, ``"jensen_shannon"``, ``"cosine"``; a module
            or function of the student's and the teacher's logits; a
            :class:`~lightning_compress.distillation.losses.LogitLoss` with arguments of its own; or a list of these, or
            of ``[loss, weight]``, which are added up. All but ``"mse"`` compare classes that exclude each other; where
            each output stands for itself (several labels at once, regression), use ``"mse"``.
        temperature: T ≥ 0.01: a number, or what changes during the run: a
            :class:`~lightning_compress.moments.Schedule`, a dict of its arguments, or a function of progress in [0, 1].
        weight: The share of distillation in the loss, in [0, 1], likewise. At 1 the loss of ``training_step`` does not
            count, and no labels are needed.
        module: The name of the student's module whose output is distilled. By default the LightningModule's own where
            ``training_step`` calls ``self(...)``, else the outermost submodule that it calls.
        output: The key, the index, or a function that takes the logits out of an output that is no tensor.
        teacher_input: A function of what the captured module received, positional and keyword, that returns what the
            teacher gets: a tuple is positional, a dict keywords, all else one argument.
        features: ``{"student.layer": "teacher.layer"}`` distils what these layers return, by mean squared error (hint);
            ``{"student.layer": {"layer": "teacher.layer", "loss": "attention", "weight": 0.5}}`` chooses ``hint``,
            ``attention``, ``relation`` or ``cosine``. Where a hint's shapes differ, a projector that the student's
            optimizer trains is put between. Of a layer that is called several times, the last output counts.
        initialize: ``"copy"`` starts the student from the teacher's weights where names and shapes match, and from the
            most important channels where the student is narrower; ``{"student.layer": "teacher.layer"}`` says which
            layer starts from which.
        cache: A folder that keeps the teacher's outputs by sample, so that each is computed once. For data without
            random augmentation, in a fixed order or with an ``index`` in the batch.

    Raises:
        ValueError: For a value out of its range, a teacher that cannot be loaded or shares parameters with the student:
            at construction or in ``setup``. In the first step, for a captured module that is never called, for
            different numbers of classes, for a name in ``features`` that does not exist.

    Note:
        Under manual optimization, ``self.manual_backward(distilled_loss(self, loss))`` adds the distillation; see
        :func:`distilled_loss`. Parameters may be sharded (FSDP), but then without projectors and ``"ema"``.

    (Hinton et al. 2015, arXiv 1503.02531.)

    Example::

        >>> from lightning.pytorch import Trainer
        >>> distillation = KnowledgeDistillation(teacher=nn.Linear(4, 2), temperature=4.0, weight=0.9)
        >>> trainer = Trainer(callbacks=[distillation], logger=False)
    """

    technique = "distillation"

    def __init__(
        self,
        teacher: Any,
        losses: Any = "kl",
        temperature: ScheduledLike = 4.0,
        weight: ScheduledLike = 0.9,
        module: str | None = None,
        output: Select | None = None,
        teacher_input: Callable[..., Any] | None = None,
        features: dict[str, Any] | None = None,
        initialize: str | dict[str, str] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.teacher = plain(teacher)
        self.losses = plain(losses)
        self._losses = as_losses(self.losses)
        self.temperature = scheduled(plain(temperature), "temperature", 0.01, 1000.0)
        self.weight = scheduled(plain(weight), "weight", 0.0, 1.0)
        self.module = module
        self.output = output
        if teacher_input is not None and not callable(teacher_input):
            raise TypeError(f"`teacher_input` must be a function of the captured inputs, got {teacher_input!r}.")
        self.teacher_input = teacher_input
        self.features: list[FeaturePair] = parse_features(plain(features) or {})
        self.initialize = plain(initialize)
        if isinstance(self.initialize, str):
            one_of(self.initialize, ["copy"], "initialize")
        self.cache = None if cache is None else Path(cache)
        if self.cache is not None and self.features:
            raise ValueError("`cache` keeps the teacher's outputs and not its `features`: leave one of them out.")
        if self.cache is not None and isinstance(teacher, str) and teacher.split(":")[0] == "ema":
            raise ValueError(f"`teacher={teacher!r}` changes at every step: leave `cache` out.")
        # Lightning asks for it at every hook.
        self._state_key = self._generate_state_key(module=module, features=sorted(plain(features) or {}))
        self._is_of_a_module = False
        self._forget()

    def _forget(self) -> None:
        self._teacher: Teacher | None = None
        self._capture: OutputCapture | None = None
        self._copied: Copied | None = None
        self._cache: TeacherCache | None = None
        self._projectors: dict[str, nn.Module] = {}
        self._shapes: dict[str, tuple[list[int], list[int], torch.dtype]] = {}
        self._joined: dict[str, tuple[int, int]] = {}  # by the projector's name, its optimizer and group
        self._restored: dict[str, Any] | None = None
        self._own_step: Any = None  # what `training_step` was in the module's own attributes
        self._batch: tuple[Any, int] = (None, 0)
        self._is_added = False
        self._was_recording = False
        self._last_step = self._delay = 0
        self._trainer: Trainer | None = None
        self._values: _Values | None = None

    @property
    def state_key(self) -> str:
        """Tell callbacks that distil different modules apart."""
        return self._state_key

    def act_only_on_its_own(self) -> None:
        """Leave all modules alone that do not hold this callback as ``distillation``."""
        self._is_of_a_module = True

    def acts_on(self, module: nn.Module) -> bool:
        """Return whether a module would be distilled."""
        return not self._is_of_a_module or getattr(module, "distillation", None) is self

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the teacher, and start the student from its weights where that is asked for."""
        if stage != "fit":
            return
        self._release(pl_module)
        self._forget()
        if not self.acts_on(pl_module):
            return
        refuse_sharding(trainer, self, but_dtensors=True, but_flat=True)
        self._teacher = load(self.teacher, pl_module, cls=getattr(pl_module, "student_type", type(pl_module)))
        if isinstance(self._teacher, EMATeacher):
            if is_sharded(trainer):
                raise ValueError("`teacher='ema'` cannot average sharded parameters: give another teacher.")
            if self.features or self.initialize:
                raise ValueError("`teacher='ema'` is the student itself: leave `features` and `initialize` out.")
        if self.initialize and is_sharded(trainer) and is_overridden("configure_model", pl_module):
            raise ValueError(
                "`initialize` cannot write into parameters that `configure_model` shards: copy the weights before."
            )
        self._trainer = trainer
        registry.register(pl_module, self)
        if self.initialize and not is_overridden("configure_model", pl_module) and not trainer.global_step:
            self._copy(pl_module)

    def _copy(self, pl_module: LightningModule) -> None:
        teacher = self._guest
        if len(teacher.modules) > 1:
            raise ValueError("`initialize` starts the student from one teacher, and here are several.")
        example = None
        if pl_module.example_input_array is not None:
            inputs = ExampleInputs.from_example(pl_module.example_input_array)
            example = ExampleInputs(*self._teacher_inputs(inputs.args, inputs.kwargs))
        mapping = None if isinstance(self.initialize, str) else self.initialize
        self._copied = copy_weights(pl_module, teacher.modules[0], mapping, example)

    @property
    def _guest(self) -> Teacher:
        assert self._teacher is not None, "setup comes first"
        return self._teacher

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the student and put the distillation into its ``training_step``."""
        if self._teacher is None:
            return
        is_new = not trainer.global_step and trainer.ckpt_path is None
        if self.initialize and is_overridden("configure_model", pl_module) and is_new:
            self._copy(pl_module)
        self._teacher.attach(pl_module.device)
        if self.features:
            self._teacher.watch([pair.teacher for pair in self.features])
        restored = self._restored or {}
        name = self.module if self.module is not None else restored.get("module")
        self._capture = OutputCapture(pl_module, name, [pair.student for pair in self.features], self._ask)
        for key, saved in restored.get("projectors", {}).items():
            self._add_projector(key, saved["student"], saved["teacher"], pl_module.device, saved["dtype"])
            self._projectors[key].load_state_dict(saved["state"])
        if restored.get("ema") is not None:
            assert isinstance(self._teacher, EMATeacher)
            self._teacher.load_state_dict(restored["ema"])
        self._last_step, self._delay = restored.get("last_step", 0), restored.get("delay", 0)
        self._wrap(pl_module)

    def _wrap(self, pl_module: LightningModule) -> None:
        self._own_step = vars(pl_module).get("training_step")
        step = pl_module.training_step
        callback = self

        @functools.wraps(step)  # Lightning reads the names of its parameters
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return callback._step(pl_module, step, args, kwargs)

        training_step.stays_behind = True  # type: ignore[attr-defined]  # where the module is copied
        vars(pl_module)["training_step"] = training_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedules."""
        if self._capture is None:
            return
        run = run_length(trainer)
        self._values = _Values(
            self.temperature.resolve(run),
            self.weight.resolve(run),
            [loss.weight.resolve(run) for loss in self._losses],
            [pair.weight.resolve(run) for pair in self.features],
        )
        self._last_step = steps_done(trainer, pl_module)
        rank_zero_info(f"KnowledgeDistillation: {self.summary()}.")

    # --- during training ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, in which losses find labels and the cache indices."""
        self._batch = batch, batch_idx

    def _step(
        self, pl_module: LightningModule, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        capture = self._watching
        self._is_added = False
        capture.forget()
        if capture.name is None and (compiled := getattr(pl_module, "_compiler_ctx", None)) is not None:
            step = compiled["original_training_step"]  # the search needs to see each call
        with capture.recording():
            result = step(*args, **kwargs)
            if not pl_module.automatic_optimization:
                if not self._is_added:
                    raise ValueError(
                        "KnowledgeDistillation cannot reach the loss of manual optimization by itself: write "
                        "`self.manual_backward(distilled_loss(self, loss))` in `training_step`, with "
                        "`from lightning_compress.distillation import distilled_loss`."
                    )
            elif not self._is_added:
                result = self._with_distillation(pl_module, result)
        capture.forget()
        return result

    def _with_distillation(self, pl_module: LightningModule, result: Any) -> Any:
        """Return what ``training_step`` returned, with the distillation in its loss."""
        if isinstance(result, Tensor):
            return self.add(pl_module, result)
        if result is None:  # a batch that is skipped, unless the loss does not count anyway
            has_calls = self._watching.has_calls
            return self.add(pl_module, None) if has_calls and self._schedules.weight(self._now) == 1.0 else None
        if isinstance(result, Mapping):  # one without a loss is Lightning's to refuse
            return {**result, "loss": self.add(pl_module, result["loss"])} if "loss" in result else result
        return self.add(pl_module, result)

    @property
    def is_training(self) -> bool:
        """Whether ``training_step`` is running."""
        return self._capture is not None and self._capture.is_recording

    @property
    def _watching(self) -> OutputCapture:
        assert self._capture is not None, "on_fit_start comes first"
        return self._capture

    @property
    def _schedules(self) -> _Values:
        assert self._values is not None, "on_train_start comes first"
        return self._values

    @property
    def _now(self) -> int:
        return self._last_step - self._delay

    def add(self, pl_module: LightningModule, loss: Tensor | None) -> Tensor:
        """Return (1 − weight) · loss + weight · distillation, for the forward passes since the last call.

        :func:`distilled_loss` calls it for you.
        """
        self._is_added = True
        weight = self._schedules.weight(self._now)
        if weight == 0.0 and loss is not None:
            return loss
        terms = self._terms(pl_module)
        distillation = functools.reduce(torch.add, terms.values())
        self._log(pl_module, terms, distillation)
        if weight == 1.0 or loss is None:
            return distillation
        if loss.dtype == distillation.dtype:
            return torch.lerp(loss, distillation, weight)  # one operator, and one node of the graph
        return (1.0 - weight) * loss + weight * distillation

    def _terms(self, pl_module: LightningModule) -> dict[str, Tensor]:
        now = self._now
        calls = [(forward, select_output(forward.output, self.output)) for forward in self._watching.take()]
        if len(calls) > 1:
            calls = [(forward, student) for forward, student in calls if student.requires_grad] or calls
        if self.cache is not None and len(calls) > 1:
            raise ValueError(f"`cache` keeps one output for each sample, and `training_step` made {len(calls)} passes.")
        values = self._schedules
        temperature = values.temperature(now)
        sums: dict[str, Tensor] = {}
        for forward, student in calls:
            teacher = forward.answer if forward.answer is not None else self._teach(forward.args, forward.kwargs)
            for loss, weight in zip(self._losses, values.losses, strict=True):
                labels = self._labels(loss.loss, student) if "labels" in loss.takes else None
                value = call(loss.loss, student, teacher, temperature, labels, loss.takes)
                if (factor := weight(now) / len(calls)) != 1.0:
                    value = value * factor
                sums[loss.name] = sums[loss.name] + value if loss.name in sums else value
        if self.features:
            sums |= self._feature_terms(now)
        return sums

    def _labels(self, loss: Callable[..., Tensor], student: Tensor) -> Tensor | None:
        batch, _ = self._batch
        find = getattr(loss, "labels", None)
        if callable(find):
            return find(batch)
        dim = loss.dim if isinstance(loss, LogitLoss) else None
        if dim is None and student.dim() == 2:
            return find_labels(batch, student.shape[:1])
        dim = class_dim(student, dim)
        return find_labels(batch, student.shape[:dim] + student.shape[dim + 1 :])

    def _teacher_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.teacher_input is None:
            return args, kwargs
        given = ExampleInputs.from_example(self.teacher_input(*args, **kwargs))
        return given.args, given.kwargs

    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Let the teacher answer before the student's own pass: inputs are still as they were, and memory is free."""
        is_wanted = self._schedules.weight(self._now) > 0.0 and (self.cache is None or not self._watching.has_calls)
        return self._teach(args, kwargs) if is_wanted else None

    def _teach(self, given: tuple[Any, ...], given_by_name: dict[str, Any]) -> Tensor:
        if isinstance(self._teacher, EMATeacher):
            assert self._trainer is not None
            self._teacher.follow(self._trainer.lightning_module.get_submodule(self._watching.name or ""))
        args, kwargs = self._teacher_inputs(given, given_by_name)

        if self.cache is not None:
            return self._cached(given, given_by_name, lambda: self._answer(args, kwargs))
        return self._answer(args, kwargs)

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return merge([self._select_teacher(output) for output in self._guest(args, kwargs)])

    def _select_teacher(self, output: Any) -> Tensor:
        try:
            return select_output(output, self.output)
        except ValueError:
            if self.output is None:
                raise
            return select_output(output)  # `output` may be meant for the student alone

    def _cached(self, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        assert self._trainer is not None
        assert self.cache is not None
        batch, batch_idx = self._batch
        loader: Any = self._trainer.train_dataloader
        indices, reason = sample_indices(batch, loader, batch_idx)
        if indices is None:
            raise ValueError(f"`cache` needs to know which samples are in a batch: {reason}")
        if self._cache is None:
            dataset = getattr(loader, "dataset", None)
            if not isinstance(dataset, Sized):
                raise ValueError(
                    f"`cache` needs to know how many samples there are, and {type(loader).__name__} has no `dataset` "
                    f"with a length: leave `cache` out, or give the dataset one."
                )
            self._cache = TeacherCache(self.cache, len(dataset), self._guest)
        inputs = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        return self._cache.lookup(indices, inputs, compute)

    # --- features -----------------------------------------------------------------------------------------------------

    def _feature_terms(self, now: int) -> dict[str, Tensor]:
        own, theirs = self._watching.features(), self._guest.features()
        terms = {}
        for pair, weight in zip(self.features, self._schedules.features, strict=True):
            student, teacher = own[pair.student], theirs[pair.teacher]
            known = FEATURE_LOSSES[pair.loss]
            key = f"{pair.student} to {pair.teacher}"
            if known.needs_projector and student.shape[1:] != teacher.shape[1:]:
                if key not in self._projectors:
                    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
                    self._add_projector(key, student.shape, teacher.shape, student.device, dtype)
                student = self._projectors[key](student)
            terms[f"{pair.loss}_{pair.student}"] = known.function(student, teacher) * weight(now)
        return terms

    def _add_projector(
        self, key: str, student: Sequence[int], teacher: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        trainer = self._trainer
        assert trainer is not None
        if is_sharded(trainer):
            raise ValueError(
                f"`features` needs a projector for '{key}', which sharded training cannot have: distil layers of the "
                f"same shape, or use loss 'attention' or 'relation'."
            )
        # from the first process, since some seed each one differently
        seed = trainer.strategy.broadcast(int(os.environ.get("PL_GLOBAL_SEED", 0))) + len(self._projectors)
        projector = make_projector(tuple(student), tuple(teacher), seed)
        assert projector is not None
        self._projectors[key] = projector = projector.to(device, dtype)
        self._shapes[key] = (list(student), list(teacher), dtype)
        layer = named_module(trainer.lightning_module, key.partition(" to ")[0], "features")
        place = _place_of(layer, trainer.optimizers)
        self._joined[key] = place
        # A group of its own would be one more than a learning rate schedule knows.
        trainer.optimizers[place[0]].param_groups[place[1]]["params"].extend(projector.parameters())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look away while activation checkpointing calls modules anew, within ``training_step`` if it is manual."""
        if self._capture is not None:
            self._was_recording = self._capture.is_recording
            self._capture.is_recording = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the projectors' gradients over processes: DistributedDataParallel does not know of them."""
        if self._capture is not None:
            self._capture.is_recording = self._was_recording
            self._capture.mark()
        if self._projectors and trainer.world_size > 1:
            for projector in self._projectors.values():
                for parameter in projector.parameters():
                    if parameter.grad is not None:
                        parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the projectors' part out of the optimizers' state: the checkpoint is that of the student alone."""
        if "optimizer_states" not in checkpoint or not self._projectors:
            return
        taken: dict[str, Any] = {}
        for key, (place, group) in self._joined.items():
            state = checkpoint["optimizer_states"][place]
            numbers = _numbers(trainer.optimizers[place])  # that an optimizer's state knows its parameters by
            own = [numbers[id(parameter)] for parameter in self._projectors[key].parameters()]
            state["param_groups"][group]["params"] = [n for n in state["param_groups"][group]["params"] if n not in own]
            taken[key] = {"place": [place, group], "state": {n: state["state"].pop(n, None) for n in own}}
        checkpoint["callbacks"][self.state_key]["optimizers"] = taken

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the projectors' part back into the optimizers' state."""
        if self._teacher is None:
            return
        taken = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("optimizers", {})
        for saved in taken.values():
            place, group = saved["place"]
            state = checkpoint["optimizer_states"][place]
            state["param_groups"][group]["params"] += list(saved["state"])
            state["state"] |= {number: told for number, told in saved["state"].items() if told is not None}

    # --- the rest of a step -------------------------------------------------------------------------------------------

    def _log(self, pl_module: LightningModule, terms: Mapping[str, Tensor], total: Tensor) -> None:
        trainer = self._trainer
        assert trainer is not None
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.barebones or not every or (self._last_step + 1) % every:
            return
        name = f"compress/distillation{registry.suffix(pl_module, self)}"
        values = {name: total.detach()}
        if len(terms) > 1:
            values |= {f"{name}_{key}": term.detach() for key, term in terms.items()}
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the moving average follow the student."""
        if self._capture is None:
            return
        step = steps_done(trainer, pl_module)
        if isinstance(self._teacher, EMATeacher) and step > self._last_step and self._capture.name is not None:
            student = pl_module.get_submodule(self._capture.name)
            self._teacher.follow(student)
            self._teacher.update(student)
        if registry.is_held(pl_module):
            self._delay += step - self._last_step
        self._last_step = step
        self._batch = (None, 0)

    # --- after training -----------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks away, and give the module its own ``training_step`` back."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is not None:
            self._restored = self.state_dict()  # what is saved after the run
            self._capture.remove()
            self._capture.forget()
            if self._own_step is None:
                vars(pl_module).pop("training_step", None)
            else:
                vars(pl_module)["training_step"] = self._own_step
        if self._teacher is not None:
            self._teacher.detach()
        self._capture = self._cache = self._trainer = self._own_step = self._values = None
        self._batch = (None, 0)
        registry.release(pl_module, self)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the projectors, the student's moving average, and which module is captured."""
        if self._capture is None:
            return dict(self._restored or {})
        return {
            "module": self._capture.name,
            "projectors": {
                key: {"student": own, "teacher": theirs, "dtype": dtype, "state": self._projectors[key].state_dict()}
                for key, (own, theirs, dtype) in self._shapes.items()
            },
            "ema": self._teacher.state_dict() if isinstance(self._teacher, EMATeacher) else None,
            "last_step": self._last_step,
            "delay": self._delay,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit starts."""
        self._restored = state_dict

    # --- what others ask ----------------------------------------------------------------------------------------------

    def stage(self) -> float:
        """Return 1: there is nothing to wait for."""
        return 1.0

    def has_begun_in(self, checkpoint: Mapping[str, Any]) -> bool:
        """Return True: a student is no less compressed for having learnt less."""
        return True

    def summary(self) -> str:
        """Return one line that says who teaches, and how."""
        losses = [*(loss.name for loss in self._losses), *(f"{pair.loss} of {pair.student}" for pair in self.features)]
        text = f"{self._teacher or 'the teacher'} teaches by {', '.join(losses)}, temperature "
        text += f"{self.temperature}, weight {self.weight}"
        return text + (f"; {self._copied.describe()}" if self._copied is not None else "")

    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: no parameter is compressed by it."""
        return {}

    @property
    def skipped(self) -> Mapping[str, str]:
        """The parameters that `initialize` could not copy, and why."""
        return self._copied.left if self._copied is not None else {}

    def snapshot(self) -> dict[str, Any]:
        """Return what :meth:`rollback` needs."""
        return copy.deepcopy(self.state_dict())

    def rollback(self, state: Mapping[str, Any]) -> None:
        """Come back to a point that :meth:`snapshot` was taken at; schedules go on from where they stood then."""
        for key, saved in state["projectors"].items():
            self._projectors[key].load_state_dict(saved["state"])
        if state["ema"] is not None and isinstance(self._teacher, EMATeacher):
            self._teacher.load_state_dict(state["ema"])
        self._delay += self._now - (state["last_step"] - state["delay"])


def distilled_loss(module: LightningModule, loss: Tensor) -> Tensor:
    """Return a loss with the distillation in it, for manual optimization.

    To call in ``training_step``, after the forward pass and before ``manual_backward``. Of several forward passes those
    since the last backward pass count, or all where there are none. Without a
    :class:`KnowledgeDistillation` in the Trainer, or outside of training, the loss comes back as it is.

    Example::

        >>> distilled_loss(LightningModule(), torch.tensor(2.0))
        tensor(2.)
    """
    for technique in registry.techniques(module):
        if isinstance(technique, KnowledgeDistillation) and technique.is_training:
            loss = technique.add(module, loss)
    return loss


def _numbers(optimizer: Optimizer) -> dict[int, int]:
    """Return the number of each parameter in the optimizer's state, by the parameter's ``id``."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): number for number, parameter in enumerate(parameters)}


def _place_of(layer: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[int, int]:
    """Return the positions of the optimizer and the group that train a layer; the first ones where none do."""
    own = {id(parameter) for parameter in layer.parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in own for parameter in group["params"]):
                return i, j
    return 0, 0
