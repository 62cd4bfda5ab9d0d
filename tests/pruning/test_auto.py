"""The search for the sparsity that a guard allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compress import AccuracyGuard, CompressionReport, GradualPruning
from tests.helpers import BATCHES, Crash, CrashAt, Net, StatefulLoader, held_out, same, seeded, snapshot, trainer, zeros

TOTAL = zeros(Net(width=64))[1]


class Limited(Net):
    """A model that is good up to a share of zeros, and bad beyond."""

    def __init__(self, limit: float = 0.9) -> None:
        super().__init__(width=64)
        self.limit = limit

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pruned, total = zeros(self)
        self.log("val_acc", 0.9 if pruned / total <= self.limit else 0.5, batch_size=1)


class Zeros(Callback):
    """Count zeros after each step."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.at[trainer.global_step] = zeros(pl_module)[0]


def guard(action: Any = "rollback", **kwargs: Any) -> AccuracyGuard:
    return AccuracyGuard("val_acc", tolerance=0.05, baseline=0.9, action=action, **kwargs)


def pruning(**kwargs: Any) -> GradualPruning:
    return GradualPruning("auto", **({"begin": 0.05, "end": 0.8, "every": 2} | kwargs))


def fit(path: Path, module: Any, callbacks: Sequence[Callback], ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    run = trainer(path, callbacks, **({"max_epochs": 20} | kwargs))
    run.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
    return run


# --- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ({}, 0.9),
        ({"regrowth": "feedback"}, 0.97),
        ({"regrowth": 0.3, "scope": "layer"}, 0.6),
        ({"criterion": "gradient_weight", "scope": "erk"}, 0.9),
        ({"granularity": "block:4x1"}, 0.8),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_run_ends_close_under_the_limit(tmp_path: Path, arguments: Any, limit: float, order: int) -> None:
    module, callback, watch = seeded(lambda: Limited(limit)), pruning(**arguments), guard()
    report = CompressionReport(dir=str(tmp_path), latency=False, plots=False)
    run = fit(tmp_path, module, [*[callback, watch][::order], report])  # without a warning
    pruned, total = zeros(module)
    assert 1 - limit <= 1 - pruned / total < 1.15 * (1 - limit)
    assert callback.stage() == 1.0
    assert float(run.callback_metrics["compress/val_acc"]) == pytest.approx(0.9)
    assert f"{pruned / total:.4g} of 5,120" in callback.summary() or arguments.get("granularity")
    curve = [entry["sparsity"] for entry in report.figures["history"]]
    assert curve[-1] == pytest.approx(pruned / total)
    assert sum(later > earlier for earlier, later in pairwise(curve)) >= 3
    assert sum(event["action"] == "rollback" for event in watch.events) >= 2


def test_channels_are_searched_and_cut_out(tmp_path: Path) -> None:
    module, callback = seeded(lambda: Limited(0.6)), pruning(granularity="channel")
    module.example_input_array = torch.zeros(2, 12)
    fit(tmp_path, module, [callback, guard()])
    pruned, total = zeros(module)
    assert 0.56 < pruned / total <= 0.6
    assert callback.pruned_module.net[0].out_features < 64
    x = torch.randn(3, 12)
    assert torch.allclose(callback.pruned_module(x), module.eval()(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:AccuracyGuard. the run ends with")
def test_a_hold_that_never_ends_keeps_the_sparsity_of_its_beginning(tmp_path: Path) -> None:
    module, callback, watch, record = seeded(Limited), pruning(), guard("hold"), Zeros()
    fit(tmp_path, module, [callback, watch, record])
    [event] = watch.events
    assert zeros(module)[0] == record.at[event["step"]]
    assert zeros(module)[0] > 0.9 * TOTAL
    assert callback.stage() == 1.0


def test_nothing_that_holds_leaves_the_dense_model(tmp_path: Path) -> None:
    module, callback, watch = seeded(lambda: Limited(0.0)), pruning(), guard()
    fit(tmp_path, module, [callback, watch])
    assert zeros(module)[0] == 0
    assert callback._search.pace < 0.1  # each attempt was slower, also from where nothing is pruned


# --- the way ----------------------------------------------------------------------------------------------------------


def test_the_density_falls_by_equal_factors(tmp_path: Path) -> None:
    record = Zeros()
    fit(tmp_path, seeded(lambda: Limited(1.0)), [pruning(begin=8, end=40, every=4), guard(), record], max_epochs=6)
    for step in range(1, 6 * BATCHES + 1):
        t = 0.0 if step < 8 else min((step - step % 4 - 8) / 32, 28 / 32)  # at 40 the masks are frozen
        last = round(0.999 * TOTAL)
        assert abs((TOTAL - record.at[step]) - TOTAL * ((TOTAL - last) / TOTAL) ** t) <= 1, step


def test_after_a_rollback_it_goes_on_half_as_fast(tmp_path: Path) -> None:
    class Twice(Limited):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.5 if self.trainer.current_epoch in (2, 3) else 0.9, batch_size=1)

    record = Zeros()
    callbacks = [pruning(begin=0, end=10 * BATCHES, every=1), guard(), record]
    fit(tmp_path, seeded(Twice), callbacks, max_epochs=10)
    [before, back, still, on] = [math.log(1 - record.at[8 * epoch] / TOTAL) for epoch in (1, 4, 5, 6)]
    way = math.log(0.001)
    assert before == pytest.approx(way / 10, rel=0.01)
    assert back == still == pytest.approx(2 * way / 10, rel=0.01)  # that of the second epoch
    assert on - still == pytest.approx(0.5 * way / 10, rel=0.01)  # two rollbacks in a row are one hold
    [later, last] = [math.log(1 - record.at[8 * epoch] / TOTAL) for epoch in (8, 9)]
    assert last - later == pytest.approx(way / 10, rel=0.02)  # after a quarter of the ramp without a hold


def test_at_the_end_the_search_is_over_whatever_was_held(tmp_path: Path) -> None:
    record = Zeros()
    fit(tmp_path, seeded(Limited), [pruning(end=0.5), guard(), record])
    after = [record.at[step] for step in range(10 * BATCHES + 1, 20 * BATCHES + 1)]
    assert after == sorted(after, reverse=True)
    assert after[-1] <= 0.9 * TOTAL


def test_a_small_layer_keeps_one_weight(tmp_path: Path) -> None:
    class Small(Limited):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.net.append(nn.Linear(4, 4))

    module = seeded(Small)
    fit(tmp_path, module, [pruning(scope="layer", every=1, end=1.0), guard()])
    assert 1 <= int((module.net[5].weight != 0).sum()) <= 2


@pytest.mark.parametrize("step", [37, 66, 81, 140])
@pytest.mark.parametrize("arguments", [{}, {"regrowth": "feedback"}, {"regrowth": 0.3}])
def test_resumes_bit_identically(tmp_path: Path, step: int, arguments: Any) -> None:
    def run(extra: Sequence[Callback] = (), path: Path | None = None) -> Any:
        module, callback, watch = seeded(Limited), pruning(**arguments), guard()
        result = fit(tmp_path, module, [callback, watch, *extra], path)
        return snapshot(module, result) | {"pruning": callback.state_dict(), "events": watch.events}

    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(step, tmp_path / "stopped.ckpt")])
    torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert same(run(path=tmp_path / "stopped.ckpt"), whole)


