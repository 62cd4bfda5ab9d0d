"""A classifier as a LightningModule: nothing in it knows of compression."""

from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Accuracy


class Classifier(L.LightningModule):
    """Cross entropy and accuracy around any network that returns one logit a class.

    Args:
        net: (B, ...) → (B, classes).
        optimizer: Makes the optimizer from the parameters; Adam at its own rate of 1e-3 by default.
        scheduler: Makes a learning-rate scheduler, stepped once an epoch, from the optimizer; `None` for none.
        classes: How many there are.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.scheduler = optimizer, scheduler
        self.val_acc = Accuracy(task="multiclass", num_classes=classes)
        self.test_acc = Accuracy(task="multiclass", num_classes=classes)
        self.example_input_array = torch.zeros(1, 1, 28, 28)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.test_acc(self(x), y)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}
