"""A model in OpenVINO on the CPU, as a module that is called like the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import require
from tenfold.runtimes.onnx_module import feeds


class OpenvinoModule(nn.Module):
    """A file of OpenVINO or ONNX, compiled for the CPU in float32; returns one tensor, or a tuple of several.

    Args:
        source: the ``.xml`` or ``.onnx`` file, or the bytes of an ONNX file.
        threads: CPU threads; as many as torch uses now if None.
        times: keep what each node took: ``node_times``.
    """

    runtime = "openvino"

    def __init__(self, source: Path | str | bytes, threads: int | None = None, *, times: bool = False) -> None:
        super().__init__()
        openvino: Any = require("openvino", "openvino")
        core = openvino.Core()
        self.threads = threads or torch.get_num_threads()
        held = core.read_model(source if isinstance(source, bytes) else str(source))
        self.names: list[str] = [value.get_any_name() for value in held.inputs]
        self.compiled = core.compile_model(held, "CPU", _settings(self.threads, times=times))
        self._request = self.compiled.create_infer_request()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs as tensors."""
        results = self._request.infer(feeds(self.names, (args, kwargs)))
        outputs: tuple[Tensor, ...] = tuple(torch.from_numpy(value.copy()) for value in results.values())
        return outputs[0] if len(outputs) == 1 else outputs

    def node_times(self) -> list[tuple[str, float]]:
        """Return name and microseconds of every node of the last run, in the order in which they ran."""
        return [(node.node_name, 1e6 * node.real_time.total_seconds()) for node in self._request.profiling_info]


def _settings(threads: int, *, times: bool) -> dict[str, Any]:
    """Return what makes a run reproducible: one stream, so many threads, and no precision below float32."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": "YES" if times else "NO",
    }