def test_the_best_compressed_checkpoint_is_one_after_the_search(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="compress/val_acc", mode="max")
    fit(tmp_path, seeded(Limited), [pruning(end=0.5), guard(), best], enable_checkpointing=True)
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert checkpoint["global_step"] > 10 * BATCHES - 1
    weights = [w for name, w in checkpoint["state_dict"].items() if name.endswith("weight")]
    assert 0.85 < sum(int((w == 0).sum()) for w in weights) / TOTAL <= 0.9


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [guard("stop")]], ids=["no guard", "stop"])
def test_a_guard_that_cannot_hold_is_refused(tmp_path: Path, others: Any) -> None:
    with pytest.raises(ValueError, match=r"`final_sparsity='auto'` needs a guard.*AccuracyGuard\(\.\.\., action='roll"):
        fit(tmp_path, seeded(Limited), [pruning(), *others])


def test_no_time_to_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"searches from `begin=0\.5` to `end=0\.5`.*give a later `end`"):
        fit(tmp_path, seeded(Limited), [pruning(begin=0.5, end=0.5), guard()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_sparsity": "Auto"}, "`final_sparsity` must be a number"),
        ({"final_sparsity": {"net.0": "auto"}}, "final_sparsity"),
        ({"final_sparsity": "auto", "schedule": "linear"}, "leave `schedule` out, got 'linear'"),
        ({"final_sparsity": "auto", "granularity": "2:4"}, "has a sparsity of 0.5: leave `final_sparsity` out"),
    ],
)
def test_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualPruning(**arguments)


def test_a_run_that_ends_before_the_search_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"stopped before `end=0\.8` \(step 128\).*that the guard allows"):
        fit(tmp_path, seeded(Limited), [pruning(), guard(), Stop(40)])


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step
