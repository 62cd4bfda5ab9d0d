"""Files that other runtimes read: ONNX with integer weights, ``torch.export``, and packed safetensors."""

from lightning_compress.export.onnx import export_onnx, integer_kernels
from lightning_compress.export.safetensors import load_compressed, save_compressed
from lightning_compress.export.torch_export import export_pt2

__all__ = ["export_onnx", "export_pt2", "integer_kernels", "load_compressed", "save_compressed"]
