"""OpenVINO on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import ExportError
from tenfold.records import Shape, SubLayerSpec
from tenfold.runtimes.base import RUNTIMES, Block, Conditions, TargetRuntime
from tenfold.runtimes.node_times import between_anchors, lower_quartile
from tenfold.runtimes.onnx_file import onnx_file_of
from tenfold.runtimes.onnx_layers import ChainModel
from tenfold.runtimes.openvino_module import OpenvinoModule


@RUNTIMES.register("openvino")
class OpenVino(TargetRuntime):
    """OpenVINO's kernels for CPUs, in float32."""

    name = "openvino"
    packages = ("openvino", "onnx", "onnxscript")
    extra = "openvino"

    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return the model compiled by OpenVINO, its batch norms fused."""
        del memory_format
        with tempfile.TemporaryDirectory() as folder:
            file, own = onnx_file_of(model, inputs, Path(folder))
            return OpenvinoModule(file, threads), own

    def chain(self, layers: Sequence[SubLayerSpec], in_shape: Shape, conditions: Conditions) -> Block:
        """Return what times the layers between two others, by the counters of the runtime."""
        model = ChainModel(layers, in_shape)
        example = torch.from_numpy(model.example())
        try:
            compiled = OpenvinoModule(model.to_bytes(), conditions.threads, times=True)
            compiled(example)
        except RuntimeError as error:
            msg = f"OpenVINO does not run the layer: {' '.join(str(error).split())[:200]}"
            raise ExportError(msg) from error

        def run(number: int) -> float:
            times = []
            for _ in range(number):
                compiled(example)
                times.append(between_anchors(compiled.node_times()))
            return 1e-6 * lower_quartile(times)

        return run
