"""Pruning: what matters least becomes zero while the model trains, and is cut out where it can be."""

from lightning_compress.pruning.callback import GradualPruning
from lightning_compress.pruning.importance import Criterion
from lightning_compress.pruning.removal import load_pruned, removal_report, remove_pruned_channels

__all__ = ["Criterion", "GradualPruning", "load_pruned", "removal_report", "remove_pruned_channels"]
