"""The report: what was compressed, by how much, and at what price; and before it, which layers can bear how much."""

from lightning_compress.report.callback import CompressionReport
from lightning_compress.report.sensitivity import Sensitivity, sensitivity

__all__ = ["CompressionReport", "Sensitivity", "sensitivity"]
