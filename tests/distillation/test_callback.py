"""A teacher beside a training run: what it changes, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_compress import (
    AccuracyGuard,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
)
from lightning_compress.distillation import LogitLoss, distilled_loss
from tests.helpers import (
    CLASSES,
    FEATURES,
    Crash,
    CrashAt,
    LazyNet,
    ManualNet,
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


def teacher(width: int = 32) -> Net:
    return seeded(lambda: Net(width=width), seed=5)


def fit(tmp_path: Path, module: Any, callbacks: Any, **kwargs: Any) -> Any:
    run = trainer(tmp_path, callbacks, **kwargs)
    run.fit(module, StatefulLoader(), held_out())
    return run


class ByHand(Net):
    """What distillation should do, written into the training_step."""

    def __init__(self, guide: nn.Module, weight: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.guide, self.weight, self.temperature = [guide.eval()], weight, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, t = self(x), self.temperature
        with torch.no_grad():
            answer = self.guide[0](x)
        soft = F.kl_div((logits / t).log_softmax(1), (answer / t).softmax(1), reduction="batchmean") * t**2
        return (1 - self.weight) * F.cross_entropy(logits, y) + self.weight * soft


@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}], ids=str)
def test_is_the_loss_written_by_hand(tmp_path: Path, kwargs: Any) -> None:
    guide = teacher().double()
    by_hand = seeded(lambda: ByHand(guide, 0.7, 3.0))
    fit(tmp_path, by_hand, [], precision="64-true", **kwargs)
    module, distillation = seeded(Net), KnowledgeDistillation(guide, temperature=3.0, weight=0.7)
    run = fit(tmp_path, module, [distillation], precision="64-true", **kwargs)
    for a, b in zip(by_hand.parameters(), module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert hooks_of(module, run) == 0
    assert "training_step" not in vars(module)


class Recorder(Callback):
    """Counts the teacher's forward passes and records losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def test_the_student_makes_no_second_pass(tmp_path: Path) -> None:
    module, passes = seeded(Net), []
    module.net.register_forward_hook(lambda *args: passes.append(module.training))
    fit(tmp_path, module, [KnowledgeDistillation(teacher())])
    assert sum(passes) == 32


