"""Reading ONNX files into the graph that the passes rewrite."""

from espalier.onnx.reader import read

__all__ = ["read"]
