"""The callback that adds a sparsity penalty: when, and to which parameters. The penalties are in ``penalties.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from lightning_compress import registry
from lightning_compress.modules import Target, as_patterns, clean_name, refuse_if_no_match, select_parameters, shorten
from lightning_compress.moments import (
    Moment,
    MomentLike,
    ProgressFunction,
    Schedule,
    ScheduledLike,
    one_of,
    refuse_if_after,
    resolve_span,
    scheduled,
)
from lightning_compress.penalties import PENALTIES, groups
from lightning_compress.pruning.sharding import local
from lightning_compress.training import plain, refuse_sharding, run_length, steps_done


class SparsityRegularization(Callback):
    """Add a penalty on the weights to the loss, so that what the task does not need becomes small, or zero.

    Before each optimizer step from ``begin`` on and before ``end``, the gradient of strength·Ω is added to those that
    the optimizer is about to see: unscaled, accumulated, reduced over processes, not yet clipped. They become those of
    loss + strength·Ω, while ``training_step`` stays as it is. The penalties Ω:

    ========================  ==================================================================================
    ``l1``                    Σ|w|
    ``l2``                    Σw², without a ½; unlike ``weight_decay`` it passes through Adam's scaling
    ``group_lasso``           Σ √|g|·‖w_g‖₂ over output neurons and filters; of ``nn.MultiheadAttention``, over heads
    ``batchnorm_scale``       Σ|γ| of batch norms, whose channels can then be pruned (network slimming)
    ``hoyer``                 Σ (Σ|w|)² / Σw², a term for each parameter, which does not mind the scale (Hoyer-square)
    ``proximal_l1``           Σ|w|, by its proximal operator
    ``proximal_group_lasso``  Σ √|g|·‖w_g‖₂, by its proximal operator
    ========================  ==================================================================================

    Gradients make weights small, and let them hover around zero. The proximal operators make true zeros: right after
    each optimizer step, and whatever its gradients were, weights (groups) shrink by lr·strength, and stop at zero. The
    rate is that of the parameter's group, as for AdamW's weight decay, and all optimizers shrink alike.

    Args:
        penalty: One of those above.
        strength: The factor λ of the penalty, 0 or more: a number; a :class:`~lightning_compress.moments.Schedule`, a
            dict of its arguments such as ``{"first": 0.0, "last": 1e-4, "end": 0.5}``, or a function of progress in
            [0, 1]; or a dict of patterns on module names and one of these for each, of which the first that matches
            counts.
        begin: When it begins: an ``int`` is optimizer steps, a ``float`` a fraction of the run, ``"3ep"`` epochs.
        end: When it ends.
        include: Patterns on the names of modules; by default all linear, convolutional, attention and recurrent ones,
            or all batch norms for ``batchnorm_scale``. A name without wildcards is taken whatever its type is.
        exclude: Patterns on the names of modules to leave alone.

    Raises:
        ValueError: For a value out of its range, a pattern that matches nothing, or a sharded strategy that the penalty
            does not suit: at construction or in ``setup``.
        TypeError: If an argument is of a wrong type.

    Note:
        Shared parameters count once, frozen ones not at all; one that two optimizers hold goes with the first. Under
        manual optimization a step is a training batch for ``begin``, ``end`` and schedules, and the term is added at
        each ``optimizer.step()``, or in ``self.clip_gradients`` before it; ``torch.nn.utils.clip_grad_norm_`` comes too
        early to see it. Parameters may be sharded by ``ModelParallelStrategy`` with ``fully_shard`` (FSDP2) for
        penalties that are sums over single weights; other strategies that shard are refused.

    (Tibshirani 1996 for ``l1``; Yuan and Lin 2006 for ``group_lasso``; Liu et al. 2017, arXiv 1708.06519, for
    ``batchnorm_scale``; Yang et al. 2020, arXiv 1908.09979, for ``hoyer``; Parikh and Boyd 2014 for the proximal
    operators.)

    Example::

        >>> from lightning.pytorch import Trainer
        >>> slimming = SparsityRegularization("batchnorm_scale", strength=1e-4, end=0.5)
        >>> trainer = Trainer(callbacks=[slimming], logger=False)
    """

    technique = "regularization"

    def __init__(
        self,
        penalty: Literal[
            "l1", "l2", "group_lasso", "batchnorm_scale", "hoyer", "proximal_l1", "proximal_group_lasso"
        ] = "l1",
        strength: ScheduledLike | dict[str, ScheduledLike] = 1e-4,
        begin: MomentLike = 0,
        end: MomentLike = 1.0,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        self.penalty = one_of(penalty, PENALTIES, "penalty")
        self._penalty = PENALTIES[self.penalty]
        self.strength = _strengths(plain(strength))
        self.begin = Moment.parse(begin, "begin")
        self.end = Moment.parse(end, "end")
        refuse_if_after(self.begin, self.end)
        self.include = as_patterns(plain(include), "include")
        self.exclude = as_patterns(plain(exclude), "exclude")
        self._state_key = self._generate_state_key(
            penalty=self.penalty, include=self.include, exclude=self.exclude, strength=list(self._patterns or ())
        )
        self._forget()

    def _forget(self) -> None:
        self._targets: list[tuple[Target, str]] = []  # each with the pattern that sets its strength
        self._parameters: dict[int, _Penalized] = {}  # by the id of the parameter
        self._owners: dict[int, Optimizer] = {}
        self._span = (0, 0)
        self._strength_at: dict[str, Callable[[int], float]] = {}
        self._last_step: int | None = None
        self._delay = 0
        self._served: Optimizer | None = None  # whose gradients have the term, until it has stepped
        self._clipped: set[int] = set()  # the ids of those that have been served as their gradients were clipped
        self._depth = 0  # of an optimizer's `step`; one that calls its parent's runs the hooks twice
        self._handles: list[Any] = []

    @property
    def state_key(self) -> str:
        """Tell callbacks of different penalties or modules apart."""
        return self._state_key

    @property
    def _patterns(self) -> list[str] | None:
        return list(self.strength) if isinstance(self.strength, dict) else None

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parameters, and forget what another run left."""
        if stage != "fit":
            return
        self._release(pl_module)
        self._forget()
        refuse_sharding(trainer, self, but_dtensors=self._penalty.unit == "weight")
        if not is_overridden("configure_model", pl_module):
            self._select(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters of a model that ``configure_model`` has only just built, and who owns each of them."""
        if not self._targets:
            self._select(pl_module)
        for target, pattern in self._targets:
            self._parameters[id(target.parameter)] = _Penalized(target.parameter, target, pattern)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if self._penalty.shrink_ is not None and "lr" not in group:
                    raise ValueError(
                        f"`penalty='{self.penalty}'` shrinks by lr·strength, and {type(optimizer).__name__} has no "
                        f"`lr`. Take `penalty='{self.penalty.removeprefix('proximal_')}'`."
                    )
                for parameter in group["params"]:
                    self._owners.setdefault(id(parameter), optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the moments, and watch the optimizers."""
        run = run_length(trainer)
        self._span = resolve_span(self.begin, self.end, run)
        values = self.strength if isinstance(self.strength, dict) else {"": self.strength}
        self._strength_at = {pattern: value.resolve(run) for pattern, value in values.items()}
        if self._last_step is None:
            self._last_step = steps_done(trainer, pl_module)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if not pl_module.automatic_optimization and self._penalty.add_gradient_ is not None:
            self._watch_clipping(trainer, pl_module)
        rank_zero_info(f"SparsityRegularization: {self.summary()}.")
        idle = [
            f"'{one.target.name}'"
            for key, one in self._parameters.items()
            if key not in self._owners or not one.parameter.requires_grad
        ]
        if idle:
            rank_zero_info(f"SparsityRegularization: left alone, until an optimizer moves them, are {', '.join(idle)}.")
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if run.steps is not None and self._span[0] >= min(run.steps, self._span[1]) and not is_trial:
            rank_zero_warn(
                f"SparsityRegularization does nothing: from step {self._span[0]} to step {self._span[1]} is no step of "
                f"the run, which has {run.steps}. Give an earlier `begin`, as a fraction of the run for example."
            )

    def _select(self, pl_module: LightningModule) -> None:
        modules = {clean_name(name): child for name, child in pl_module.named_modules(remove_duplicate=False) if name}
        for pattern in self._patterns or ():
            refuse_if_no_match(pattern, modules, "strength")
        select = _scales if self.penalty == "batchnorm_scale" else select_parameters
        targets = select(pl_module, self.include or self._patterns, self.exclude)
        self._targets = [(target, _pattern_of(target, self._patterns)) for target in targets]
        _refuse_idle(self._patterns, [pattern for _, pattern in self._targets])
        registry.register(pl_module, self)

    # --- during training ----------------------------------------------------------------------------------------------

    @property
    def _clock(self) -> int:
        return (self._last_step or 0) - self._delay

    @property
    def _is_active(self) -> bool:
        return self._span[0] <= self._clock < self._span[1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move the clock on, and log the penalty."""
        # Under manual optimization the batch that begins is counted already.
        step = steps_done(trainer, pl_module) - (not pl_module.automatic_optimization)
        if registry.is_held(pl_module):  # the clock stands still
            self._delay += step - (self._last_step or 0)
        self._last_step = step
        self._served, self._depth = None, 0  # a step that was skipped, or broken off, does not tell
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._is_active and not trainer.barebones and every and (step + 1) % every == 0:
            self._log(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the term's gradient, before clipping and after everything else."""
        # A fused optimizer unscales for itself.
        is_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._add_once(optimizer, _scale(trainer) if is_scaled else 1.0)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        if self._penalty.add_gradient_ is None or self._depth > 1:
            return None
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            with_term = functools.partial(self._with_term, optimizer)
            return (args[0], *map(with_term, args[1:])), {name: with_term(value) for name, value in kwargs.items()}
        # An optimizer that manual optimization steps without Lightning's wrapper comes only here.
        if self._served is not optimizer:
            self._add_once(optimizer, float(getattr(optimizer, "grad_scale", None) or 1.0))
        return None

    def _with_term(self, optimizer: Optimizer, closure: Any) -> Any:
        """Return a closure after which the gradients have the term; for LBFGS, which compares losses, the loss too."""
        if not callable(closure):
            return closure

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)  # Lightning's own calls on_before_optimizer_step
            if self._served is not optimizer:
                self._add_once(optimizer, 1.0)
            self._served = None
            if self._is_active and isinstance(optimizer, LBFGS) and loss is not None:
                return loss + self._value()
            return loss

        return evaluate

    def _watch_clipping(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the module's own ``clip_gradients``, which manual optimization calls before the step, see the term."""
        clip = pl_module.clip_gradients

        @functools.wraps(clip)
        def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            if id(own) not in self._clipped:
                self._add(own, _scale(trainer))
                self._clipped.add(id(own))
            clip(optimizer, *args, **kwargs)

        clip_gradients.stays_behind = True  # type: ignore[attr-defined]  # where the module is copied
        vars(pl_module)["clip_gradients"] = clip_gradients

    def _add_once(self, optimizer: Optimizer, scale: float) -> None:
        if id(optimizer) in self._clipped:
            self._clipped.discard(id(optimizer))
        else:
            self._add(optimizer, scale)
        self._served = optimizer

    @torch.no_grad()
    def _add(self, optimizer: Optimizer, scale: float) -> None:
        add = self._penalty.add_gradient_
        if add is None:
            return
        for (strength, _), owned in self._owned(optimizer).items():
            gradients = [_dense_gradient(one.parameter) for one in owned]
            add(self._parts(owned, gradients), self._parts(owned), strength * scale)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._served = None
        shrink, was_skipped = self._penalty.shrink_, getattr(optimizer, "found_inf", None)  # of a fused optimizer
        if shrink is None or (was_skipped is not None and bool(was_skipped)):
            return
        for (strength, rate), owned in self._owned(optimizer).items():
            shrink(self._parts(owned), strength * rate)

    def _owned(self, optimizer: Optimizer) -> dict[tuple[float, float], list[_Penalized]]:
        """Return what an optimizer is to penalize, by strength and rate; nothing where nothing was backpropagated."""
        owned: dict[tuple[float, float], list[_Penalized]] = {}
        has_gradient = False
        strengths = {pattern: at(self._clock) for pattern, at in self._strength_at.items()} if self._is_active else {}
        for group in optimizer.param_groups if any(strengths.values()) else ():
            rate = float(group["lr"]) if self._penalty.shrink_ is not None else 0.0
            for parameter in group["params"]:
                has_gradient = has_gradient or parameter.grad is not None
                one = self._parameters.get(id(parameter))
                # Groups may be added while the model trains.
                if one is None or self._owners.setdefault(id(parameter), optimizer) is not optimizer:
                    continue
                if parameter.requires_grad and strengths[one.pattern]:
                    owned.setdefault((strengths[one.pattern], rate), []).append(one)
        return owned if has_gradient else {}

    def _parts(self, owned: Sequence[_Penalized], tensors: list[Tensor] | None = None) -> list[Tensor]:
        """Return what a penalty works on: parameters, or tensors of their shapes, split up into groups if need be."""
        tensors = [one.parameter for one in owned] if tensors is None else tensors
        if self._penalty.unit != "group":
            return [local(tensor) for tensor in tensors]
        return [
            part
            for one, tensor in zip(owned, tensors, strict=True)
            for part in groups(tensor, one.target.module, one.target.attribute)
        ]

    @torch.no_grad()
    def _value(self) -> Tensor:
        """Return strength·Ω as it stands, the sum over all that is penalized."""
        total: Tensor = torch.zeros(())
        for pattern, at in self._strength_at.items():
            strength = at(self._clock)
            owned = [one for one in self._parameters.values() if one.pattern == pattern]
            if strength:
                value = strength * _whole(self._penalty.value([one.parameter for one in owned]))
                total = value + total.to(value.device)
        return total

    def _log(self, pl_module: LightningModule) -> None:
        values = {"penalty": self._value()}
        if self._penalty.shrink_ is not None:
            parameters = [one.parameter.detach() for one in self._parameters.values()]
            zeros = sum(int(_whole((parameter == 0).sum())) for parameter in parameters)
            values["zeros"] = torch.tensor(zeros / sum(parameter.numel() for parameter in parameters))
        for name, value in values.items():
            name = f"compress/{name}{registry.suffix(pl_module, self)}"
            pl_module.log(name, value.float(), on_step=True, on_epoch=False, batch_size=1)

    # --- after training -----------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._owners = {}
        self._served = None
        if getattr(vars(pl_module).get("clip_gradients"), "stays_behind", False):
            del vars(pl_module)["clip_gradients"]
        registry.release(pl_module, self)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the clock stands."""
        return {"last_step": self._last_step, "delay": self._delay}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self._last_step, self._delay = state_dict["last_step"], state_dict["delay"]

    # --- what others may know (registry.Technique) --------------------------------------------------------------------

    def stage(self) -> float:
        """Return 1: a penalty has no target, and is never what is missing."""
        return 1.0

    def summary(self) -> str:
        """Return one line that says what is penalized, and how strongly."""
        names = list(dict.fromkeys(target.module_name for target, _ in self._targets))
        count = sum(target.parameter.numel() for target, _ in self._targets)
        values = self.strength if isinstance(self.strength, dict) else {"": self.strength}
        strength = ", ".join(f"{value} {pattern}".strip() for pattern, value in values.items())
        return (
            f"{self.penalty} on {count:,} weights of {len(names)} layers ({shorten(names)}), strength {strength}, "
            f"from step {self._span[0]} to step {self._span[1]}"
        )

    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: how sparse a parameter becomes is not decided here."""
        return {}

    def snapshot(self) -> dict[str, Any]:
        """Return where the clock stands."""
        return {"clock": self._clock}

    def rollback(self, state: Mapping[str, Any]) -> None:
        """Set the clock back to a snapshot."""
        self._delay = (self._last_step or 0) - state["clock"]


class _Penalized(NamedTuple):
    """A parameter, where it belongs, and the pattern that sets its strength."""

    parameter: nn.Parameter  # the one that the optimizer holds; under `fully_shard` the module shows others at times
    target: Target
    pattern: str


# --- which parameters -------------------------------------------------------------------------------------------------


def _scales(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[Target]:
    """Return the scales γ of batch norms, and of other norms that a pattern without wildcards names."""
    modules = {clean_name(name): child for name, child in module.named_modules(remove_duplicate=False) if name}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            refuse_if_no_match(pattern, modules, argument)
    taken: dict[int, Target] = {}
    fruitful = set()
    for name, child in modules.items():
        matching = [pattern for pattern in include or ("*",) if fnmatchcase(name, pattern)]
        scale = getattr(child, "weight", None)
        if not isinstance(scale, nn.Parameter) or not (isinstance(child, _BatchNorm) or name in matching):
            continue
        if any(fnmatchcase(name, pattern) for pattern in exclude or ()):
            continue
        if isinstance(scale, nn.parameter.UninitializedParameter):
            raise ValueError(f"'{name}.weight' is not initialized yet. Run one batch through the model before.")
        if matching and scale.dim() == 1:
            taken.setdefault(id(scale), Target(f"{name}.weight", name, child, "weight"))
            fruitful.update(matching)
    if include is None and exclude is None and not taken:
        raise ValueError(
            f"`penalty='batchnorm_scale'` finds no batch norm with a scale in {type(module).__name__}. Take "
            f"`penalty='group_lasso'`, or give the full name of a norm of another kind in `include`."
        )
    for pattern in include or ("*",):
        if pattern not in fruitful:
            raise ValueError(
                f"`penalty='batchnorm_scale'` finds no batch norm with a scale in {type(module).__name__} that "
                f"`include` pattern '{pattern}' and `exclude={exclude}` leave. A norm of another kind is taken where "
                f"`include` has its full name."
            )
    return list(taken.values())


def _pattern_of(target: Target, patterns: Sequence[str] | None) -> str:
    if patterns is None:
        return ""
    names = [target.module_name, *(alias.rpartition(".")[0] for alias in target.aliases)]
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            return pattern
    raise ValueError(
        f"`strength` has no pattern for '{target.module_name}', which `include` names. "
        f"Its patterns: {', '.join(patterns)}. Add one, '*' for all others."
    )


def _refuse_idle(patterns: Sequence[str] | None, governing: Sequence[str]) -> None:
    for pattern in patterns or ():
        if pattern not in governing:
            raise ValueError(
                f"`strength` pattern '{pattern}' governs nothing: what it matches is left out by `include` or "
                f"`exclude`, cannot be penalized, or belongs to a pattern before it."
            )


# --- small things -----------------------------------------------------------------------------------------------------


def _strengths(value: Any) -> Schedule | ProgressFunction | dict[str, Schedule | ProgressFunction]:
    if not isinstance(value, Mapping) or {"first", "last"} & value.keys():
        return scheduled(value, "strength", 0.0)
    if not value:
        raise ValueError("`strength` as a dict must name at least one pattern, got {}.")
    return {str(pattern): scheduled(one, f"strength['{pattern}']", 0.0) for pattern, one in value.items()}


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    """Return a gradient that a term can be added to: zeros where there was none, as loss + term would have one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout is not torch.strided:  # of an embedding: of the rows that were looked up
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _scale(trainer: Trainer) -> float:
    """Return what gradients are multiplied by until they are unscaled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _whole(value: Tensor) -> Tensor:
    """Return a sum over all processes that hold parts of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
