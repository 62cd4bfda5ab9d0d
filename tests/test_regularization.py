"""SparsityRegularization against loss + term by autograd, written anew here, in float64."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_compress import AccuracyGuard, GradualPruning, QuantizationAwareTraining, registry
from lightning_compress.moments import Schedule
from lightning_compress.penalties import PENALTIES, groups
from lightning_compress.regularization import SparsityRegularization
from tests.helpers import (
    BATCHES,
    FEATURES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    Net,
    StatefulLoader,
    held_out,
    hooks_of,
    loss_scaling,
    same,
    seeded,
    snapshot,
    trainer,
)

ROOT = Path(__file__).parents[1]
STRENGTH = 0.03

# --- the terms, by their formulas -------------------------------------------------------------------------------------


def matrices(module: nn.Module) -> list[Tensor]:
    return list({child.weight: None for child in module.modules() if isinstance(child, nn.Linear)})  # shared ones once


def row_norms(weight: Tensor) -> Tensor:
    return sum((math.sqrt(len(row)) * (row * row).sum().sqrt() for row in weight), torch.zeros(()))


TERMS: dict[str, Callable[[nn.Module], Any]] = {
    "l1": lambda module: sum(w.abs().sum() for w in matrices(module)),
    "l2": lambda module: sum((w * w).sum() for w in matrices(module)),
    "group_lasso": lambda module: sum(row_norms(w) for w in matrices(module)),
    "hoyer": lambda module: sum(w.abs().sum() ** 2 / (w * w).sum() for w in matrices(module)),
    "batchnorm_scale": lambda module: module.norm.weight.abs().sum(),
}


class Doubled(Net):
    """A net in float64 with a batch norm, whose loss may have a term; it keeps the gradients that optimizers saw."""

    def __init__(self, term: Callable[[nn.Module], Any] | None = None, optimizer: Any = None) -> None:
        super().__init__(optimizer=optimizer)
        self.norm = nn.BatchNorm1d(16)
        self.net.insert(1, self.norm)
        self.term = term
        self.seen: list[list[Tensor]] = []
        self.double()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss = super().loss((x.double(), y))
        return loss if self.term is None else loss + STRENGTH * self.term(self)

    def watch(self, *optimizers: Any) -> None:
        for optimizer in optimizers:
            optimizer.register_step_post_hook(lambda stepped, args, kwargs: self.seen.append(gradients(stepped)))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.watch(optimizer)
        return optimizer


def gradients(optimizer: Any) -> list[Tensor]:
    every = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return [gradient.clone() for gradient in every if gradient is not None]


class Manual(Doubled):
    """Manual optimization by Lightning's wrapper, with two batches a step."""

    is_raw = clips = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=not self.is_raw)
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            if self.clips:
                self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()
            optimizer.zero_grad()


class Raw(Manual):
    """Manual optimization behind Lightning's back."""

    is_raw = True


class Clipping(Manual):
    """Manual optimization that clips."""

    clips = True


class RawClosure(Raw):
    """Manual optimization behind Lightning's back, by a closure."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class TwoOptimizers(Manual):
    """One optimizer for some layers, another for the others and one that both have."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for place, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if place == 0 or batch_idx % 3:
                optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.SGD(self.net[:4].parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam(self.net[4:].parameters()),
        ]
        self.watch(*optimizers)
        return optimizers


