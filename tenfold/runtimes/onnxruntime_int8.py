"""ONNX Runtime on the CPU, in eight-bit integers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.runtimes.base import RUNTIMES
from tenfold.runtimes.onnx_file import onnx_file_of
from tenfold.runtimes.onnx_int8 import quantize_static
from tenfold.runtimes.onnx_module import OnnxModule
from tenfold.runtimes.onnxruntime import OnnxRuntime
from tenfold.runtimes.program import first_words


@RUNTIMES.register("onnxruntime-int8")
class OnnxRuntimeInt8(OnnxRuntime):
    """ONNX Runtime's kernels for CPUs, quantized statically, weights by output channel.

    Times only: ranges are those of the inputs that are timed. The file to ship is quantized by calibration inputs:
    ``tenfold export --int8``.
    """

    name = "onnxruntime-int8"
    int8 = True

    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return the model as a quantized ONNX file in a session, its batch norms fused."""
        del memory_format
        with tempfile.TemporaryDirectory() as folder:
            file, own = onnx_file_of(model, inputs, Path(folder))
            small = Path(folder) / "int8.onnx"
            try:
                quantize_static(file, small, [own])
            except TenfoldError:
                raise
            except Exception as error:
                msg = f"{type(model).__name__} cannot be quantized: {first_words(error)}"
                raise ExportError(msg) from error
            made = OnnxModule(small, threads)
            made.runtime = self.name
            return made, own
