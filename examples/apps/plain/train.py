"""A training script without configuration: `python train.py`."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Perceptron(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005)


def train(callbacks: list[L.Callback]) -> None:
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    training = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=64, shuffle=True)
    validation = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=297)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=8, log_every_n_steps=10, enable_progress_bar=False, callbacks=callbacks
    )
    trainer.fit(Perceptron(), training, validation)


if __name__ == "__main__":
    train(callbacks=[])
