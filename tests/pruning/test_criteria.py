"""Criteria, granularities and regrowth inside the Trainer, held to plain loops over the same run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress import AccuracyGuard, GradualPruning
from lightning_compress.modules import Target, select_parameters
from lightning_compress.pruning.activations import InputNorms, input_norm
from lightning_compress.pruning.granularity import BlockField, Granularity, PatternField
from lightning_compress.pruning.importance import Criterion
from tests.helpers import (
    FEATURES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    Net,
    StatefulLoader,
    held_out,
    loss_scaling,
    same,
    seeded,
    trainer,
    zeros,
)

STEP = 6  # all of it is pruned after this step


class Follow(Callback):
    """Gather, with plain loops, what the criteria are made of, up to the step at which weights are pruned."""

    def __init__(self) -> None:
        self.scores: dict[str, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < STEP:
            x = batch[0]
            for name, layer in pl_module.net.named_children():
                if isinstance(layer, nn.Linear):
                    self._add(f"net.{name}.weight", "squares", x.square().sum(0).detach())
                is_linear = isinstance(layer, nn.Linear)  # not called: that would be seen
                x = nn.functional.linear(x, layer.weight, layer.bias) if is_linear else layer(x)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step < STEP:
            for name, p in pl_module.named_parameters():
                if p.dim() > 1:
                    self._add(name, "gradient", p.grad.abs().clone())
                    self._add(name, "gradient_weight", (p.grad * p).abs().detach().clone())
                    self._add(name, "movement", (-p.grad * p).detach().clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == STEP:
            for name, p in pl_module.named_parameters():
                if p.dim() > 1:
                    self.scores[name]["activation_weight"] = p.detach().abs() * self.scores[name]["squares"].sqrt()

    def _add(self, name: str, key: str, value: Tensor) -> None:
        own = self.scores.setdefault(name, {})
        own[key] = own[key] + value if key in own else value


def fit(tmp_path: Any, callback: Any, module: Any = None, extra: Any = (), **kwargs: Any) -> Any:
    module = module or seeded(Net)
    fitted = trainer(tmp_path, [*extra, callback], **kwargs)
    fitted.fit(module, StatefulLoader(), held_out())
    return module


@pytest.mark.parametrize("criterion", ["gradient", "gradient_weight", "activation_weight", "movement"])
def test_the_lowest_scores_go(tmp_path: Any, criterion: str) -> None:
    follow = Follow()
    pruning = GradualPruning(0.6, criterion=criterion, schedule="one_shot", begin=STEP, end=STEP, every=STEP)  # type: ignore[arg-type]
    module = fit(tmp_path, pruning, extra=[follow])
    scores = torch.cat([follow.scores[name][criterion].flatten() for name in follow.scores])
    lost = torch.cat([(p == 0).flatten() for p in module.parameters() if p.dim() > 1])
    assert int(lost.sum()) == round(0.6 * 512)
    assert scores[lost].max() <= scores[~lost].min() * (1 + 1e-5)


def test_neurons_by_the_sum_of_the_same_scores(tmp_path: Any) -> None:
    follow = Follow()
    kwargs: dict[str, Any] = {"schedule": "one_shot", "begin": STEP, "end": STEP, "every": STEP, "scope": "layer"}
    module = fit(
        tmp_path, GradualPruning(0.5, criterion="gradient_weight", granularity="channel", **kwargs), extra=[follow]
    )
    for i in (0, 2):
        sums = follow.scores[f"net.{i}.weight"]["gradient_weight"].sum(1)
        lost = (module.net[i].weight == 0).all(1)
        assert int(lost.sum()) == 8
        assert sums[lost].max() <= sums[~lost].min()


def test_random_is_the_same_for_a_seed_and_moves_on(tmp_path: Any) -> None:
    first = fit(tmp_path, GradualPruning(0.5, criterion="random", end=0.5))
    second = fit(tmp_path, GradualPruning(0.5, criterion="random", end=0.5))
    assert all(torch.equal(a == 0, b == 0) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    by_size = fit(tmp_path, GradualPruning(0.5, end=0.5))
    assert not torch.equal(first.net[0].weight == 0, by_size.net[0].weight == 0)


def test_own_criterion_is_one_function(tmp_path: Any) -> None:
    largest_first = Criterion(lambda weight, signal: -weight.abs())
    module = fit(tmp_path, GradualPruning(0.5, criterion=largest_first, begin=0, end=0))
    before = seeded(Net)
    kept = torch.cat(
        [a[b != 0].abs() for a, b in zip(before.parameters(), module.parameters(), strict=True) if a.dim() > 1]
    )
    gone = torch.cat(
        [a[b == 0].abs() for a, b in zip(before.parameters(), module.parameters(), strict=True) if a.dim() > 1]
    )
    assert len(gone) == 256
    assert gone.min() >= kept.max()
    with pytest.raises(ValueError, match="`gather`"):
        Criterion(lambda w, s: w, signal="gradient")
    with pytest.raises(ValueError, match="`signal`"):
        Criterion(lambda w, s: w, signal="loss")  # type: ignore[arg-type]


def test_a_parameter_without_a_gradient_has_no_score(tmp_path: Any) -> None:
    module = seeded(Net)
    module.net[2].requires_grad_(False)
    module = fit(tmp_path, GradualPruning(0.25, criterion="gradient", end=0.5), module)
    assert zeros(module, ["net.2.weight"])[0] == 0
    assert zeros(module)[0] == 128
    other = seeded(Net)
    other.net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"nothing was learnt about 'net\.2\.weight'"):
        fit(tmp_path, GradualPruning(0.9, criterion="gradient", end=0.5, scope="layer"), other)


def test_a_skipped_step_tells_nothing(tmp_path: Any) -> None:
    pruning = GradualPruning(0.5, criterion="gradient", begin=2, end=6, every=1)
    module = fit(tmp_path, pruning, extra=[InfiniteGradientAt(3)], plugins=[loss_scaling()])
    assert zeros(module)[0] == 256
    assert all(torch.isfinite(p).all() for p in module.parameters())


# --- activations -----------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 3, 2)
        self.line = nn.Conv1d(3, 2, 1)
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x))
        return self.linear(input=self.line(x.flatten(2))[..., :5])


def test_input_norms_of_layers() -> None:
    torch.manual_seed(0)
    net, x = Layers(), torch.randn(3, 4, 6, 6)
    targets = dict(enumerate(select_parameters(net)))
    norms = InputNorms(targets, lambda: True)
    norms.attach()
    norms.attach()
    net(x)
    norms.detach()
    net(x)
    squares = norms.take()
    assert norms.take() == {}
    seen = {targets[i].module_name: (targets[i], value) for i, value in squares.items()}
    assert torch.allclose(seen["conv"][1], x.square().sum((0, 2, 3)), rtol=1e-5)
    grouped = input_norm(seen["conv"][1], seen["conv"][0])
    assert grouped.shape == (6, 2, 1, 1)
    assert torch.equal(grouped[0], grouped[2])
    assert torch.equal(grouped[3].flatten(), seen["conv"][1][2:].sqrt())
    assert input_norm(seen["up"][1], seen["up"][0]).shape == (6, 1, 1, 1)
    assert input_norm(seen["line"][1], seen["line"][0]).shape == (1, 3, 1)
    assert input_norm(seen["linear"][1], seen["linear"][0]).shape == (1, 5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_input_norms_of_attention(dropout: float) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=dropout, kdim=6, vdim=5)
    targets = dict(enumerate(select_parameters(nn.ModuleDict({"a": attention}))))
    norms = InputNorms(targets, lambda: True)
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 5)
    norms.attach()
    torch.manual_seed(1)
    out, _ = attention(q, k, value=v)
    norms.detach()
    torch.manual_seed(1)
    assert torch.equal(out, attention(q, k, value=v)[0])
    seen = {targets[i].attribute: value for i, value in norms.take().items()}
    for name, x in (("q_proj_weight", q), ("k_proj_weight", k), ("v_proj_weight", v)):
        assert torch.allclose(seen[name], x.square().sum((0, 1)))
    weight, bias = attention.out_proj.weight.double(), attention.out_proj.bias.double()
    inner = torch.linalg.solve(weight, (out.double() - bias).reshape(-1, 8).T).T
    assert torch.allclose(seen["weight"].double(), inner.square().sum(0), rtol=1e-3)


def test_activation_checkpointing_counts_once() -> None:
    layer = nn.Linear(4, 4)
    norms = InputNorms({0: Target("weight", "", layer, "weight")}, lambda: True)
    norms.attach()
    x = torch.randn(3, 4, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    norms.detach()
    assert torch.allclose(norms.take()[0], x.square().sum(0))


def test_validation_does_not_count(tmp_path: Any) -> None:
    pruning = GradualPruning(0.5, criterion="activation_weight", begin=2, end=8, every=4)
    quiet = fit(tmp_path, GradualPruning(0.5, criterion="activation_weight", begin=2, end=8, every=4))
    busy = fit(tmp_path, pruning, val_check_interval=1)
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), busy.parameters(), strict=True))


def test_layers_whose_inputs_cannot_be_seen_are_refused_by_name(tmp_path: Any) -> None:
    module = seeded(Net)
    module.rnn = nn.LSTM(4, 4)
    with pytest.raises(ValueError, match=r"'rnn\.weight_ih_l0'.*LSTM"):
        fit(tmp_path, GradualPruning(0.5, criterion="activation_weight"), module)


# --- granularities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "4", "4:4", "0:4", "block", "block:4", "block:0x1", "channels", 4])
def test_refuses_granularities(text: Any) -> None:
    with pytest.raises(ValueError, match="`granularity`"):
        Granularity.parse(text)


@pytest.mark.parametrize(
    ("keep", "of", "shape", "dim"), [(2, 4, (6, 8), 1), (1, 4, (4, 8, 3, 3), 1), (4, 8, (8, 2, 3), 0)]
)
def test_pattern_leaves_the_largest_of_each_group(keep: int, of: int, shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    field = PatternField("x", 0, shape, dim, keep, of)
    score = torch.rand(shape)
    lost = field.candidates(score, torch.ones(shape, dtype=torch.bool))
    groups, scores = lost.movedim(dim, -1).reshape(-1, of), score.movedim(dim, -1).reshape(-1, of)
    for row, values in zip(groups, scores, strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(values.argsort()[: of - keep].tolist())


def test_blocks_sum_what_is_in_them() -> None:
    field = BlockField("x", 0, (4, 6), 2, 3)
    score = torch.arange(24.0).reshape(4, 6)
    expected = torch.stack([torch.stack([score[r : r + 2, c : c + 3].sum() for c in (0, 3)]) for r in (0, 2)])
    assert torch.equal(field.reduce({0: score}), expected)
    spread = field.spread(torch.tensor([[True, False], [False, True]]))[0]
    assert torch.equal(spread, torch.kron(torch.eye(2), torch.ones(2, 3)).bool())


class Convolutions(LightningModule):
    """Case 18: a stem of 3 channels and a layer of 10 inputs do not divide by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.ten, self.head = nn.Linear(10, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        image = nn.functional.pad(x, (0, 192 - FEATURES)).reshape(-1, 3, 8, 8)
        features = self.conv(self.stem(image).relu()).mean((2, 3))
        return self.head(features + self.ten(x[:, :10]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_case_18_what_does_not_divide_is_named(tmp_path: Any, caplog: Any) -> None:
    module, pruning = seeded(Convolutions), GradualPruning(granularity="2:4", end=0.6)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run = trainer(tmp_path, [pruning])
        run.fit(module, StatefulLoader())
    assert "'stem.weight' (its 3 inputs do not divide by 4)" in caplog.text
    assert "'ten.weight' (its 10 inputs do not divide by 4)" in caplog.text
    assert (module.stem.weight != 0).all()
    assert (module.ten.weight != 0).all()
    for weight in (module.conv.weight, module.head.weight):
        assert ((weight.movedim(1, -1).reshape(-1, 4) == 0).sum(1) == 2).all()
    assert float(run.callback_metrics["compress/sparsity"]) == 0.5
    assert set(pruning.layers()) == {"conv.weight", "head.weight"}
    with pytest.raises(ValueError, match=r"fits no layer: 'stem\.weight'"):
        trainer(tmp_path, [GradualPruning(granularity="2:4", include="stem")]).fit(module, StatefulLoader())


# --- regrowth --------------------------------------------------------------------------------------------------------


def test_regrowth_brings_back_the_largest_gradients(tmp_path: Any) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.back = self.checked = 0

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            self.gradients = [p.grad.abs().clone() for p in pl_module.parameters() if p.dim() > 1]
            self.gone = [p.detach() == 0 for p in pl_module.parameters() if p.dim() > 1]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            for gradient, gone, p in zip(
                self.gradients, self.gone, [p for p in pl_module.parameters() if p.dim() > 1], strict=True
            ):
                back = gone & (p != 0)
                if back.any():
                    self.back += int(back.sum())
                    stayed = gradient[gone & (p == 0)]
                    self.checked += int(stayed.numel() == 0 or gradient[back].min() >= stayed.max())
                    assert stayed.numel() == 0 or gradient[back].min() >= stayed.max()
            total = zeros(pl_module)[1]
            if trainer.global_step >= 4:
                assert abs(zeros(pl_module)[0] / total - 0.6) < 1 / total

    watch = Watch()
    pruning = GradualPruning(0.6, schedule="one_shot", begin=4, end=24, every=4, regrowth=0.3)
    fit(tmp_path, watch, extra=[pruning])
    assert watch.back > 100
    assert watch.checked >= 9


def test_regrowth_fades_and_the_masks_are_frozen_from_the_end(tmp_path: Any) -> None:
    class Masks(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, Tensor] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen[trainer.global_step] = torch.cat(
                [(p == 0).flatten() for p in pl_module.parameters() if p.dim() > 1]
            )

    masks = Masks()
    fit(tmp_path, masks, extra=[GradualPruning(0.6, schedule="one_shot", begin=4, end=20, every=4, regrowth=0.5)])
    moved = {step: int((masks.seen[step] ^ masks.seen[step - 1]).sum()) for step in range(5, 33)}
    assert moved[8] > moved[12] > moved[16] > 0
    assert all(moved[step] == 0 for step in range(20, 33))


# --- what can happen in between --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cubic", "one_shot"])
def test_an_update_without_a_signal_is_made_up_for(tmp_path: Any, schedule: str) -> None:
    begin = 8 if schedule == "one_shot" else 0
    pruning = GradualPruning(0.8, criterion="gradient", begin=begin, end=8, every=1, schedule=schedule)
    module = fit(tmp_path, pruning, extra=[InfiniteGradientAt(7)], plugins=[loss_scaling()])
    assert zeros(module)[0] == round(0.8 * 512)
    assert pruning.stage() == 1.0
    at_once = fit(tmp_path, GradualPruning(0.8, criterion="gradient", begin=0, end=0))
    assert zeros(at_once)[0] == round(0.8 * 512)


class Alternating(Net):
    """A pair of optimizers that take turns, as adversarial training has them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1, momentum=0.9) for part in (self.net[:3], self.net[3:])]


def test_alternating_optimizers(tmp_path: Any) -> None:
    module = fit(tmp_path, GradualPruning(0.8, criterion="gradient", begin=0, end=20, schedule="linear"), Alternating())
    assert zeros(module)[0] == round(0.8 * 512)

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.before = [p.detach() == 0 for p in pl_module.parameters() if p.dim() > 1]

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self.owned = [id(p) in owned for p in pl_module.parameters() if p.dim() > 1]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            matrices = [p for p in pl_module.parameters() if p.dim() > 1]
            for parameter, before, is_owned in zip(matrices, self.before, self.owned, strict=True):
                came_back = before & (parameter != 0)
                assert is_owned or not came_back.any()

    pruning = GradualPruning(0.6, regrowth=0.4, every=1, begin=2, end=20, scope="layer")
    module = fit(tmp_path, Watch(), seeded(Alternating), extra=[pruning])
    assert abs(zeros(module)[0] / 512 - 0.6) < 1 / 512


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "activation_weight"])
def test_zeros_are_those_that_are_claimed_while_weights_regrow(tmp_path: Any, criterion: Any) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert zeros(pl_module)[0] == round(pruning._running.sparsity * 512)

    module = seeded(lambda: Net(optimizer=torch.optim.Adam))
    pruning = GradualPruning(0.8, begin=0.1, end=0.7, every=1, criterion=criterion, regrowth=0.3)
    swaps: list[float] = []
    original = GradualPruning._regrow

    def counted(self: Any, *args: Any) -> None:
        original(self, *args)
        swaps.append(sum(int(mask.sum()) for mask in self._running._grown or []))

    GradualPruning._regrow = counted  # type: ignore[method-assign]
    try:
        fit(tmp_path, Watch(), module, extra=[pruning])
    finally:
        GradualPruning._regrow = original  # type: ignore[method-assign]
    assert sum(swaps) > 20
    assert zeros(module)[0] == round(0.8 * 512)


@pytest.mark.filterwarnings(
    "ignore:GradualPruning.* the run stopped before", "ignore:AccuracyGuard.* the run ends with"
)
def test_nothing_regrows_while_the_ramp_is_held(tmp_path: Any) -> None:
    module = seeded(Net)
    pruning = GradualPruning(0.8, regrowth=0.4, begin=0, end=0.9, every=1)
    guard = AccuracyGuard("val_acc", tolerance=0.0, baseline=0.999)
    average = EMAWeightAveraging(decay=0.9)
    run = trainer(tmp_path, [pruning, guard, average], val_check_interval=4, max_epochs=2)
    run.fit(module, StatefulLoader(), held_out())
    run.save_checkpoint(tmp_path / "held.ckpt")
    state = torch.load(tmp_path / "held.ckpt", weights_only=True)["state_dict"]
    assert sum(int((w == 0).sum()) for w in state.values() if w.dim() > 1) == round(pruning._running.sparsity * 512)


@pytest.mark.parametrize("saver_is_first", [True, False])
@pytest.mark.parametrize("step", [1, 7, 9])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"criterion": "activation_weight", "regrowth": 0.3},
        {"criterion": "gradient_weight", "regrowth": "feedback"},
        {"criterion": "activation_weight", "granularity": "channel", "scope": "layer"},
        {"criterion": "gradient_weight", "granularity": "channel", "scope": "layer"},
    ],
    ids=str,
)
def test_resume_wherever_the_checkpoint_is_written(
    tmp_path: Any, kwargs: dict[str, Any], step: int, saver_is_first: bool
) -> None:
    def run(extra: Any = (), ckpt_path: Any = None) -> Any:
        pruning = GradualPruning(0.5, begin=0, end=0.6, every=3, **kwargs)
        module = seeded(Net)
        callbacks = [*extra, pruning] if saver_is_first else [pruning, *extra]
        trainer(tmp_path, callbacks, num_sanity_val_steps=0).fit(
            module, StatefulLoader(), held_out(), ckpt_path=ckpt_path
        )
        return dict(module.state_dict()), pruning.state_dict()

    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(step, tmp_path / "x.ckpt")])
    assert same(whole, run((), tmp_path / "x.ckpt"))
