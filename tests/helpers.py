"""What the tests share: small modules, a loader that can resume in mid-epoch, and a way to break a run off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_compress.distillation import distilled_loss

BATCHES = 8  # an epoch
FEATURES, CLASSES = 12, 4


class StatefulLoader:
    """Batches of random data, shuffled in training. A plain ``DataLoader`` cannot resume in mid-epoch; this one can."""

    def __init__(
        self, batches: int = BATCHES, batch_size: int = 8, seed: int = 0, features: int = FEATURES, shuffle: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batches * batch_size, features, generator=generator)
        self.y = (self.x[:, :CLASSES] + 0.3 * torch.randn(len(self.x), CLASSES, generator=generator)).argmax(1)
        self.batch_size, self.batches, self.seed, self.shuffle = batch_size, batches, seed, shuffle
        self.epoch = self.position = 0
        self._has_begun = False

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._has_begun:
            self.epoch, self.position = self.epoch + 1, 0
        self._has_begun = True
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        order = order if self.shuffle else torch.arange(len(self.x))
        while self.position < self.batches:
            start = self.position * self.batch_size
            self.position += 1
            rows = order[start : start + self.batch_size]
            yield self.x[rows], self.y[rows]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._has_begun = self.position >= self.batches


def held_out() -> StatefulLoader:
    """Return other data, always in the same order."""
    return StatefulLoader(seed=1, shuffle=False)


class Net(LightningModule):
    """An ordinary LightningModule: a small perceptron, SGD with momentum, or whatever `optimizer` makes."""

    def __init__(self, width: int = 16, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class ManualNet(Net):
    """Manual optimization with one optimizer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in [self.optimizers()] if not isinstance(self.optimizers(), list) else self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(distilled_loss(self, self.loss(batch)))
            optimizer.step()


class RawManualNet(ManualNet):
    """Manual optimization that steps the optimizer behind Lightning's back."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(distilled_loss(self, self.loss(batch)))
        optimizer.step()


class TwoOptimizerNet(ManualNet):
    """Manual optimization with two optimizers, each of which steps in every batch."""

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[:3].parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam(self.net[3:].parameters()),
        ]


class TiedNet(Net):
    """An embedding and an output layer that share one weight."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding = nn.Embedding(CLASSES, 16)
        self.net[4].weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.embedding(torch.zeros(len(x), dtype=torch.long, device=x.device)).sum(1, keepdim=True)


class LazyNet(Net):
    """A model that only exists once ``configure_model`` has run."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = Net().net


class QuietNet(Net):
    """A module that logs nothing: Dynamo cannot trace Lightning's own ``self.log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


class Crash(Exception):
    """The run breaks off."""


class CrashAt(Callback):
    """Save a checkpoint after an optimizer step, and break the run off."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Crash


class Rates(Callback):
    """Record the learning rates that each training batch was done with."""

    def __init__(self) -> None:
        self.rates: list[tuple[int, list[float]]] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.rates.append(
            (trainer.global_step, [float(g["lr"]) for optimizer in trainer.optimizers for g in optimizer.param_groups])
        )


def trainer(tmp_path: Path, callbacks: Any = (), **kwargs: Any) -> Trainer:
    """Return a quiet CPU trainer for 4 epochs."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | kwargs))


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """Return what `make` makes from a fixed seed."""
    torch.manual_seed(seed)
    return make()


def loss_scaling(**kwargs: Any) -> MixedPrecision:
    """Return 16-bit mixed precision with a real loss scaler on the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, **kwargs))


class InfiniteGradientAt(Callback):
    """Make the gradients infinite in one training batch (0-based), so that loss scaling skips the optimizer."""

    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, -1

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen += 1

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.seen == self.batch:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.inf)


def hooks_of(module: LightningModule, trainer: Trainer | None = None) -> int:
    """Count the hooks on a module, its parameters and the trainer's optimizers.

    Those of quantizers do not count: they are meant to stay, so that what is tested and exported is what was trained.
    """
    count = 0
    for child in module.modules():
        for hook in (*child._forward_hooks.values(), *child._forward_pre_hooks.values()):
            count += getattr(hook, "__module__", "") != "lightning_compress.quantization.layers"
        count += len(child._backward_hooks) + len(child._backward_pre_hooks)
    for parameter in module.parameters():
        count += len(parameter._backward_hooks or ()) + len(
            getattr(parameter, "_post_accumulate_grad_hooks", None) or ()
        )
    for optimizer in trainer.optimizers if trainer is not None else ():
        count += len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return count


def same(a: Any, b: Any) -> bool:
    """Whether two nests of containers hold bit-identical tensors and equal values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def snapshot(module: LightningModule, run: Trainer) -> dict[str, Any]:
    """Return all that a resumed run must share with one that was never stopped."""
    return copy.deepcopy(
        {
            "weights": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        }
    )


def zeros(module: nn.Module, names: list[str] | None = None) -> tuple[int, int]:
    """Count zeros and entries of a module's matrices, shared ones once, with nothing but torch."""
    chosen = {id(p): p for name, p in module.named_parameters() if p.dim() > 1 and (names is None or name in names)}
    return sum(int((p == 0).sum()) for p in chosen.values()), sum(p.numel() for p in chosen.values())
