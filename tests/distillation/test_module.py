"""The wrapping LightningModule: the student as if it were alone, with a teacher beside it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import DistillationModule, GradualPruning, KnowledgeDistillation, QuantizationAwareTraining
from tests.helpers import (
    CLASSES,
    FEATURES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    LazyNet,
    ManualNet,
    Net,
    QuietNet,
    RawManualNet,
    StatefulLoader,
    TiedNet,
    TwoOptimizerNet,
    held_out,
    hooks_of,
    loss_scaling,
    same,
    seeded,
    snapshot,
    trainer,
)


class Student(LightningModule):
    """Uses most of what a LightningModule can have."""

    def __init__(self, width: int = 16, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.called: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_callbacks(self) -> list[Callback]:
        return [Marker()]

    def on_train_start(self) -> None:
        self.called.append("on_train_start")

    def on_train_epoch_end(self) -> None:
        self.called.append("on_train_epoch_end")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.rate)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Marker(Callback):
    """One of the student's own callbacks."""

    starts = 0

    def on_train_start(self, *args: Any) -> None:
        Marker.starts += 1


def teacher() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)), seed=3)


def test_both_doors_lead_to_the_same(tmp_path: Path) -> None:
    wrapped, plain = seeded(Student), seeded(Student)
    module = DistillationModule(wrapped, teacher(), temperature=2.0, weight=0.5)
    Marker.starts = 0
    through_module = trainer(tmp_path)
    through_module.fit(module, StatefulLoader(), held_out())
    through_callback = trainer(tmp_path, [KnowledgeDistillation(teacher(), temperature=2.0, weight=0.5)])
    through_callback.fit(plain, StatefulLoader(), held_out())
    assert same(snapshot(module, through_module), snapshot(plain, through_callback))
    assert same(dict(wrapped.state_dict()), dict(plain.state_dict()))  # the student itself was trained
    assert same(through_module.callback_metrics, through_callback.callback_metrics)
    assert module.called == plain.called == ["on_train_start", *["on_train_epoch_end"] * 4]
    assert Marker.starts == 2
    assert hooks_of(module, through_module) == 0
    assert through_module.test(module, held_out(), verbose=False) == through_callback.test(
        plain, held_out(), verbose=False
    )
    assert same(through_module.predict(module, held_out()), through_callback.predict(plain, held_out()))
    assert type(module.student) is Student
    assert module.student.net is wrapped.net


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (Net, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
        (Net, {"precision": "bf16-mixed"}),
        (Net, {"plugins": "loss scaling"}),
        (Net, {"precision": "64-true"}),
        (Net, {"val_check_interval": 3, "limit_train_batches": 5}),
        (ManualNet, {}),
        (RawManualNet, {}),
        (TwoOptimizerNet, {}),
        (TiedNet, {}),
        (LazyNet, {}),
    ],
)
def test_both_doors_lead_to_the_same_everywhere(tmp_path: Path, make: Any, kwargs: Any) -> None:
    results = []
    for door in ("module", "callback"):
        student, arguments = seeded(make), {"losses": ["kl", "mse"], "features": {"net.1": "1"}}
        module = DistillationModule(student, teacher(), **arguments) if door == "module" else student
        distillation = module.distillation if door == "module" else KnowledgeDistillation(teacher(), **arguments)
        own = {"plugins": [loss_scaling()]} if "plugins" in kwargs else kwargs
        skipped = [InfiniteGradientAt(3)] if "plugins" in kwargs else []
        run = trainer(tmp_path, [*skipped, *([distillation] if door == "callback" else [])], **own)
        run.fit(module, StatefulLoader(), held_out())
        results.append(snapshot(module, run) | {"state": distillation.state_dict()})
        assert hooks_of(module, run) == 0
    assert same(*results)


def test_checkpoints_are_the_bare_students(tmp_path: Path) -> None:
    module = DistillationModule(Student(width=24), teacher())
    best = ModelCheckpoint(tmp_path / "best", monitor="val_acc", mode="max")
    logger = CSVLogger(tmp_path)
    run = trainer(
        tmp_path, [best, LearningRateMonitor()], enable_checkpointing=True, logger=logger, log_every_n_steps=4
    )
    run.fit(module, StatefulLoader(), held_out())
    opened = Student.load_from_checkpoint(best.best_model_path)
    assert (opened.hparams.width, type(opened)) == (24, Student)
    assert list(torch.load(best.best_model_path)["state_dict"]) == list(Student(24).state_dict())
    assert sorted((Path(logger.log_dir) / "hparams.yaml").read_text().split("\n")) == ["", "rate: 0.1", "width: 24"]
    with pytest.raises(ValueError, match=r"Student\.load_from_checkpoint"):
        type(module).load_from_checkpoint(best.best_model_path)
    with pytest.raises(ValueError, match=r"Student\.load_from_checkpoint"):
        DistillationModule.load_from_checkpoint(best.best_model_path)


def test_resumes_bit_identically(tmp_path: Path) -> None:
    def run(extra: Any = (), ckpt_path: Any = None) -> Any:
        module = DistillationModule(seeded(Student), teacher(), features={"net.0": "0"})
        started = trainer(tmp_path, extra)
        started.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
        return snapshot(module, started) | {"state": module.distillation.state_dict()}

    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(13, tmp_path / "crash.ckpt")])
    assert same(whole, run(ckpt_path=tmp_path / "crash.ckpt"))