class Odd(Doubled):
    """A layer that the loss does not know, one that is frozen, two that share their weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unused = nn.Linear(3, 5)
        self.net[3].requires_grad_(False)
        self.net.insert(4, nn.Linear(16, 16))
        self.net[4].weight = nn.Parameter(self.net[3].weight.detach().clone())
        self.net.insert(5, nn.Linear(16, 16, bias=False))
        self.net[5].weight = self.net[4].weight
        self.double()


class NestedSGD(torch.optim.SGD):
    """An optimizer whose `step` calls that of its class: torch runs the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class ScaledDouble(MixedPrecision):
    """Loss scaling without rounding."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def autocast_context_manager(self) -> Any:
        return contextlib.nullcontext()


def lbfgs(search: str | None) -> Any:
    return lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn=search)


SITUATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Doubled, {}),
    "accumulation": (Doubled, {"accumulate_grad_batches": 4}),
    "clipped_norm": (Doubled, {"gradient_clip_val": 0.05}),
    "clipped_value": (Doubled, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "loss_scaling": (Doubled, {"plugins": [ScaledDouble], "gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
    "loss_scaling_manual": (Manual, {"plugins": [ScaledDouble]}),
    "loss_scaling_manual_clipped": (Clipping, {"plugins": [ScaledDouble]}),
    "loss_scaling_fused": (
        lambda term=None: Doubled(term, lambda p: torch.optim.Adam(p, fused=True)),
        {"plugins": [ScaledDouble]},
    ),
    "adamw": (lambda term=None: Doubled(term, torch.optim.AdamW), {}),
    "nested": (lambda term=None: Doubled(term, lambda p: NestedSGD(p, lr=0.1)), {}),
    "lbfgs": (lambda term=None: Doubled(term, lbfgs(None)), {}),
    "lbfgs_line_search": (lambda term=None: Doubled(term, lbfgs("strong_wolfe")), {"max_epochs": 1}),
    "manual": (Manual, {}),
    "manual_clipped": (Clipping, {}),
    "raw": (Raw, {}),
    "raw_closure": (RawClosure, {}),
    "raw_lbfgs": (lambda term=None: RawClosure(term, lbfgs("strong_wolfe")), {"max_epochs": 1}),
    "two_optimizers": (TwoOptimizers, {}),
    "odd_parameters": (Odd, {}),
}


def fit(tmp_path: Path, module: LightningModule, callbacks: Any = (), **kwargs: Any) -> Any:
    kwargs["plugins"] = [make() for make in kwargs.get("plugins", [])]
    run = trainer(tmp_path, callbacks, **({"max_epochs": 2, "limit_val_batches": 0, "log_every_n_steps": 1} | kwargs))
    run.fit(module, StatefulLoader(), held_out() if isinstance(module, Net) else None)
    return run


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("penalty", TERMS)
def test_gradients_are_those_of_loss_and_term(tmp_path: Path, penalty: str, situation: str) -> None:
    make, kwargs = SITUATIONS[situation]
    torch.optim.SGD([torch.zeros(1)])  # hooks of the class run too, see NestedSGD
    skipping = [InfiniteGradientAt(4)] if situation == "loss_scaling" else []
    module, reference = seeded(make), seeded(lambda: make(TERMS[penalty]))
    callback = SparsityRegularization(penalty, STRENGTH)
    run = fit(tmp_path, module, [callback, *skipping], **kwargs)
    if penalty != "batchnorm_scale" and situation == "odd_parameters":
        # The frozen layer is a constant of the term.
        assert module.net[3].weight.grad is None
    fit(tmp_path, reference, [type(one)(4) for one in skipping], **kwargs)
    assert len(module.seen) == len(reference.seen) > 2
    for ours, theirs in zip(module.seen, reference.seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    for (name, ours), theirs in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, msg=name)
    assert hooks_of(module, run) == len(run.optimizers)  # those of the test
    assert "clip_gradients" not in vars(module)


def test_without_the_term_the_comparison_fails(tmp_path: Path) -> None:
    plain, reference = seeded(Doubled), seeded(lambda: Doubled(TERMS["l1"]))
    fit(tmp_path, plain)
    fit(tmp_path, reference)
    assert not torch.allclose(plain.seen[0][0], reference.seen[0][0], atol=1e-3)


# --- case 16, and what proximal operators do --------------------------------------------------------------------------


class Weight(LightningModule):
    """One weight that the loss does not depend on, between −0.55 and 0.55; SGD. It remembers each step."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1, bias=False)
        self.layer.weight.data = torch.linspace(-0.55, 0.55, FEATURES)[None]
        self.lr = lr
        self.trace: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trace.append(self.layer.weight.detach().clone())
        return 0.0 * self.layer(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("penalty", ["l1", "proximal_l1"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("plugins", [[], [loss_scaling]], ids=["float32", "scaled"])
def test_case_16(tmp_path: Path, plugins: Any, accumulation: int, penalty: str) -> None:
    module = seeded(Weight)
    before = module.layer.weight.detach().clone()
    callback = SparsityRegularization(penalty, strength=0.1)
    fit(tmp_path, module, [callback], plugins=plugins, accumulate_grad_batches=accumulation, max_epochs=-1, max_steps=1)
    fallen = before.abs() - module.layer.weight.detach().abs()
    assert torch.allclose(fallen, torch.full_like(fallen, 0.01), atol=1e-6)


class SlowBias(Doubled):
    """Two groups of parameters with rates of their own."""

    def configure_optimizers(self) -> Any:
        slow = {"params": self.net[0].parameters(), "lr": 0.02}
        rest = {"params": [p for layer in self.net[1:] for p in layer.parameters()]}
        self.optimizer = torch.optim.SGD([slow, rest], lr=0.1, momentum=0.9)
        return self.optimizer


def shrunk_by_rows(weight: Tensor, threshold: float) -> Tensor:
    rows = []
    for row in weight:
        norm = math.sqrt(float((row * row).sum()))
        rows.append(row * max(0.0, 1.0 - threshold * math.sqrt(len(row)) / norm) if norm else row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("penalty", "shrunk"),
    [("proximal_l1", nn.functional.softshrink), ("proximal_group_lasso", shrunk_by_rows)],
)
def test_proximal_operators_follow_the_step(tmp_path: Path, penalty: str, shrunk: Callable[..., Tensor]) -> None:
    strength = 0.05

    class Reference(SlowBias):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                for weight in matrices(self):
                    rate = 0.02 if weight is self.net[0].weight else 0.1
                    weight.copy_(shrunk(weight, rate * strength))

    module, reference = seeded(SlowBias), seeded(Reference)
    fit(tmp_path, module, [SparsityRegularization(penalty, strength)], max_epochs=6)
    fit(tmp_path, reference, max_epochs=6)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert sum(int((weight == 0).sum()) for weight in matrices(module)) > 20
    if penalty == "proximal_group_lasso":
        assert ((module.net[0].weight == 0).all(1) == (module.net[0].weight == 0).any(1)).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_shrinks_nothing(tmp_path: Path, fused: bool) -> None:
    class Fused(Weight):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, fused=fused)

    module = seeded(Fused)
    callback = SparsityRegularization("proximal_l1", 0.05)
    fit(tmp_path, module, [callback, InfiniteGradientAt(2)], plugins=[loss_scaling], max_epochs=1)
    falls = [float((a.abs() - b.abs()).max()) for a, b in pairwise(module.trace)]
    assert falls == pytest.approx([0.005, 0.005, 0.0, 0.005, 0.005, 0.005, 0.005], abs=1e-6)


def test_the_hooks_of_a_nested_step_shrink_once(tmp_path: Path) -> None:
    class Nested(Weight):
        def configure_optimizers(self) -> Any:
            return NestedSGD(self.parameters(), lr=self.lr)

    torch.optim.SGD([torch.zeros(1)])
    module = seeded(Nested)
    fit(tmp_path, module, [SparsityRegularization("proximal_l1", 0.05)], max_epochs=1)
    assert float((module.trace[0].abs() - module.trace[1].abs()).max()) == pytest.approx(0.005, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_without_a_loss_there_is_no_term(tmp_path: Path) -> None:
    class Silent(Weight):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    for penalty in ("l1", "proximal_l1"):
        module = seeded(Silent)
        fit(tmp_path, module, [SparsityRegularization(penalty, 0.05)], max_epochs=1)
        falls = [float((a.abs() - b.abs()).max()) for a, b in pairwise(module.trace)]
        assert falls == pytest.approx([0.005, 0.0, 0.005, 0.0, 0.005, 0.0, 0.005], abs=1e-6)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_is_a_filter_a_neuron_or_a_head() -> None:
    torch.manual_seed(0)
    conv, transposed = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert [tuple(part.flatten(1).shape) for part in groups(conv.weight, conv, "weight")] == [(4, 27)]
    # Output channel 3 + o of a transposed convolution reads the inputs of the second group.
    parts = groups(transposed.weight, transposed, "weight")
    assert torch.equal(parts[1][2], transposed.weight[2:4, 2])
    attention = nn.MultiheadAttention(8, 2)
    q, k, v = attention.in_proj_weight.chunk(3)
    (part,) = groups(attention.in_proj_weight, attention, "in_proj_weight")
    assert torch.equal(part[1], torch.stack([q[4:], k[4:], v[4:]]))
    apart = nn.MultiheadAttention(8, 2, kdim=5)
    (part,) = groups(apart.k_proj_weight, apart, "k_proj_weight")
    assert torch.equal(part[1], apart.k_proj_weight[4:])


@pytest.mark.parametrize("kdim", [None, 5])
def test_group_lasso_takes_whole_heads(kdim: int | None) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=kdim).double()
    if kdim is None:
        heads = [attention.in_proj_weight.view(3, 2, 4, 8)[:, head] for head in range(2)]
        names = ["in_proj_weight"]
    else:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        heads = [getattr(attention, name)[rows] for name in names for rows in (slice(4), slice(4, 8))]
    expected = sum(math.sqrt(head.numel()) * (head * head).sum().sqrt() for head in heads)
    expected.backward()
    weights = [getattr(attention, name) for name in names]
    parts = [part for name, w in zip(names, weights, strict=True) for part in groups(w.detach(), attention, name)]
    assert torch.allclose(PENALTIES["group_lasso"].value(parts), expected.detach())
    ours = [torch.zeros_like(weight) for weight in weights]
    views = [part for name, g in zip(names, ours, strict=True) for part in groups(g, attention, name)]
    PENALTIES["group_lasso"].add_gradient_(views, parts, 1.0)
    for gradient, weight in zip(ours, weights, strict=True):
        assert torch.allclose(gradient, weight.grad, rtol=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zeros_stay_zeros_in_every_type(name: str, dtype: torch.dtype) -> None:
    penalty = PENALTIES[name]
    weight = torch.zeros(3, 4000, dtype=dtype)
    weight[0] = 300.0  # the sum of which float16 cannot hold
    before = weight.clone()
    if penalty.add_gradient_ is not None:
        gradient = torch.zeros_like(weight)
        penalty.add_gradient_([gradient, torch.zeros_like(weight)], [weight, torch.zeros_like(weight)], 0.5)
        assert gradient.isfinite().all()
        assert (gradient[1:] == 0).all()
    else:
        penalty.shrink_([weight], 100.0)
        assert (weight[0] < before[0]).all()
    assert (weight[1:] == 0).all()
    assert math.isfinite(penalty.value([weight, torch.zeros_like(weight)]))


@pytest.mark.parametrize("name", ["l1", "hoyer", "proximal_l1"])
def test_large_weights_are_served_one_after_another(name: str) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(2**21 + 1) for _ in range(3)]
    penalty = PENALTIES[name]
    if penalty.shrink_ is not None:
        expected = [nn.functional.softshrink(weight, 0.5) for weight in weights]
        penalty.shrink_(weights, 0.5)
        assert all(map(torch.equal, weights, expected))
        return
    ours = [torch.zeros_like(weight) for weight in weights]
    penalty.add_gradient_(ours, weights, 2.0)
    for weight, gradient in zip(weights, ours, strict=True):
        exact = weight.double().requires_grad_()
        (2.0 * (exact.abs().sum() if name == "l1" else exact.abs().sum() ** 2 / (exact * exact).sum())).backward()
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=5e-4, atol=1e-3)


# --- when -------------------------------------------------------------------------------------------------------------


class Holds(Callback):
    """Hold the ramps from one step to another, in a resumed run too."""

    def __init__(self, first: int, last: int) -> None:
        self.steps = range(first, last)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        registry.hold(pl_module, self, trainer.global_step in self.steps)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        registry.hold(pl_module, self, trainer.global_step in self.steps)


def falls(tmp_path: Path, callback: Callback, *others: Callback, manual: bool = False) -> list[float]:
    """What each of eight steps took from a weight, over the learning rate: the strength."""

    class ManualWeight(Weight):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()

    module = seeded(ManualWeight if manual else Weight)
    module.automatic_optimization = not manual
    with torch.no_grad():
        module.layer.weight.fill_(1.0)
    fit(tmp_path, module, [callback, *others], max_epochs=1)
    trace = [*module.trace, module.layer.weight.detach()]
    return [round(float((a - b).max()) / 0.1, 4) for a, b in pairwise(trace)]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("penalty", ["l1", "proximal_l1"])
def test_it_acts_from_begin_to_end(tmp_path: Path, penalty: str, manual: bool) -> None:
    callback = SparsityRegularization(penalty, 0.1, begin=2, end=0.75)
    assert falls(tmp_path, callback, manual=manual) == [0, 0, 0.1, 0.1, 0.1, 0.1, 0, 0]


RAMP = {"first": 0.0, "last": 0.8, "begin": 0, "end": 8}


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("strength", [RAMP, Schedule(**RAMP), lambda t: 0.8 * t], ids=["dict", "schedule", "function"])
def test_the_strength_follows_a_schedule(tmp_path: Path, strength: Any, manual: bool) -> None:
    expected = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert falls(tmp_path, SparsityRegularization("l1", strength), manual=manual) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("manual", [False, True])
def test_a_hold_stops_the_clock(tmp_path: Path, manual: bool) -> None:
    callback = SparsityRegularization("l1", RAMP, end=5)
    expected = [0, 0.1, 0.2, 0.2, 0.2, 0.3, 0.4, 0]
    assert falls(tmp_path, callback, Holds(3, 5), manual=manual) == pytest.approx(expected, abs=1e-4)
    point = callback.snapshot()
    callback.rollback({"clock": 2})
    assert (point, callback.snapshot()) == ({"clock": 5}, {"clock": 2})


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_hold_survives_a_resume(tmp_path: Path, step: int) -> None:
    def run(*others: Callback, path: Path | None = None) -> tuple[Any, Any]:
        module, callback = seeded(Net), SparsityRegularization("l1", RAMP)
        started = trainer(tmp_path, [callback, Holds(3, 5), *others], max_epochs=1)
        started.fit(module, StatefulLoader(), held_out(), ckpt_path=path)
        return snapshot(module, started), callback.state_dict()

    whole = run()
    with pytest.raises(Crash):
        run(CrashAt(step, tmp_path / "crash.ckpt"))
    assert same(whole, run(path=tmp_path / "crash.ckpt"))
    assert whole[1] == {"last_step": 7, "delay": 2}


def test_a_guard_ignores_it(tmp_path: Path) -> None:
    guard, module = AccuracyGuard("val_acc", tolerance=0.9), seeded(Net)
    callbacks = [SparsityRegularization("l1", 1e-3), GradualPruning(0.8, begin=0.3, end=0.6, every=2), guard]
    run = trainer(tmp_path, callbacks)
    run.fit(module, StatefulLoader(), held_out())
    stages = [callback.stage() for callback in callbacks]
    assert stages == [1.0, 1.0, 1.0]
    assert guard.baseline is None
    assert not guard.events


# --- which ------------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_sets_the_strength(tmp_path: Path) -> None:
    module = seeded(lambda: Doubled(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.loss = lambda batch: 0.0 * sum(p.sum() for p in module.parameters())
    strength = {"net.0": 0.1, "net.[03]": RAMP | {"first": 0.2, "last": 0.2}}
    fit(tmp_path, module, [SparsityRegularization("l1", strength)], max_epochs=-1, max_steps=1)
    for name, parameter in module.named_parameters():
        fallen = {"net.0.weight": 0.01, "net.3.weight": 0.02}.get(name, 0.0)
        kept = before[name].abs() > 0.03
        assert torch.allclose((before[name] - parameter).abs()[kept], torch.tensor(fallen).double()), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"penalty": "l0"}, r"`penalty` must be one of l1, .*, got 'l0'"),
        ({"strength": -1.0}, r"`strength` must be a number in \[0, inf\], got -1.0"),
        ({"strength": math.nan}, r"`strength` must be"),
        ({"strength": math.inf}, r"`strength` must be finite"),
        ({"strength": {}}, r"`strength` as a dict must name at least one pattern"),
        ({"strength": {"net": "much"}}, r"`strength\['net'\]` must be a number"),
        ({"strength": {"first": 0.0}}, r"`strength` as a mapping takes first, last"),
        ({"strength": [1e-4]}, r"`strength` must be a number"),
        ({"begin": 1.5}, r"`begin` as a float is a fraction"),
        ({"begin": 0.5, "end": 0.2}, r"`begin=0.5` comes after `end=0.2`"),
        ({"include": []}, r"`include` must name something"),
        ({"exclude": 3}, r"`exclude` must be a name pattern"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SparsityRegularization(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": ["nett.*"]}, r"`include` pattern 'nett.\*' matches no module. The closest names: 'net"),
        ({"strength": {"nett": 1.0}}, r"`strength` pattern 'nett' matches no module"),
        ({"strength": {"net.0": 1.0}, "include": ["net.3"]}, r"`strength` has no pattern for 'net.3'"),
        ({"strength": {"*": 1.0, "net.0": 1.0}}, r"`strength` pattern 'net.0' governs nothing"),
        ({"penalty": "batchnorm_scale", "include": ["net.0"]}, r"finds no batch norm .* pattern 'net.0'"),
        ({"penalty": "batchnorm_scale", "exclude": ["net.1", "norm"]}, r"finds no batch norm"),
        ({"penalty": "batchnorm_scale", "include": ["nom"]}, r"`include` pattern 'nom' matches no module"),
        ({"begin": 0.5, "end": 1}, r"`end=1` is one optimizer step"),
    ],
)
def test_what_fits_no_module_or_run_is_refused_by_name(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, seeded(Doubled), [SparsityRegularization(**kwargs)])


def test_scales_that_are_not_there_are_refused_with_a_way_out(tmp_path: Path) -> None:
    message = r"finds no batch norm with a scale in Net\. Take `penalty='group_lasso'`"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, seeded(Net), [SparsityRegularization("batchnorm_scale")])
    module = seeded(Net)
    module.net.insert(1, nn.BatchNorm1d(16, affine=False))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, [SparsityRegularization("batchnorm_scale")])


