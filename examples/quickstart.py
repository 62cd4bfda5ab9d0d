"""Prunes 90 % of a network's weights while it trains: `python examples/quickstart.py`."""

import lightning as L
from data import MNIST5k
from models import LeNet300100
from module import Classifier

from lightning_compress import CompressionReport, GradualPruning

L.seed_everything(0)
model = Classifier(LeNet300100())
data = MNIST5k()
trainer = L.Trainer(
    max_epochs=20,
    callbacks=[GradualPruning(final_sparsity=0.9), CompressionReport()],
    default_root_dir="outputs/quickstart",
)
trainer.fit(model, data)
trainer.test(model, data)
