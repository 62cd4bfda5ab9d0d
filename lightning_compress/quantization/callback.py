"""Quantization-aware training as a callback: it says when; the mathematics is in the modules beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_compress import registry
from lightning_compress.modules import as_patterns, shorten
from lightning_compress.moments import Moment, one_of, refuse_if_after, resolve_span
from lightning_compress.quantization.insertion import Insertion, Settings, insert
from lightning_compress.quantization.layers import QuantizedMultiheadAttention, Quantizer
from lightning_compress.training import (
    callbacks,
    plain,
    publish_compressed_metrics,
    refuse_sharding,
    run_length,
    steps_done,
    warn_if_best_is_uncompressed,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

_SCHEMES = {"symmetric": None, "affine": None}
_RANGES = {"minmax": None, "moving_average": None, "learned": None}


class QuantizationAwareTraining(Callback):
    """Trains with rounded weights and activations, so that the model can run in integer arithmetic without loss.

    From `begin` on, the forward pass rounds weights and activations to integers of a few bits and back (Jacob et al.
    2018, arXiv 1712.05877); gradients pass through the rounding unchanged (straight-through) and are 0 outside of the
    range. Parameters keep their names, values and hooks: a checkpoint fits the plain model, and a plain checkpoint can
    be the start. Ranges of activations move on training batches only. Where the forward can be traced (torch.fx),
    activations are rounded wherever an integer runtime needs them, residual sums and concatenations included, and
    batch norms are folded into the layers before them; elsewhere the layers' inputs are rounded, and the first line
    of the run says so.

    Linear, Conv1d/2d/3d, their transposed forms (without groups), Embedding and `nn.MultiheadAttention` are quantized.
    After ``fit`` the model stays rounded: ``trainer.test`` and export see what was trained;
    :func:`lightning_compress.quantization.dequantize` gives back the plain module with rounded weights.

    Args:
        weight_bits: Bits of a weight, 2 to 8.
        activation_bits: Bits of an activation, 2 to 8; ``None`` leaves activations float.
        granularity: Which weights share a scale: those of an output ``"channel"``, of the whole ``"tensor"``, or 32
            (any number) consecutive ones of a channel, ``"group:32"``.
        scheme: ``"symmetric"``: scale = max|w| / (2^(bits−1) − 1), the zero point is 0. ``"affine"``: scale =
            (max − min) / (2^bits − 1), the zero point is free. Activations are affine in both.
        range: ``"moving_average"``: activations between moving averages of the batches' extremes; ``"minmax"``: between
            the extremes of all batches; weights, in both, between their own extremes. ``"learned"``: the scales of
            weights and activations are parameters that the optimizer trains (LSQ, Esser et al. 2020, arXiv 1902.08153);
            weights are symmetric then.
        begin: When rounding begins (a moment, see :class:`~lightning_compress.moments.Moment`).
        freeze_ranges: When the ranges of activations, and learned scales, stop to move.
        freeze_batchnorm: When the statistics of the folded batch norms stop to move.
        include: Patterns of the names of modules to quantize.
        exclude: Patterns of the names of modules to leave float.

    Raises:
        ValueError: For bits outside 2 to 8, an unknown word, or `begin` after `freeze_ranges`; in ``setup`` for a model
            that has nothing to quantize or is in half precision, and for strategies that shard parameters.

    Example::

        >>> QuantizationAwareTraining(weight_bits=4, granularity="group:32").weight_bits
        4
    """

    technique = "quantization"

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        granularity: str = "channel",
        scheme: Literal["symmetric", "affine"] = "symmetric",
        range: Literal["minmax", "moving_average", "learned"] = "moving_average",
        begin: int | float | str = 0.5,
        freeze_ranges: int | float | str = 0.9,
        freeze_batchnorm: int | float | str = 0.9,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        self.weight_bits = _bits(weight_bits, "weight_bits")
        self.activation_bits = None if activation_bits is None else _bits(activation_bits, "activation_bits")
        self.granularity = granularity
        self.scheme = one_of(scheme, _SCHEMES, "scheme")
        self.range = one_of(range, _RANGES, "range")
        if self.range == "learned" and self.scheme == "affine":
            raise ValueError("`range='learned'` learns a scale alone: `scheme='affine'` does not go with it.")
        self.begin = Moment.parse(begin, "begin")
        self.freeze_ranges = Moment.parse(freeze_ranges, "freeze_ranges")
        self.freeze_batchnorm = Moment.parse(freeze_batchnorm, "freeze_batchnorm")
        for name in ("freeze_ranges", "freeze_batchnorm"):
            refuse_if_after(self.begin, getattr(self, name), end_name=name)
        self.include = as_patterns(plain(include), "include")
        self.exclude = as_patterns(plain(exclude), "exclude")
        self._settings = Settings(
            self.weight_bits,
            self.activation_bits,
            _granularity(granularity),
            self.scheme,  # type: ignore[arg-type]
            self.range,  # type: ignore[arg-type]
        )
        self._state_key = self._generate_state_key(include=self.include, exclude=self.exclude)
        self._forget()

    def _forget(self) -> None:
        self._insertion: Insertion | None = None
        self._restored: Mapping[str, Any] | None = None
        self._frozen: list[Tensor] | None = None
        self._moments: tuple[int, int, int] | None = None
        self._is_on = False
        self._has_agreed = False
        self._delay = 0
        self._last_step = 0
        self._handles: list[Any] = []

    @property
    def state_key(self) -> str:
        """Tell callbacks on disjoint modules apart, by the patterns that they were given."""
        return self._state_key

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert quantizers, switched off."""
        self._release(pl_module)
        self._forget()
        refuse_sharding(trainer, self)
        if trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"QuantizationAwareTraining rounds float32 weights, which Trainer(precision='{trainer.precision}') "
                f"does away with. Use '{trainer.precision.replace('true', 'mixed')}'."
            )
        if getattr(trainer.strategy, "_layer_sync", None) is not None:
            raise ValueError(
                "QuantizationAwareTraining folds batch norms, which Trainer(sync_batchnorm=True) replaces later. "
                "Leave `sync_batchnorm` out."
            )
        if is_overridden("configure_model", pl_module):
            self._insert_after_configure_model(pl_module)
        else:
            self._insert(pl_module)
            self._insert_into_averages(trainer)

    def _insert_after_configure_model(self, pl_module: LightningModule) -> None:
        # Lightning calls it after `setup` and before it restores weights and makes optimizers.
        configure = pl_module.configure_model

        def configure_model() -> None:
            pl_module.__dict__.pop("configure_model", None)
            configure()
            self._insert(pl_module)

        pl_module.__dict__["configure_model"] = configure_model

    def _insert(self, pl_module: LightningModule) -> None:
        self._insertion = insert(pl_module, self._settings, self.include, self.exclude)
        self._insertion.observe(False)
        self._insertion.start_pass()
        weights = {id(weight): (name, weight) for name, weight in self._named_weights()}
        registry.register(pl_module, self, weights.values())
        self._is_on = any(quantizer.is_on for quantizer in self._insertion.quantizers.values())
        if self._restored is not None:
            self._restore(self._restored)

    def _insert_into_averages(self, trainer: Trainer) -> None:
        # What averages weights may have copied the model before it was quantized.
        for callback in callbacks(trainer):
            copy = getattr(callback, "_average_model", None)
            copy = getattr(copy, "module", copy)
            if isinstance(copy, nn.Module) and not any(isinstance(child, Quantizer) for child in copy.modules()):
                insert(copy, self._settings, self.include, self.exclude)

    def _named_weights(self) -> list[tuple[str, nn.Parameter]]:
        insertion = self._inserted
        return [(insertion.weight_names[name], weight) for name, (_, weight) in insertion.weights.items()]

    @property
    def _inserted(self) -> Insertion:
        if self._insertion is None:
            raise RuntimeError(
                "QuantizationAwareTraining has not been set up: call trainer.fit, validate or test first."
            )
        return self._insertion

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the moments and watch the optimizers."""
        insertion = self._inserted
        run = run_length(trainer)
        begin, freeze = resolve_span(self.begin, self.freeze_ranges, run, end_name="freeze_ranges")
        _, freeze_norm = resolve_span(self.begin, self.freeze_batchnorm, run, end_name="freeze_batchnorm")
        # A range needs one batch at least.
        self._moments = (begin, max(freeze, begin + 1), freeze_norm)
        if insertion.parameters:
            owned = {
                id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
            }
            lost = [
                name for name, q in insertion.quantizers.items() if q.scale is not None and id(q.scale) not in owned
            ]
            if lost:
                raise ValueError(
                    f"`range='learned'` needs the optimizer to train the scales, but {len(lost)} of them are in none "
                    f"({lost[0]}, …). Let `configure_optimizers` take all of `self.parameters()`, or choose "
                    f"`range='moving_average'`."
                )
            for optimizer in trainer.optimizers:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if self._restored is None:
            self._is_on = False
            insertion.switch(False)
            insertion.freeze_norms(False)
        self._announce(run.steps)
        warn_if_best_is_uncompressed(trainer)
        self._last_step = steps_done(trainer, pl_module)

    def _announce(self, steps: int | None) -> None:
        insertion = self._inserted
        begin, freeze, freeze_norm = self._due
        names = list(insertion.layers)
        rank_zero_info(
            f"QuantizationAwareTraining: {self.weight_bits}-bit weights and {self._activations} activations in "
            f"{len(names)} layers ({shorten(names)}; {self.granularity}, {self.scheme}, {self.range}), "
            f"from step {begin}; ranges are frozen from step {freeze}"
            + (f", {len(insertion.norms)} folded batch norms from step {freeze_norm}." if insertion.norms else ".")
        )
        if insertion.skipped:
            reasons = "; ".join(f"'{name}' ({reason})" for name, reason in insertion.skipped.items())
            rank_zero_info(f"QuantizationAwareTraining: float stay {reasons}.")
        if insertion.untraced and self.activation_bits is not None:
            reasons = "; ".join(f"'{name or 'the model'}' ({reason})" for name, reason in insertion.untraced.items())
            rank_zero_info(
                f"QuantizationAwareTraining: could not be traced: {reasons}. There, inputs and weights of the layers "
                f"are rounded and nothing else."
            )
        if steps is not None and begin >= steps:
            rank_zero_warn(
                f"QuantizationAwareTraining: `begin={self.begin}` is step {begin}, but the run ends after {steps} "
                f"steps: nothing will be quantized. Give an earlier `begin`, as a fraction of the run for example."
            )

    # --- during training ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch on or freeze what is due, and let the ranges move with this batch."""
        insertion, (begin, freeze, freeze_norms) = self._inserted, self._due
        insertion.start_pass()
        step = self._last_step - self._delay
        # Not before a batch comes: what is validated or saved in between has ranges, or is not quantized at all.
        if not self._is_on and step >= begin and not registry.is_held(pl_module):
            insertion.forget()
            insertion.switch(True)
            self._is_on = True
            self._log(trainer, pl_module, is_epoch=False)  # the progress bar shows it at once
        if self._is_on:
            insertion.freeze_norms(step >= freeze_norms)
            if step >= freeze and self._frozen is None:
                self._frozen = [scale.detach().clone() for scale in insertion.parameters]
            insertion.observe(self._frozen is None)

    @property
    def _due(self) -> tuple[int, int, int]:
        assert self._moments is not None, "on_train_start comes first"
        return self._moments

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Hide scales that do not act from the optimizer; let all processes take their first step from the same."""
        if not self._is_on or self._frozen is not None:
            for scale in self._inserted.parameters:
                scale.grad = None
        if self._is_on and not self._has_agreed and trainer.world_size > 1:
            self._agree(trainer)
            self._has_agreed = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._frozen is not None:
            for scale, frozen in zip(self._inserted.parameters, self._frozen, strict=True):
                scale.copy_(frozen)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree on the ranges with other processes."""
        self._inserted.observe(False)
        if self._is_on and trainer.world_size > 1 and self._frozen is None:
            self._agree(trainer)
        step = steps_done(trainer, pl_module)
        if registry.is_held(pl_module) and not self._is_on:
            self._delay += step - self._last_step
        self._last_step = step

    @torch.no_grad()
    def _agree(self, trainer: Trainer) -> None:
        """Give all processes the same ranges: averages of moving averages, extremes of extremes."""
        observers = [q for q in self._inserted.observers.values() if not q.is_fixed]
        if not observers:
            return
        device = observers[0].low.device
        # A range that a process has not seen does not count: (low, high, seen).
        mine = torch.stack([torch.stack([-q.low, q.high]) for q in observers])
        seen = torch.tensor([float(q.has_seen) for q in observers], device=device)
        if self.range == "minmax":
            # nothing seen is (0, 0), and ranges hold 0 anyway
            ends = trainer.strategy.reduce(mine, reduce_op="max")
            counts = trainer.strategy.reduce(seen, reduce_op="max")
        else:
            # reduce works in place: what is averaged is computed before
            ends = trainer.strategy.reduce(mine * seen[:, None], reduce_op="sum")
            counts = trainer.strategy.reduce(seen, reduce_op="sum")
            ends = ends / counts.clamp(min=1)[:, None]
        learned = [q for q in observers if q.scale is not None]
        if learned:
            facts = torch.stack([torch.stack([q.scale.detach()[0], q.scale.new_tensor(q.zero_point)]) for q in learned])  # type: ignore[union-attr]
            facts = trainer.strategy.broadcast(facts)
        for quantizer, (low, high), count in zip(observers, ends, counts.tolist(), strict=True):
            if count:
                quantizer.low.copy_(-low)
                quantizer.high.copy_(high)
                quantizer.has_seen = True
        for quantizer, (scale, zero_point) in zip(learned, facts if learned else [], strict=True):
            quantizer.scale.data.fill_(scale)  # type: ignore[union-attr]
            quantizer.zero_point = int(zero_point)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the bits that are in force, for ``ModelCheckpoint`` and ``EarlyStopping`` to see."""
        self._inserted.start_pass()
        if self._moments is not None:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the bits that are in force."""
        self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``ModelCheckpoint`` the metrics of quantized epochs, as ``compress/<name>``."""
        if self._moments is not None:
            publish_compressed_metrics(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the uses of shared modules anew."""
        self._inserted.start_pass()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _log(self, trainer: Trainer, pl_module: LightningModule, is_epoch: bool = True) -> None:
        if trainer.barebones:
            return
        pl_module.log(
            f"compress/weight_bits{registry.suffix(pl_module, self)}",
            float(self.weight_bits if self._is_on else 32),
            prog_bar=True,
            on_step=not is_epoch,
            on_epoch=is_epoch,
            batch_size=1,
            reduce_fx="min",
        )

    # --- after training -----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where a quantizer was never switched on or never saw data."""
        if self._moments is None:
            return
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if not self._is_on:
            if not is_trial:
                rank_zero_warn(
                    f"QuantizationAwareTraining: the run stopped before `begin={self.begin}` (step {self._due[0]}): "
                    f"nothing is quantized."
                )
        elif blind := self.blind():
            rank_zero_warn(
                f"QuantizationAwareTraining: no training batch has reached {', '.join(blind)}: without a range they "
                f"stay float."
            )

    def blind(self) -> list[str]:
        """Return the names of the quantizers of activations that have seen no data: what they are for stays float."""
        insertion = self._inserted
        spare = {
            f"{name}.{part}_input_quantizer"
            for name, layer in insertion.layers.items()
            if isinstance(layer, QuantizedMultiheadAttention)
            for part in ("key", "value")
        }
        return [name for name, q in insertion.observers.items() if not q.has_seen and name not in spare]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks on the optimizers."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hooks on the optimizers; the quantizers stay."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._insertion is not None:
            self._insertion.observe(False)
        pl_module.__dict__.pop("configure_model", None)
        registry.release(pl_module, self)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the ranges, and what has been switched on."""
        if self._insertion is None:
            return dict(self._restored or {})
        return {
            "ranges": self._insertion.state(),
            "is_on": self._is_on,
            "is_norm_frozen": any(norm.is_frozen for norm in self._insertion.norms.values()),
            "frozen": None if self._frozen is None else [scale.cpu() for scale in self._frozen],
            "has_agreed": self._has_agreed,
            "last_step": self._last_step,
            "delay": self._delay,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._restored = state_dict
        if self._insertion is not None:
            self._restore(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        if not state:
            self._restored = None
            return
        insertion = self._inserted
        insertion.load_state(state["ranges"])
        for quantizer in insertion.quantizers.values():
            quantizer.is_on = state["is_on"]
        insertion.freeze_norms(state["is_norm_frozen"])
        self._is_on, self._has_agreed = state["is_on"], state["has_agreed"]
        self._frozen = None
        if state["frozen"] is not None:
            self._frozen = [
                frozen.to(scale.device) for frozen, scale in zip(state["frozen"], insertion.parameters, strict=True)
            ]
        self._last_step, self._delay = state["last_step"], state["delay"]

    # --- what others ask ----------------------------------------------------------------------------------------------

    def stage(self) -> float:
        """Return 0 before rounding has begun, and 1 from then on."""
        return float(self._is_on)

    def has_begun_in(self, checkpoint: Mapping[str, Any]) -> bool:
        """Return whether the model was quantized when a Lightning checkpoint was written."""
        return bool(checkpoint.get("callbacks", {}).get(self.state_key, {}).get("is_on", False))

    @property
    def _activations(self) -> str:
        return "float" if self.activation_bits is None else f"{self.activation_bits}-bit"

    def summary(self) -> str:
        """Return one line that says what was quantized."""
        insertion = self._inserted
        state = f"{self.weight_bits}-bit weights, {self._activations} activations" if self._is_on else "not begun"
        return f"{state} in {len(insertion.layers)} layers ({self.granularity}, {self.scheme}, {self.range})"

    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the bits of each quantized weight."""
        bits = self.weight_bits if self._is_on else 32
        return {name: {"bits": bits} for name, _ in self._named_weights()}

    @property
    def skipped(self) -> dict[str, str]:
        """Return why modules stay float, by name."""
        return dict(self._inserted.skipped)

    def snapshot(self) -> dict[str, Any]:
        """Return what :meth:`rollback` needs: the ranges, and what is switched on."""
        return self.state_dict()

    def rollback(self, state: Mapping[str, Any]) -> None:
        """Come back to a point that :meth:`snapshot` was taken at."""
        delay, last = self._delay, self._last_step
        behind = last - delay - (state["last_step"] - state["delay"])
        self._restore(state)
        self._last_step, self._delay = last, delay + behind


def _bits(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise ValueError(f"`{name}` must be a whole number from 2 to 8, got {value!r}.")
    return value


def _granularity(value: Any) -> str | int:
    if value in ("channel", "tensor"):
        return str(value)
    kind, _, length = str(value).partition(":")
    if kind == "group" and length.isdigit() and int(length) > 0:
        return int(length)
    raise ValueError(f"`granularity` must be 'channel', 'tensor' or 'group:32' (any length), got {value!r}.")
