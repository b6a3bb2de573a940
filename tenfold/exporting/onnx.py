"""ONNX: the format of most runtimes on servers, on phones and in browsers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tenfold.exporting.base import EXPORTERS, Exporter
from tenfold.runtimes.onnx_file import write_onnx
from tenfold.runtimes.onnx_module import OnnxModule


@EXPORTERS.register("onnx")
class OnnxExporter(Exporter):
    """One .onnx file with the weights inside, for ONNX Runtime and whatever else reads ONNX."""

    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "export"
    has_opset = True

    def write(self, program: Any, file: Path, *, opset: int | None) -> int | None:
        """Write the program in ONNX operators; return the version of their set.

        Raises:
            ExportError: more than the 2 GiB that one file can hold.
        """
        return write_onnx(program, file, opset=opset)

    def open(self, file: Path) -> nn.Module:
        """Return the file in ONNX Runtime."""
        return OnnxModule(file)
