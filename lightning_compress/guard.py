"""The guard callback: compression goes on only while a metric stays near its baseline."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress import registry
from lightning_compress.modules import clean_name
from lightning_compress.moments import number, one_of
from lightning_compress.training import callbacks, is_sharded, plain, publish_compressed_metrics, steps_done

_ACTIONS = {"hold": "holds compression", "rollback": "rolls the model back", "stop": "stops the run"}


@dataclass
class _State:
    """All that a resumed run must know: plain Python and tensors."""

    baseline: float | None = None
    is_logged_in_validation: bool = False
    is_held: bool = False
    has_begun: bool = False  # compression, as far as evaluations have seen
    downs: int = 0  # evaluations in a row that were down
    ups: int = 0  # evaluations in a row that were within the tolerance
    evaluations: int = 0
    within: int = 0
    last_value: float | None = None
    proven_step: int | None = None  # the step at which the model in memory is known to be within the tolerance
    good: dict[str, Any] | None = None  # the last point within the tolerance
    events: list[dict[str, Any]] = field(default_factory=list)


class AccuracyGuard(Callback):
    """Hold compression, roll it back or stop the run while a metric that the module logs is down.

    At the end of each validation (of each training epoch, for a metric that only training logs), outside the sanity
    check. The metric is down where it is more than ``tolerance`` worse than the baseline, or is NaN or infinite. Before
    compression begins only NaN and infinity are down: what a dense model loses is not the guard's business.

    - ``"hold"``: the ramps of all techniques stand still until the metric is within the tolerance again, and go on from
      there. The ramp is delayed, so the run may end before its target. A metric of NaN or infinity says nothing of the
      sparsity that it was measured at: the masks and ranges then return to those of the last point within the tolerance
      (weights pruned since are free to grow again from zero).
    - ``"rollback"``: weights and buffers, masks and ranges, averaged weights, and the states of the optimizers and of
      the loss scaler return to the last point within the tolerance. The ramps stand still there until ``patience``
      evaluations in a row were within the tolerance, and are then tried again. If the model at the end of the run has
      not been seen within the tolerance, that point, which is the most compressed one that held, is the result.
    - ``"stop"``: the run ends there.

    With several processes the mean of their values decides, so that all decide alike. What the guard did is in
    ``events``, in the table of ``CompressionReport`` and, as ``compress/held``, in the loggers.

    Args:
        monitor: The metric's name, as in ``trainer.callback_metrics``.
        mode: ``"max"`` where more is better, ``"min"`` where less is.
        tolerance: How much worse than the baseline is allowed, in the metric's own unit: 0.01 is one point of accuracy.
        baseline: The value to compare with. By default the best one seen before compression begins; the first one,
            where compression begins before anything has been seen. The sanity check is not looked at.
        patience: How many evaluations in a row must be down before the guard acts.
        action: ``"hold"``, ``"rollback"`` or ``"stop"``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: At construction, for a value out of its range. In ``setup``, for what a rollback cannot serve:
            sharded parameters, ``StochasticWeightAveraging``, a second guard that rolls back. During training, if the
            metric is not logged, with the names of those that are.

    Note:
        With ``"rollback"`` a copy of the model and of the optimizer states is kept in the CPU's memory, and in every
        checkpoint. Learning rates, the data loader and the trainer's counters are not rolled back.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> guard = AccuracyGuard("val_acc", tolerance=0.01, baseline=0.93, action="rollback")
        >>> guard.is_within(0.92), guard.is_within(0.91), guard.is_within(float("nan"))
        (True, False, False)
        >>> trainer = Trainer(callbacks=[guard], logger=False)
    """

    technique = "guard"

    def __init__(
        self,
        monitor: str,
        mode: Literal["max", "min"] = "max",
        tolerance: float = 0.01,
        baseline: float | None = None,
        patience: int = 1,
        action: Literal["hold", "rollback", "stop"] = "hold",
    ) -> None:
        super().__init__()
        self.monitor = _metric_name(monitor)
        self.mode = one_of(mode, ("max", "min"), "mode")
        self.tolerance = _finite(tolerance, "tolerance", 0.0)
        self.baseline = None if baseline is None else _finite(baseline, "baseline", -math.inf)
        self.patience = _count(patience, "patience")
        self.action = one_of(action, tuple(_ACTIONS), "action")
        self._state = _State()
        self._is_running = False
        self._has_validated = False
        self._stale: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Tell guards of other metrics apart, and guards of one metric that act otherwise."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, action=self.action)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the guard did, in order.

        Each is a dict: ``action`` (``"hold"``, ``"resume"``, ``"rollback"``, ``"stop"``, or ``"restore"`` at the end of
        the run), ``step``, ``epoch``, ``value``, ``baseline``, ``stage`` (how far compression was, from 0 to 1) and
        ``returned_to`` (the step of the point that was returned to, or None).
        """
        return self._state.events

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a point to return to."""
        return self._is_running and self.action == "rollback" and self._state.good is not None

    @property
    def can_hold(self) -> bool:
        """Whether ramps are held while the metric is down."""
        return self.action != "stop"

    def is_within(self, value: float) -> bool:
        """Return whether a value is within the tolerance; nothing is as long as no baseline is known."""
        baseline = self._baseline
        if baseline is None or not math.isfinite(value):
            return False
        rounding = 1e-6 * max(abs(baseline), self.tolerance)  # metrics are float32: 0.9 is not quite 0.9
        worse = baseline - value if self.mode == "max" else value - baseline
        return worse <= self.tolerance + rounding

    @property
    def _baseline(self) -> float | None:
        return self._state.baseline if self.baseline is None else self.baseline

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be guarded, and forget what another run left."""
        if stage != "fit":
            return
        self._release(pl_module)
        self._state, self._has_validated = _State(), False
        if trainer.barebones:
            raise ValueError(
                f"AccuracyGuard cannot see '{self.monitor}': Trainer(barebones=True) logs nothing. Remove one of them."
            )
        if self.action == "rollback":
            self._refuse_rollback_beside_others(trainer)
        registry.register(pl_module, self)

    def _refuse_rollback_beside_others(self, trainer: Trainer) -> None:
        if is_sharded(trainer):
            raise ValueError(
                f"AccuracyGuard(action='rollback') cannot keep a copy of the sharded parameters of "
                f"{type(trainer.strategy).__name__}. Use "
                f"`action='hold'` or 'stop', or Trainer(strategy='ddp')."
            )
        for other in callbacks(trainer):
            if isinstance(other, StochasticWeightAveraging):
                raise ValueError(
                    "AccuracyGuard(action='rollback') cannot vouch for StochasticWeightAveraging: it ends the run with "
                    "an average that no validation has seen. Use EMAWeightAveraging, or `action='hold'`."
                )
            if other is not self and isinstance(other, AccuracyGuard) and other.action == "rollback":
                raise ValueError(
                    f"Two guards with `action='rollback'` (monitor='{self.monitor}' and '{other.monitor}') would "
                    f"return to different points. Give one of them `action='hold'` or 'stop'."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on holding in a resumed run, before any ramp is asked where it stands."""
        registry.hold(pl_module, self, self._state.is_held)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be done."""
        self._is_running = True
        guarded = self._guarded(pl_module)
        if not guarded:
            rank_zero_warn(
                f"AccuracyGuard(monitor='{self.monitor}') has nothing to guard: no other callback of the Trainer "
                f"compresses the model. Add one, such as GradualPruning, or remove the guard."
            )
        registry.hold(pl_module, self, self._state.is_held)
        baseline = self._baseline
        rank_zero_info(
            f"AccuracyGuard: {_ACTIONS[self.action]} ({', '.join(t.technique for t in guarded) or 'nothing'}) when "
            f"{self.monitor} is more than {self.tolerance:g} {self._worse_side} "
            + (
                "its best value before compression begins (its first value, if compression begins before any)"
                if baseline is None
                else f"{baseline:.4g}"
            )
            + (f", {self.patience} evaluations in a row." if self.patience > 1 else ".")
        )

    # --- during training ----------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric as it was, to know a new one."""
        self._stale = trainer.callback_metrics.get(self.monitor)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric as it was, to know a new one."""
        self._stale = trainer.callback_metrics.get(self.monitor)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log whether compression was held."""
        self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, if this validation logged the metric."""
        if not self._is_running:  # the sanity check, or trainer.validate
            return
        value = self._new_value(trainer)
        is_endless = self._has_validated and trainer.num_training_batches == math.inf  # no end of an epoch is in sight
        self._has_validated = True
        if value is not None:
            self._state.is_logged_in_validation = True
            self._evaluate(trainer, pl_module, value)
        elif is_endless and not self._state.evaluations:
            raise self._unknown_metric(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, if training alone logs the metric."""
        if not self._state.is_logged_in_validation:
            value = self._new_value(trainer)
            if value is not None:
                self._evaluate(trainer, pl_module, value)
            elif not self._state.evaluations and (self._has_validated or not trainer.enable_validation):
                raise self._unknown_metric(trainer)
        self._log(trainer, pl_module)

    def _new_value(self, trainer: Trainer) -> float | None:
        """Return the metric if it was logged since it was last looked at: on all ranks the mean of theirs."""
        metric = trainer.callback_metrics.get(self.monitor)
        is_new = metric is not None and metric is not self._stale
        total, count = (float(metric), 1.0) if is_new and metric is not None else (0.0, 0.0)
        if trainer.world_size > 1:
            pair = torch.tensor([total, count], dtype=torch.float64, device=trainer.strategy.root_device)
            total, count = trainer.strategy.reduce(pair, reduce_op="sum").tolist()
        return total / count if count else None

    def _unknown_metric(self, trainer: Trainer) -> ValueError:
        logged = sorted(name for name in trainer.callback_metrics if not name.startswith("compress/"))
        close = difflib.get_close_matches(self.monitor, logged, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return ValueError(
            f"AccuracyGuard(monitor='{self.monitor}'): neither validation nor the training steps have logged such a "
            f"metric. Logged: {', '.join(logged) or 'nothing'}.{hint} A metric that is not logged each time has to be "
            f"logged the first time too."
        )

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_running:
            pl_module.log(
                "compress/held",
                float(self._state.is_held),
                prog_bar=True,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                reduce_fx="max",  # of several guards
                sync_dist=trainer.world_size > 1,
            )

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        state, stage = self._state, self._stage(pl_module)
        state.has_begun |= stage > 0.0 or state.is_held  # also where a rollback has led back before the beginning
        self._move_baseline(value)
        is_within = self.is_within(value)
        is_down = not is_within and (state.has_begun or not math.isfinite(value))
        state.evaluations += 1
        state.within += is_within
        state.last_value = value
        state.ups = state.ups + 1 if is_within else 0
        state.downs = state.downs + 1 if is_down else 0
        if is_within:
            state.proven_step = steps_done(trainer, pl_module)
            if self.action != "stop":
                state.good = self._point(trainer, pl_module, value, stage)
            if state.is_held and state.ups >= (self.patience if self.action == "rollback" else 1):
                self._hold(pl_module, False)
                self._record(trainer, pl_module, "resume", value, stage)
        elif state.downs >= self.patience:
            self._act(trainer, pl_module, value, stage)
        publish_compressed_metrics(trainer, pl_module)  # compression may be complete no longer

    def _move_baseline(self, value: float) -> None:
        known, has_begun = self._state.baseline, self._state.has_begun
        if self.baseline is not None or not math.isfinite(value):
            return
        if known is None and has_begun:
            rank_zero_info(
                f"AccuracyGuard: compression has begun before {self.monitor} was first seen: that value, {value:.4g}, "
                f"is the baseline. Give `baseline` for the dense model's, or let compression begin later."
            )
        if known is None:
            self._state.baseline = value
        elif not has_begun:
            self._state.baseline = max(known, value) if self.mode == "max" else min(known, value)

    def _act(self, trainer: Trainer, pl_module: LightningModule, value: float, stage: float) -> None:
        state, good = self._state, self._state.good
        if self.action == "stop":
            if not trainer.should_stop:
                trainer.should_stop = True
                self._record(trainer, pl_module, "stop", value, stage)
        elif self.action == "rollback" and good is not None:
            self._return_to(trainer, pl_module, good)
            self._hold(pl_module, True)
            state.downs, state.proven_step = 0, steps_done(trainer, pl_module)
            self._record(trainer, pl_module, "rollback", value, stage, good["step"])
        elif not math.isfinite(value) and good is not None and stage > good["stage"]:
            self._return_techniques_to(pl_module, good)
            self._hold(pl_module, True)
            self._record(trainer, pl_module, "hold", value, stage, good["step"])
        elif not state.is_held:
            self._hold(pl_module, True)
            self._record(trainer, pl_module, "hold", value, stage)

    def _hold(self, pl_module: LightningModule, is_held: bool) -> None:
        self._state.is_held = is_held
        registry.hold(pl_module, self, is_held)

    def _record(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        action: str,
        value: float | None,
        stage: float,
        returned_to: int | None = None,
    ) -> None:
        event = {
            "action": action,
            "step": steps_done(trainer, pl_module),
            "epoch": trainer.current_epoch,
            "value": value,
            "baseline": self._baseline,
            "stage": stage,
            "returned_to": returned_to,
        }
        self._state.events.append(event)
        baseline = "no baseline yet" if self._baseline is None else f"baseline {self._baseline:.4g}"
        rank_zero_info(f"AccuracyGuard: {_spell(event, self.monitor)} ({baseline}, compression at {stage:.0%}).")

    # --- points to return to ------------------------------------------------------------------------------------------

    def _point(self, trainer: Trainer, pl_module: LightningModule, value: float, stage: float) -> dict[str, Any]:
        point = {
            "step": steps_done(trainer, pl_module),
            "value": value,
            "stage": stage,
            "techniques": {_key(t): t.snapshot() for t in self._guarded(pl_module)},
        }
        if self.action == "rollback":
            point["metrics"] = _metrics(trainer)
            point["tensors"] = _on_cpu(_tensors(pl_module))
            point["averages"] = [_on_cpu(_tensors(average)) for average in _averages(trainer)]
            point["optimizers"] = [_on_cpu(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
            point["precision"] = _on_cpu(trainer.precision_plugin.state_dict())
        return point

    @torch.no_grad()
    def _return_to(self, trainer: Trainer, pl_module: LightningModule, point: Mapping[str, Any]) -> None:
        _write(_tensors(pl_module), point["tensors"])
        for average, tensors in zip(_averages(trainer), point["averages"], strict=True):
            _write(_tensors(average), tensors)
        for optimizer, state in zip(trainer.optimizers, point["optimizers"], strict=True):
            # The groups, with their learning rates, stay as they are. The copy: the optimizer would write into ours.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copy.deepcopy(state), "param_groups": groups})
            optimizer.zero_grad()  # what has been accumulated belongs to other weights
        if point["precision"]:
            trainer.precision_plugin.load_state_dict(point["precision"])
        self._return_techniques_to(pl_module, point)

    def _return_techniques_to(self, pl_module: LightningModule, point: Mapping[str, Any]) -> None:
        for technique in self._guarded(pl_module):
            if _key(technique) in point["techniques"]:
                technique.rollback(point["techniques"][_key(technique)])

    def _guarded(self, pl_module: LightningModule) -> list[registry.Technique]:
        return [t for t in registry.techniques(pl_module) if t.technique != self.technique]

    def _stage(self, pl_module: LightningModule) -> float:
        """Return how far compression is: the mean over what changes parameters, or over all if nothing does."""
        guarded = self._guarded(pl_module)
        guarded = [technique for technique in guarded if technique.layers()] or guarded
        return sum(technique.stage() for technique in guarded) / len(guarded) if guarded else 0.0

    # --- after training -----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with a model that was seen within the tolerance, if ``rollback`` is asked for, and sum up."""
        state = self._state
        has_begun = state.has_begun or self._stage(pl_module) > 0.0
        is_touched = has_begun or not math.isfinite(state.last_value or 0.0)
        is_proven = state.proven_step == steps_done(trainer, pl_module)
        if self.can_roll_back and state.good is not None and is_touched and not is_proven:
            stage = self._stage(pl_module)
            self._return_to(trainer, pl_module, state.good)
            for average in _averages(trainer):
                _write(_tensors(pl_module), _tensors(average))  # validation sees the average, and the run ends with it
            state.proven_step = steps_done(trainer, pl_module)
            self._record(trainer, pl_module, "restore", state.last_value, stage, state.good["step"])
        if self.can_roll_back and state.good is not None and self._has_just_returned(trainer, pl_module):
            # The last evaluation was of the model that is no more.
            trainer.callback_metrics.update({name: torch.tensor(v) for name, v in state.good["metrics"].items()})
            publish_compressed_metrics(trainer, pl_module)
        self._sum_up(pl_module)
        self._is_running = False

    def _has_just_returned(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        last = self._state.events[-1] if self._state.events else {"returned_to": None}
        return last["returned_to"] is not None and last["step"] == steps_done(trainer, pl_module)

    def _sum_up(self, pl_module: LightningModule) -> None:
        state = self._state
        held = f"; held at the end, at {self._stage(pl_module):.0%} of the way" if state.is_held else ""
        rank_zero_info(f"AccuracyGuard: {self.summary()}{held}.")
        if not state.evaluations:
            rank_zero_warn(
                f"AccuracyGuard(monitor='{self.monitor}') has guarded nothing: the run ended before a value."
            )
        elif state.downs and not (self.action == "rollback" and state.good is not None) and self.action != "stop":
            rank_zero_warn(
                f"AccuracyGuard: the run ends with {self.monitor} = {state.last_value:.4g}, outside the tolerance "
                f"({self._spell_tolerance()}). "
                + (
                    "`action='rollback'` would end it with the last point within."
                    if self.action == "hold"
                    else "No point within was seen that could be returned to."
                )
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hold behind."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hold behind."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        self._is_running = False
        self._stale = None
        registry.release(pl_module, self)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the decisions so far and the point to return to: plain Python and tensors only."""
        state = {each.name: getattr(self._state, each.name) for each in fields(self._state)}
        return state | {"events": copy.deepcopy(state["events"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self._state = _State(**state_dict | {"events": copy.deepcopy(state_dict["events"])})

    # --- what others may know (registry.Technique) --------------------------------------------------------------------

    def stage(self) -> float:
        """Return 1: a guard compresses nothing, and is never what is missing."""
        return 1.0

    def summary(self) -> str:
        """Return one line that says what the guard did, when and why."""
        state = self._state
        if not state.evaluations:
            return f"{self.monitor} was not evaluated"
        line = f"{self._spell_tolerance()} at {state.within} of {state.evaluations} evaluations"
        told = [_spell(event, self.monitor) for event in state.events]
        if len(told) > 6:
            told = [*told[:3], f"… {len(told) - 5} more …", *told[-2:]]
        return "; ".join([line, *told]) if told else f"{line}, nothing had to be done"

    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: a guard changes no parameter of its own accord."""
        return {}

    def snapshot(self) -> dict[str, Any]:
        """Return nothing: the guard's own decisions are not rolled back."""
        return {}

    def rollback(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""

    def _spell_tolerance(self) -> str:
        baseline = "an unknown baseline" if self._baseline is None else f"{self._baseline:.4g}"
        return f"{self.monitor} no more than {self.tolerance:g} {self._worse_side} {baseline}"

    @property
    def _worse_side(self) -> str:
        return "below" if self.mode == "max" else "above"


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers, those included that its ``state_dict`` leaves out."""
    if isinstance(module, AveragedModel):
        return {"n_averaged": module.n_averaged} | _tensors(module.module)
    return {clean_name(name): tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the copies that weight-averaging callbacks keep."""
    for callback in callbacks(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _on_cpu(value: Any) -> Any:
    """Return a copy of a nest of containers whose tensors are on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return copy.deepcopy(value)


# --- small things -----------------------------------------------------------------------------------------------------


def _metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics, without those that :func:`publish_compressed_metrics` makes of them."""
    metrics = trainer.callback_metrics
    return {
        name: float(value)
        for name, value in metrics.items()
        if torch.as_tensor(value).numel() == 1 and name.removeprefix("compress/") not in metrics.keys() - {name}
    }


def _key(technique: registry.Technique) -> str:
    return str(getattr(technique, "state_key", technique.technique))


def _spell(event: Mapping[str, Any], monitor: str) -> str:
    value = "" if event["value"] is None else f", {monitor} = {event['value']:.4g}"
    back = "" if event["returned_to"] is None else f", back to step {event['returned_to']}"
    return f"{event['action']} at step {event['step']}{value}{back}"


def _metric_name(monitor: object) -> str:
    if not isinstance(monitor, str):
        raise TypeError(f"`monitor` must be the name of a metric, got {monitor!r} of type {type(monitor).__name__}.")
    if not monitor:
        raise ValueError("`monitor` must be the name of a metric that the module logs, got ''.")
    if monitor.startswith("compress/"):
        raise ValueError(
            f"`monitor={monitor!r}` is NaN until compression is complete, which the guard would wait for. Give the "
            f"metric that the module logs: '{monitor.removeprefix('compress/')}'."
        )
    return monitor


def _finite(value: object, name: str, low: float) -> float:
    result = number(plain(value), name, low)
    if math.isinf(result):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    return result


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int of 1 or more, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`{name}` must be 1 or more, got {value!r}.")
    return int(value)
