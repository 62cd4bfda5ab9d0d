"""Pruned weights that go on learning: held to a plain loop that keeps dense weights and masks what the network sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_compress import GradualPruning, registry
from tests.helpers import (
    FEATURES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    ManualNet,
    Net,
    RawManualNet,
    StatefulLoader,
    TwoOptimizerNet,
    held_out,
    loss_scaling,
    same,
    seeded,
    trainer,
    zeros,
)

BEGIN, END, EVERY, STEPS = 3, 20, 2, 32


class ClosureNet(ManualNet):
    """Manual optimization that hands its own closure to the optimizer, behind Lightning's back."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.02, max_iter=3, history_size=2)


def matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() > 1]


def fit(tmp_path: Any, pruning: Any, module: Any = None, extra: Any = (), **kwargs: Any) -> Any:
    module = module or seeded(Net)
    trainer(tmp_path, [pruning, *extra], **kwargs).fit(module, StatefulLoader(), held_out())
    return module


def with_dense_weights(make_optimizer: Any, criterion: str = "magnitude") -> list[Tensor]:
    """Train with dense weights of which the network sees the masked ones, up to END; then with the masked ones."""
    net = seeded(Net).double()
    dense = [p.detach().clone().requires_grad_() for p in net.parameters()]
    masks = [torch.ones_like(p) for p in dense]
    pruned = [i for i, p in enumerate(dense) if p.dim() > 1]
    scores = {i: torch.zeros_like(dense[i]) for i in pruned}
    optimizer, loader, step = make_optimizer(dense), StatefulLoader(), 0
    for _ in range(4):
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y, may_return: bool = step < END) -> Tensor:
                seen = [(p.detach() * mask).requires_grad_() for p, mask in zip(dense, masks, strict=True)]
                h = torch.relu(nn.functional.linear(x.double(), seen[0], seen[1]))
                h = torch.relu(nn.functional.linear(h, seen[2], seen[3]))
                loss = nn.functional.cross_entropy(nn.functional.linear(h, seen[4], seen[5]), y)
                slopes = torch.autograd.grad(loss, seen)
                for p, slope, mask in zip(dense, slopes, masks, strict=True):
                    p.grad = slope if may_return else slope * mask
                return loss.detach()

            if criterion == "gradient_weight":
                closure()
                for i in pruned:
                    scores[i] += (dense[i].detach() * dense[i].grad).abs()
            optimizer.step(closure)
            step += 1
            if BEGIN <= step <= END and ((step - BEGIN) % EVERY == 0 or step == END):
                done = 1 - (1 - (step - BEGIN) / (END - BEGIN)) ** 3
                flat = torch.cat([dense[i].detach().abs().flatten() for i in pruned])
                if criterion == "gradient_weight":
                    flat = torch.cat([scores.pop(i).flatten() for i in pruned])
                    scores = {i: torch.zeros_like(dense[i]) for i in pruned}
                kept = torch.ones_like(flat)
                kept[flat.argsort()[: int(round(0.8 * len(flat)) * done + 0.5)]] = 0
                for i, part in zip(pruned, kept.split([dense[i].numel() for i in pruned]), strict=True):
                    masks[i] = part.reshape(dense[i].shape)
            if step >= END:
                for p, mask in zip(dense, masks, strict=True):
                    p.data *= mask
    return [p.detach() for p in dense]


@pytest.mark.parametrize(
    ("make", "make_optimizer", "criterion"),
    [
        (Net, momentum, "magnitude"),
        (Net, adamw, "magnitude"),
        (Net, lbfgs, "magnitude"),
        (Net, adamw, "gradient_weight"),
        (ManualNet, momentum, "magnitude"),
        (RawManualNet, adamw, "magnitude"),
        (RawManualNet, adamw, "gradient_weight"),
        (ClosureNet, momentum, "magnitude"),
        (ClosureNet, lbfgs, "magnitude"),
    ],
)
def test_is_the_plain_loop_over_dense_weights(tmp_path: Any, make: Any, make_optimizer: Any, criterion: Any) -> None:
    pruning = GradualPruning(0.8, criterion=criterion, begin=BEGIN, end=END, every=EVERY, regrowth="feedback")
    module = fit(tmp_path, pruning, seeded(lambda: make(optimizer=make_optimizer)), precision="64-true")
    for ours, expected in zip(module.parameters(), with_dense_weights(make_optimizer, criterion), strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-6, atol=1e-9)
        if ours.dim() > 1:
            assert torch.equal(ours == 0, expected == 0)


