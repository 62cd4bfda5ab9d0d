"""The guard: when it acts, that what it returns to is returned to exactly, and that a run ends within the tolerance."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_compress import (
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    LearningRateSchedule,
    QuantizationAwareTraining,
    SparsityRegularization,
    registry,
)
from lightning_compress.guard import AccuracyGuard
from lightning_compress.training import publish_compressed_metrics, warn_if_best_is_uncompressed
from tests.helpers import (
    BATCHES,
    Crash,
    CrashAt,
    ManualNet,
    Net,
    QuietNet,
    StatefulLoader,
    TwoOptimizerNet,
    held_out,
    hooks_of,
    loss_scaling,
    same,
    seeded,
    snapshot,
    trainer,
    zeros,
)

NAN = math.nan
ends_early = pytest.mark.filterwarnings("ignore:GradualPruning. the run stopped before")
ends_outside = pytest.mark.filterwarnings("ignore:AccuracyGuard. the run ends with")


def scripted(base: type[Net] = Net) -> type[Net]:
    """A module whose validation logs what it was told to, one value an epoch; the sanity check logs 0.1."""

    class Scripted(base):  # type: ignore[valid-type,misc]
        def __init__(self, values: Sequence[float], **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.values = list(values)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            value = 0.1 if self.trainer.sanity_checking else self.values[self.trainer.current_epoch]
            self.log("val_acc", value, batch_size=1)

    return Scripted


class NormNet(Net):
    """With buffers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net.insert(1, nn.BatchNorm1d(16))


class CountingNet(NormNet):
    """With a buffer that its ``state_dict`` leaves out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)


def pruning(end: Any = 1.0, **kwargs: Any) -> GradualPruning:
    return GradualPruning(0.8, **({"schedule": "linear", "begin": 0, "every": 1} | kwargs), end=end)


class Watch(Callback):
    """Keep what there was at the end of each validation (of each epoch, with `at_epoch_end`)."""

    def __init__(self, *techniques: GradualPruning) -> None:
        self.techniques = techniques
        self.seen: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append(everything(pl_module, trainer, self.techniques))


def everything(module: LightningModule, run: Trainer, techniques: Sequence[Any] = ()) -> dict[str, Any]:
    return {
        **snapshot(module, run),
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "masks": [t._pruner.state_dict() for t in techniques],
        "sparsity": [t._pruner.sparsity for t in techniques],
        "scaler": dict(run.precision_plugin.state_dict()),
    }


class Break(Callback):
    """Make a weight NaN at the beginning of an epoch."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch in self.epochs:
            with torch.no_grad():
                next(pl_module.parameters())[0, 0] = NAN


