"""QuantizationAwareTraining inside the Trainer: what Lightning's own callback broke on, and everything refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import AccuracyGuard, GradualPruning, LearningRateSchedule, QuantizationAwareTraining
from lightning_compress.moments import Moment
from lightning_compress.quantization.insertion import dequantize, insertions
from lightning_compress.quantization.layers import ActivationQuantizer, QuantizedLayer, Quantizer
from tests.helpers import (
    BATCHES,
    CLASSES,
    FEATURES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    LazyNet,
    ManualNet,
    Net,
    RawManualNet,
    StatefulLoader,
    held_out,
    loss_scaling,
    same,
    seeded,
    snapshot,
    trainer,
    zeros,
)

QAT = QuantizationAwareTraining
ignore_missing_callbacks = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class NormNet(Net):
    """Batch norms that can be folded, and a residual sum."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net[:3](x)
        return self.head(self.net[3:](y) + y)


class Record(Callback):
    """Copy a value after every training batch (counted from 1), or wherever validation can run."""

    def __init__(self, value: Any) -> None:
        self.value, self.train, self.validation = value, {}, {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.train[trainer.fit_loop.epoch_loop.total_batch_idx + 1] = self.value()

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validation[trainer.global_step] = self.value()


def run(tmp_path: Any, callback: Any, module: Any = None, extra: Any = (), ckpt_path: Any = None, **kwargs: Any) -> Any:
    module = module or seeded(Net)
    fitted = trainer(tmp_path, [callback, *extra], **kwargs)
    fitted.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
    return module, fitted


def is_on(module: nn.Module) -> set[bool]:
    return {child.is_on for child in module.modules() if isinstance(child, Quantizer)}


def ranges(callback: Any) -> dict[str, Any]:
    return callback.state_dict()["ranges"]


# --- the threads that Lightning's callback ended with -----------------------------------------------------------------


def test_7926_15862_forward_takes_keyword_arguments(tmp_path: Path) -> None:
    class Keywords(Net):
        def forward(self, x: Tensor, *, scale: float = 1.0, **rest: Any) -> Any:
            return {"logits": self.net(x) * scale, **rest}

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(x=batch[0], scale=1.0, note="hi")["logits"], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    callback = QAT(begin=0.3)
    module, fitted = run(tmp_path, callback, seeded(Keywords))
    assert fitted.callback_metrics["val_loss"] < 1.2
    assert is_on(module) == {True}
    assert not callback.blind()
    assert module(held_out().x, note=3)["note"] == 3


def test_12896_test_from_a_checkpoint_in_a_new_process(tmp_path: Path) -> None:
    """The new process gets the loss that training saw; nobody there loads torchao, and nothing is written to stderr."""
    seen = {}
    for kind in ("moving_average", "learned"):
        _, fitted = run(tmp_path, QAT(3, begin=0.3, range=kind), seeded(NormNet))
        seen[kind] = float(fitted.callback_metrics["val_loss"])
        fitted.save_checkpoint(tmp_path / f"{kind}.ckpt")
        plain = seeded(NormNet)
        plain.load_state_dict(torch.load(tmp_path / f"{kind}.ckpt", weights_only=True)["state_dict"])
        unlike = trainer(tmp_path).validate(plain, held_out(), verbose=False)[0]["val_loss"]
        assert abs(unlike - seen[kind]) > 1e-4
    script = f"""
import sys, warnings
warnings.simplefilter("ignore")
from tests.quantization.test_callback import *
torch.set_num_threads(1)
for kind in ("moving_average", "learned"):
    path = f"{tmp_path}/{{kind}}.ckpt"
    run = trainer("{tmp_path}", [QAT(3, begin=0.3, range=kind)])
    print(run.test(seeded(NormNet, 5), held_out(), ckpt_path=path, verbose=False)[0]["test_loss"])
print([name for name in sys.modules if name.startswith("torchao")])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *losses, loaded = done.stdout.splitlines()
    assert [float(loss) for loss in losses] == pytest.approx(list(seen.values()), rel=1e-6)
    assert loaded == "[]"
    assert "torchao" not in done.stderr


@pytest.mark.parametrize("kind", ["moving_average", "minmax", "learned"])
def test_8507_validation_data_moves_nothing(tmp_path: Path, kind: Any) -> None:
    results = []
    for factor in (1.0, 1e4):
        callback, module, loader = QAT(begin=0.2, range=kind), seeded(NormNet), held_out()
        loader.x = loader.x * factor
        fitted = trainer(tmp_path, [callback], val_check_interval=2)
        fitted.fit(module, StatefulLoader(), loader)
        fitted.validate(module, loader, verbose=False)
        fitted.test(module, loader, verbose=False)
        fitted.predict(module, DataLoader(loader.x, batch_size=8))
        results.append((dict(module.state_dict()), {n: q.state() for n, q in insertions(module)[0].quantizers.items()}))
    assert same(*results)


def test_8485_resumes_bit_identically(tmp_path: Path) -> None:
    for kwargs in ({}, {"range": "learned", "weight_bits": 3}):

        def one(extra: Any = (), ckpt_path: Any = None, kwargs: Any = kwargs) -> Any:
            callback = QAT(begin=0.2, freeze_ranges=0.5, freeze_batchnorm=0.6, **kwargs)
            module, fitted = run(tmp_path, callback, seeded(NormNet), extra, ckpt_path)
            return snapshot(module, fitted) | {"state": callback.state_dict()}

        whole = one()
        for step in (3, 7, 16, 23):
            with pytest.raises(Crash):
                one([CrashAt(step, tmp_path / "crash.ckpt")])
            assert same(whole, one(ckpt_path=tmp_path / "crash.ckpt")), step


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"scheme": "affine"}, {"granularity": "group:4", "scheme": "affine"}, {"range": "learned", "weight_bits": 4}],
    ids=str,
)
@pytest.mark.parametrize("is_first", [True, False])
def test_11047_pruned_and_quantized_in_one_run(tmp_path: Path, kwargs: dict[str, Any], is_first: bool) -> None:
    prune, quantize = GradualPruning(0.8, begin=0.1, end=0.6, every=2), QAT(begin=0.4, **kwargs)
    module, _ = run(tmp_path, *((prune, None, [quantize]) if is_first else (quantize, None, [prune])))
    pruned, total = zeros(module)
    assert pruned == round(0.8 * total)
    for layer in module.modules():
        if isinstance(layer, QuantizedLayer):
            assert (layer.quantized_weight()[layer.weight == 0] == 0).all()
    is_zero = {name: p == 0 for name, p in module.named_parameters() if p.dim() > 1}
    dequantize(module)
    assert all((module.get_parameter(name)[mask] == 0).all() for name, mask in is_zero.items())
    assert zeros(module)[0] >= pruned


@ignore_missing_callbacks
def test_a_plain_checkpoint_is_the_start(tmp_path: Path) -> None:
    _, fitted = run(tmp_path, LearningRateSchedule(), max_epochs=2)
    fitted.save_checkpoint(tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    module = seeded(Net, 3)
    module.load_state_dict(state, strict=True)
    run(tmp_path, QAT(begin=0), module, max_epochs=1)
    module.load_state_dict(state, strict=True)  # into the quantized one too
    assert list(module.state_dict()) == list(state)
    # a whole run that goes on from it
    callback = QAT(begin=0.6)
    other = seeded(Net, 4)
    run(tmp_path, callback, other, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.stage() == 1


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moving_average", "learned"])
def test_case_5_a_backbone_that_joins_later(tmp_path: Path, kind: Any) -> None:
    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[:3])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.05)

    class Head(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    callback = QAT(begin=0.2, range=kind)
    extra = [Finetuning(), LearningRateSchedule(warmup=4, decay="linear")]
    if kind == "learned":
        with pytest.raises(ValueError, match="in none"):
            run(tmp_path, callback, seeded(Head), extra, max_epochs=5)
        return
    module, fitted = run(tmp_path, callback, seeded(Head), extra, max_epochs=5)
    assert all(group["lr"] <= 1e-6 for group in fitted.optimizers[0].param_groups)
    assert not callback.blind()
    assert is_on(module) == {True}


def test_case_6_hydras_containers(tmp_path: Path) -> None:
    config = OmegaConf.create(
        {
            "_target_": "lightning_compress.QuantizationAwareTraining",
            "exclude": ["net.2"],
            "weight_bits": 4,
            "begin": 0.2,
        }
    )
    callback = hydra.utils.instantiate(config)
    assert callback.exclude == ("net.2",)
    module, fitted = run(tmp_path, callback)
    assert list(callback.layers()) == ["net.0.weight", "net.4.weight"]
    assert callback.layers()["net.0.weight"] == {"bits": 4}
    assert type(module.net[2]) is nn.Linear
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    torch.load(tmp_path / "end.ckpt", weights_only=True)


@pytest.mark.parametrize("value", [1, 1.0, "1e-1", "3ep"])
def test_case_7_moments(tmp_path: Path, value: Any) -> None:
    config = {"_target_": "lightning_compress.QuantizationAwareTraining", "begin": 0, "freeze_ranges": value}
    expected = {1: Moment(1, "steps"), "1e-1": Moment(0.1, "fraction"), "3ep": Moment(3.0, "epochs")}
    made = hydra.utils.instantiate(OmegaConf.create(config)).freeze_ranges
    assert made == (Moment(1.0, "fraction") if isinstance(value, float) else expected[value])
    with pytest.raises(ValueError, match="freeze_ranges"):
        run(tmp_path, QAT(begin=0.5, freeze_ranges=1))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.* before .*optimizer.step")
def test_case_10_a_skipped_step(tmp_path: Path) -> None:
    for kind in ("moving_average", "learned"):
        callback, plain = QAT(begin=0.2, range=kind), QAT(begin=0.2, range=kind)
        module, _ = run(
            tmp_path,
            callback,
            extra=[InfiniteGradientAt(3), GradualPruning(0.8, every=1), LearningRateSchedule(warmup=4)],
            plugins=[loss_scaling()],
            max_epochs=2,
        )
        assert all(torch.isfinite(p).all() for p in module.parameters())
        assert zeros(module)[0] == round(0.8 * zeros(module)[1])
        run(tmp_path, plain, max_epochs=2)
        assert callback.stage() == plain.stage() == 1
        assert all(q.has_seen for q in insertions(module)[0].observers.values())


def test_case_12_one_object_many_entries(tmp_path: Path) -> None:
    callback, module = QAT(begin=0.3), seeded(NormNet)
    fitted = trainer(tmp_path, [callback])

    def count() -> tuple[int, int]:
        quantizers = sum(isinstance(child, Quantizer) for child in module.modules())
        return quantizers, sum(len(c._forward_hooks) + len(c._forward_pre_hooks) for c in module.modules())

    fitted.fit(module, StatefulLoader(), held_out())
    first, numbers = fitted.test(module, held_out(), verbose=False), count()
    fitted.validate(module, held_out(), verbose=False)
    assert fitted.test(module, held_out(), verbose=False) == first
    fitted.fit_loop.max_epochs = 6
    fitted.fit(module, StatefulLoader(), held_out())
    assert count() == numbers
    state = {n: q.state() for n, q in insertions(module)[0].quantizers.items()}
    other = seeded(lambda: NormNet())
    trainer(tmp_path, [callback]).fit(other, StatefulLoader(), held_out())
    assert same({n: q.state() for n, q in insertions(module)[0].quantizers.items()}, state)
    assert callback._inserted is insertions(other)[0]


def test_a_second_fit_starts_the_ranges_anew(tmp_path: Path) -> None:
    callback, module = QAT(begin=0.5), seeded(Net)
    fitted = trainer(tmp_path, [callback], max_epochs=2)
    loader = StatefulLoader()
    loader.x = loader.x * 1e3
    fitted.fit(module, loader, held_out())
    assert ranges(callback)["net.0.input_quantizer"]["high"] > 1e3
    again = trainer(tmp_path, [callback, record := Record(lambda: is_on(module))], max_epochs=2)
    again.fit(module, StatefulLoader(), held_out())
    assert ranges(callback)["net.0.input_quantizer"]["high"] < 10
    assert record.train[BATCHES - 1] == {False}
    assert record.train[2 * BATCHES] == {True}


class Falls(NormNet):
    """Whose accuracy is best at the start."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_good", 1.0 / (1 + self.current_epoch))


