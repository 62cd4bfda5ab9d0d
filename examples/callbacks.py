"""Callbacks of the example app itself."""

import statistics
import time

import lightning as L


class StepTimer(L.Callback):
    """Logs at the end of each epoch how long training takes: the median step in milliseconds, the fit in seconds.

    A step lasts from the end of one batch to the end of the next, so it holds the data, the optimizer and all other
    callbacks, wherever they stand in the list. Steps of the first epoch count only if there is no second.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = time.perf_counter()
        self.steps: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = None  # validation and checkpoints belong to no step
        if trainer.current_epoch == 1:
            self.steps.clear()

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("step_ms", 1000 * statistics.median(self.steps or [0.0]))
        pl_module.log("fit_seconds", time.perf_counter() - self.began)
