"""Callbacks that compress a PyTorch model while Lightning trains it."""

from lightning_compress.distillation import DistillationModule, KnowledgeDistillation
from lightning_compress.export import ExportCompressed
from lightning_compress.guard import AccuracyGuard
from lightning_compress.learning_rate import LearningRateSchedule
from lightning_compress.pruning import GradualPruning
from lightning_compress.quantization import QuantizationAwareTraining
from lightning_compress.regularization import SparsityRegularization
from lightning_compress.report import CompressionReport

__version__ = "0.1.0"

__all__ = [
    "AccuracyGuard",
    "CompressionReport",
    "DistillationModule",
    "ExportCompressed",
    "GradualPruning",
    "KnowledgeDistillation",
    "LearningRateSchedule",
    "QuantizationAwareTraining",
    "SparsityRegularization",
]
