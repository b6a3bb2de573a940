"""Static quantization of ONNX files by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tenfold.errors import require
from tenfold.runtimes.onnx_module import OnnxModule, feeds
from tenfold.runtimes.onnx_notes import write_bare
from tenfold.runtimes.quiet import quiet

Ranges = Literal["minmax", "entropy", "percentile"]


def quantize_static(
    source: Path,
    target: Path,
    inputs: list[Any],
    *,
    operators: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    ranges: Ranges = "minmax",
    known: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Write an ONNX file in eight-bit integers (QDQ), weights by output channel: ``exporting.quantize_onnx``.

    Args:
        source: the file in floating point.
        target: the new file.
        inputs: for calibration, as the model takes them.
        operators: types of operators to quantize; all that ONNX Runtime supports if None.
        keep: names of nodes to leave in floating point.
        ranges: how ranges of activations are found.
        known: ranges of activations that were found otherwise, by name.
    """
    onnx: Any = require("onnx", "export")
    quantization: Any = require("onnxruntime.quantization", "export")
    methods = quantization.CalibrationMethod
    method = {"minmax": methods.MinMax, "entropy": methods.Entropy, "percentile": methods.Percentile}[ranges]
    ends = {name: np.array(both, np.float32) for name, both in (known or {}).items()}
    overrides = {name: [{"rmin": low, "rmax": high}] for name, (low, high) in ends.items()}
    with quiet():
        shaped = target.with_suffix(".shaped.onnx")
        preprocess(source, shaped)
        # What no layer has absorbed gains nothing in integers, and shares its factors between its inputs.
        norms = [node.name for node in onnx.load(shaped).graph.node if node.op_type == "BatchNormalization"]
        quantization.quantize_static(
            shaped,
            target,
            _reader(OnnxModule(source).names, inputs),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=None if operators is None else list(operators),
            nodes_to_exclude=[*keep, *norms],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=method,
            extra_options={"TensorQuantOverrides": overrides},
        )
        write_bare(onnx.load(target), target)


def preprocess(source: Path, target: Path) -> None:
    """Write the file with inferred shapes, which the quantizer needs, and merged operators."""
    shaping: Any = require("onnxruntime.quantization.shape_inference", "export")
    shaping.quant_pre_process(source, target, skip_symbolic_shape=True)


def _reader(names: list[str], inputs: list[Any]) -> Any:
    """Return a calibration reader of ONNX Runtime over the inputs."""
    quantization: Any = require("onnxruntime.quantization", "export")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(inputs)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else feeds(names, batch)

    return Reader()
