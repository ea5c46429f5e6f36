"""ONNX: the graph is emitted from the configuration and the headers; weights are pointed at, or streamed once."""

from sspcompile.export.onnx.write import PRECISIONS, Blocks, Exported, Precision, export_onnx

__all__ = ["PRECISIONS", "Blocks", "Exported", "Precision", "export_onnx"]
