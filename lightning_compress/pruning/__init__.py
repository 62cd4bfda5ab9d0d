"""Pruning: weights that matter least become zero while the model trains."""

from lightning_compress.pruning.callback import GradualPruning

__all__ = ["GradualPruning"]