def test_a_norm_of_another_kind_is_taken_by_its_full_name(tmp_path: Path) -> None:
    module = seeded(Doubled)
    module.net[3] = nn.LayerNorm(16).double()
    callback = SparsityRegularization("batchnorm_scale", 0.1, include=["net.3"])
    fit(tmp_path, module, [callback])
    assert callback.summary().startswith("batchnorm_scale on 16 weights of 1 layers (net.3), strength 0.1")


def test_a_layer_with_several_weights_is_named_once(tmp_path: Path) -> None:
    module = seeded(Doubled)
    module.memory = nn.LSTM(3, 4)
    callback = SparsityRegularization("group_lasso", 0.1, include=["memory", "net.0"])
    fit(tmp_path, module, [callback])
    assert callback.summary().startswith("group_lasso on 304 weights of 2 layers (net.0, memory)")


def test_a_proximal_penalty_needs_a_rate(tmp_path: Path) -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    with pytest.raises(ValueError, match=r"`penalty='proximal_l1'` shrinks by lr·strength, and Rateless has no `lr`"):
        fit(tmp_path, Net(optimizer=Rateless), [SparsityRegularization("proximal_l1")])


def test_a_span_outside_of_the_run_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SparsityRegularization does nothing: from step 100"):
        fit(tmp_path, seeded(Net), [SparsityRegularization("l1", begin=100, end=200)])


