"""What the app needs of NeMo, as small as it can be and with the same habits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def resolve_trainer_cfg(trainer_cfg: DictConfig) -> dict[str, Any]:
    """Return the Trainer's arguments: plain containers, in which a strategy and a *list* of callbacks are made.

    So does `nemo.utils.trainer_utils.resolve_trainer_cfg`; in its first releases the strategy alone was made.
    """
    resolved = OmegaConf.to_container(trainer_cfg, resolve=True)
    if isinstance(resolved.get("strategy"), dict):
        resolved["strategy"] = hydra.utils.instantiate(resolved["strategy"])
    if isinstance(resolved.get("callbacks"), list):
        resolved["callbacks"] = [hydra.utils.instantiate(callback) for callback in resolved["callbacks"]]
    return resolved


def exp_manager(trainer: pl.Trainer, cfg: DictConfig | None) -> None:
    """Add the logger and the checkpoints to a Trainer that was made without them."""
    if cfg is None:
        return
    folder = Path(cfg.exp_dir) / cfg.name
    trainer._default_root_dir = str(folder)
    trainer._logger_connector.configure_logger([CSVLogger(folder, name="")])
    if cfg.create_checkpoint_callback:
        trainer.callbacks.append(ModelCheckpoint(folder / "checkpoints", **cfg.checkpoint_callback_params))


def wrap_training_step(step: Callable[..., Tensor | dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return a step that also takes keyword arguments and always returns a dict, as NeMo's models have one."""

    def training_step(batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = step(batch, batch_idx)
        return output if isinstance(output, dict) else {"loss": output}

    return training_step


class DigitsModel(pl.LightningModule):
    """A model that is given its section of the config and the Trainer, and makes data and optimizer from it."""

    def __init__(self, cfg: DictConfig, trainer: pl.Trainer | None = None) -> None:
        super().__init__()
        self._cfg = cfg
        self.encoder = nn.Sequential(nn.Linear(64, cfg.encoder.d_model), nn.ReLU())
        self.decoder = nn.Linear(cfg.encoder.d_model, cfg.decoder.num_classes)
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        self._train_dl = DataLoader(TensorDataset(images[:1500], labels[:1500]), cfg.train_ds.batch_size, shuffle=True)
        self._validation_dl = DataLoader(TensorDataset(images[1500:], labels[1500:]), cfg.validation_ds.batch_size)
        self.training_step = wrap_training_step(self.training_step)
        if trainer is not None:
            self.trainer = trainer

    def train_dataloader(self) -> DataLoader:
        return self._train_dl

    def val_dataloader(self) -> DataLoader:
        return self._validation_dl

    def forward(self, input_signal: Tensor) -> Tensor:
        return self.decoder(self.encoder(input_signal))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        signal, labels = batch
        return nn.functional.cross_entropy(self.forward(input_signal=signal), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        signal, labels = batch
        logits = self.forward(input_signal=signal)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._cfg.optim.lr)
        steps = self._cfg.optim.sched.max_steps
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}
        ]
