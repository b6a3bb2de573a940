"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tenfold.errors import ExportError
from tenfold.records import Shape, SubLayerSpec
from tenfold.runtimes.base import RUNTIMES, Block, Conditions, TargetRuntime
from tenfold.runtimes.node_times import between_anchors, lower_quartile, runs_of
from tenfold.runtimes.onnx_file import onnx_file_of
from tenfold.runtimes.onnx_layers import INPUT, ChainModel
from tenfold.runtimes.onnx_module import OnnxModule, open_session, session_options


@RUNTIMES.register("onnxruntime")
class OnnxRuntime(TargetRuntime):
    """ONNX Runtime's kernels for CPUs, in float32."""

    name = "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "export"
    int8: ClassVar[bool] = False

    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return the model as an ONNX file in a session, its batch norms fused."""
        del memory_format
        with tempfile.TemporaryDirectory() as folder:
            file, own = onnx_file_of(model, inputs, Path(folder))
            return OnnxModule(file, threads), own

    def chain(self, layers: Sequence[SubLayerSpec], in_shape: Shape, conditions: Conditions) -> Block:
        """Return what times the layers between two others, by the profile of a session."""
        model = ChainModel(layers, in_shape, int8=self.int8)
        held, example = model.to_bytes(), model.example()

        def run(number: int) -> float:
            runs = profiled(held, {INPUT: example}, conditions.threads, number + 1)
            return 1e-6 * lower_quartile([between_anchors(run) for run in runs[1:]])  # the first one warms up

        return run


def profiled(model: bytes, feed: dict[str, Any], threads: int, runs: int) -> list[Sequence[tuple[str, float]]]:
    """Return for every run name and microseconds of its nodes, in the order in which they ran."""
    options = session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = open_session(model, options)
            for _ in range(runs):
                session.run(None, feed)
        except Exception as error:
            msg = f"ONNX Runtime does not run the layer: {' '.join(str(error).split())[:200]}"
            raise ExportError(msg) from error
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [(e["name"], float(e["dur"])) for e in events if e.get("cat") == "Node" and _is_run(e["name"])]
    return runs_of(nodes, runs)


def _is_run(name: str) -> bool:
    return not name.endswith(("_fence_before", "_fence_after"))