@pytest.mark.filterwarnings("ignore:ModelCheckpoint.* may keep an epoch that is not compressed")
def test_case_13_the_best_checkpoint_is_quantized(tmp_path: Path) -> None:
    for begin, first in ((0.3, 1), ("2ep", 2), (0, 0)):
        best = ModelCheckpoint(tmp_path / str(begin), monitor="compress/val_good", mode="max")
        plain = ModelCheckpoint(tmp_path / f"plain{begin}", monitor="val_good", mode="max")
        callback = QAT(begin=begin)
        run(tmp_path, callback, seeded(Falls), [best, plain], enable_checkpointing=True)
        state = torch.load(best.best_model_path, weights_only=True)
        assert state["epoch"] == first
        state = state["callbacks"][callback.state_key]
        assert state["is_on"]
        assert all(facts.get("has_seen", True) for facts in state["ranges"].values())
        other = torch.load(plain.best_model_path, weights_only=True)["callbacks"][callback.state_key]
        assert other["is_on"] == (begin == 0)


@ignore_missing_callbacks
def test_case_14_token_ids_and_a_tied_embedding(tmp_path: Path) -> None:
    class Tokens(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = None
            self.embedding, self.block = nn.Embedding(50, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU())
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.embedding(x.abs().mul(9).long().clamp(max=49)))).mean(1)

    def make() -> Any:
        return seeded(Tokens)

    prune, quantize = GradualPruning(0.5, end=0.4, include=["embedding", "block.0", "head"]), QAT(begin=0.3)
    module, fitted = run(tmp_path, quantize, make(), [prune])
    assert module.embedding.weight is module.head.weight
    assert not quantize.blind()
    assert zeros(module)[0] == round(0.5 * zeros(module)[1])
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    other = make()
    trainer(tmp_path, [QAT(begin=0.3)]).test(other, held_out(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert other.embedding.weight is other.head.weight
    assert same(dict(other.state_dict()), dict(module.state_dict()))


def test_case_19_recurrent_layers_stay_float_and_are_named(tmp_path: Path, caplog: Any) -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=lambda p: torch.optim.Adam(p, 0.02))
            self.net = None
            self.rnn, self.head = nn.LSTM(3, 16, 2, batch_first=True), nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.view(len(x), -1, 3))[0].sum(1))

    quantize, prune = QAT(begin=0.4), GradualPruning(0.8, include=["rnn"], end=0.4)
    with caplog.at_level(logging.INFO):
        module, _ = run(tmp_path, quantize, seeded(Recurrent), [prune])
    assert "float stay 'rnn' (LSTM has no integer form here)" in caplog.text
    assert quantize.skipped == {"rnn": "LSTM has no integer form here"}
    names = [n for n, _ in module.named_parameters() if "rnn.weight" in n]
    assert zeros(module, names)[0] == round(0.8 * zeros(module, names)[1])
    assert not quantize.blind()


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moving_average", "learned"])
def test_begins_and_freezes_when_it_says(tmp_path: Path, kind: Any) -> None:
    callback, module = QAT(begin=5, freeze_ranges=12, freeze_batchnorm=20, range=kind), seeded(NormNet)
    record = Record(
        lambda: (
            is_on(module),
            ranges(callback),
            [n.is_frozen for n in callback._inserted.norms.values()],
            mean(module),
        )
    )

    def mean(module: Any) -> Tensor:
        return module.net[1].running_mean.clone()

    run(tmp_path, callback, module, [record], val_check_interval=1)
    for step, (on, _, frozen, _) in record.train.items():
        assert on == {step > 5}, step
        assert set(frozen) == {step > 20}
    moved = {s: not same(record.train[s][1], record.train[s - 1][1]) for s in range(7, 33)}
    assert {s for s, has_moved in moved.items() if has_moved} == set(range(7, 13))
    statistics = {s for s in range(2, 33) if not torch.equal(record.train[s][3], record.train[s - 1][3])}
    assert statistics == set(range(2, 21))
    assert all(same(record.validation[s][1], record.train[s][1]) for s in record.validation)


