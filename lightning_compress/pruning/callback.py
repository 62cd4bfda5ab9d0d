"""The pruning callback: when weights are pruned."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_compress import registry
from lightning_compress.example_inputs import ExampleInputs, InputCapture, is_compiled, reset_compiled
from lightning_compress.modules import Target, as_patterns, clean_name, refuse_if_no_match, select_parameters, shorten
from lightning_compress.moments import (
    Moment,
    MomentLike,
    Ramp,
    number,
    one_of,
    progress,
    ramp,
    refuse_if_after,
    resolve_span,
)
from lightning_compress.pruning import sharding
from lightning_compress.pruning.activations import InputNorms
from lightning_compress.pruning.allocation import SCOPES
from lightning_compress.pruning.coupling import ChannelGroup
from lightning_compress.pruning.granularity import Field, Granularity, element_fields
from lightning_compress.pruning.importance import CRITERIA, Criterion
from lightning_compress.pruning.pruner import Group, Pruner
from lightning_compress.pruning.structure import (
    find_groups,
    groups_from_state,
    groups_to_state,
    make_fields,
    smaller_copy,
)
from lightning_compress.pruning.target import CEILING, MEASURES, Removal, Search, even_in_log, fewest_units
from lightning_compress.training import (
    callbacks,
    plain,
    publish_compressed_metrics,
    refuse_sharding,
    run_length,
    steps_done,
    warn_if_best_is_uncompressed,
)

CriterionName = Literal["magnitude", "gradient", "gradient_weight", "activation_weight", "movement", "random"]


class GradualPruning(Callback):
    """Prune a model while it trains, a little every few steps, to exactly the sparsity that is asked for.

    At ``begin``, every ``every`` steps and at ``end``, at the end of the training batch, the lowest-scoring weights
    become zero, until ``final_sparsity`` of them are. Forward and backward see zeros from then on, and every checkpoint
    holds them: the parameters keep their names, each is as sparse as ``compress/sparsity`` says, and loads into the
    plain model. Until ``end`` a pruned weight may come back (``regrowth``); afterwards its gradient is cleared before
    each optimizer step and the weight set to zero right after it.

    With S₀ and S₁ the first and last sparsity, t the progress from ``begin`` to ``end`` in [0, 1] and f the
    ``schedule``, the sparsity is S(t) = S₀ + (S₁ − S₀)·f(t). The zeros of a model that is already sparse are kept, and
    S₀ is then at least what it brings.

    Args:
        final_sparsity: The share of the weights (blocks, channels, heads) that are zero at the end, in (0, 1); or a
            dict of patterns on module names and their sparsity, ``{"backbone.*": 0.9, "head": 0.5}``, of which the
            first that matches counts. N:M sets its own sparsity, 1 − N/M: leave it out there. ``"auto"`` raises it as
            far as an :class:`~lightning_compress.AccuracyGuard` that holds or rolls back lets it: see the note.
        initial_sparsity: The sparsity at ``begin``, in [0, 1).
        criterion: How a weight is scored, the lowest go first: ``"magnitude"`` |w|, ``"gradient"`` Σ|∂L/∂w|,
            ``"gradient_weight"`` Σ|w·∂L/∂w| (Taylor), ``"activation_weight"`` |w|·‖x‖ with the norm of the weight's
            input, ``"movement"`` −Σ w·∂L/∂w over the whole run, ``"random"``, or a
            :class:`~lightning_compress.pruning.importance.Criterion`. Sums run over the optimizer steps, norms over the
            training batches, since the last update. A parameter without a gradient has no score and is left alone.
        granularity: What is pruned: ``"weight"`` single weights; N:M such as ``"2:4"``, N of each M consecutive inputs
            are kept; ``"block:RxC"`` blocks of R outputs by C inputs; ``"channel"`` output neurons and filters with all
            that depends on them; ``"head"`` attention heads. Scores are summed over what goes together. Channels and
            heads are cut out of a copy, :attr:`pruned_module`, at the end of the fit. What a layer cannot carry is
            named at the start.
        scope: How the sparsity is spread: ``"global"`` compares all scores with each other, ``"layer"`` gives every
            layer the same sparsity, ``"erk"`` keeps small layers denser (Erdős–Rényi-kernel). No layer is emptied.
        schedule: The way from the first sparsity to the last: ``"cubic"``, ``"linear"``, ``"cosine"``,
            ``"exponential"``, ``"one_shot"`` (all of it at ``begin``), or a function of progress in [0, 1].
        begin: When pruning begins: an ``int`` is optimizer steps, a ``float`` a fraction of the run, ``"3ep"`` epochs.
        end: When the final sparsity is reached, and the masks are frozen.
        every: How long from one update of the masks to the next.
        regrowth: Which pruned weights come back before ``end``. ``"feedback"``: each optimizer step also moves a copy
            of the pruned weights by their gradients, and each update ranks all of them afresh; for weights, N:M and
            blocks, and any criterion but ``"random"``. A share in [0, 1): at each update, this share of the kept (or of
            the pruned, if they are fewer) single weights is swapped for the pruned ones with the largest gradient,
            fading to 0 (RigL); 0.0 lets none come back. ``None`` is ``"feedback"`` for single weights by magnitude, and
            0.0 for all else and beside ``final_sparsity="auto"``.
        include: Patterns on the names of the modules to prune; by default all linear, convolutional, attention and
            recurrent ones. A name without wildcards is taken whatever its type is.
        exclude: Patterns on the names of modules to leave alone.
        parameters: Which of a module's parameters: ``("weight",)``, or ``("weight", "bias")`` for biases too. Channels
            and heads take along all that belongs to them.
        target_size: Instead of ``final_sparsity``, for channels and heads: how large the model from which they are cut
            out is, in bytes of the tensors in its ``state_dict``, as a share of the dense one, in (0, 1).
        target_macs: The same for the multiply-adds of a forward in linear and convolutional layers and attention.
        target_latency: The same for the median time of a forward at batch 1, on the device of training. Both models
            are timed in turns; a busy machine may move it by some hundredths.

    Raises:
        ValueError: For a value out of its range, a pattern that matches nothing, a parameter that another pruning
            callback claims, a sparsity that would empty a layer, a target that is out of reach, or ``"auto"`` without
            a guard: at construction or before the first step. During training, for a weight that is NaN, with its name.

    Note:
        With ``"auto"`` the density falls from ``begin`` on by equal factors in equal times, at first such that it would
        be 0.001 at ``end`` (or one unit a layer). After each hold or rollback the ramp goes on half as fast; after
        a quarter of its time without one, twice as fast again. At ``end`` the search is over: the masks are frozen,
        unless the guard rolls back to fewer zeros.

        With a target, the number of units is found by bisection on a copy of the model, at the first update, in each
        quarter of the ramp and at the last one, each time with the scores at hand.

        Under manual optimization, a step is a training batch. Parameters may be sharded by ``ModelParallelStrategy``
        with ``fully_shard`` (FSDP2) or, but for channels and heads, by ``FSDPStrategy(use_orig_params=True)``;
        DeepSpeed is refused. Channels and heads need the whole model in every process, once at the start and once at
        the end, and whenever the number of units for a target is found. With weight averaging (``WeightAveraging``,
        ``StochasticWeightAveraging``) the averaged weights are pruned alike.

    Prune early and often, and leave half of the run to recover: that is what the defaults do. (Zhu and Gupta 2017,
    arXiv 1710.01878; Evci et al. 2020, arXiv 1911.11134, for ``erk``; Lin et al. 2020, arXiv 2006.07253, for
    ``"feedback"``.)

    Example::

        >>> from lightning.pytorch import Trainer
        >>> pruning = GradualPruning(final_sparsity=0.9, begin="1ep", end=0.5, exclude=["head"])
        >>> trainer = Trainer(callbacks=[pruning], logger=False)
    """

    technique = "pruning"

    def __init__(
        self,
        final_sparsity: float | dict[str, float] | Literal["auto"] = 0.9,
        initial_sparsity: float = 0.0,
        criterion: CriterionName | Criterion = "magnitude",
        granularity: str = "weight",
        scope: Literal["global", "layer", "erk"] = "global",
        schedule: str | Ramp = "cubic",
        begin: MomentLike = 0.05,
        end: MomentLike = 0.5,
        every: MomentLike = 0.005,
        regrowth: float | Literal["feedback"] | None = None,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        parameters: Sequence[str] = ("weight",),
        target_size: float | None = None,
        target_macs: float | None = None,
        target_latency: float | None = None,
    ) -> None:
        super().__init__()
        self.granularity = granularity
        self._granularity = Granularity.parse(granularity)
        self.final_sparsity = _sparsities(_of_pattern(self._granularity, plain(final_sparsity)))
        self.target_size, self.target_macs, self.target_latency = target_size, target_macs, target_latency
        self._target = _target({"size": target_size, "macs": target_macs, "latency": target_latency})
        if self._target is not None:
            _refuse_target_of(self._granularity, granularity, final_sparsity, self._target[0])
        self.initial_sparsity = number(initial_sparsity, "initial_sparsity", 0.0, 1.0)
        final = self.final_sparsity
        self._asked = None if self._target is not None or final == "auto" else final  # None: it is found in the run
        lowest = min(self._asked.values()) if isinstance(self._asked, dict) else self._asked or CEILING
        if self.initial_sparsity > lowest:
            raise ValueError(
                f"`initial_sparsity={initial_sparsity}` must not be above `final_sparsity`, which is {lowest}: "
                f"pruned weights are not revived."
            )
        allowed = {**CRITERIA, "or a Criterion": None}
        self.criterion = criterion if isinstance(criterion, Criterion) else one_of(criterion, allowed, "criterion")
        self._criterion = criterion if isinstance(criterion, Criterion) else CRITERIA[criterion]
        self.scope = one_of(scope, SCOPES, "scope")
        if self.scope == "erk" and self._granularity.kind == "pattern":
            raise ValueError(f"`scope='erk'` spreads a sparsity that `granularity={granularity!r}` has set already.")
        if regrowth is None:
            # re-ranking moves the metric, which is all that a search has to go by
            learns = (granularity, criterion) == ("weight", "magnitude") and self.final_sparsity != "auto"
            regrowth = "feedback" if learns else 0.0
        self.regrowth = regrowth if regrowth == "feedback" else _share_that_returns(regrowth)
        if self.regrowth == "feedback" and (self._granularity.is_structured or criterion == "random"):
            odd = f"granularity={granularity!r}" if self._granularity.is_structured else "criterion='random'"
            raise ValueError(
                f"`regrowth='feedback'` ranks what pruned weights have learnt: it does not suit `{odd}`. "
                f"Set `regrowth=0.0`."
            )
        if isinstance(self.regrowth, float) and self.regrowth and self._granularity.kind != "weight":
            raise ValueError(
                f"`regrowth={regrowth!r}` brings single weights back: it does not suit `granularity={granularity!r}`."
            )
        self.schedule = schedule
        self.begin = Moment.parse(begin, "begin")
        self.end = Moment.parse(end, "end")
        self.every = Moment.parse(every, "every")
        if self.every.value == 0:
            raise ValueError(f"`every` must be more than 0, got {every!r}: updates need steps between them.")
        refuse_if_after(self.begin, self.end)
        self.include = as_patterns(plain(include), "include")
        self.exclude = as_patterns(plain(exclude), "exclude")
        self.parameters = as_patterns(plain(parameters), "parameters") or ("weight",)
        if self._granularity.is_structured and self.parameters != ("weight",):
            raise ValueError(
                f"`parameters={parameters!r}` names single parameters; `granularity={granularity!r}` takes all that "
                f"belong to a {granularity}, biases and norms included: leave it out."
            )
        self._ramp = ramp(schedule)
        if self.final_sparsity == "auto" and schedule != "cubic":
            raise ValueError(
                f"`final_sparsity='auto'` lets the density fall by equal factors in equal times: leave `schedule` out, "
                f"got {schedule!r}."
            )
        # Lightning asks for it at every hook.
        self._state_key = self._generate_state_key(
            include=self.include,
            exclude=self.exclude,
            parameters=self.parameters,
            final_sparsity=list(self.final_sparsity) if isinstance(self.final_sparsity, dict) else None,
            granularity=self.granularity,
        )
        self._forget()

    def _forget(self) -> None:
        self._pruner: Pruner | None = None
        self._norms: InputNorms | None = None
        self._skipped: dict[str, str] = {}
        self._upcoming = 0
        self._regrown: tuple[int, list[int]] = (-1, [])  # a step, and the optimizers that have swapped weights in it
        self._is_training: Callable[[], bool] = lambda: False
        self._is_held: Callable[[], bool] = lambda: False
        self._sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self._broadcast: Callable[[Any], Any] = lambda value: value
        self._search = Search() if self.final_sparsity == "auto" else None
        self._aim: tuple[int, float] | None = None  # how many units are to go, and what they leave of what is measured
        self._restored: dict[str, Any] | None = None
        self._last_update: int | None = None
        self._last_step = 0
        self._delay = 0
        self._span = (0, 0, 1)
        self._has_cleared = False
        self._averaged: list[list[nn.Parameter]] = []
        self._steps: int | None = None
        self._is_trial = False
        self._has_started = False
        self._has_finished = False
        self._capture: InputCapture | None = None
        self._structure: list[ChannelGroup] | None = None
        self._called = ""
        self._inputs = ExampleInputs()
        self.pruned_module: nn.Module | None = None
        self._handles: list[Any] = []
        self._optimizers: list[Optimizer] = []

    @property
    def state_key(self) -> str:
        """Tell callbacks on disjoint modules apart, by the patterns that they were given."""
        return self._state_key

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parameters, and forget what another run left."""
        if stage != "fit":
            return
        self._release(pl_module)
        self._forget()
        refuse_sharding(trainer, self, but_dtensors=True, but_flat=not self._granularity.is_structured)
        if not self._granularity.is_structured and not is_overridden("configure_model", pl_module):
            self._select(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters of a model that ``configure_model`` has only just built, and its channels or heads."""
        if self._search is not None and not registry.can_hold(pl_module):
            raise ValueError(
                "`final_sparsity='auto'` needs a guard that holds the ramp: add AccuracyGuard(..., action='rollback') "
                "or 'hold' to the callbacks, or give a number."
            )
        if self._granularity.is_structured:
            if pl_module.example_input_array is not None:
                inputs = ExampleInputs.from_example(pl_module.example_input_array)
                self._find_structure(trainer, pl_module, "", inputs)
            elif any(map(is_compiled, pl_module.modules())):
                raise ValueError(
                    f"`granularity='{self.granularity}'` needs to know what the model receives, which compiled code "
                    f"does not tell. Set `example_input_array` in {type(pl_module).__name__}."
                )
            else:
                self._capture = InputCapture(pl_module)
        elif self._pruner is None:
            self._select(trainer, pl_module)
        self._attach_if_compiled(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the moments, make or restore the masks, and watch the optimizers."""
        self._is_training = lambda: trainer.training
        self._is_held = lambda: registry.is_held(pl_module)
        if trainer.world_size > 1:
            self._sum_over_ranks = lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")
        self._broadcast = trainer.strategy.broadcast
        sharding.reshard(pl_module)
        run = run_length(trainer)
        begin, end = resolve_span(self.begin, self.end, run)
        self._span = (begin, end, max(self.every.resolve(run, "every"), 1))
        self._steps = run.steps
        self._is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._search is not None and begin == end and not self._is_trial:
            raise ValueError(
                f"`final_sparsity='auto'` searches from `begin={self.begin}` to `end={self.end}`, which are both step "
                f"{begin}: give a later `end`."
            )
        self._optimizers = list(trainer.optimizers)
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if self._restored is not None and "structure" in self._restored:
            self._drop_capture()
            structure = self._restored["structure"]
            self._called, self._skipped = structure["called"], structure["skipped"]
            self._inputs = ExampleInputs(tuple(structure["args"]), dict(structure["kwargs"]))
            self._set_structure(pl_module, groups_from_state(structure["groups"]))
        elif self._capture is not None:
            self._take_captured(trainer, pl_module, is_last_chance=False)
        if self._pruner is not None:
            self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = self._running
        pruner.root = trainer.strategy.model
        if self._restored is not None:
            pruner.load_state_dict(self._restored["pruner"])
            self._last_update = self._restored["last_update"]
            self._last_step, self._delay = self._restored["last_step"], self._restored["delay"]
            self._regrown = (self._restored["regrown"][0], list(self._restored["regrown"][1]))
            if self._search is not None and self._restored["search"] is not None:
                self._search = Search(**self._restored["search"])
            self._set_aim(self._restored["aim"])
        else:
            pruner.start()
            self._refuse_what_is_out_of_reach(pl_module)
        self._has_started = True
        self._averaged = list(_averaged_parameters(trainer, pruner.targets))
        self._enforce_everywhere()
        self._announce(self._steps)
        warn_if_best_is_uncompressed(trainer)
        self._move(pl_module, steps_done(trainer, pl_module))

    # --- which parameters ---------------------------------------------------------------------------------------------

    def _select(self, trainer: Trainer, pl_module: LightningModule) -> None:
        patterns = list(self.final_sparsity) if isinstance(self.final_sparsity, dict) else None
        _refuse_patterns(pl_module, patterns)
        with sharding.whole_shapes(trainer.strategy.model):
            targets = select_parameters(pl_module, self.include or patterns, self.exclude, self.parameters)
            fields, self._skipped = element_fields(self._granularity, targets)
        if not fields:
            raise ValueError(f"`granularity={self.granularity!r}` fits no layer: {_reasons(self._skipped)}.")
        targets = [target for target in targets if target.name not in self._skipped]
        for i, field in enumerate(fields):
            field.members[:] = [i]
        self._make_pruner(pl_module, targets, fields)

    def _take_captured(self, trainer: Trainer, pl_module: LightningModule, *, is_last_chance: bool) -> None:
        """Find channels or heads from what the model has just been seen to receive."""
        assert self._capture is not None
        try:
            called, inputs = self._capture.result()
        except ValueError as error:
            if is_last_chance:
                raise ValueError(
                    f"`granularity='{self.granularity}'` needs to know what the model receives, but {error}. "
                    f"Set `example_input_array` in {type(pl_module).__name__}."
                ) from None
            return
        self._drop_capture()
        self._find_structure(trainer, pl_module, called, inputs)

    def _drop_capture(self) -> None:
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    def _find_structure(self, trainer: Trainer, pl_module: LightningModule, called: str, inputs: ExampleInputs) -> None:
        patterns = list(self.final_sparsity) if isinstance(self.final_sparsity, dict) else None
        # Ranks see other data: one of them decides.
        inputs = trainer.strategy.broadcast(inputs.to("cpu"))
        _refuse_patterns(pl_module, patterns)
        groups, self._skipped = trainer.strategy.broadcast(
            find_groups(pl_module, called, inputs, self.include or patterns, self.exclude, self.granularity)
        )
        if not groups:
            rank_zero_warn(
                f"GradualPruning: nothing is pruned, since no {self.granularity} of {type(pl_module).__name__} is the "
                f"model's own affair: {_reasons(self._skipped)}."
            )
            return
        self._called, self._inputs = called, inputs
        self._set_structure(pl_module, groups)

    def _set_structure(self, pl_module: LightningModule, groups: list[ChannelGroup]) -> None:
        self._structure = groups
        self._make_pruner(pl_module, *make_fields(pl_module, groups))

    def _make_pruner(self, pl_module: LightningModule, targets: list[Target], fields: list[Field]) -> None:
        self._pruner = Pruner(
            targets,
            fields,
            _groups(self.initial_sparsity if self._asked is None else self._asked, targets, fields),
            self._criterion,
            self.scope,
            self.initial_sparsity,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            feedback=self.regrowth == "feedback",
        )
        if self._asked is None:
            self._pruner.aim(CEILING if self._search is not None else 1.0)
        if self._criterion.signal == "activation":
            scored = {i for field in fields for i in field.scored}
            self._norms = InputNorms({i: targets[i] for i in scored}, lambda: self._is_training())
        registry.register(pl_module, self, [(target.name, target.parameter) for target in targets])

    def _attach_if_compiled(self, pl_module: LightningModule) -> None:
        if self._norms is not None and reset_compiled(pl_module):
            self._norms.attach()

    def _announce(self, steps: int | None) -> None:
        pruner, (begin, end, every) = self._running, self._span
        names = list(dict.fromkeys(pruner.targets[field.scored[0]].module_name for field in pruner.fields))
        start = f" from {pruner.sparsity:.4g}" if pruner.sparsity else ""
        rank_zero_info(
            f"GradualPruning: {pruner.total:,} {self._units()} of {len(names)} layers ({shorten(names)}){start} to "
            f"{self._spell_aim()} ({self._spell_criterion()}, {self.granularity}, {self.scope}), "
            f"from step {begin} to step {end}, every {every}."
        )
        if self._skipped:
            rank_zero_info(f"GradualPruning: not pruned are {_reasons(self._skipped)}.")
        if pruner.surplus > len(names):
            rank_zero_warn(
                f"GradualPruning: the model is already sparser than `final_sparsity={self.final_sparsity}`; "
                f"{pruner.surplus:,} of its zeros are free to grow again."
            )
        if steps is not None and end > steps and not self._is_trial:
            rank_zero_warn(
                f"GradualPruning: `end={self.end}` is step {end}, but the run ends after {steps} steps: too short to "
                f"reach the final sparsity. Give an earlier `end`, as a fraction of the run for example."
            )

    # --- during training ----------------------------------------------------------------------------------------------

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Find channels or heads, where the first training batch has to tell what the model receives."""
        if self._capture is not None and trainer.training:
            self._take_captured(trainer, pl_module, is_last_chance=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the layers' inputs while a criterion needs them."""
        # Under manual optimization the batch that begins is counted already.
        self._upcoming = steps_done(trainer, pl_module) - self._delay + pl_module.automatic_optimization
        if self._norms is not None:
            if self._is_watching():
                self._norms.attach()
            elif self._norms.is_attached and not any(map(is_compiled, pl_module.modules())):
                self._norms.detach()

    def _is_watching(self) -> bool:
        """Whether what happens in this step tells an update still to come."""
        begin, _, every = self._span
        return not self._is_over and (self._criterion.is_lasting or self._upcoming > begin - every)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients, and clear those of pruned weights before clipping sees them and momentum gathers them.

        Gradients of weights that may come back by feedback stay.
        """
        if not self._has_started:
            if self._pruner is None:
                return
            self._start(trainer, pl_module)  # the first training batch has told what the model receives
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._read_gradients(optimizer, is_scaled=scaler is not None)
        self._has_cleared = True

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._has_started:
            return None
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            masked = {name: self._on_masked_weights(value, optimizer) for name, value in kwargs.items()}
            return (args[0], *(self._on_masked_weights(value, optimizer) for value in args[1:])), masked
        self._hand_over(optimizer)
        return None

    def _on_masked_weights(self, closure: Any, optimizer: Optimizer) -> Any:
        """Return a closure that sees pruned weights as zeros, however often it is evaluated in a step."""
        if not callable(closure):
            return closure
        is_moved = False

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_moved
            if is_moved:
                self._running.enforce(but=self._of_others(optimizer))
            is_moved = True
            loss = closure(*args, **kwargs)
            self._hand_over(optimizer)
            return loss

        return evaluate

    def _hand_over(self, optimizer: Optimizer) -> None:
        """Let the optimizer move the weights: their gradients are ready."""
        # One that manual optimization steps without Lightning's wrapper has not come to on_before_optimizer_step.
        if not self._has_cleared:
            self._read_gradients(optimizer, is_scaled=False)
        # While a guard holds the ramp they rest: what they learn now would come back all at once, and be held again.
        if not self._is_held():
            self._running.put_back(self._of_others(optimizer))

    def _of_others(self, optimizer: Optimizer) -> set[int]:
        """Return the ids of other optimizers' parameters: these may be in a graph whose backward is still to come."""
        others = [_owned(other) for other in self._optimizers if other is not optimizer]
        return set().union(*others).difference(_owned(optimizer)) if others else set()

    def _read_gradients(self, optimizer: Optimizer, *, is_scaled: bool) -> None:
        pruner, (begin, end, every) = self._running, self._span
        share = self.regrowth if isinstance(self.regrowth, float) else 0.0
        is_due = begin < self._upcoming < end and (self._upcoming - begin) % every == 0
        regrows = share > 0 and is_due and not self._is_over
        gathers = self._criterion.signal == "gradient" and self._is_watching()
        if regrows or gathers:
            owned = _owned(optimizer)
            # A step that loss scaling is about to skip is no step.
            if not is_scaled or pruner.agree(all(_is_finite(p.grad) for p in owned.values())):
                if gathers:
                    pruner.gather_gradients(owned)
                if regrows and not self._is_held():
                    self._regrow(optimizer, owned, share * (1.0 - progress(self._upcoming, begin, end)))
        pruner.clear_gradients(are_learning=not self._is_held())

    def _regrow(self, optimizer: Optimizer, owned: Collection[int], share: float) -> None:
        step, done = self._regrown
        place = self._optimizers.index(optimizer) if optimizer in self._optimizers else -1
        done = done if step == self._upcoming else []
        if place in done:
            return
        self._regrown = (self._upcoming, [*done, place])
        self._take_norms()
        self._running.regrow(share, owned)
        self._enforce_averages()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._has_cleared = False
        if self._has_started:
            self._running.enforce(but=self._of_others(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the masks on where an update is due."""
        if self._capture is not None:
            self._take_captured(trainer, pl_module, is_last_chance=True)
        if self._pruner is None:
            return
        if not self._has_started:
            self._start(trainer, pl_module)
            return
        self._take_norms()
        if self._move(pl_module, steps_done(trainer, pl_module)):
            self._log(trainer, pl_module, on_step=True, on_epoch=False)

    def _take_norms(self) -> None:
        if self._norms is not None and self._norms.is_attached:
            # Every rank adds the same numbers at every step, so a resumed run does too.
            squares = self._norms.take()
            self._running.add_squares({i: self._sum_over_ranks(squares[i]) for i in sorted(squares)})

    def _move(self, pl_module: LightningModule, step: int) -> bool:
        # While the ramp is held, its clock stands still.
        before, is_held = self._last_step - self._delay, registry.is_held(pl_module)
        if is_held:
            self._delay += step - self._last_step
        self._last_step = step
        if self._search is not None:
            begin, end, _ = self._span
            self._search.advance(progress(step - self._delay, begin, end) - progress(before, begin, end), is_held)
            if self._is_over:
                self._running.settle()
        return self._update_if_due(pl_module, step - self._delay)

    @property
    def _is_over(self) -> bool:
        """Whether the masks are frozen; a search ends when its time is over, held or not."""
        end = self._span[1]
        if self._search is not None:
            return self._last_step >= end
        return self._last_update is not None and self._last_update >= end

    def _update_if_due(self, pl_module: LightningModule, step: int) -> bool:
        begin, end, every = self._span
        last = self._last_update
        if step < begin or self._is_over:
            return False
        is_due = last is None or step >= end or (step - begin) // every > (last - begin) // every
        if not is_due:
            return False
        try:
            if self._target is not None and not self._has_aim(pl_module, step):
                return False
            if self._search is not None:
                done = even_in_log(self._search.position, self._running.ratio)
            else:
                done = _share(self._ramp, progress(step, begin, end))
            is_complete = self._running.update(done)
        except ValueError:
            if not registry.can_roll_back(pl_module):  # a guard will bring back weights that are not NaN
                raise
            return False
        # Where the last update lacked a signal (a step that was skipped, say) it is made up for at the next step.
        self._last_update = step if is_complete or step < end else last
        if step >= end and is_complete:
            self._running.settle()
        self._enforce_everywhere()
        return True

    # --- the target -------------------------------------------------------------------------------------------------

    def _has_aim(self, pl_module: LightningModule, step: int) -> bool:
        """Find anew how many units are to go, where that is due; return whether it is known."""
        begin, end, _ = self._span
        at, last_at = (int(4 * progress(x, begin, end)) for x in (step, self._last_update or 0))
        if self._aim is None or at > last_at:
            removal = self._removal(pl_module)
            aim = fewest_units(self._running, lambda kept: self._share_left(pl_module, removal, kept), self._goal)
            self._set_aim(aim or self._aim)
        return self._aim is not None

    def _set_aim(self, aim: Sequence[Any] | None) -> None:
        if self._target is not None:
            self._aim = None if aim is None else (aim[0], aim[1])
            self._running.aim(1.0 if self._aim is None else self._aim[0] / self._running.total)

    def _refuse_what_is_out_of_reach(self, pl_module: LightningModule) -> None:
        if self._target is None:
            return
        least = [torch.arange(field.size) < 1 for field in self._running.fields]
        share = self._share_left(pl_module, self._removal(pl_module), least)
        if share > self._goal:
            raise ValueError(
                f"`target_{self._target[0]}={self._goal}` is out of reach: with one {self.granularity} left in each of "
                f"{len(least)} groups, the model still has {share:.4g} of its {MEASURES[self._target[0]]}. Give a "
                f"larger share, or let more layers be pruned."
            )

    def _removal(self, pl_module: LightningModule) -> Removal:
        assert self._target is not None
        assert self._structure is not None
        sharding.reshard(pl_module)
        return Removal(pl_module, self._called, self._inputs, self._structure, self._target[0])

    def _share_left(self, pl_module: LightningModule, removal: Removal, kept: Sequence[Tensor]) -> float:
        # Ranks would time differently: one of them decides.
        return float(self._broadcast(removal.share(kept) if pl_module.global_rank == 0 else 0.0))

    @property
    def _goal(self) -> float:
        assert self._target is not None
        return self._target[1]

    def _enforce_everywhere(self) -> None:
        self._running.enforce()
        self._enforce_averages()

    def _enforce_averages(self) -> None:
        # An average of weights is zero where all of them are: averaged copies need the masks only when these change.
        for parameters in self._averaged:
            if self.regrowth == "feedback":
                self._running.fill(parameters)
            self._running.enforce(parameters)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity."""
        if self._has_started:
            self._log(trainer, pl_module, on_step=False, on_epoch=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity of what is validated, for ``ModelCheckpoint`` and ``EarlyStopping`` to see."""
        if self._handles and self._has_started:
            self._log(trainer, pl_module, on_step=False, on_epoch=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``ModelCheckpoint`` the metrics of fully compressed epochs, as ``compress/<name>``."""
        if self._handles:
            publish_compressed_metrics(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool, on_epoch: bool) -> None:
        if trainer.barebones:
            return
        value = torch.tensor(self._running.sparsity, dtype=torch.float64)
        pl_module.log(
            f"compress/sparsity{registry.suffix(pl_module, self)}",
            value.float(),
            prog_bar=True,
            on_step=on_step,
            on_epoch=on_epoch,
            batch_size=1,
            reduce_fx="max",
            sync_dist=on_epoch and trainer.world_size > 1,
        )

    # --- after training -----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where the final sparsity was not reached."""
        if not self._has_started:
            return
        self._running.enforce()
        if self._running.is_sharded:
            self.finish(pl_module)  # now, while all processes are here: it gathers the weights
        if unknown := sorted(self._running.without_signal):
            say = rank_zero_warn if self.stage() < 1.0 else rank_zero_info
            say(
                f"GradualPruning: nothing was learnt about {', '.join(map(repr, unknown))} in some updates "
                f"(no gradient, or not called): without a score they were left alone. The sparsity is "
                f"{self._running.sparsity:.4g} on the way to {self._spell_aim()}."
            )
        elif self.stage() < 1.0 and not self._is_trial:
            rank_zero_warn(
                f"GradualPruning: the run stopped before `end={self.end}` (step {self._span[1]}): the sparsity is "
                f"{self._running.sparsity:.4g}, on the way to {self._spell_aim()}."
            )
        if self._running.rescued:
            rescued = ", ".join(sorted(self._running.rescued))
            rank_zero_info(
                f"GradualPruning: `scope='{self.scope}'` would have emptied {rescued}: the best weight stays. "
                f"`scope='erk'` or 'layer' spreads the sparsity more evenly."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the smaller module, where channels or heads were pruned, and say what has been found."""
        self.finish(pl_module)
        if self._asked is None and self._has_started:  # after a guard's last word, in on_train_end
            rank_zero_info(f"GradualPruning: {self.summary()}.")

    def finish(self, pl_module: nn.Module) -> None:
        """Make :attr:`pruned_module`: a copy without the pruned channels or heads, checked against the masked model."""
        if self._structure is None or not self._has_started or self._has_finished:
            return
        if self._running.sparsity == 0.0:
            return
        self._has_finished = True
        sharding.reshard(pl_module)
        try:
            self.pruned_module = smaller_copy(pl_module, self._called, self._inputs, self._structure)
        except ValueError as error:
            rank_zero_warn(f"GradualPruning: the pruned {self.granularity}s were not cut out: {error}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind, and no weights that only the optimizer should have seen."""
        if self._pruner is not None and self._pruner.is_dense:
            self._pruner.enforce()
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hooks behind; the zeros stay."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizers = []
        if self._norms is not None:
            self._norms.detach()
        self._drop_capture()
        if self._pruner is not None:
            self._pruner.root = None
        self._averaged = []
        self._is_training = self._is_held = lambda: False
        self._sum_over_ranks = lambda tensor: tensor
        self._broadcast = lambda value: value
        registry.release(pl_module, self)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the masks (packed) and the step of the last update."""
        if self._pruner is None or not self._pruner.masks:
            return self._restored or {}
        self._take_norms()  # a callback before us in the list may save what this batch has told
        state: dict[str, Any] = {
            "pruner": self._pruner.state_dict(),
            "last_update": self._last_update,
            "last_step": self._last_step,
            "delay": self._delay,
            "regrown": [self._regrown[0], list(self._regrown[1])],
            "search": None if self._search is None else asdict(self._search),
            "aim": None if self._aim is None else list(self._aim),
        }
        if self._structure is not None:
            state["structure"] = {
                "groups": groups_to_state(self._structure),
                "called": self._called,
                "skipped": dict(self._skipped),
                "args": list(self._inputs.args),
                "kwargs": dict(self._inputs.kwargs),
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._restored = state_dict

    # --- what others may know (registry.Technique) --------------------------------------------------------------------

    def stage(self) -> float:
        """Return how far pruning is, from 0 (not begun) to 1 (the final sparsity, or a search that is over)."""
        if self._pruner is None or not self._pruner.masks:
            return 0.0
        if self._asked is None and not self._is_over:  # where the way ends may still change
            return min(self._pruner.stage, 0.99)
        return 1.0 if self._search is not None else self._pruner.stage

    def summary(self) -> str:
        """Return one line that says what was pruned."""
        pruner, target = self._running, self._spell_aim().removeprefix("a sparsity of ")
        return (
            f"{pruner.sparsity:.4g} of {pruner.total:,} {self._units()} in {len(pruner.fields)} layers pruned "
            f"(target {target}; {self._spell_criterion()}, {self.granularity}, {self.scope})"
        )

    @property
    def skipped(self) -> Mapping[str, str]:
        """The layers that cannot carry the granularity, and why."""
        return self._skipped

    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the sparsity of each parameter."""
        return {
            name: {"sparsity": pruned / total, "pruned": pruned, "total": total}
            for name, (pruned, total) in self._running.pruned().items()
        }

    def snapshot(self) -> dict[str, Any]:
        """Return the masks and where the ramp stands."""
        return {
            "pruner": self._running.state_dict(),
            "ramp": self._last_step - self._delay,
            "update": self._last_update,
            "position": None if self._search is None else self._search.position,
            "aim": self._aim,
        }

    def rollback(self, state: Mapping[str, Any]) -> None:
        """Return to the masks of a snapshot; the ramp goes on from where it stood then."""
        self._running.load_state_dict(state["pruner"])
        self._last_update = state["update"]
        self._delay = self._last_step - state["ramp"]
        self._regrown = (-1, [])
        if self._search is not None:
            self._search.return_to(state["position"])
        self._set_aim(state["aim"])
        self._enforce_everywhere()

    def _units(self) -> str:
        return {"weight": "weights", "pattern": "weights", "block": "blocks"}.get(
            self._granularity.kind, f"{self.granularity}s"
        )

    def _spell_aim(self) -> str:
        if self._search is not None:
            return "the sparsity that the guard allows"
        if self._target is None:
            return f"a sparsity of {self._running.final_sparsity:.4g}"
        now = "" if self._aim is None else f", {self._aim[1]:.4g} with the {self._aim[0]:,} that are to go"
        return f"{self._goal:g} of the {MEASURES[self._target[0]]}{now}"

    def _spell_criterion(self) -> str:
        return self.criterion if isinstance(self.criterion, str) else "own criterion"

    @property
    def _running(self) -> Pruner:
        if self._pruner is None:
            raise RuntimeError("GradualPruning has not been set up: it works inside `trainer.fit`.")
        return self._pruner


def _owned(optimizer: Optimizer) -> dict[int, nn.Parameter]:
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(sharding.local(gradient).isfinite().all())


def _share_that_returns(value: Any) -> float:
    try:
        share = number(value, "regrowth", 0.0, 1.0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{str(error).removesuffix('.')}; or give 'feedback'.") from None
    if share == 1.0:
        raise ValueError(f"`regrowth` must lie in [0, 1), or be 'feedback', got {value!r}.")
    return share


def _target(given: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return what is to be measured and how much of it is to be left."""
    asked = {measure: value for measure, value in given.items() if value is not None}
    if len(asked) > 1:
        names = " and ".join(f"`target_{measure}`" for measure in asked)
        raise ValueError(f"{names} are given: one of them decides how many units go.")
    for measure, value in asked.items():
        return measure, _between(value, f"target_{measure}")
    return None


def _refuse_target_of(granularity: Granularity, name: str, final_sparsity: Any, measure: str) -> None:
    if not granularity.is_structured:
        raise ValueError(
            f"`target_{measure}` is that of a model from which channels or heads are cut out: `granularity={name!r}` "
            f"leaves it as large and as slow as it is. Give `final_sparsity`, or `granularity='channel'`."
        )
    if final_sparsity != 0.9:
        raise ValueError(f"`target_{measure}` sets the sparsity: leave `final_sparsity` out, got {final_sparsity!r}.")


def _sparsities(value: Any) -> float | dict[str, float] | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    if not isinstance(value, Mapping):
        return _between(value, "final_sparsity")
    if not value:
        raise ValueError("`final_sparsity` as a dict must name at least one pattern, got {}.")
    return {str(pattern): _between(sparsity, f"final_sparsity['{pattern}']") for pattern, sparsity in value.items()}


def _between(value: Any, name: str) -> float:
    share = number(value, name, 0.0, 1.0)
    if not 0.0 < share < 1.0:
        raise ValueError(f"`{name}` must lie between 0 and 1, both excluded, got {value!r}.")
    return share


def _of_pattern(granularity: Granularity, final_sparsity: Any) -> Any:
    """Return the sparsity that N:M sets, and refuse another one; the default stands for none."""
    sparsity = granularity.sparsity
    if sparsity is None:
        return final_sparsity
    if (
        isinstance(final_sparsity, Mapping)
        or final_sparsity == "auto"
        or number(final_sparsity, "final_sparsity") not in (0.9, sparsity)
    ):
        raise ValueError(
            f"`granularity='{granularity.first}:{granularity.second}'` has a sparsity of {sparsity:g}: "
            f"leave `final_sparsity` out, got {final_sparsity!r}."
        )
    return sparsity


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"'{name}' ({reason})" for name, reason in skipped.items())


def _groups(
    final_sparsity: float | dict[str, float], targets: Sequence[Target], fields: Sequence[Field]
) -> list[Group]:
    if not isinstance(final_sparsity, dict):
        return [Group(final_sparsity, list(range(len(fields))))]
    groups = {pattern: Group(sparsity, []) for pattern, sparsity in final_sparsity.items()}
    for i, field in enumerate(fields):
        target = targets[field.scored[0]]
        names = [target.module_name, *(alias.rpartition(".")[0] for alias in target.aliases)]
        for pattern, group in groups.items():
            if any(fnmatchcase(name, pattern) for name in names):
                group.members.append(i)
                break
        else:
            raise ValueError(
                f"`final_sparsity` has no pattern for '{target.module_name}', which `include` names. "
                f"Its patterns: {', '.join(final_sparsity)}. Add one, '*' for all others."
            )
    for pattern, group in groups.items():
        if not group.members:
            raise ValueError(
                f"`final_sparsity` pattern '{pattern}' governs nothing: what it matches is left out by `include` or "
                f"`exclude`, cannot be pruned, or belongs to a pattern before it."
            )
    return list(groups.values())


def _refuse_patterns(pl_module: nn.Module, patterns: Sequence[str] | None) -> None:
    modules = {clean_name(name): child for name, child in pl_module.named_modules(remove_duplicate=False) if name}
    for pattern in patterns or ():
        refuse_if_no_match(pattern, modules, "final_sparsity")


def _share(ramp: Ramp, t: float) -> float:
    share = float(ramp(t))
    if math.isnan(share):
        raise ValueError(f"`schedule` returned NaN at progress {t:.4g}.")
    return min(max(share, 0.0), 1.0)


def _averaged_parameters(trainer: Trainer, targets: Sequence[Target]) -> Iterator[list[nn.Parameter]]:
    """Yield the targets' counterparts in the copies that weight-averaging callbacks keep."""
    for callback in callbacks(trainer):
        average = getattr(callback, "_average_model", None)
        if not isinstance(average, nn.Module):
            continue
        if isinstance(average, AveragedModel):
            average = average.module
        modules = {clean_name(name): module for name, module in average.named_modules(remove_duplicate=False)}
        yield [getattr(modules[target.module_name], target.attribute) for target in targets]