def fit(path: Path, module: Any, callbacks: Sequence[Callback], ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    run = trainer(path, callbacks, **kwargs)
    run.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
    return run


def actions(guard: AccuracyGuard) -> list[tuple[str, int]]:
    return [(event["action"], event["step"]) for event in guard.events]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": ""}, ValueError, "`monitor` must be the name"),
        ({"monitor": 3}, TypeError, "`monitor` must be the name of a metric, got 3 of type int"),
        ({"monitor": "compress/val_acc"}, ValueError, "NaN until compression is complete.*'val_acc'"),
        ({"mode": "best"}, ValueError, "`mode` must be one of max, min, got 'best'"),
        ({"tolerance": -0.1}, ValueError, "`tolerance` must be a number in"),
        ({"tolerance": math.inf}, ValueError, "`tolerance` must be finite"),
        ({"tolerance": None}, TypeError, "`tolerance` must be a number"),
        ({"baseline": NAN}, ValueError, "`baseline` must be a number"),
        ({"baseline": "good"}, ValueError, "`baseline` must be a number"),
        ({"patience": 0}, ValueError, "`patience` must be 1 or more, got 0"),
        ({"patience": True}, TypeError, "`patience` must be an int"),
        ({"patience": 1.0}, TypeError, "`patience` must be an int"),
        ({"action": "halt"}, ValueError, "`action` must be one of hold, rollback, stop, got 'halt'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AccuracyGuard(**{"monitor": "val_acc"} | arguments)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_within_the_tolerance_in_the_precision_of_metrics(mode: Any) -> None:
    guard = AccuracyGuard("m", mode=mode, tolerance=0.01, baseline=0.91)
    sign = 1 if mode == "max" else -1
    for value, expected in [(0.91 - sign * 0.01, True), (0.91 - sign * 0.0101, False), (0.91 + sign, True)]:
        assert guard.is_within(float(torch.tensor(value))) is expected
    assert not any(guard.is_within(value) for value in (NAN, math.inf, -math.inf))


# --- case 11: NaN in the watched metric -------------------------------------------------------------------------------

CASE_11 = [0.9, 0.9, NAN, NAN]


@ends_early
@ends_outside
def test_case_11_hold_keeps_the_sparsity_of_the_last_good_epoch(tmp_path: Path) -> None:
    prune = pruning()
    guard, watch = AccuracyGuard("val_acc", patience=1), Watch(prune)
    module = seeded(lambda: scripted()(CASE_11))
    fit(tmp_path, module, [prune, guard, watch])
    assert guard.events[0]["baseline"] == pytest.approx(0.9)  # not the sanity check's 0.1
    assert actions(guard) == [("hold", 3 * BATCHES)]
    last_good = watch.seen[1]["sparsity"]
    assert last_good == watch.seen[2]["sparsity"] == watch.seen[3]["sparsity"] == [pytest.approx(0.4, abs=0.01)]
    assert prune._pruner.sparsity == last_good[0]
    assert same(watch.seen[1]["masks"], watch.seen[3]["masks"])  # what pruned weights have learnt, too


@ends_early
@pytest.mark.parametrize("guard_first", [True, False])
def test_case_11_rollback_returns_to_finite_weights(tmp_path: Path, guard_first: bool) -> None:
    prune, guard = pruning(), AccuracyGuard("val_acc", patience=1, action="rollback")
    watch = Watch(prune)
    module = seeded(lambda: scripted(CountingNet)(CASE_11))
    ours = [guard, prune] if guard_first else [prune, guard]
    run = fit(tmp_path, module, [*ours, watch, Break(2, 3)])
    assert actions(guard) == [("rollback", 3 * BATCHES), ("rollback", 4 * BATCHES)]
    good = watch.seen[1]
    for after in (watch.seen[2], watch.seen[3], everything(module, run, [prune])):
        assert same({**after, "optimizers": [o["state"] for o in after["optimizers"]]}, {
            **good, "optimizers": [o["state"] for o in good["optimizers"]]
        })  # fmt: skip
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert guard._baseline == pytest.approx(0.9)


@ends_early
def test_case_11_stop_stops(tmp_path: Path) -> None:
    prune, guard = pruning(), AccuracyGuard("val_acc", patience=1, action="stop")
    run = fit(tmp_path, seeded(lambda: scripted()(CASE_11)), [prune, guard])
    assert run.current_epoch == 3
    assert actions(guard) == [("stop", 3 * BATCHES)]


def test_nan_weights_end_a_run_that_no_guard_can_mend(tmp_path: Path) -> None:
    for guards in ([], [AccuracyGuard("val_acc")]):
        with pytest.raises(ValueError, match="net.0.weight"):
            fit(tmp_path, seeded(lambda: scripted()(CASE_11)), [pruning(), *guards, Break(2)])


# --- hold -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Net, ManualNet])
def test_held_ramp_goes_on_where_it_stood_and_ends_exactly(tmp_path: Path, net: type[Net]) -> None:
    values = [0.9, 0.9, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9]
    prune, guard = pruning(end=5 * BATCHES), AccuracyGuard("val_acc")
    watch, module = Watch(prune), seeded(lambda: scripted(net)(values))
    fit(tmp_path, module, [prune, guard, watch], max_epochs=8)
    assert actions(guard) == [("hold", 3 * BATCHES), ("resume", 5 * BATCHES)]
    way = [prune._pruner._paths[0].count(min(done, 5) / 5) / prune._pruner.total for done in (1, 2, 3, 3, 3, 4, 5, 5)]
    assert [seen["sparsity"] for seen in watch.seen] == [[expected] for expected in way]
    pruned, total = zeros(module)
    assert abs(pruned / total - 0.8) < 1 / total
    assert prune.stage() == 1.0


def test_patience_waits_for_that_many_in_a_row(tmp_path: Path) -> None:
    values = [0.9, 0.9, 0.5, 0.9, 0.5, 0.5, 0.9, 0.9]
    guard = AccuracyGuard("val_acc", patience=2)
    fit(tmp_path, seeded(lambda: scripted()(values)), [pruning(end=5 * BATCHES), guard], max_epochs=8)
    assert actions(guard) == [("hold", 6 * BATCHES), ("resume", 7 * BATCHES)]


@ends_early
@ends_outside
def test_tells_that_the_run_ends_outside(tmp_path: Path) -> None:
    guard = AccuracyGuard("val_acc")
    with pytest.warns(UserWarning, match=r"ends with val_acc = 0\.5, outside .* 0\.01 below 0\.9.*'rollback'"):
        fit(tmp_path, seeded(lambda: scripted()([0.9, 0.5, 0.5, 0.5])), [pruning(), guard])
    assert "hold at step 16, val_acc = 0.5" in guard.summary()


def test_mode_min(tmp_path: Path) -> None:
    guard = AccuracyGuard("val_acc", mode="min", tolerance=0.1)
    values = [0.5, 0.55, 0.65, 0.6]
    fit(tmp_path, seeded(lambda: scripted()(values)), [pruning(end=2 * BATCHES), guard])
    assert actions(guard) == [("hold", 3 * BATCHES), ("resume", 4 * BATCHES)]


# --- the baseline -----------------------------------------------------------------------------------------------------


def test_baseline_is_the_best_value_before_compression(tmp_path: Path) -> None:
    values = [0.7, 0.9, 0.5, 0.95, 0.9, 0.95]  # dense for three epochs: its dip at the third is nobody's business
    guard = AccuracyGuard("val_acc", action="rollback")
    prune = pruning(begin=3 * BATCHES, end=4 * BATCHES)
    fit(tmp_path, seeded(lambda: scripted()(values)), [prune, guard], max_epochs=6)
    assert guard.events == []
    assert guard._baseline == pytest.approx(0.9)
    assert guard.summary() == "val_acc no more than 0.01 below 0.9 at 5 of 6 evaluations, nothing had to be done"


def test_given_baseline_counts(tmp_path: Path) -> None:
    guard = AccuracyGuard("val_acc", baseline=0.95)
    values = [0.5, 0.9, 0.95, 0.95]
    fit(tmp_path, seeded(lambda: scripted()(values)), [pruning(begin=BATCHES, end=2 * BATCHES), guard])
    assert actions(guard) == [("hold", 2 * BATCHES), ("resume", 3 * BATCHES)]


# --- rollback ---------------------------------------------------------------------------------------------------------


@ends_early
@pytest.mark.parametrize("kwargs", [{}, {"plugins": "scaler"}, {"accumulate_grad_batches": 3}], ids=str)
@pytest.mark.parametrize("net", [CountingNet, TwoOptimizerNet])
def test_rollback_is_bit_equal_in_everything_but_the_rates(tmp_path: Path, net: type[Net], kwargs: Any) -> None:
    if net is TwoOptimizerNet and "accumulate_grad_batches" in kwargs:
        pytest.skip("Lightning refuses it under manual optimization")
    kwargs = {"plugins": [loss_scaling(growth_interval=2)]} if "plugins" in kwargs else kwargs
    prune, guard = pruning(), AccuracyGuard("val_acc", action="rollback", patience=2)
    watch, values = Watch(prune), [0.9, 0.9, 0.5, 0.5, 0.9, 0.9, 0.9]
    schedule = LearningRateSchedule(warmup=0, decay="linear")
    fit(tmp_path, seeded(lambda: scripted(net)(values)), [prune, guard, watch, schedule], max_epochs=7, **kwargs)
    good, after = watch.seen[1], watch.seen[3]
    assert [action for action, _ in actions(guard)] == ["rollback", "resume"]
    assert not same(watch.seen[2]["weights"], good["weights"])
    for key in ("weights", "buffers", "masks", "sparsity", "scaler"):
        assert same(after[key], good[key]), key
    for then, now in zip(good["optimizers"], after["optimizers"], strict=True):
        assert same(then["state"], now["state"])
        assert now["param_groups"][0]["lr"] < then["param_groups"][0]["lr"]
    # Held for `patience` evaluations within the tolerance, and then tried again.
    assert watch.seen[4]["sparsity"] == watch.seen[5]["sparsity"] == good["sparsity"] < watch.seen[6]["sparsity"]


@ends_early
@pytest.mark.parametrize(
    "values",
    [
        [0.9, 0.9, 0.5, 0.5, 0.5, 0.5],
        [0.9, 0.9, 0.9, 0.9, 0.9, 0.5],
        [0.9, 0.5, 0.5, 0.9, 0.9, NAN],
        [0.5, 0.9, 0.85, 0.4, 0.9, 0.3],
    ],
    ids=str,
)
@pytest.mark.parametrize("patience", [1, 3])
def test_run_ends_with_the_most_compressed_point_that_held(tmp_path: Path, values: Any, patience: int) -> None:
    prune = pruning()
    guard = AccuracyGuard("val_acc", action="rollback", patience=patience, baseline=0.9)
    watch, module = Watch(prune), seeded(lambda: scripted()(values))
    run = fit(tmp_path, module, [prune, guard, watch], max_epochs=6)
    last_good = max(i for i, value in enumerate(values) if value == 0.9)
    assert same(dict(module.state_dict()), watch.seen[last_good]["weights"])
    assert prune._pruner.sparsity == watch.seen[last_good]["sparsity"][0]
    pruned, total = zeros(module)
    assert pruned / total == prune._pruner.sparsity
    assert float(run.callback_metrics["val_acc"]) == pytest.approx(0.9)


@ends_early
@pytest.mark.parametrize("rate", [0.1, 3.0, 1e4], ids="rate={}".format)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_absurd_run_ends_within_the_tolerance(tmp_path: Path, rate: float, precision: Any) -> None:
    class LateAbsurd(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch >= 4:
                trainer.optimizers[0].param_groups[0]["lr"] = rate

    guard = AccuracyGuard("val_acc", tolerance=0.02, action="rollback", patience=2)
    prune = GradualPruning(0.97, begin=0.4, end=0.8)
    module = seeded(NormNet)
    run = fit(tmp_path, module, [prune, guard, LateAbsurd()], max_epochs=10, precision=precision)
    assert guard._baseline is not None
    assert guard._baseline > 0.5
    [after] = run.validate(module, held_out(), verbose=False)
    assert after["val_acc"] >= guard._baseline - 0.02 - 1e-6
    assert guard.events[-1]["action"] in ("restore", "rollback")


def test_steps_that_no_validation_has_seen_are_given_up(tmp_path: Path) -> None:
    class OwnNet(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.9, batch_size=1)

    prune, guard = pruning(end=20), AccuracyGuard("val_acc", action="rollback")
    watch, module = Watch(prune), seeded(OwnNet)
    run = fit(tmp_path, module, [prune, guard, watch], val_check_interval=3)
    assert run.global_step == 4 * BATCHES
    assert actions(guard) == [("restore", 4 * BATCHES)]
    assert guard.events[0]["returned_to"] == 4 * BATCHES - 2
    assert same(dict(module.state_dict()), watch.seen[-1]["weights"])


@ends_early
def test_without_a_good_point_rollback_holds_and_says_so(tmp_path: Path) -> None:
    guard = AccuracyGuard("val_acc", action="rollback", baseline=0.9)
    with pytest.warns(UserWarning, match=r"ends with val_acc = 0\.5.*No point within was seen"):
        fit(tmp_path, seeded(lambda: scripted()([0.5] * 4)), [pruning(), guard])
    assert actions(guard) == [("hold", BATCHES)]


@pytest.mark.parametrize("is_first", [True, False])
def test_averaged_weights_are_rolled_back_too(tmp_path: Path, is_first: bool) -> None:
    prune, guard = pruning(end=BATCHES), AccuracyGuard("val_acc", action="rollback")
    average, module = EMAWeightAveraging(decay=0.8), seeded(lambda: scripted(NormNet)([0.9, 0.9, 0.9, 0.5]))
    kept: list[Any] = []

    class Keep(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert average._average_model is not None
            kept.append({k: v.clone() for k, v in average._average_model.state_dict().items()})

    ours = [prune, guard]
    fit(tmp_path, module, [*([average, *ours] if is_first else [*ours, average]), Keep()])
    kept = kept[1:]  # the first is the sanity check's
    assert same(kept[3], kept[2])
    averaged = {name.removeprefix("module."): value for name, value in kept[2].items() if name != "n_averaged"}
    assert same(dict(module.state_dict()), averaged)

    # Where the run ends before the guard's patience does, the average that held is what it ends with.
    kept.clear()
    guard = AccuracyGuard("val_acc", action="rollback", patience=2)
    average, prune = EMAWeightAveraging(decay=0.8), pruning(end=BATCHES)
    ours, module = [prune, guard], seeded(lambda: scripted(NormNet)([0.9, 0.9, 0.9, 0.5]))
    fit(tmp_path, module, [*([average, *ours] if is_first else [*ours, average]), Keep()])
    assert actions(guard) == [("restore", 4 * BATCHES)]
    averaged = {name.removeprefix("module."): value for name, value in kept[3].items() if name != "n_averaged"}
    assert same(dict(module.state_dict()), averaged)


def test_what_rollback_cannot_serve_is_refused(tmp_path: Path) -> None:
    guard = AccuracyGuard("val_acc", action="rollback")
    with pytest.raises(ValueError, match="average that no validation has seen.*action='hold'"):
        fit(tmp_path, seeded(Net), [pruning(), guard, StochasticWeightAveraging(swa_lrs=0.05)])
    other = AccuracyGuard("val_loss", mode="min", action="rollback")
    with pytest.raises(ValueError, match="Two guards .*'val_acc'.*'val_loss'.*different points"):
        fit(tmp_path, seeded(Net), [pruning(), guard, other])
    sharded = type("FSDPStrategy", (SingleDeviceStrategy,), {})  # the real one refuses the CPU
    with pytest.raises(ValueError, match="sharded parameters of FSDPStrategy.*'hold'"):
        fit(tmp_path, seeded(Net), [guard], strategy=sharded(device=torch.device("cpu")))


def test_compiled(tmp_path: Path) -> None:
    values = [0.9, 0.9, 0.5, 0.9]

    class Logging(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.log("val_acc", 0.1 if trainer.sanity_checking else values[trainer.current_epoch])

    module = seeded(NormNet)
    module.net = torch.compile(module.net, backend="eager")
    prune, guard = pruning(end=BATCHES), AccuracyGuard("val_acc", action="rollback")
    watch = Watch(prune)
    fit(tmp_path, module, [prune, guard, Logging(), watch])
    assert actions(guard) == [("rollback", 3 * BATCHES), ("resume", 4 * BATCHES)]
    assert same(watch.seen[2]["weights"], watch.seen[1]["weights"])


# --- resume -----------------------------------------------------------------------------------------------------------


@ends_early
@ends_outside
@pytest.mark.parametrize(("step", "saved_first"), [(3, False), (17, True), (23, False), (26, True), (36, False)])
@pytest.mark.parametrize("action", ["hold", "rollback"])
def test_resumes_bit_identically(tmp_path: Path, action: Any, step: int, saved_first: bool) -> None:
    values = [0.9, 0.9, 0.5, NAN if action == "hold" else 0.5, 0.9, 0.4]

    def run(extra: Sequence[Callback] = (), ckpt_path: Any = None) -> dict[str, Any]:
        module, prune = seeded(lambda: scripted(NormNet)(values)), pruning(end=0.9)
        guard = AccuracyGuard("val_acc", action=action)
        ours = [prune, LearningRateSchedule(), guard, CompressionReport(dir=str(tmp_path), plots=False, latency=False)]
        started = fit(
            tmp_path,
            module,
            [*extra, *ours] if saved_first else [*ours, *extra],
            ckpt_path,
            max_epochs=6,
        )
        state = guard.state_dict()
        for event in state["events"]:
            event["value"] = repr(event["value"])  # NaN is not equal to itself
        return everything(module, started, [prune]) | {"pruning": prune.state_dict(), "guard": state}

    with pytest.raises(Crash):
        run([CrashAt(step, tmp_path / "crash.ckpt")])
    torch.load(tmp_path / "crash.ckpt", weights_only=True)
    whole, resumed = run(), run(ckpt_path=tmp_path / "crash.ckpt")
    assert len(whole["guard"]["events"]) > 2
    for key in whole:
        assert same(whole[key], resumed[key]), key


@ends_early
@pytest.mark.parametrize("step", [7, 16, 22])
@pytest.mark.parametrize("net", [ManualNet, TwoOptimizerNet, Net])
def test_resumes_bit_identically_with_validation_in_mid_epoch(tmp_path: Path, net: type[Net], step: int) -> None:
    class OwnNet(net):  # type: ignore[valid-type,misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
            self.log("val_acc", 0.1 if 12 < seen < 18 else 0.9, batch_size=1)

    def run(extra: Sequence[Callback] = (), ckpt_path: Any = None) -> dict[str, Any]:
        module, prune, guard = seeded(OwnNet), pruning(end=20), AccuracyGuard("val_acc", action="rollback", patience=2)
        plugins = [] if net is TwoOptimizerNet else [loss_scaling(growth_interval=3)]
        started = fit(tmp_path, module, [prune, guard, *extra], ckpt_path, val_check_interval=2, plugins=plugins)
        return everything(module, started, [prune]) | {"guard": guard.state_dict()}

    step |= 1  # not between a batch and its validation, which Lightning skips in the resumed run
    step *= 2 if net is TwoOptimizerNet else 1  # the trainer counts the steps of both
    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(step, tmp_path / "crash.ckpt")])
    assert [event["action"] for event in whole["guard"]["events"]] == ["rollback", "resume"]
    resumed = run(ckpt_path=tmp_path / "crash.ckpt")
    for key in whole:
        assert same(whole[key], resumed[key]), key


# --- which metric, and when -------------------------------------------------------------------------------------------


def test_unknown_metric_is_an_error_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor='val_ac'.*Logged: train_loss, val_acc, val_loss\. Did you mean 'va"):
        fit(tmp_path, seeded(Net), [pruning(), AccuracyGuard("val_ac")])
    with pytest.raises(ValueError, match=r"monitor='val_acc'.*Logged: train_loss\."):
        fit(tmp_path, seeded(Net), [pruning(), AccuracyGuard("val_acc")], limit_val_batches=0)
    run = Trainer(callbacks=[AccuracyGuard("val_acc")], barebones=True, max_epochs=1, accelerator="cpu")
    with pytest.raises(ValueError, match="barebones=True"):
        run.fit(seeded(QuietNet), StatefulLoader(), held_out())


def test_unknown_metric_is_an_error_where_no_epoch_ends(tmp_path: Path) -> None:
    class Endless(StatefulLoader):
        __len__ = None  # type: ignore[assignment]

    run = trainer(
        tmp_path,
        [pruning(end=8), AccuracyGuard("val_ac")],
        max_epochs=-1,
        max_steps=100,
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    with pytest.raises(ValueError, match="monitor='val_ac'.*val_acc"):
        run.fit(seeded(Net), Endless(batches=1000), held_out())
    assert run.global_step == 10


@pytest.mark.parametrize("limit_val_batches", [0, 2])
def test_metric_that_training_alone_logs(tmp_path: Path, limit_val_batches: int) -> None:
    values = [0.9, 0.9, 0.5, 0.9]

    class OwnNet(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("acc", values[self.trainer.current_epoch], on_step=False, on_epoch=True)
            return self.loss(batch)

    guard = AccuracyGuard("acc")
    fit(tmp_path, seeded(OwnNet), [pruning(end=BATCHES), guard], limit_val_batches=limit_val_batches)
    assert actions(guard) == [("hold", 3 * BATCHES), ("resume", 4 * BATCHES)]
    assert guard._state.evaluations == 4


def test_validation_counts_where_training_logs_the_same_name(tmp_path: Path) -> None:
    class OwnNet(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("acc", 0.1, on_step=False, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("acc", 0.9)

    guard = AccuracyGuard("acc")
    fit(tmp_path, seeded(OwnNet), [pruning(end=BATCHES), guard])
    assert guard.events == []
    assert guard._state.evaluations == 4


def test_decides_only_when_there_is_a_new_value(tmp_path: Path) -> None:
    guard = AccuracyGuard("val_acc")
    values = [NAN, 0.9, NAN, 0.9, NAN, 0.9]
    run = [pruning(end=BATCHES), guard]
    fit(tmp_path, seeded(lambda: scripted()(values)), run, max_epochs=6, check_val_every_n_epoch=2)
    assert (guard.events, guard._state.evaluations) == ([], 3)


def test_a_metric_that_is_logged_now_and_then(tmp_path: Path) -> None:
    class OwnNet(Net):
        def __init__(self, values: dict[int, float]) -> None:
            super().__init__()
            self.values = values

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.current_epoch in self.values:
                self.log("val_acc", self.values[self.trainer.current_epoch], batch_size=1)

    prune, guard = pruning(begin=BATCHES, end=3 * BATCHES), AccuracyGuard("val_acc")
    module = seeded(lambda: OwnNet({0: 0.9, 2: 0.5, 4: 0.9}))
    fit(tmp_path, module, [prune, guard], max_epochs=6)
    assert actions(guard) == [("hold", 3 * BATCHES), ("resume", 5 * BATCHES)]
    assert guard._state.evaluations == 3
    with pytest.raises(ValueError, match=r"Logged: train_loss\..*has to be logged the first time too"):
        fit(tmp_path, seeded(lambda: OwnNet({1: 0.9, 3: 0.9})), [pruning(), guard])


def test_says_that_there_is_nothing_to_guard(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="monitor='val_acc'.*nothing to guard"):
        fit(tmp_path, seeded(Net), [AccuracyGuard("val_acc")])


# --- one object, many runs; with others -------------------------------------------------------------------------------


@ends_early
@ends_outside
@pytest.mark.parametrize("action", ["hold", "rollback", "stop"])
def test_one_object_serves_many_runs(tmp_path: Path, action: Any) -> None:
    values = [0.9, 0.5, 0.5, 0.9]
    prune, guard = pruning(), AccuracyGuard("val_acc", action=action)

    def once(guard: AccuracyGuard, prune: GradualPruning, width: int) -> Any:
        module = seeded(lambda: scripted()(values, width=width))
        run = fit(tmp_path, module, [prune, guard])
        assert not registry.is_held(module)
        assert registry.techniques(module) == []
        assert hooks_of(module, run) == 0
        events = guard.events
        module.values *= 2  # an epoch more has been counted
        run.validate(module, held_out(), verbose=False)
        run.test(module, held_out(), verbose=False)
        assert guard.events is events
        return dict(module.state_dict()), events

    once(guard, prune, 16)
    again = once(guard, prune, 24)
    assert same(again, once(AccuracyGuard("val_acc", action=action), pruning(), 24))


def test_leaves_nothing_behind_after_an_exception(tmp_path: Path) -> None:
    module = seeded(lambda: scripted()([0.9, 0.5, 0.5, 0.5]))
    guard, held = AccuracyGuard("val_acc"), []

    class Look(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            held.append(registry.is_held(pl_module))

    with pytest.raises(Crash):
        fit(tmp_path, module, [Look(), pruning(), guard, CrashAt(20, tmp_path / "crash.ckpt")])
    assert held == [True]
    assert not registry.is_held(module)
    assert registry.techniques(module) == []


@ends_early
@pytest.mark.parametrize("order", [1, -1])
def test_early_stopping_beside_it(tmp_path: Path, order: int) -> None:
    prune, guard = pruning(), AccuracyGuard("val_acc", action="rollback", patience=2)
    stopping, watch = EarlyStopping("val_acc", mode="max", patience=1), Watch(prune)
    module = seeded(lambda: scripted()([0.8, 0.9, 0.5, 0.5, 0.5, 0.5]))
    run = fit(tmp_path, module, [prune, *[guard, stopping][::order], watch], max_epochs=6)
    assert run.current_epoch == 3
    assert actions(guard) == [("restore", 3 * BATCHES)]
    assert same(dict(module.state_dict()), watch.seen[1]["weights"])


class Ramps(Callback):
    """What each training batch was done with."""

    def __init__(self, *techniques: Any) -> None:
        self.techniques = techniques
        self.rows: list[tuple[Any, ...]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        prune, quantize, distil, regularize = self.techniques
        at = distil._schedules
        ramps = at.temperature(distil._now), at.weight(distil._now), regularize._strength_at[""](regularize._clock)
        self.rows.append((prune._pruner.sparsity, quantize.stage(), *ramps))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@ends_early
@ends_outside
def test_all_ramps_stand_still_and_the_learning_rate_does_not(tmp_path: Path) -> None:
    distil = KnowledgeDistillation(
        seeded(lambda: Net(width=24)), temperature={"first": 8.0, "last": 2.0}, weight={"first": 0.9, "last": 0.1}
    )
    regularize = SparsityRegularization("l1", {"first": 0.0, "last": 1e-3})
    techniques = [pruning(), QuantizationAwareTraining(begin=3 * BATCHES), distil, regularize]
    ramps, module = Ramps(*techniques), seeded(lambda: scripted()([0.9, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9]))
    fit(tmp_path, module, [*techniques, LearningRateSchedule(), AccuracyGuard("val_acc"), ramps], max_epochs=7)
    held = ramps.rows[2 * BATCHES : 5 * BATCHES]  # from the second evaluation, the first that was down, to the fifth
    assert held == [held[0]] * 3 * BATCHES
    assert [row[1] for row in ramps.rows] == [0.0] * 6 * BATCHES + [1.0] * BATCHES  # its `begin` is delayed
    before, after = ramps.rows[2 * BATCHES - 2], ramps.rows[5 * BATCHES + 1]
    for place in (0, 2, 3, 4):  # they moved before, and go on where they stood
        assert before[place] != held[0][place] != after[place]
    assert all(later < earlier for earlier, later in pairwise(ramps.rates[8:]))


@pytest.mark.parametrize("net", [Net, ManualNet, TwoOptimizerNet])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_the_search_in_every_kind_of_loop(tmp_path: Path, net: type[Net], tolerance: float) -> None:
    class Limited(net):  # type: ignore[misc,valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pruned, total = zeros(self)
            self.log("val_acc", 0.9 if pruned / total <= 0.8 else 0.5, batch_size=1)

    prune = GradualPruning("auto", begin=0.1, end=0.8, every=1)
    guard = AccuracyGuard("val_acc", tolerance=tolerance, action="rollback")
    module = seeded(lambda: Limited(width=64))
    fit(tmp_path, module, [prune, guard], max_epochs=16)
    pruned, total = zeros(module)
    assert 0.75 < pruned / total <= 0.8
    assert guard.events[0]["baseline"] == pytest.approx(0.9)


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_cut_out_and_reported_is_what_was_restored(tmp_path: Path, order: int) -> None:
    prune = GradualPruning(0.5, granularity="channel", begin=0.1, end=0.9, every=1)
    guard = AccuracyGuard("val_acc", action="rollback", patience=2)
    report = CompressionReport(dir=str(tmp_path), plots=False, latency=False)
    module = seeded(lambda: scripted()([0.9, 0.9, 0.9, 0.5]))
    module.example_input_array = torch.zeros(2, module.net[0].in_features)
    watch = Watch(prune)
    run = fit(tmp_path, module, [watch, *[prune, guard, report][::order]])
    assert actions(guard) == [("restore", 4 * BATCHES)]
    assert same(dict(module.state_dict()), watch.seen[2]["weights"])
    x = torch.randn(5, module.net[0].in_features)
    assert torch.allclose(prune.pruned_module(x), module.eval()(x), atol=1e-6)
    assert report.figures is not None
    found = sum(row["zeros"] for row in report.figures["parameters"] if len(row["shape"]) > 1)
    assert found == zeros(module)[0]
    assert report.figures["metrics"]["val_acc"] == pytest.approx(float(run.callback_metrics["val_acc"]))
    assert report.figures["metrics"]["val_acc"] == pytest.approx(0.9)


@ends_early
@ends_outside
def test_ramp_is_held_as_long_as_one_of_two_guards_holds_it(tmp_path: Path) -> None:
    losses = [1.0, 1.0, 1.0, 2.0, 2.0, 1.0]

    class OwnNet(scripted()):  # type: ignore[misc]
        def on_validation_epoch_end(self) -> None:
            self.log("loss", losses[self.trainer.current_epoch])

    prune = pruning()
    guards = AccuracyGuard("val_acc"), AccuracyGuard("loss", mode="min", action="hold")
    watch = Watch(prune)
    module = seeded(lambda: OwnNet([0.9, 0.9, 0.5, 0.5, 0.9, 0.9]))
    run = fit(tmp_path, module, [prune, *guards, watch], max_epochs=6)
    assert actions(guards[0]) == [("hold", 3 * BATCHES), ("resume", 5 * BATCHES)]
    assert actions(guards[1]) == [("hold", 4 * BATCHES), ("resume", 6 * BATCHES)]
    sparsity = [seen["sparsity"][0] for seen in watch.seen]
    assert sparsity[1] < sparsity[2] == sparsity[3] == sparsity[4] == sparsity[5]
    assert "compress/held" in run.callback_metrics


def test_report_tells_what_the_guard_did(tmp_path: Path) -> None:
    guard, report = AccuracyGuard("val_acc"), CompressionReport(dir=str(tmp_path), plots=False, latency=False)
    values = [0.9, 0.5, 0.9, 0.9]
    fit(tmp_path, seeded(lambda: scripted()(values)), [pruning(end=BATCHES), guard, report])
    assert report.figures is not None
    [entry] = [technique for technique in report.figures["techniques"] if technique["technique"] == "guard"]
    assert entry["summary"] == (
        "val_acc no more than 0.01 below 0.9 at 3 of 4 evaluations; "
        "hold at step 16, val_acc = 0.5; resume at step 24, val_acc = 0.9"
    )
    assert report.figures["totals"]["claimed_sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert not any("not complete" in note for note in report.figures["notes"])


# --- case 13: the best compressed epoch -------------------------------------------------------------------------------


class Publish(Callback):
    """What ``GradualPruning`` does."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_if_best_is_uncompressed(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        publish_compressed_metrics(trainer, pl_module)


class Falling(Net):
    """Its accuracy is highest while it is dense."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pruned, total = zeros(self)
        self.log("val_acc", 1 - pruned / total / 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_last": True},
        {"every_n_train_steps": 5},
        {"save_on_train_epoch_end": True},
        {"save_on_train_epoch_end": False},
        {"save_top_k": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("val_check_interval", [1.0, 3])
def test_case_13_best_of_the_compressed(tmp_path: Path, options: dict[str, Any], val_check_interval: Any) -> None:
    best = ModelCheckpoint(tmp_path, monitor="compress/val_acc", mode="max", **options)
    fit(
        tmp_path,
        seeded(Falling),
        [GradualPruning(0.95, begin=0.1, end=0.6), Publish(), best],
        max_epochs=6,
        val_check_interval=val_check_interval,
        enable_checkpointing=True,
    )
    plain = seeded(Falling)
    plain.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    pruned, total = zeros(plain)
    assert abs(pruned / total - 0.95) < 1 / total
    assert best.best_model_score == pytest.approx(1 - 0.95 / 2, abs=1e-3)


def test_case_13_ordinary_best_is_dense_and_there_is_a_warning(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    prune = GradualPruning(0.95, begin=0.3, end=0.6)
    with pytest.warns(UserWarning, match=r"may keep .*\(monitor='compress/val_acc', mode='max'"):
        fit(tmp_path, seeded(Falling), [prune, Publish(), best], max_epochs=6, enable_checkpointing=True)
    plain = seeded(Falling)
    plain.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert zeros(plain)[0] == 0


@pytest.mark.parametrize("quiet", [{"save_top_k": -1}, {"save_top_k": 0}, {"monitor": None}])
def test_no_warning_where_nothing_is_chosen(tmp_path: Path, quiet: dict[str, Any]) -> None:
    keep = ModelCheckpoint(tmp_path, **{"monitor": "val_acc", "mode": "max"} | quiet)
    fit(tmp_path, seeded(Falling), [pruning(), Publish(), keep], enable_checkpointing=True)


def test_published_metrics_do_not_replace_those_of_others(tmp_path: Path) -> None:
    class OwnNet(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sparsity", 0.25)  # GradualPruning logs compress/sparsity

    run = fit(tmp_path, seeded(OwnNet), [pruning(end=0.5), Publish()])
    assert float(run.callback_metrics["compress/sparsity"]) == pytest.approx(0.8, abs=1e-3)


@ends_early
def test_rollback_takes_the_published_metric_back(tmp_path: Path) -> None:
    prune, guard = pruning(end=3 * BATCHES), AccuracyGuard("val_acc", action="rollback")
    run = fit(tmp_path, seeded(lambda: scripted()([0.9, 0.9, 0.5, 0.9])), [prune, Publish(), guard])
    assert prune.stage() < 1
    assert math.isnan(run.callback_metrics["compress/val_acc"])


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path) -> None:
    """Ranks that log different values decide alike, and return to the same weights."""
    root = Path(__file__).parents[1]
    worker = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(root / "tests/guard_worker.py")]
    subprocess.run(
        [sys.executable, *worker, str(tmp_path)],
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
    )
    results = [torch.load(tmp_path / f"guard_rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert set(results[0]) == {"hold", "rollback", "stop", "resumed"}
    assert same(results[0], results[1])
    assert same(results[0]["rollback"], results[0]["resumed"])
    assert [event["action"] for event in results[0]["hold"]["events"]] == ["hold", "resume"]
    assert [event["action"] for event in results[0]["rollback"]["events"]] == ["rollback", "resume"] * 2
    assert results[0]["stop"]["events"][0]["step"] == 2 * BATCHES
    assert results[0]["hold"]["events"][0]["value"] == pytest.approx(0.7)  # the mean of 0.9 and 0.5