class Claimed(Callback):
    """Hold the zeros that the network sees, and those that could be saved, to the sparsity that is claimed."""

    def __init__(self, pruning: GradualPruning) -> None:
        self.pruning, self.forwards, self.back, self.frozen = pruning, 0, 0, 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net.register_forward_pre_hook(lambda *args: self.check(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = [p.detach() == 0 for p in matrices(pl_module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.check(pl_module)
        moved = sum(int((was & (p != 0)).sum()) for was, p in zip(self.before, matrices(pl_module), strict=True))
        self.back += moved
        self.frozen += moved if trainer.global_step > END else 0

    def check(self, pl_module: Any) -> None:
        self.forwards += 1
        pruner = self.pruning._running
        if pruner.masks:
            assert zeros(pl_module)[0] == sum(pruned for pruned, _ in pruner.pruned().values())


@pytest.mark.parametrize(
    ("make_optimizer", "kwargs", "setting"),
    [
        (momentum, {}, {}),
        (lbfgs, {}, {}),
        (adamw, {"scope": "erk"}, {"accumulate_grad_batches": 2, "max_epochs": 8}),
        (adamw, {"criterion": "activation_weight"}, {"gradient_clip_val": 0.1}),
        (adamw, {"granularity": "block:2x2", "criterion": "movement"}, {"precision": "bf16-true"}),
    ],
)
def test_the_network_sees_zeros_some_return_and_none_after_the_end(
    tmp_path: Any, make_optimizer: Any, kwargs: Any, setting: Any
) -> None:
    pruning = GradualPruning(0.6, begin=BEGIN, end=END, every=EVERY, regrowth="feedback", **kwargs)
    claimed = Claimed(pruning)
    pruning_first = seeded(lambda: Net(optimizer=make_optimizer))
    if setting.get("precision") == "bf16-true":
        pruning_first.forward = lambda x: pruning_first.net(x.to(torch.bfloat16)).float()
    module = fit(tmp_path, pruning, pruning_first, [claimed], **setting)
    assert abs(zeros(module)[0] / 512 - 0.6) < 4 / 512
    assert claimed.forwards > 64
    assert claimed.back > 0
    assert claimed.frozen == 0
    state = pruning.state_dict()["pruner"]
    assert (state["initial"], state["copies"]) == (None, {})


def test_2_4_holds_in_each_group_at_the_end(tmp_path: Any) -> None:
    module = fit(tmp_path, GradualPruning(granularity="2:4", begin=0, end=END, every=1, regrowth="feedback"))
    for weight in matrices(module):
        assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_a_step_that_loss_scaling_skips_moves_no_copy(tmp_path: Any) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append((trainer.global_step, pruning.state_dict()["pruner"]["copies"], zeros(pl_module)[0]))

    pruning = GradualPruning(0.8, begin=2, end=END, every=50, initial_sparsity=0.5, regrowth="feedback")
    watch = Watch()
    fit(tmp_path, pruning, extra=[watch, InfiniteGradientAt(5)], plugins=[loss_scaling()])
    copies = {step: found for step, found, _ in watch.seen}
    assert same(copies[5], copies[6])
    assert not same(copies[6], copies[7])
    assert {count for step, _, count in watch.seen if 2 <= step < END} == {256}


@pytest.mark.parametrize("saves_first", [True, False])
def test_a_step_that_breaks_off_leaves_sparse_weights(tmp_path: Any, saves_first: bool) -> None:
    class Breaks(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            loss = closure()
            if self.steps == 12:
                assert zeros(module)[0] == 0
                raise RuntimeError("broke off")
            return loss

    class Saves(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            self.state = pruning.state_dict()["pruner"]

        def on_exception(self, trainer: Any, *args: Any) -> None:
            assert (zeros(module)[0] == 0) == saves_first
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    module = seeded(lambda: Net(optimizer=lambda p: Breaks(p, lr=0.1)))
    pruning = GradualPruning(0.8, initial_sparsity=0.5, begin=0, end=END, regrowth="feedback")
    saves = Saves()
    with pytest.raises(RuntimeError, match="broke off"):
        trainer(tmp_path, [saves, pruning][:: 1 if saves_first else -1]).fit(module, StatefulLoader(), held_out())
    pruned = round(pruning._running.sparsity * 512)
    assert zeros(module)[0] == pruned > 256
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert sum(int((w == 0).sum()) for w in saved["state_dict"].values() if w.dim() > 1) == pruned
    [state] = saved["callbacks"].values()
    assert same(state["pruner"], saves.state)


def test_the_zeros_of_a_sparse_model_stay(tmp_path: Any) -> None:
    module = seeded(lambda: Net(optimizer=momentum))
    holes = []
    for weight in matrices(module):
        holes.append(torch.rand_like(weight) < 0.3)
        weight.data[holes[-1]] = 0

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            [optimizer] = trainer.optimizers
            for weight, hole in zip(matrices(pl_module), holes, strict=True):
                assert not weight[hole].any()
                assert not optimizer.state[weight]["momentum_buffer"][hole].any()

    pruning = GradualPruning(0.8, begin=BEGIN, end=END, every=EVERY, regrowth="feedback")
    claimed = Claimed(pruning)
    fit(tmp_path, pruning, module, [Watch(), claimed])
    assert zeros(module)[0] == round(0.8 * 512)
    assert claimed.back > 0


def test_copies_rest_while_held_and_without_a_gradient(tmp_path: Any) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, Any] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            step = trainer.global_step
            self.seen[step] = pruning.state_dict()["pruner"]
            registry.hold(pl_module, self, 5 <= step < 9)
            if step == 10:
                pl_module.net[2].weight.requires_grad_(False)
                pl_module.net[2].weight.grad = None

    pruning, watch = GradualPruning(0.8, begin=2, end=END, every=50, initial_sparsity=0.5, regrowth="feedback"), Watch()
    trainer(tmp_path, [watch, pruning]).fit(seeded(Net), StatefulLoader(), held_out())
    copies = {step: state["copies"] for step, state in watch.seen.items()}
    assert not same(copies[4], copies[5])
    assert same(copies[5], copies[9])
    assert not same(copies[9], copies[10])
    assert same(copies[11]["net.2.weight"], copies[13]["net.2.weight"])
    assert not same(copies[11]["net.0.weight"], copies[13]["net.0.weight"])


def test_a_copy_that_is_nan_is_found_by_name(tmp_path: Any) -> None:
    class Poison(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 9:
                weight = pl_module.net[2].weight
                weight.grad[weight == 0] = torch.nan

    module = seeded(Net)
    pruning = GradualPruning(0.8, begin=2, end=END, every=3, regrowth="feedback")
    with pytest.raises(ValueError, match=r"net\.2\.weight"):
        fit(tmp_path, pruning, module, [Poison()])
    assert zeros(module)[0] == round(pruning._running.sparsity * 512) > 0
    assert all(weight.isfinite().all() for weight in matrices(module))


def test_a_snapshot_brings_back_the_copies(tmp_path: Any) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 10:
                self.snapshot = pruning.snapshot()
                self.weights = [p.detach().clone() for p in pl_module.parameters()]
            if trainer.global_step in (14, 25):  # while weights learn, and when they no longer do
                for p, value in zip(pl_module.parameters(), self.weights, strict=True):
                    p.data.copy_(value)
                pruning.rollback(self.snapshot)
                assert same(pruning.snapshot()["pruner"], self.snapshot["pruner"])
                assert zeros(pl_module)[0] == round(pruning._running.sparsity * 512)

    pruning = GradualPruning(0.8, begin=2, end=END, every=1, regrowth="feedback")
    module = fit(tmp_path, pruning, extra=[Watch()], max_epochs=6)
    assert zeros(module)[0] == round(0.8 * 512)


def test_a_checkpoint_of_another_setting_can_be_the_start(tmp_path: Any) -> None:
    def make(regrowth: Any) -> GradualPruning:
        return GradualPruning(0.8, begin=BEGIN, end=END, every=EVERY, regrowth=regrowth)

    for before, after in ((0.0, "feedback"), ("feedback", 0.0)):
        module = seeded(Net)
        with pytest.raises(Crash):
            fit(tmp_path, make(before), module, [CrashAt(9, tmp_path / "x.ckpt")])
        saved = [weight == 0 for weight in matrices(module)]
        pruning = make(after)
        claimed = Claimed(pruning)
        module = seeded(Net)
        trainer(tmp_path, [pruning, claimed]).fit(module, StatefulLoader(), held_out(), ckpt_path=tmp_path / "x.ckpt")
        assert zeros(module)[0] == round(0.8 * 512)
        assert all((weight == 0)[gone].all() for weight, gone in zip(matrices(module), saved, strict=True))
        assert (claimed.back > 0) == (after == "feedback")


def test_two_optimizers_and_an_average(tmp_path: Any) -> None:
    average = EMAWeightAveraging(decay=0.8)

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            for module in (pl_module, average._average_model.module):
                assert zeros(module)[0] == round(pruning._running.sparsity * 512)

    pruning = GradualPruning(0.8, begin=2, end=END, every=3, regrowth="feedback")
    claimed = Claimed(pruning)
    module = fit(tmp_path, average, seeded(TwoOptimizerNet), [pruning, Watch(), claimed])
    assert zeros(module)[0] == zeros(average._average_model.module)[0] == round(0.8 * 512)
    assert claimed.back > 0


def test_two_callbacks_on_disjoint_modules(tmp_path: Any) -> None:
    callbacks = [
        GradualPruning(0.5, include="net.0", regrowth="feedback"),
        GradualPruning(0.8, exclude="net.0", regrowth=0.0),
    ]
    other = GradualPruning(0.8, exclude="net.0", regrowth="feedback")
    weights = []
    for second in (callbacks[1], other):
        module = fit(tmp_path, callbacks[0], seeded(lambda: Net(optimizer=lbfgs)), [second])
        weights.append(module.net[2].weight)
        assert zeros(module, ["net.0.weight"])[0] == round(0.5 * 16 * FEATURES)
        assert zeros(module, ["net.2.weight", "net.4.weight"])[0] == round(0.8 * 320)
    assert not torch.equal(*weights)