def test_parameters_that_join_in_mid_run_are_penalized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Joins(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                pl_module.late.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": pl_module.late.parameters(), "lr": 0.05})

    class Late(Weight):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(2, 2, bias=False).requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.layer.parameters(), lr=self.lr)

    for penalty in ("l1", "proximal_l1"):
        module = seeded(Late)
        before = module.late.weight.detach().clone()
        caplog.clear()
        fit(tmp_path, module, [SparsityRegularization(penalty, 0.1), Joins()], max_epochs=1)
        fallen = before.abs() - module.late.weight.detach().abs()
        assert torch.allclose(fallen, torch.full_like(fallen, 4 * 0.05 * 0.1), atol=1e-6)
        assert "left alone, until an optimizer moves them, are 'late.weight'." in caplog.text


def test_sparse_gradients_take_the_term(tmp_path: Path) -> None:
    class Looks(Weight):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.embedding(torch.tensor([1])).sum()

    module = seeded(Looks)
    expected = module.embedding.weight.detach() - 0.1 * (0.2 * module.embedding.weight.detach().sign())
    expected[1] -= 0.1
    callback = SparsityRegularization("l1", 0.2, include=["embedding"])
    fit(tmp_path, module, [callback], max_epochs=-1, max_steps=1)
    assert torch.allclose(module.embedding.weight, expected)


