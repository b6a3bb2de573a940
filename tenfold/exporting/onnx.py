"""ONNX: the format of most runtimes on servers, on phones and in browsers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import ExportError
from tenfold.exporting.base import EXPORTERS, Exporter
from tenfold.exporting.onnx_notes import write_onnx
from tenfold.exporting.onnx_session import OnnxModule
from tenfold.exporting.quiet import quiet


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
        size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
        if size >= 2**31:
            msg = f"the weights have {size / 2**30:.1f} GiB; one ONNX file holds 2 GiB. Use --to torch-export."
            raise ExportError(msg)
        with quiet():
            made: Any = torch.onnx.export(program, opset_version=opset, verbose=False)
            write_onnx(made.model_proto, file)
        return int(made.model.opset_imports[""])

    def open(self, file: Path) -> nn.Module:
        """Return the file in ONNX Runtime."""
        return OnnxModule(file)
