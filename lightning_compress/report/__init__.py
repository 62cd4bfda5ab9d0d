"""The report: what was compressed, by how much, and at what price."""

from lightning_compress.report.callback import CompressionReport

__all__ = ["CompressionReport"]