def test_teacher_is_a_guest(tmp_path: Path) -> None:
    guide = teacher()
    guide.net.insert(2, nn.BatchNorm1d(32))
    guide.net.insert(3, nn.Dropout(0.5))
    guide.train()
    before = copy.deepcopy(guide.state_dict())
    plain, module = seeded(Net), seeded(Net)
    keys = list(module.state_dict())
    modes = []

    class Modes(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            modes.append(guide.training)

    run = fit(tmp_path, module, [KnowledgeDistillation(guide), Modes()])
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert same(dict(before), dict(guide.state_dict()))
    assert all(p.grad is None for p in guide.parameters())
    assert not any(modes)
    assert guide.training  # as it came
    assert list(module.state_dict()) == keys
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == keys
    plain_run = fit(tmp_path, plain, [])
    plain_run.save_checkpoint(tmp_path / "plain.ckpt")
    reference = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    sizes = [len(state["state"]) for state in checkpoint["optimizer_states"]]
    assert sizes == [len(state["state"]) for state in reference["optimizer_states"]]
    Net().load_state_dict(checkpoint["state_dict"])


def test_weight_one_needs_no_labels(tmp_path: Path) -> None:
    class Unlabelled(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module = seeded(Unlabelled)
    fit(tmp_path, module, [KnowledgeDistillation(teacher().double(), weight=1.0)], precision="64-true")
    guide = teacher().double()
    reference = seeded(lambda: ByHand(guide, 1.0, 4.0))
    fit(tmp_path, reference, [], precision="64-true")
    for a, b in zip(reference.parameters(), module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_skipped_batch_stays_skipped(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    recorder = Recorder()
    recorder.on_train_batch_end = lambda run, module, outputs, *args: recorder.losses.append(bool(outputs))  # type: ignore
    module = seeded(Skips)
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(tmp_path, module, [KnowledgeDistillation(teacher()), recorder])
    assert recorder.losses == [True, False] * 16


def test_a_dict_keeps_what_it_holds(tmp_path: Path) -> None:
    class Dict(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "extra": 3}

    seen = []

    class See(Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs["extra"])

    module, plain = seeded(Dict), seeded(Net)
    fit(tmp_path, module, [KnowledgeDistillation(teacher()), See()])
    fit(tmp_path, plain, [KnowledgeDistillation(teacher())])
    assert seen == [3] * 32
    assert same(dict(module.state_dict()), dict(plain.state_dict()))


def test_schedules_and_several_losses(tmp_path: Path) -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.values: list[dict[str, float]] = []

        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            self.values.append({k: float(v) for k, v in run.callback_metrics.items() if k.startswith("compress/")})

    logged, guide, module = Logged(), teacher(), seeded(Net)
    first = next(iter(StatefulLoader()))
    student, answer = module(first[0]).detach(), guide(first[0]).detach()
    distillation = KnowledgeDistillation(
        guide,
        losses=["mse", ["hard", {"first": 0.5, "last": 0.0, "begin": 1, "end": 1}], lambda s, t: (s - t).abs().mean()],
        weight={"first": 0.5, "last": 0.0, "begin": 8, "end": 16},
    )
    recorder = Recorder()
    fit(tmp_path, module, [distillation, logged, recorder], log_every_n_steps=1)
    terms = logged.values[0]
    assert terms["compress/distillation_mse"] == pytest.approx(F.mse_loss(student, answer).item(), rel=1e-5)
    hard = F.cross_entropy(student, answer.argmax(1)).item()
    assert terms["compress/distillation_hard"] == pytest.approx(0.5 * hard, rel=1e-5)
    assert terms["compress/distillation_lambda"] == pytest.approx((student - answer).abs().mean().item(), rel=1e-5)
    total = sum(value for key, value in terms.items() if key != "compress/distillation")
    assert terms["compress/distillation"] == pytest.approx(total, rel=1e-5)
    own = F.cross_entropy(student, first[1]).item()
    assert recorder.losses[0] == pytest.approx(0.5 * own + 0.5 * total, rel=1e-5)
    assert logged.values[1]["compress/distillation_hard"] == 0.0


def test_manual_optimization_opts_in_by_one_call(tmp_path: Path) -> None:
    class Forgetful(ManualNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.raises(ValueError, match="distilled_loss"):
        fit(tmp_path, seeded(Forgetful), [KnowledgeDistillation(teacher())])

    class OptsIn(Forgetful):
        def loss(self, batch: Any) -> Tensor:
            return distilled_loss(self, super().loss(batch))

    manual, automatic = seeded(OptsIn), seeded(Net)
    fit(tmp_path, manual, [KnowledgeDistillation(teacher())])
    fit(tmp_path, automatic, [KnowledgeDistillation(teacher())])
    assert same(dict(manual.state_dict()), dict(automatic.state_dict()))


# --- what is captured -------------------------------------------------------------------------------------------------


class Parts(LightningModule):
    """Never calls itself."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def distilled(tmp_path: Path, make: Any, **kwargs: Any) -> dict[str, Tensor]:
    module = seeded(make)
    fit(tmp_path, module, [KnowledgeDistillation(teacher(), **kwargs)])
    return dict(module.state_dict())


@pytest.mark.parametrize("features", [None, {"net.1": "net.1"}])
def test_passes_without_gradients_do_not_count(tmp_path: Path, features: Any) -> None:
    class Looks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self(2.0 * batch[0])
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self(0.0 * batch[0])
            return loss

    kwargs = {"features": features}
    assert same(distilled(tmp_path, Net, **kwargs), distilled(tmp_path, Looks, **kwargs))


def test_passes_before_a_backward_pass_do_not_count(tmp_path: Path) -> None:
    """As in sharpness-aware minimization: the graph of the first pass is gone when the second is distilled."""

    class Once(ManualNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for is_last in (False, True):
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(distilled_loss(self, loss) if is_last else loss)
                optimizer.step()

    class Afterwards(Once):
        """Makes its own first pass in plain torch, where nobody sees it."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            out = batch[0]
            for layer in self.net:
                out = layer.forward(out)
            self.manual_backward(F.cross_entropy(out, batch[1]))
            optimizer.step()
            optimizer.zero_grad()
            self.manual_backward(distilled_loss(self, self.loss(batch)))
            optimizer.step()

    assert same(distilled(tmp_path, Once), distilled(tmp_path, Afterwards))


def test_one_pass_may_be_distilled_after_another_backward_pass(tmp_path: Path) -> None:
    """As a generator's, whose discriminator goes first."""

    class Adversarial(ManualNet):
        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.Linear(CLASSES, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            out = self(batch[0])
            self.manual_backward(self.critic(out.detach()).mean())
            optimizer.zero_grad()
            self.manual_backward(distilled_loss(self, F.cross_entropy(out, batch[1])))
            optimizer.step()

    module = distilled(tmp_path, Adversarial)
    plain = distilled(tmp_path, Net)
    assert all(torch.equal(module[name], plain[name]) for name in plain)


@pytest.mark.parametrize("module", [None, ""])
def test_the_teacher_gets_what_the_student_was_given_before_it_changes_it(tmp_path: Path, module: Any) -> None:
    """Also in the first step, in which it is not known yet which module is meant."""

    class Halves(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0.5)

    class HalvesInPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0].clone(), batch[1]], batch_idx)

    assert same(distilled(tmp_path, HalvesInPlace, module=module), distilled(tmp_path, Halves, module=module))


def test_the_teacher_is_asked_once_for_each_pass_and_not_where_it_has_no_weight(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = teacher(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x)

    calls = {}
    for weight in (0.5, 0.0):
        guide = Counts()
        run = fit(tmp_path, seeded(Net), [KnowledgeDistillation(guide, weight=weight)])
        calls[weight] = guide.calls / run.global_step
    assert calls == {0.5: 1.0, 0.0: 0.0}


def test_the_teacher_is_not_asked_again_where_activations_are_computed_again(tmp_path: Path) -> None:
    class Checkpointed(ManualNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            out = checkpoint(self.net, batch[0], use_reentrant=False)
            self.manual_backward(distilled_loss(self, F.cross_entropy(out, batch[1])))
            optimizer.step()

    guide, calls = teacher(), []
    guide.register_forward_hook(lambda module, args, output: calls.append(1))
    run = fit(tmp_path, seeded(Checkpointed), [KnowledgeDistillation(guide, module="net")])
    assert len(calls) == run.global_step > 0


def test_a_moving_average_of_a_part_begins_before_it_has_a_weight(tmp_path: Path) -> None:
    weight = {"first": 0.0, "last": 0.9, "schedule": "one_shot", "begin": 0.5, "end": 1.0}
    module, average = seeded(Net), KnowledgeDistillation("ema:0.9", module="net", weight=weight)
    fit(tmp_path, module, [average])
    assert average.state_dict()["ema"].keys() == module.net.state_dict().keys()


def test_refuses_features_within_reentrant_checkpointing(tmp_path: Path) -> None:
    class Recomputes(Net):
        is_reentrant = False

        def forward(self, x: Tensor) -> Tensor:
            out = checkpoint(self.net[:2].forward, x.requires_grad_(), use_reentrant=self.is_reentrant)
            return self.net[2:].forward(out)

    kwargs = {"features": {"net.0": "net.0"}, "module": ""}
    assert same(distilled(tmp_path, Recomputes, **kwargs), distilled(tmp_path, Net, **kwargs))
    Recomputes.is_reentrant = True
    with pytest.raises(ValueError, match=r"'net\.0'.*use_reentrant=False"):
        distilled(tmp_path, Recomputes, **kwargs)


def test_two_parts_need_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'body' and 'head'.*`module`"):
        fit(tmp_path, seeded(Parts), [KnowledgeDistillation(teacher())])
    # The head receives features, so the teacher has to be one of features.
    guide = nn.Linear(16, CLASSES)
    module = seeded(Parts)
    fit(tmp_path, module, [KnowledgeDistillation(guide, module="head")])
    with pytest.raises(ValueError, match="`module` names 'heads'.*'head'"):
        fit(tmp_path, seeded(Parts), [KnowledgeDistillation(guide, module="heads")])
    with pytest.raises(ValueError, match="`training_step` never calls Parts's own forward"):
        fit(tmp_path, seeded(Parts), [KnowledgeDistillation(guide, module="")])
    assert "training_step" not in vars(module)


def test_other_classes_and_teacher_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 classes and the teacher 7"):
        fit(tmp_path, seeded(Net), [KnowledgeDistillation(nn.Linear(FEATURES, 7))])
    guide = nn.Linear(3, CLASSES)
    seen = []
    guide.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    fit(tmp_path, seeded(Net), [KnowledgeDistillation(guide, teacher_input=lambda x: x[:, :3])])
    assert set(seen) == {(8, 3)}


class Sequence(LightningModule):
    """Returns [B, T, V] in a dict, and takes its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)

    def forward(self, *, tokens: Tensor) -> dict[str, Tensor]:
        hidden = tokens[:, None, :].repeat(1, 5, 1)
        return {"logits": self.net(hidden), "hidden": hidden}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(tokens=batch["x"])["logits"].flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_sequences_count_each_position_that_has_a_label(tmp_path: Path) -> None:
    """CASES 1, through the callback."""
    module, guide = seeded(Sequence), seeded(Sequence, seed=3)
    labels = torch.randint(0, CLASSES, (8, 5))
    labels[:, 3:] = -100
    batch = {"x": torch.randn(8, FEATURES), "labels": labels}
    student, answer = module(tokens=batch["x"])["logits"].detach(), guide(tokens=batch["x"])["logits"].detach()
    recorder = Recorder()
    run = trainer(tmp_path, [KnowledgeDistillation(guide, weight=1.0, temperature=4.0), recorder], max_steps=1)
    run.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    rows = [tensor[:, :3].reshape(-1, CLASSES) / 4.0 for tensor in (student, answer)]
    expected = 16.0 * F.kl_div(rows[0].log_softmax(1), rows[1].softmax(1), reduction="batchmean")
    assert recorder.losses[0] == pytest.approx(expected.item(), rel=1e-5)


# --- features ---------------------------------------------------------------------------------------------------------


def features_run(tmp_path: Path, optimizer: Any = None, extra: Any = (), ckpt_path: Any = None) -> Any:
    module = seeded(lambda: Net(optimizer=optimizer))
    distillation = KnowledgeDistillation(
        teacher(),
        features={"net.1": "net.1", "net.3": {"layer": "net.3", "loss": "relation", "weight": 0.1}},
    )
    run = trainer(tmp_path, [distillation, *extra])
    run.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
    return module, distillation, run


ADAM = torch.optim.Adam


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_projectors_train_with_the_student_and_stay_out_of_its_checkpoint(tmp_path: Path) -> None:
    module, distillation, run = features_run(tmp_path, ADAM)
    whole = snapshot(module, run) | {"state": distillation.state_dict()}
    [projector] = whole["state"]["projectors"].values()
    assert projector["state"]["0.weight"].shape == (32, 16)
    with pytest.raises(Crash):
        features_run(tmp_path, ADAM, [CrashAt(13, tmp_path / "crash.ckpt")])
    checkpoint = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Net().state_dict())
    [state] = checkpoint["optimizer_states"]
    assert len(state["state"]) == len(state["param_groups"][0]["params"]) == 6
    module, distillation, run = features_run(tmp_path, ADAM, ckpt_path=tmp_path / "crash.ckpt")
    assert same(whole, snapshot(module, run) | {"state": distillation.state_dict()})
    # The bare student goes on from it, too.
    bare = seeded(lambda: Net(optimizer=ADAM))
    trainer(tmp_path).fit(bare, StatefulLoader(), held_out(), ckpt_path=tmp_path / "crash.ckpt")


def test_projectors_begin_as_the_first_process_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seed each process differently."""

    def first_layer(seed: str) -> Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        return features_run(tmp_path)[0].net[0].weight.detach().clone()

    assert not torch.equal(first_layer("3"), first_layer("4"))
    of_the_first = first_layer("3")
    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", lambda self, obj, src=0: 3 if obj == 4 else obj)
    assert torch.equal(first_layer("4"), of_the_first)


def test_unknown_features(tmp_path: Path) -> None:
    for features, name in (({"net.9": "net.1"}, "net.9"), ({"net.1": "net.9"}, "net.9")):
        module = seeded(Net)
        with pytest.raises(ValueError, match=f"`features` names '{name}'.*closest"):
            fit(tmp_path, module, [KnowledgeDistillation(teacher(), features=features)])
        assert hooks_of(module) == 0


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_students_class(tmp_path: Path) -> None:
    """Lightning #17592: a trained checkpoint teaches."""
    guide = seeded(lambda: Parts(width=24), seed=3)
    trainer(tmp_path).fit(guide, StatefulLoader(), held_out())
    torch.manual_seed(0)
    run = trainer(tmp_path)
    run.strategy.connect(guide)
    run.save_checkpoint(tmp_path / "guide.ckpt")

    class Whole(Parts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    from_path, from_module = seeded(Whole), seeded(Whole)
    fit(tmp_path, from_path, [KnowledgeDistillation(str(tmp_path / "guide.ckpt"))])
    fit(tmp_path, from_module, [KnowledgeDistillation(guide)])
    assert same(dict(from_path.state_dict()), dict(from_module.state_dict()))


def test_moving_average_resumes_bit_identically(tmp_path: Path) -> None:
    def run(extra: Any = (), ckpt_path: Any = None) -> Any:
        module, distillation = seeded(Net), KnowledgeDistillation("ema:0.9", losses="mse", weight=0.5)
        started = trainer(tmp_path, [distillation, *extra])
        started.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
        return snapshot(module, started) | {"state": distillation.state_dict()}

    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(11, tmp_path / "crash.ckpt")])
    assert same(whole, run(ckpt_path=tmp_path / "crash.ckpt"))
    average, last = whole["state"]["ema"]["net.0.weight"], whole["weights"]["net.0.weight"]
    assert not torch.equal(average, last)


def test_starts_from_the_teachers_weights(tmp_path: Path) -> None:
    module = seeded(Net)
    distillation = KnowledgeDistillation(teacher(16), initialize="copy")
    trainer(tmp_path, [distillation], max_steps=1).fit(module, StatefulLoader(), held_out())
    start = teacher(16)
    assert all(torch.allclose(a, b, atol=0.2) for a, b in zip(module.parameters(), start.parameters(), strict=True))
    assert "copied 6 of 6" in distillation.summary()
    assert "copied" not in KnowledgeDistillation(teacher(16)).summary()


def test_resuming_does_not_start_from_the_teacher_again(tmp_path: Path) -> None:
    def run(extra: Any = (), ckpt_path: Any = None) -> Any:
        module = seeded(Net)
        started = trainer(tmp_path, [KnowledgeDistillation(teacher(16), initialize="copy"), *extra])
        started.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
        return snapshot(module, started)

    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(9, tmp_path / "crash.ckpt")])
    assert same(whole, run(ckpt_path=tmp_path / "crash.ckpt"))


class Rows(torch.utils.data.Dataset):
    def __init__(self, has_index: bool) -> None:
        self.x, self.has_index = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(0)), has_index

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        row = {"x": self.x[index], "y": torch.tensor(index % CLASSES)}
        return row | ({"index": index} if self.has_index else {})


class Keyed(Net):
    validation_step = LightningModule.validation_step

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])


