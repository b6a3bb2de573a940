"""An ONNX file in ONNX Runtime, as a module that is called like its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import require
from tenfold.tracing.inputs import arguments, tensors_in

_EXACT = "session.x64quantprecision"


class OnnxModule(nn.Module):
    """An ONNX file in ONNX Runtime on the CPU, called like the model; returns one tensor, or a tuple of several.

    Args:
        file: the ``.onnx`` file.
        threads: CPU threads; as many as torch uses now if None.
    """

    runtime = "onnxruntime"

    def __init__(self, file: Path | str, threads: int | None = None) -> None:
        super().__init__()
        self.threads = threads or torch.get_num_threads()
        self.session = open_session(str(file), session_options(self.threads))
        self.names: list[str] = [value.name for value in self.session.get_inputs()]

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the right kind, all zeros; axes of any length have length 1."""
        floats = ("float", "double")
        return tuple(
            torch.zeros(
                [n if isinstance(n, int) else 1 for n in value.shape],
                dtype=torch.float32 if any(name in value.type for name in floats) else torch.int64,
            )
            for value in self.session.get_inputs()
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs as tensors."""
        found = self.session.run(None, feeds(self.names, (args, kwargs)))
        outputs = tuple(torch.from_numpy(value) for value in found)
        return outputs[0] if len(outputs) == 1 else outputs


def session_options(threads: int) -> Any:
    """Return the options of a quiet session on so many threads."""
    ort: Any = require("onnxruntime", "export")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Without it products of 8-bit integers overflow on processors with AVX2 and no VNNI: outputs are off by a tenth.
    options.add_session_config_entry(_EXACT, "1")
    return options


def open_session(model: str | bytes, options: Any) -> Any:
    """Return a session of ONNX Runtime on the CPU, for a file or its bytes.

    Exact products of 8-bit integers are given up where ONNX Runtime cannot prepare them: of weights that are shared.
    """
    ort: Any = require("onnxruntime", "export")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes share no other base
        if "replace the existing tensor" not in str(error):
            raise
    options.add_session_config_entry(_EXACT, "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds(names: Sequence[str], inputs: Any) -> dict[str, Any]:
    """Return the input arrays of ONNX Runtime: keyword arguments by name, the rest in order."""
    args, kwargs = arguments(inputs)
    named = {name: value for name, value in kwargs.items() if name in names and isinstance(value, Tensor)}
    others = tensors_in((*args, {name: value for name, value in kwargs.items() if name not in named}))
    rest = [name for name in names if name not in named]
    found = named | dict(zip(rest, others, strict=True))
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}
