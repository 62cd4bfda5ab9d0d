"""Finds the channels that a network can do without, and cuts them out: `python examples/regularization.py`.

A penalty on the scales of the batch norms makes those small whose channels matter least (network slimming, Liu et al.
2017, arXiv 1708.06519). Then half of the channels are pruned, and what is left recovers. Ends with an error if the
smaller model answers differently, is not smaller, or loses more than 0.02 of accuracy.
"""

import functools
import sys

import lightning as L
import torch
from data import MNIST5k
from models import ResidualCNN
from module import Classifier

from lightning_compress import GradualPruning, LearningRateSchedule, SparsityRegularization
from lightning_compress.pruning.removal import profile, removal_report

EPOCHS = 8
ADAM = functools.partial(torch.optim.Adam, lr=3e-3)


def train(callbacks: list[L.Callback]) -> tuple[Classifier, float]:
    """The same training from the same weights, with these callbacks; returns the module and its accuracy."""
    L.seed_everything(0)
    module, data = Classifier(ResidualCNN(widths=(16, 32, 64)), ADAM), MNIST5k()
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    [result] = trainer.test(module, data, verbose=False)
    return module, result["test_acc"]


def main() -> None:
    regularization = SparsityRegularization("batchnorm_scale", strength=1e-3, end=0.5)
    pruning = GradualPruning(
        0.5, criterion="gradient_weight", granularity="channel", begin=0.5, end=0.6, every=0.02
    )  # `gradient_weight` sees the scales: behind one near zero, no weight of a channel has a gradient
    _, before = train([LearningRateSchedule()])
    module, after = train([regularization, pruning, LearningRateSchedule()])

    smaller, images = pruning.pruned_module, module.example_input_array
    sizes = profile(module, images), profile(smaller, images)
    print(removal_report(*sizes))
    print(f"accuracy       {before:.3f} -> {after:.3f}")

    x = torch.randn(64, 1, 28, 28)
    with torch.no_grad():
        difference = (smaller.eval()(x) - module.eval()(x)).abs().max().item()
    if difference > 1e-4 or sizes[1].parameters > sizes[0].parameters / 2 or after < before - 0.02:
        sys.exit(f"The smaller model is not what was asked for; its outputs differ by {difference:.1e}.")


if __name__ == "__main__":
    main()