def test_a_student_without_validation_gets_none(tmp_path: Path) -> None:
    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(FEATURES, CLASSES)

        def training_step(self, batch: Any) -> Tensor:  # without a batch_idx
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="no `validation_step`"):
        trainer(tmp_path).fit(DistillationModule(Bare(), teacher()), StatefulLoader(), held_out())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_composes_and_compiles(tmp_path: Path) -> None:
    module = DistillationModule(seeded(Net), teacher())
    pruning, quantization = GradualPruning(0.8, begin=0.1, end=0.5, every=2), QuantizationAwareTraining(begin=0.6)
    trainer(tmp_path, [quantization, pruning]).fit(module, StatefulLoader(), held_out())
    assert pruning.stage() == quantization.stage() == 1.0

    manual = DistillationModule(seeded(ManualNet), teacher())
    trainer(tmp_path).fit(manual, StatefulLoader(), held_out())

    compiled, eager = (DistillationModule(seeded(QuietNet), teacher()) for _ in range(2))
    trainer(tmp_path).fit(torch.compile(compiled, backend="eager"), StatefulLoader(), held_out())
    trainer(tmp_path).fit(eager, StatefulLoader(), held_out())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))


def test_one_trainer_serves_other_modules(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(DistillationModule(seeded(Student), teacher()), StatefulLoader(), held_out())
    alone, after = seeded(Student), seeded(Student)
    trainer(tmp_path).fit(alone, StatefulLoader(), held_out())
    other = trainer(tmp_path, run.callbacks)
    other.fit(after, StatefulLoader(), held_out())
    assert same(dict(alone.state_dict()), dict(after.state_dict()))  # not distilled


def test_copies_and_pickles() -> None:
    module = DistillationModule(seeded(Student), teacher())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin, Student)
        assert isinstance(twin, DistillationModule)
        assert same(dict(twin.state_dict()), dict(module.state_dict()))
        assert twin.net[0].weight is not module.net[0].weight
        assert twin.student.net is twin.net
    assert copy.deepcopy(module).distillation is module.distillation
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in Student().parameters())
    assert "32" not in repr(module)  # the teacher's width


def test_copies_and_pickles_after_a_fit(tmp_path: Path) -> None:
    class Copies(Callback):
        def on_train_end(self, run: Any, module: Any) -> None:
            assert copy.deepcopy(module)._trainer is None

    module = DistillationModule(seeded(Student), teacher())
    trainer(tmp_path, [Copies()]).fit(module, StatefulLoader(), held_out())
    assert same(dict(pickle.loads(pickle.dumps(module)).state_dict()), dict(module.state_dict()))


def test_a_derived_class_keeps_what_it_adds(tmp_path: Path) -> None:
    epochs = []

    class Own(DistillationModule):
        def on_train_epoch_end(self) -> None:
            epochs.append(self.current_epoch)

    module = Own(seeded(Student), teacher())
    trainer(tmp_path).fit(module, StatefulLoader(), held_out())
    assert epochs == [0, 1, 2, 3]
    assert isinstance(copy.deepcopy(module), Own)


def test_names_that_both_have_are_refused() -> None:
    class Nested(Student):
        def __init__(self) -> None:
            super().__init__()
            self.student = self.net

    with pytest.raises(ValueError, match="`student` has an attribute 'student'"):
        DistillationModule(Nested(), teacher())


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's
@pytest.mark.parametrize("is_subclass", [False, True])
def test_is_made_by_the_cli(tmp_path: Path, is_subclass: bool) -> None:
    trained = Student(width=24)
    run = trainer(tmp_path)
    run.strategy.connect(trained)
    run.save_checkpoint(tmp_path / "guide.ckpt")
    cli = LightningCLI(
        None if is_subclass else DistillationModule,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=[
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.max_epochs=1",
            *(["--model=lightning_compress.DistillationModule"] if is_subclass else []),
            f"--model.student={__name__}.Student",
            "--model.student.init_args.width=20",
            f"--model.teacher={tmp_path / 'guide.ckpt'}",
            "--model.temperature=2",
            "--model.losses=[[kl, 1.0], [mse, 0.1]]",
            "--model.output=0",
        ],
    )
    distillation = cli.model.distillation
    assert (distillation.output, distillation.temperature.first) == (0, 2.0)
    cli.trainer.fit(cli.model, StatefulLoader(), held_out())
    cli.trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert "student" not in torch.load(tmp_path / "end.ckpt", weights_only=True)["hyper_parameters"]
    opened = Student.load_from_checkpoint(tmp_path / "end.ckpt")
    assert same(dict(opened.state_dict()), dict(cli.model.state_dict()))


def test_refuses_what_it_cannot_wrap(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a LightningModule, got Linear"):
        DistillationModule(nn.Linear(2, 2), teacher())
    with pytest.raises(TypeError, match="compile the DistillationModule instead"):
        DistillationModule(torch.compile(Student()), teacher())
    with pytest.raises(TypeError, match="list of teachers"):
        DistillationModule(DistillationModule(Student(), teacher()), teacher())
    with pytest.raises(ValueError, match="`weight`"):
        DistillationModule(Student(), teacher(), weight=2.0)
    student = Student()
    with pytest.raises(ValueError, match="shares parameters with the student"):
        trainer(tmp_path).fit(DistillationModule(student, student.net), StatefulLoader(), held_out())
    with pytest.raises(ValueError, match="leave one of them out"):
        trainer(tmp_path, [KnowledgeDistillation(teacher())]).fit(
            DistillationModule(Student(), teacher()), StatefulLoader(), held_out()
        )
