"""Write a traced program as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tenfold.errors import ExportError
from tenfold.runtimes.quiet import quiet


def write_onnx(program: Any, file: Path, *, opset: int | None = None) -> int:
    """Write a ``torch.export.ExportedProgram`` as one ONNX file; return the version of its operators.

    Raises:
        ExportError: more than the 2 GiB that one file can hold.
    """
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size >= 2**31:
        msg = f"the weights have {size / 2**30:.1f} GiB; one ONNX file holds 2 GiB. Use --to torch-export."
        raise ExportError(msg)
    with quiet():
        made: Any = torch.onnx.export(program, opset_version=opset, verbose=False)
        made.save(str(file), external_data=False)
    return int(made.model.opset_imports[""])
