"""The training of `train.py`, with callbacks: `python compressed.py`."""

from train import train

from lightning_compress import CompressionReport, GradualPruning

train(callbacks=[GradualPruning(final_sparsity=0.9), CompressionReport()])
