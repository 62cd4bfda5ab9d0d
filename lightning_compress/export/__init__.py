"""Files that other runtimes read: ONNX with integer weights, ``torch.export``, and packed safetensors."""

from lightning_compress.export.callback import ExportCompressed
from lightning_compress.export.formats import export
from lightning_compress.export.onnx import export_onnx, integer_kernels
from lightning_compress.export.safetensors import load_compressed, save_compressed
from lightning_compress.export.torch_export import export_pt2
from lightning_compress.export.verify import ExportedFile

__all__ = [
    "ExportCompressed",
    "ExportedFile",
    "export",
    "export_onnx",
    "export_pt2",
    "integer_kernels",
    "load_compressed",
    "save_compressed",
]
