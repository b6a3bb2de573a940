"""OpenVINO: Intel's runtime for processors of servers, laptops and smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tenfold.errors import require
from tenfold.exporting.base import EXPORTERS, Exporter
from tenfold.runtimes.onnx_file import write_onnx
from tenfold.runtimes.openvino_module import OpenvinoModule


@EXPORTERS.register("openvino")
class OpenvinoExporter(Exporter):
    """An .xml file for OpenVINO with the weights in a .bin file beside it, in the precision of the model."""

    suffix = ".xml"
    beside = (".bin",)
    packages = ("openvino", "onnx", "onnxscript")
    extra = "openvino"

    def write(self, program: Any, file: Path, *, opset: int | None) -> int | None:
        """Write the program by way of ONNX; weights are not rounded to half precision, OpenVINO's default."""
        del opset
        openvino: Any = require("openvino", self.extra)
        between = file.with_suffix(".onnx")
        write_onnx(program, between)
        openvino.save_model(openvino.Core().read_model(str(between)), str(file), compress_to_fp16=False)
        return None

    def open(self, file: Path) -> nn.Module:
        """Return the files in OpenVINO."""
        return OpenvinoModule(file)