@pytest.mark.parametrize(("shuffle", "has_index"), [(False, False), (True, True), (True, False)])
def test_cache_asks_the_teacher_once(tmp_path: Path, shuffle: bool, has_index: bool) -> None:
    def run(cache: Any) -> tuple[Any, int]:
        guide, module, passes = teacher(), seeded(Keyed), []
        guide.net.register_forward_hook(lambda *args: passes.append(1))
        loader = torch.utils.data.DataLoader(Rows(has_index), batch_size=8, shuffle=shuffle)
        torch.manual_seed(1)
        run = trainer(tmp_path, [KnowledgeDistillation(guide, cache=cache)])
        run.fit(module, loader)
        return dict(module.state_dict()), len(passes)

    if shuffle and not has_index:
        with pytest.raises(ValueError, match="`cache` needs to know which samples"):
            run(tmp_path / "cache")
        return
    plain, passes = run(None)
    assert passes == 16
    cached, passes = run(tmp_path / "cache")
    assert passes == 4
    assert same(plain, cached)
    assert run(tmp_path / "cache")[1] == 0


def test_cache_needs_a_length(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            rows = Rows(has_index=True)
            yield from (rows[index] for index in range(8))

    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(ValueError, match="`cache` needs to know how many samples"):
        trainer(tmp_path, [KnowledgeDistillation(teacher(), cache=tmp_path / "cache")]).fit(seeded(Keyed), loader)


# --- together ---------------------------------------------------------------------------------------------------------


def test_prunes_quantizes_and_distils_in_one_fit(tmp_path: Path) -> None:
    module = seeded(Net)
    pruning = GradualPruning(0.5, granularity="channel", scope="layer", begin=0.1, end=0.5, every=2)
    distillation = KnowledgeDistillation(teacher(), features={"net.1": "net.1"})
    quantization = QuantizationAwareTraining(begin=0.6)
    run = fit(tmp_path, module, [distillation, pruning, quantization])
    assert "training_step" not in vars(pruning.pruned_module)
    x = torch.randn(3, FEATURES)
    assert torch.allclose(pruning.pruned_module(x), module(x), atol=0.02)  # ranges may get narrower
    assert hooks_of(module, run) == 0


@pytest.mark.filterwarnings("ignore:GradualPruning. the run stopped before")  # the guard has held it
def test_a_guard_rolls_the_teachers_part_back(tmp_path: Path) -> None:
    class Falls(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.9 if self.current_epoch != 2 else 0.1)

    module, distillation = seeded(Falls), KnowledgeDistillation("ema:0.9", losses="mse")
    guard = AccuracyGuard("val_acc", tolerance=0.05, action="rollback")
    fit(tmp_path, module, [distillation, GradualPruning(0.8, begin=0.1, end=0.9, every=2), guard])
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:ModelCheckpoint.* may keep an epoch that is not compressed")
def test_best_checkpoint_and_loss_scaling(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    module = seeded(Net)
    fit(
        tmp_path,
        module,
        [KnowledgeDistillation(teacher(), features={"net.1": "net.1"}), best],
        plugins=[loss_scaling()],
        enable_checkpointing=True,
    )
    Net().load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"losses": "kll"}, "losses"),
        ({"losses": []}, "losses"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": {"first": 1.0, "last": -1.0}}, "temperature"),
        ({"weight": 1.5}, "weight"),
        ({"initialize": "paste"}, "initialize"),
        ({"cache": "x", "features": {"a": "b"}}, "cache"),
        ({"losses": [["kl", -1.0]]}, "losses"),
    ],
)
def test_bad_arguments(kwargs: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"`{match}"):
        KnowledgeDistillation(nn.Linear(2, 2), **kwargs)


