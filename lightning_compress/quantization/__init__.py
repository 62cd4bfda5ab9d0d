"""Quantization-aware training that ends in integer arithmetic."""

from lightning_compress.quantization.callback import QuantizationAwareTraining
from lightning_compress.quantization.insertion import dequantize

__all__ = ["QuantizationAwareTraining", "dequantize"]
