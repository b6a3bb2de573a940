"""Write a traced program, or a model, as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.runtimes.program import first_words, program_of
from tenfold.runtimes.quiet import quiet
from tenfold.surgery import fuse_batchnorm_
from tenfold.tracing import copied, to_device


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


def onnx_file_of(model: nn.Module, inputs: Any, folder: Path) -> tuple[Path, Any]:
    """Return an ONNX file of the model on inputs of this size, its batch norms fused; and the inputs on the CPU.

    Raises:
        ExportError: the model cannot be exported.
    """
    eager, own = copied(model).cpu().eval(), to_device(inputs, "cpu")
    fuse_batchnorm_(eager, own)
    file = folder / "model.onnx"
    program = program_of(eager, own, dynamic_batch=False)
    try:
        write_onnx(program, file)
    except TenfoldError:
        raise
    except Exception as error:
        msg = f"{type(model).__name__} cannot be written in ONNX: {first_words(error.__cause__ or error)}"
        raise ExportError(msg) from error
    return file, own