def test_says_who_teaches_and_how(tmp_path: Path) -> None:
    distillation = KnowledgeDistillation([teacher(), nn.Linear(FEATURES, CLASSES)], weight={"first": 1.0, "last": 0.5})
    assert distillation.summary() == "the teacher teaches by kl, temperature 4, weight 1 to 0.5"
    fit(tmp_path, seeded(Net), [distillation], max_epochs=1)
    assert distillation.summary() == "Net and Linear teaches by kl, temperature 4, weight 1 to 0.5"
    average = KnowledgeDistillation("ema:0.9", weight=lambda t: 1.0 - t)
    fit(tmp_path, seeded(Net), [average], max_epochs=1)
    expected = "the student's moving average (decay 0.9) teaches by kl, temperature 4, weight as a function of progress"
    assert average.summary() == expected


def test_does_not_write_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_compress.distillation.callback.is_sharded", lambda run: True)
    with pytest.raises(ValueError, match="`initialize` cannot write into"):
        fit(tmp_path, seeded(LazyNet), [KnowledgeDistillation(teacher(16), initialize="copy")])


def test_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    module = seeded(Net)
    with pytest.raises(ValueError, match=r"shares parameters with the student.*net\.0"):
        fit(tmp_path, module, [KnowledgeDistillation(module.net)])
    with pytest.raises(ValueError, match="'dkd' needs labels"):
        fit(
            tmp_path,
            seeded(Net),
            [KnowledgeDistillation(teacher(), losses=LogitLoss("dkd", labels=lambda batch: None))],
        )
    with pytest.raises(ValueError, match="`cache`"):
        KnowledgeDistillation("ema", cache=tmp_path)
