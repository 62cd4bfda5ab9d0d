"""Channels and heads pruned inside the Trainer, and the smaller module at the end."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import CompressionReport, GradualPruning
from lightning_compress.pruning import load_pruned, remove_pruned_channels
from lightning_compress.pruning.importance import CRITERIA
from tests.helpers import FEATURES, Crash, CrashAt, Net, StatefulLoader, held_out, same, seeded, trainer


class Module(LightningModule):
    """Any network that maps (B, FEATURES) to (B, 4) once `reshape` has given its input a shape."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x: Tensor) -> Tensor:
        size = self.shape[0] * self.shape[1] * (self.shape[2] if len(self.shape) > 2 else 1)
        return self.net(x.repeat(1, -(-size // FEATURES))[:, :size].reshape(-1, *self.shape))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.second_norm = nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


class Attention(nn.Module):
    """Case 17: attention as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(3, 32),
            nn.MultiheadAttention(32, 4, batch_first=True),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class GroupedQueries(nn.Module):
    """Case 17: 4 query heads that share 2 key and value heads of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 8
        self.embed = nn.Linear(3, 32)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o_proj, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.head(self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)).mean(1))


def fit(tmp_path: Any, module: Any, pruning: Any, **kwargs: Any) -> Any:
    run = trainer(tmp_path, [pruning], **kwargs)
    run.fit(module, StatefulLoader(), held_out())
    return run


def agrees(module: nn.Module, smaller: nn.Module, batch: int = 5) -> bool:
    x = torch.randn(batch, FEATURES)
    return torch.allclose(module.eval()(x), smaller.eval()(x), atol=1e-5)


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "gradient_weight", "movement", "random"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_channels_with_batch_norm_and_a_residual(tmp_path: Any, criterion: Any, scope: Any) -> None:
    module = seeded(lambda: Module(Residual(), (3, 4, 4)))
    pruning = GradualPruning(0.5, granularity="channel", criterion=criterion, scope=scope, begin=0.1, end=0.6)
    fit(tmp_path, module, pruning)
    net = module.net
    stem = (net.stem.weight == 0).flatten(1).all(1)
    first = (net.first.weight == 0).flatten(1).all(1)
    assert int(stem.sum() + first.sum()) == 12
    if scope == "layer":
        assert (int(stem.sum()), int(first.sum())) == (4, 8)
    assert torch.equal(stem, (net.second.weight == 0).flatten(1).all(1))  # coupled by the residual
    for norm, gone in ((net.norm, stem), (net.second_norm, stem), (net.first_norm, first)):
        assert ((norm.weight == 0) & (norm.bias == 0) == gone).all()
    smaller = pruning.pruned_module
    assert smaller.net.stem.out_channels == 8 - int(stem.sum())
    assert smaller.net.first_norm.num_features == 16 - int(first.sum())
    assert smaller.net.head.in_features == smaller.net.stem.out_channels
    assert agrees(module, smaller)
    assert "12 of" not in pruning.summary()
    assert "of 24 channels in 2 layers" in pruning.summary()


def test_activations_score_channels(tmp_path: Any) -> None:
    module = seeded(lambda: Module(Residual(), (3, 4, 4)))
    pruning = GradualPruning(0.5, granularity="channel", criterion="activation_weight", scope="layer", end=0.6)
    fit(tmp_path, module, pruning)
    assert agrees(module, pruning.pruned_module)


@pytest.mark.parametrize("source", ["example", "sanity check", "first batch"])
def test_example_inputs(tmp_path: Any, source: str, caplog: Any) -> None:
    module = seeded(Net)
    if source == "example":
        module.example_input_array = torch.zeros(2, FEATURES)
    pruning = GradualPruning(0.5, granularity="channel", begin=0, end=0.5)
    fit(tmp_path, module, pruning, num_sanity_val_steps=0 if source == "first batch" else 2)
    assert sum(int((module.net[i].weight == 0).all(1).sum()) for i in (0, 2)) == 16
    assert agrees(module, pruning.pruned_module)


def test_what_cannot_lose_channels_is_named(tmp_path: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, seeded(Net), GradualPruning(0.5, granularity="channel", end=0.5))
    assert "not pruned are 'net.4' (its width is that of an output of the model)" in caplog.text
    with pytest.raises(ValueError, match=r"`granularity='channel'` fits no layer of Net: 'net\.4'"):
        fit(tmp_path, seeded(Net), GradualPruning(0.5, granularity="channel", include="net.4"))
    with pytest.raises(ValueError, match=r"`granularity='head'` fits no layer of Net"):
        fit(tmp_path, seeded(Net), GradualPruning(0.5, granularity="head"))


class Backbone(nn.Module):
    """Case 2: feature maps for a head that lives outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2 = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p3 = self.conv1(self.conv0(x).relu())
        return {"p3": p3, "p4": self.conv2(p3.relu())}


class Detector(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.example_input_array = torch.randn(2, 3, 8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(value.square().mean() for value in self(torch.randn(2, 3, 8, 8)).values())  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_case_2_returned_channels_keep_their_width(tmp_path: Any) -> None:
    module, pruning = seeded(Detector), GradualPruning(0.5, granularity="channel", end=0.6)
    run = trainer(tmp_path, [pruning])
    run.fit(module, StatefulLoader())
    x = torch.randn(2, 3, 8, 8)
    masked, smaller = module(x), pruning.pruned_module(x)
    assert {name: value.shape for name, value in smaller.items()} == {"p3": (2, 16, 6, 6), "p4": (2, 32, 4, 4)}
    assert all(torch.allclose(masked[name], smaller[name], atol=1e-4) for name in masked)
    assert pruning.pruned_module.backbone.conv0.out_channels == 6


@pytest.mark.parametrize("make", [Attention, GroupedQueries])
def test_case_17_heads(tmp_path: Any, make: Any) -> None:
    module = seeded(lambda: Module(make(), (5, 3)))
    pruning = GradualPruning(0.5, granularity="head", begin=0.1, end=0.6)
    fit(tmp_path, module, pruning)
    net = module.net
    weight = net.attention.in_proj_weight[:32] if make is Attention else net.q_proj.weight
    gone = (weight == 0).reshape(4, 8, 32).all((1, 2))
    assert int(gone.sum()) == 2
    out = net.attention.out_proj.weight if make is Attention else net.o_proj.weight
    assert torch.equal((out == 0).reshape(32, 4, 8).all(0).all(1), gone)
    if make is GroupedQueries:
        assert int(gone[:2].sum()) == int(gone[2:].sum()) == 1
        assert pruning.pruned_module.net.num_heads == 2
    assert agrees(module, pruning.pruned_module)
    module.shape = pruning.pruned_module.shape = (7, 3)  # another length
    assert agrees(module, pruning.pruned_module, batch=3)


def test_case_19_one_output_channel(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3), nn.Flatten(), nn.LazyLinear(4))
    module = seeded(lambda: Module(net, (3, 6, 6)))
    module(torch.zeros(2, FEATURES))
    pruning = GradualPruning(0.5, granularity="channel", end=0.6, exclude="net.2")
    fit(tmp_path, module, pruning)
    assert pruning.pruned_module.net[0].out_channels == 4
    assert pruning.pruned_module.net[2].out_channels == 1
    assert agrees(module, pruning.pruned_module)


def test_smaller_module_is_saved_loaded_and_trained_on(tmp_path: Any) -> None:
    module = seeded(lambda: Module(Residual(), (3, 4, 4)))
    pruning = GradualPruning(0.5, granularity="channel", scope="layer", end=0.6)
    run = fit(tmp_path, module, pruning)
    masked = copy.deepcopy(module.state_dict())
    torch.save(pruning.pruned_module.state_dict(), tmp_path / "smaller.pt")
    fresh = load_pruned(Module(Residual(), (3, 4, 4)), tmp_path / "smaller.pt")
    assert agrees(module, fresh)

    remove_pruned_channels(module, torch.randn(4, FEATURES), optimizer=run.optimizers)
    assert agrees(module, fresh)
    assert all(
        state.shape == parameter.shape
        for parameter in module.parameters()
        for state in run.optimizers[0].state[parameter].values()
        if state.dim()
    )
    module.train()
    batch = next(iter(StatefulLoader()))
    before = module.training_step(batch, 0).item()
    again = trainer(tmp_path, [GradualPruning(0.5, end=0.3)])
    again.fit(module, StatefulLoader(), held_out())
    module.train()
    assert module.training_step(batch, 0).item() < before
    assert masked["net.stem.weight"].shape[0] == 2 * module.net.stem.out_channels


def test_the_report_compares_the_masked_module_with_the_cut_one(tmp_path: Any) -> None:
    for order in (1, -1):
        module = seeded(lambda: Module(Residual(), (3, 4, 4)))
        report = CompressionReport(dir=str(tmp_path), plots=False)
        pruning = GradualPruning(0.5, granularity="channel", scope="layer", end=0.6)
        run = trainer(tmp_path, [report, pruning][::order])
        run.fit(module, StatefulLoader(), held_out())
        removed = report.figures["removed"]
        assert removed["masked"]["parameters"] == sum(p.numel() for p in module.parameters())
        assert removed["cut"]["parameters"] == sum(p.numel() for p in pruning.pruned_module.parameters())
        # 3·8·9 + 8·16·9 + 16·8·9 multiplications at each of 16 places, and 8·4 in the head
        assert removed["masked"]["multiply_adds"] == 16 * (216 + 1152 + 1152) + 32
        assert removed["cut"]["multiply_adds"] == 16 * (108 + 288 + 288) + 16
        assert removed["cut"]["latency"]["64"]["ms"] > 0
        assert any("really cut out" in note for note in report.figures["notes"])


class Interfaces(Detector):
    """Case 2 to the letter: both widths are what the model hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.backbone = nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p3 = self.conv1(x)
        return {"p3": p3, "p4": self.conv2(p3.relu())}


@pytest.mark.parametrize("has_example", [True, False])
def test_case_2_nothing_but_interfaces(tmp_path: Any, has_example: bool) -> None:
    module = seeded(Interfaces)
    if not has_example:
        module.example_input_array = None
    with pytest.warns(UserWarning, match=r"nothing is pruned.*'conv1' \(its width is that of an output"):
        trainer(tmp_path, [GradualPruning(0.5, granularity="channel")]).fit(module, StatefulLoader())
    out = module(torch.randn(2, 3, 8, 8))
    assert (out["p3"].shape, out["p4"].shape) == ((2, 16, 8, 8), (2, 32, 8, 8))


def test_refused_before_the_first_step(tmp_path: Any) -> None:
    module = seeded(Net)
    before = copy.deepcopy(module.state_dict())
    run = trainer(tmp_path, [GradualPruning(0.5, granularity="head")], num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="fits no layer"):
        run.fit(module, StatefulLoader(), held_out())
    assert run.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_report_names_the_kept_widths(tmp_path: Any) -> None:
    report = CompressionReport(dir=str(tmp_path), plots=False, latency=False)
    trainer(tmp_path, [GradualPruning(0.5, granularity="channel", end=0.6), report]).fit(
        seeded(Detector), StatefulLoader()
    )
    [technique] = report.figures["techniques"]
    assert set(technique["skipped"]) == {"backbone.conv1", "backbone.conv2"}
    assert any(
        "backbone.conv1 (its width is that of an output of the model" in note for note in report.figures["notes"]
    )


class Measured(Net):
    """A module that logs a torchmetrics object."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    test_step = validation_step


def test_the_smaller_module_is_a_lightning_module_like_any_other(tmp_path: Any) -> None:
    module, pruning = seeded(Measured), GradualPruning(0.5, granularity="channel", end=0.6)
    run = fit(tmp_path, module, pruning)
    [masked] = run.test(module, held_out(), verbose=False)
    [smaller] = trainer(tmp_path).test(pruning.pruned_module, held_out(), verbose=False)
    assert masked == smaller
    trainer(tmp_path, max_epochs=1).fit(pruning.pruned_module, StatefulLoader(), held_out())


@pytest.mark.parametrize("granularity", ["weight", "2:4", "block:4x1", "channel", "head"])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_with_every_granularity(tmp_path: Any, criterion: Any, granularity: str) -> None:
    def run(extra: Any = (), ckpt_path: Any = None) -> Any:
        module = seeded(lambda: Module(Feedforward() if granularity == "channel" else Attention(), (5, 3)))
        share = {} if granularity == "2:4" else {"final_sparsity": 0.5}
        pruning = GradualPruning(granularity=granularity, criterion=criterion, begin=2, end=20, every=3, **share)
        trainer(tmp_path, [pruning, *extra]).fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
        return module, pruning

    module, pruning = run()
    with pytest.raises(Crash):
        run([CrashAt(11, tmp_path / "x.ckpt")])
    again, resumed = run((), tmp_path / "x.ckpt")
    assert same(dict(module.state_dict()), dict(again.state_dict()))
    assert same(pruning.state_dict(), resumed.state_dict())
    pruner = pruning._running
    assert pruner.sparsity == pruner.final_sparsity
    assert abs(pruner.sparsity - 0.5) < 1 / pruner.total
    parameters = dict(module.named_parameters())
    for name, facts in pruning.layers().items():
        assert int((parameters[name] == 0).sum()) >= facts["pruned"]
        if parameters[name].dim() > 1:
            assert int((parameters[name] == 0).sum()) == facts["pruned"]
    if pruning.pruned_module is not None:
        assert agrees(module, pruning.pruned_module)


class Feedforward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean(1))
