"""A program of ExecuTorch: written for XNNPACK, and run like the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import require
from tenfold.runtimes.quiet import quiet
from tenfold.tracing.inputs import arguments, tensors_in

aten = torch.ops.aten


def write_executorch(program: Any, file: Path) -> None:
    """Write a ``torch.export.ExportedProgram``, delegated to XNNPACK as far as possible.

    What depends on no input, such as products of neighbouring cores of a tensor train, is computed here, where the
    runtime would do it in every run, without XNNPACK. Copies are left to it, which are as large as it wants them.
    """
    with quiet(), torch.no_grad():
        exir: Any = require("executorch.exir", "executorch")
        xnnpack: Any = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
        folding: Any = require("executorch.exir.passes.constant_prop_pass", "executorch")
        program = folding.constant_prop_pass(program, {aten.expand.default, aten.repeat.default, aten.full.default})
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        file.write_bytes(lowered.to_executorch().buffer)


class ExecutorchModule(nn.Module):
    """A .pte file in the runtime, called like the model."""

    runtime = "executorch"

    def __init__(self, file: Path) -> None:
        super().__init__()
        runtime: Any = require("executorch.runtime", "executorch")
        self._loaded = runtime.Runtime.get().load_program(file.read_bytes())  # the method reads from it
        self._method = self._loaded.load_method("forward")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, copied because the next call overwrites them."""
        given, named = arguments((args, kwargs))
        outputs = tuple(value.clone() for value in self._method.execute(list(tensors_in((given, named)))))
        return outputs[0] if len(outputs) == 1 else outputs
