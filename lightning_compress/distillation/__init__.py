"""Distillation: a small model learns from what a trained teacher answers."""

from lightning_compress.distillation.callback import KnowledgeDistillation, distilled_loss
from lightning_compress.distillation.losses import LogitLoss
from lightning_compress.distillation.module import DistillationModule

__all__ = ["DistillationModule", "KnowledgeDistillation", "LogitLoss", "distilled_loss"]
