"""torch.export: a program for torch itself and AOTInductor, without the Python code of the model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.exporting.base import EXPORTERS, Exporter
from tenfold.runtimes.quiet import quiet


@EXPORTERS.register("torch-export")
class TorchExporter(Exporter):
    """One .pt2 file that torch runs without the code of the model, or compiles ahead of time."""

    suffix = ".pt2"

    def write(self, program: Any, file: Path, *, opset: int | None) -> int | None:
        """Write the program."""
        del opset
        made = io.BytesIO()  # torch's own writer of files aborts the process where the disk is full
        with quiet():
            torch.export.save(program, made)
        file.write_bytes(made.getbuffer())
        return None

    def open(self, file: Path) -> nn.Module:
        """Return the program as a module."""
        with quiet():
            module: nn.Module = torch.export.load(file).module()
        return _Opened(module)


class _Opened(nn.Module):
    """An exported program, hidden from ``eval()`` and ``train()``, which it does not support."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self._program = [program]  # not a submodule, whose mode would be set

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the program."""
        return self._program[0](*args, **kwargs)