@pytest.mark.parametrize("make", [NormNet, RawManualNet, ManualNet])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5),
    ],
    ids=["sgd", "adamw"],
)
def test_frozen_scales_do_not_decay(tmp_path: Path, optimizer: Any, make: Any) -> None:
    callback = QAT(begin=0.2, freeze_ranges=0.5, range="learned")
    module = seeded(lambda: make(optimizer=optimizer))
    record = Record(lambda: ranges(callback))
    run(tmp_path, callback, module, [record])
    assert not same(record.train[8], record.train[16])
    assert same(record.train[17], record.train[32])


def test_scales_start_where_they_say_whatever_the_optimizer_did_before(tmp_path: Path) -> None:
    """Weight decay and momentum do not act on a scale that has no part yet."""
    callback = QAT(begin=8, range="learned")
    module = seeded(lambda: Net(optimizer=lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)))
    record = Record(lambda: {n: len(trainer_of(module).state.get(s, {})) for n, s in scales(module).items()})

    def trainer_of(module: Any) -> Any:
        return module.trainer.optimizers[0]

    run(tmp_path, callback, module, [record], max_epochs=2)
    assert set(record.train[8].values()) == {0}
    assert 0 not in record.train[9].values()


def scales(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if name.endswith(".scale")}


def test_frozen_batch_norms_stay_frozen(tmp_path: Path) -> None:
    class Trains(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train()
            return super().training_step(batch, batch_idx)

    def record(module: Any) -> Record:
        return Record(lambda: module.net[1].running_mean.clone())

    module = seeded(Trains)
    whole = record(module)
    run(tmp_path, QAT(begin=2, freeze_batchnorm=10), module, [whole])
    assert torch.equal(whole.train[11], whole.train[32])
    assert not torch.equal(whole.train[9], whole.train[10])
    with pytest.raises(Crash):
        run(tmp_path, QAT(begin=2, freeze_batchnorm=10), seeded(Trains), [CrashAt(15, tmp_path / "crash.ckpt")])
    module = seeded(Trains)
    resumed = record(module)
    run(tmp_path, QAT(begin=2, freeze_batchnorm=10), module, [resumed], ckpt_path=tmp_path / "crash.ckpt")
    assert torch.equal(resumed.train[16], whole.train[11])
    assert torch.equal(resumed.train[32], whole.train[11])
    assert module.net[1].training


def test_what_is_validated_has_ranges_or_is_not_quantized(tmp_path: Path) -> None:
    """Rounding begins with a batch, not between two: `begin` at an epoch's end leaves that epoch float."""
    callback, module = QAT(begin="1ep"), seeded(Net)
    record = Record(lambda: (is_on(module), callback.blind(), callback.stage()))
    run(tmp_path, callback, module, [record])
    assert record.validation[BATCHES][0] == {False}
    assert record.validation[BATCHES][2] == 0
    assert record.validation[2 * BATCHES] == ({True}, [], 1.0)


def test_logs_and_lines(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        _, fitted = run(tmp_path, callback := QAT(begin=0.5, weight_bits=4))
    assert "4-bit weights and 8-bit activations in 3 layers (net.0, net.2, net.4; channel" in caplog.text
    assert "from step 16; ranges are frozen from step 29" in caplog.text
    assert fitted.callback_metrics["compress/weight_bits"] == 4
    assert "4-bit weights, 8-bit activations in 3 layers" in callback.summary()


# --- several at once --------------------------------------------------------------------------------------------------


def test_two_callbacks_on_disjoint_modules(tmp_path: Path) -> None:
    callbacks = [QAT(4, include="net.0", begin=0.2), QAT(8, exclude="net.0", begin=0.4)]
    assert callbacks[0].state_key != callbacks[1].state_key
    module, fitted = run(tmp_path, callbacks[0], extra=callbacks[1:])
    assert {"compress/weight_bits_0", "compress/weight_bits_1"} <= set(fitted.callback_metrics)
    assert [module.net[i].weight_quantizer.bits for i in (0, 2, 4)] == [4, 8, 8]
    assert is_on(module) == {True}
    assert not callbacks[0].blind()
    assert not callbacks[1].blind()
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    expected = fitted.test(module, held_out(), verbose=False)
    again = [QAT(8, exclude="net.0", begin=0.4), QAT(4, include="net.0", begin=0.2)]
    found = trainer(tmp_path, again).test(seeded(Net), held_out(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert found[0]["test_loss"] == pytest.approx(expected[0]["test_loss"], rel=1e-3)


def test_one_module_claimed_twice(tmp_path: Path) -> None:
    for bits in (8, 4):
        with pytest.raises(ValueError, match=r"'net\.0' is quantized already"):
            run(tmp_path, QAT(8), extra=[QAT(bits, include="net.[02]")])


@ignore_missing_callbacks
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("kind", ["moving_average", "learned"])
def test_averaged_weights(tmp_path: Path, is_first: bool, kind: Any) -> None:
    callback, average = QAT(begin=0.3, range=kind), EMAWeightAveraging(decay=0.8)
    callbacks = [average, callback] if is_first else [callback, average]
    module = seeded(NormNet)
    fitted = trainer(tmp_path, callbacks)
    fitted.fit(module, StatefulLoader(), held_out())
    assert is_on(module) == {True}
    assert not callback.blind()
    for quantizer in module.modules():
        if isinstance(quantizer, ActivationQuantizer):
            assert isinstance(quantizer.zero_point, int)
            assert quantizer.has_seen is True
            assert quantizer.high > quantizer.low
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    here = fitted.test(module, held_out(), verbose=False)
    there = trainer(tmp_path, [QAT(begin=0.3, range=kind)]).test(
        seeded(NormNet, 3), held_out(), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert here[0]["test_loss"] == pytest.approx(there[0]["test_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["moving_average", "learned"])
def test_lazily_built_models(tmp_path: Path, kind: Any) -> None:
    callback = QAT(begin=0.2, range=kind)
    module, fitted = run(tmp_path, callback, LazyNet())
    assert is_on(module) == {True}
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    here = fitted.test(module, held_out(), verbose=False)
    again = trainer(tmp_path, [QAT(begin=0.2, range=kind)])
    assert again.test(LazyNet(), held_out(), ckpt_path=tmp_path / "end.ckpt", verbose=False) == here


def test_accumulation(tmp_path: Path) -> None:
    callback, module = QAT(begin=2, freeze_ranges=4), seeded(Net)
    record = Record(lambda: is_on(module))
    run(tmp_path, callback, module, [record], accumulate_grad_batches=4)
    assert [record.train[batch] for batch in (8, 9)] == [{False}, {True}]


class Metric(NormNet):
    """Logs the accuracy that it is told, epoch by epoch."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.values[min(self.current_epoch, len(self.values) - 1)], batch_size=1)


def test_a_guard_holds_before_it_begins(tmp_path: Path) -> None:
    # Down in epochs 1 and 2: the time that is held does not count. `begin` would be step 20.
    module = seeded(lambda: Metric([0.9, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9]))
    record = Record(lambda: is_on(module))
    callback = QAT(begin=20)
    prune, guard = GradualPruning(0.5, begin=0, end=40), AccuracyGuard("val_acc", baseline=0.9)
    run(tmp_path, callback, module, [prune, guard, record], max_epochs=7)
    first = min(step for step, on in record.train.items() if on == {True})
    assert first == 21 + 2 * BATCHES


@pytest.mark.parametrize("kind", ["moving_average", "learned"])
def test_a_guard_rolls_back(tmp_path: Path, kind: Any) -> None:
    module = seeded(lambda: Metric([0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9]))
    callback = QAT(begin=2 * BATCHES, freeze_ranges=4 * BATCHES, freeze_batchnorm=1.0, range=kind)
    record = Record(lambda: is_on(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(
            tmp_path,
            callback,
            module,
            [AccuracyGuard("val_acc", patience=1, action="rollback"), record],
            max_epochs=8,
        )
    assert record.train[2 * BATCHES + 1] == {True}
    assert {False} in [on for step, on in record.train.items() if step > 3 * BATCHES]  # back to before
    assert is_on(module) == {True}
    assert not callback.blind()


# --- refused or reported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 9, 0, -8, True, "8", 4.0, None, 4.5])
def test_bits(value: Any) -> None:
    with pytest.raises(ValueError, match="`weight_bits` must be a whole number from 2 to 8"):
        QAT(weight_bits=value)
    if value is not None:
        with pytest.raises(ValueError, match="`activation_bits` must be a whole number from 2 to 8"):
            QAT(activation_bits=value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"granularity": "group:0"}, "`granularity` must be"),
        ({"granularity": "group"}, "`granularity` must be"),
        ({"granularity": "row"}, "'row'"),
        ({"scheme": "asymmetric"}, "`scheme`"),
        ({"range": "percentile"}, "`range`"),
        ({"range": "learned", "scheme": "affine"}, "scheme='affine'"),
        ({"begin": 0.9, "freeze_ranges": 0.5}, "freeze_ranges"),
        ({"begin": 0.5, "freeze_ranges": 1.0, "freeze_batchnorm": 0.3}, "freeze_batchnorm"),
        ({"begin": 10, "freeze_ranges": 5}, "freeze_ranges"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QAT(**kwargs)


def test_bad_models(tmp_path: Path) -> None:
    class Nothing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LSTM(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0]

    with pytest.raises(ValueError, match=r"Nothing to quantize.*'net': LSTM"):
        run(tmp_path, QAT(), Nothing())
    with pytest.raises(ValueError, match=r"Nothing to quantize.*no multiple of the group of 7"):
        run(tmp_path, QAT(granularity="group:7"))
    with pytest.raises(ValueError, match="closest names: 'net'"):
        run(tmp_path, QAT(include="nets"))
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(ValueError, match=rf"precision='{precision}'\) does away with.*mixed"):
            run(tmp_path, QAT(), precision=precision)
    with pytest.raises(ValueError, match="half precision"):
        run(tmp_path, QAT(), seeded(Net).bfloat16())
    synchronized = trainer(tmp_path, [QAT()])
    synchronized.strategy._layer_sync = object()
    with pytest.raises(ValueError, match="sync_batchnorm"):
        synchronized.fit(seeded(Net), StatefulLoader(), held_out())


def test_an_optimizer_that_misses_the_scales(tmp_path: Path) -> None:
    class Misses(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([layer.weight for layer in self.net if isinstance(layer, nn.Linear)], lr=0.1)

    with pytest.raises(ValueError, match=r"5 of them are in none|of them are in none \(net\..*quantizer"):
        run(tmp_path, QAT(range="learned"), Misses())


@pytest.mark.filterwarnings("ignore:QuantizationAwareTraining. the run stopped before")
def test_a_run_too_short_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the run ends after 32 steps: nothing will be quantized"):
        run(tmp_path, QAT(begin=100, freeze_ranges=200, freeze_batchnorm=200))


def test_what_only_runs_in_evaluation_is_named_and_stays_float(tmp_path: Path) -> None:
    class Extra(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y if self.training else self.extra(y)

    callback = QAT(begin=0.2)
    with pytest.warns(UserWarning, match=r"no training batch has reached extra\.input_quantizer: without a range"):
        module, _ = run(tmp_path, callback, seeded(Extra))
    assert callback.blind() == ["extra.input_quantizer"]
    x = torch.randn(3, CLASSES)
    assert torch.equal(module.extra.input_quantizer(x), x)


class AttentionNet(Net):
    """An attention and a residual sum over three tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attention = nn.MultiheadAttention(FEATURES // 3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, -1))
        return super().forward((x + self.attention(x, x, x, need_weights=False)[0]).flatten(1))


@pytest.mark.parametrize("range", ["moving_average", "learned"])
def test_heads_are_cut_out_of_an_attention_that_rounds(tmp_path: Path, range: str) -> None:
    pruning = GradualPruning(0.5, granularity="head", include=["attention"], begin=0.1, end=0.3, every=2)
    module = seeded(AttentionNet)
    run = trainer(tmp_path, [pruning, QAT(begin=0.5, freeze_ranges=0.8, range=range)])
    run.fit(module, StatefulLoader(), held_out())
    smaller = pruning.pruned_module
    assert (module.attention.num_heads, smaller.attention.num_heads) == (2, 1)
    assert len(smaller.attention.in_proj_weight) == len(module.attention.in_proj_weight) // 2
    quantizers = [child for child in smaller.modules() if isinstance(child, Quantizer)]
    assert len(quantizers) == len([child for child in module.modules() if isinstance(child, Quantizer)])
    assert all(quantizer.is_on for quantizer in quantizers)
    x = torch.randn(64, FEATURES)
    close = (smaller.eval()(x) - module.eval()(x)).abs() < 1e-5
    assert close.all(1).float().mean() > 0.9  # in a few, a sum in another order is rounded to the neighbour
    plain = dequantize(smaller)
    assert not any(isinstance(child, Quantizer) for child in plain.modules())
    assert plain(x).shape == (64, CLASSES)