# --- beside others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["l1", "l2", "group_lasso", "hoyer", "proximal_l1", "proximal_group_lasso"])
@pytest.mark.parametrize("regrowth", [0.0, "feedback"])
@pytest.mark.parametrize("is_first", [True, False])
def test_pruned_weights_stay_zero(tmp_path: Path, penalty: Any, regrowth: Any, is_first: bool) -> None:
    module = seeded(Net)
    pruning = GradualPruning(0.8, begin=0.2, end=0.5, every=2, regrowth=regrowth)
    callbacks = [SparsityRegularization(penalty, 1e-4), pruning]
    trainer(tmp_path, callbacks if is_first else callbacks[::-1]).fit(module, StatefulLoader(), held_out())
    weights = matrices(module)
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros >= round(0.8 * total) if penalty.startswith("proximal") else zeros == round(0.8 * total)


def test_scales_of_quantizers_are_not_penalized(tmp_path: Path) -> None:
    class Idle(Net):
        def loss(self, batch: Any) -> Tensor:
            return 0.0 * super().loss(batch)

    module = seeded(lambda: Idle(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    callback = SparsityRegularization("l1", 0.01)
    quantization = QuantizationAwareTraining(range="learned", begin=0)
    run = trainer(tmp_path, [quantization, callback], max_epochs=1)
    run.fit(module, StatefulLoader(), held_out())
    assert callback.summary().startswith("l1 on 512 weights of 3 layers (net.0, net.2, net.4)")
    weight = seeded(Net).net[0].weight
    fallen = (weight.abs() - module.net[0].weight.abs()).detach().max()
    assert float(fallen) == pytest.approx(BATCHES * 0.001, abs=1e-5)


def test_two_penalties_act_on_one_weight(tmp_path: Path) -> None:
    module = seeded(Doubled)
    reference = seeded(lambda: Doubled(lambda own: TERMS["l1"](own) + TERMS["group_lasso"](own)))
    fit(tmp_path, module, [SparsityRegularization("l1", STRENGTH), SparsityRegularization("group_lasso", STRENGTH)])
    fit(tmp_path, reference)
    for ours, theirs in zip(module.seen, reference.seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_an_average_is_one_of_penalized_weights(tmp_path: Path) -> None:
    module, reference = seeded(Doubled), seeded(lambda: Doubled(TERMS["l1"]))
    for own, callbacks in ((module, [SparsityRegularization("l1", STRENGTH)]), (reference, [])):
        fit(tmp_path, own, [EMAWeightAveraging(decay=0.8), *callbacks])
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_it_logs_the_term_and_the_zeros_at_log_steps(tmp_path: Path) -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            names = ("compress/penalty", "compress/zeros")
            self.rows.append({n: float(v) for n, v in trainer.logged_metrics.items() if n in names})

    logged, module = Logged(), seeded(lambda: Weight(lr=1.0))
    module.layer.weight.data = torch.linspace(-0.6, 0.5, FEATURES)[None]  # 0.1 apart, 0 among them
    fit(tmp_path, module, [SparsityRegularization("proximal_l1", 0.1), logged], log_every_n_steps=2, max_epochs=1)
    assert [bool(row) for row in logged.rows] == [False, *[True] * 7]
    # Before the second step each has lost 0.1, and three are at zero.
    assert logged.rows[1]["compress/penalty"] == pytest.approx(0.1 * (0.5 + 2 * (0.4 + 0.3 + 0.2 + 0.1)), abs=1e-5)
    weight = module.trace[1]
    assert logged.rows[1]["compress/zeros"] == pytest.approx(float((weight == 0).float().mean()))
    assert logged.rows[-1]["compress/zeros"] == 1.0


@pytest.mark.parametrize("value", ["1e-3", "0.001", "{first: 0, last: 1e-3}", "{net.0: 1e-3, '*': 1e-5}"])
def test_the_command_line_takes_a_strength(tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    prefix = "--trainer.callbacks"
    given = [f"{prefix}+=lightning_compress.SparsityRegularization", f"{prefix}.strength={value}"]
    quiet = ["--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    made = LightningCLI(Net, run=False, args=[*quiet, f"--trainer.default_root_dir={tmp_path}", *given])
    (callback,) = [one for one in made.trainer.callbacks if isinstance(one, SparsityRegularization)]
    expected = {"{first": Schedule(0.0, 1e-3), "{net.0": {"net.0": Schedule(1e-3, 1e-3), "*": Schedule(1e-5, 1e-5)}}
    assert callback.strength == expected.get(value.partition(":")[0], Schedule(1e-3, 1e-3))


def test_containers_of_hydra_are_taken(tmp_path: Path) -> None:
    target = {"_target_": "lightning_compress.SparsityRegularization", "include": ["net.0", "net.2"]}
    config = OmegaConf.create(target | {"strength": {"net.0": 1e-3, "net.2": {"first": 0, "last": "1e-3"}}})
    callback, module = hydra.utils.instantiate(config), seeded(Net)
    run = trainer(tmp_path, [callback])
    run.fit(module, StatefulLoader(), held_out())
    run.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state == {"last_step": 31, "delay": 0}


# --- network slimming, end to end -------------------------------------------------------------------------------------


class Pictures:
    """Two kinds of 8 × 8 pictures: stripes across and stripes along, in noise."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        stripes = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2).expand(8, 8)
        for _ in range(10):
            y = torch.randint(2, (32,), generator=generator)
            clean = torch.where(y.view(-1, 1, 1, 1) == 0, stripes, stripes.T)
            yield clean + torch.randn(32, 3, 8, 8, generator=generator), y

    def __len__(self) -> int:
        return 10


class Wide(Net):
    """A convolutional net of more channels than it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
        )

    def scales(self) -> Tensor:
        return torch.cat([self.net[1].weight, self.net[4].weight]).detach().abs()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 40:
            self.halfway = self.scales()


def test_the_recipe_slims_a_network(tmp_path: Path) -> None:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["+compress@callbacks=slimming", "callbacks.regularization.strength=0.1"]
        overrides += [f"callbacks.report.dir={tmp_path}", "callbacks.report.plots=false"]
        config = hydra.compose(overrides=overrides)
    callbacks = {name: hydra.utils.instantiate(one) for name, one in config.callbacks.items()}
    module = seeded(Wide)
    run = trainer(tmp_path, callbacks.values(), max_epochs=8)
    run.fit(module, Pictures(), Pictures())

    assert module.halfway.median() < 0.3  # of 1
    smaller = callbacks["pruning"].pruned_module
    gone = torch.cat([(module.net[i].weight == 0).flatten(1).all(1) for i in (0, 3)])
    assert int(gone.sum()) == 16
    assert not gone[module.halfway.topk(5).indices].any()
    assert module.halfway[gone].mean() < module.halfway[~gone].mean() / 2
    assert (module.scales()[gone] == 0).all()
    kept = [16 - int(gone[:16].sum()), 16 - int(gone[16:].sum())]
    assert [smaller.net[0].out_channels, smaller.net[3].out_channels] == kept
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in module.parameters()) / 2
    x, y = next(iter(Pictures()))
    assert torch.allclose(smaller.eval()(x), module.eval()(x), atol=1e-5)
    assert (smaller(x).argmax(1) == y).float().mean() > 0.9


# --- sharded parameters -----------------------------------------------------------------------------------------------


class Sharded(Doubled):
    """A net whose parameters are split over two processes."""

    def configure_model(self) -> None:
        fully_shard(self.net[3], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def test_shards_end_as_copies_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, env=environment, timeout=300, capture_output=True)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for (penalty, net), here in results[0].items():
        assert same(here, results[1][penalty, net])
        for name, tensor in here.items():
            torch.testing.assert_close(tensor, results[0][penalty, "Doubled"][name], msg=f"{penalty} {net} {name}")
    assert len(results[0]) == 8


def run_in_two_processes(folder: Path) -> None:
    """Train copies and shards; show the weights and the term."""
    results: dict[Any, dict[str, Tensor]] = {}
    two = {"devices": 2, "use_distributed_sampler": False, "log_every_n_steps": 1, "max_epochs": 2}
    for penalty in ("l1", "l2", "batchnorm_scale", "proximal_l1"):
        for make in (Doubled, Sharded):
            kind = {Doubled: DDPStrategy, Sharded: ModelParallelStrategy}[make]
            module = seeded(make)
            callback = SparsityRegularization(penalty, STRENGTH)
            sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1} if make is Sharded else {}
            strategy: Any = kind(process_group_backend="gloo", **sizes)
            run = trainer(folder, [callback], strategy=strategy, limit_val_batches=0, **two)
            run.fit(module, StatefulLoader(seed=10 + run.global_rank), held_out())
            assert isinstance(module.net[3].weight, DTensor) == (make is Sharded)
            own = dict(module.named_parameters()) | {n: v for n, v in run.logged_metrics.items() if "compress" in n}
            results[penalty, make.__name__] = {
                name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
                for name, value in own.items()
            }
    strategy = ModelParallelStrategy(process_group_backend="gloo")
    refused = trainer(folder, [SparsityRegularization("hoyer")], strategy=strategy, limit_val_batches=0, **two)
    with pytest.raises(ValueError, match="SparsityRegularization cannot act on the sharded parameters"):
        refused.fit(Sharded(), StatefulLoader(), held_out())
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    run_in_two_processes(Path(sys.argv[1]))
