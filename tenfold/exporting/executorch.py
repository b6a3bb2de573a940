"""ExecuTorch: torch's runtime for phones and small devices, with the XNNPACK kernels for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tenfold.exporting.base import EXPORTERS, Exporter
from tenfold.runtimes.executorch_module import ExecutorchModule, write_executorch


@EXPORTERS.register("executorch")
class ExecutorchExporter(Exporter):
    """One .pte file for ExecuTorch, on devices from phones down; batches up to 64, or up to that of the example."""

    suffix = ".pte"
    packages = ("executorch",)
    extra = "executorch"
    max_batch = 64  # memory is planned for the largest

    def write(self, program: Any, file: Path, *, opset: int | None) -> int | None:
        """Write the program for XNNPACK; see ``write_executorch``."""
        del opset
        write_executorch(program, file)
        return None

    def open(self, file: Path) -> nn.Module:
        """Return the file in the ExecuTorch runtime."""
        return ExecutorchModule(file)
