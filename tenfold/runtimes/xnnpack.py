"""ExecuTorch on the CPU, with the kernels of XNNPACK."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.profiling.latency.layer_timer import constant_input, neutral_layer
from tenfold.records import Shape, SubLayerSpec
from tenfold.runtimes.base import RUNTIMES, Block, Conditions, TargetRuntime
from tenfold.runtimes.executorch_module import ExecutorchModule, write_executorch
from tenfold.runtimes.program import first_words, program_of
from tenfold.surgery import fuse_batchnorm_
from tenfold.tracing import copied, to_device


@RUNTIMES.register("executorch")
class Executorch(TargetRuntime):
    """ExecuTorch with XNNPACK's kernels, in float32; layers are timed alone."""

    name = "executorch"
    packages = ("executorch",)
    extra = "executorch"

    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return the model as a program in the runtime, its batch norms fused; it takes as many threads as it likes."""
        del memory_format, threads
        eager, own = copied(model).cpu().eval(), to_device(inputs, "cpu")
        fuse_batchnorm_(eager, own)
        return _opened(eager, own), own

    def chain(self, layers: Sequence[SubLayerSpec], in_shape: Shape, conditions: Conditions) -> Block:
        """Return what times the layers one after the other."""
        like, x = torch.empty(0), constant_input(layers[0], in_shape, conditions.device, conditions.dtype)
        program = _opened(nn.Sequential(*(neutral_layer(spec, like) for spec in layers)).eval(), x)

        def run(number: int) -> float:
            program(x)
            start = time.perf_counter()
            for _ in range(number):
                program(x)
            return (time.perf_counter() - start) / number

        return run


def _opened(model: nn.Module, inputs: Any) -> ExecutorchModule:
    program = program_of(model, inputs, dynamic_batch=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pte"
        try:
            write_executorch(program, file)
            return ExecutorchModule(file)
        except TenfoldError:
            raise
        except Exception as error:
            msg = f"ExecuTorch does not take {type(model).__name__}: {first_words(error.__cause__ or error)}"
            raise ExportError(msg) from error
