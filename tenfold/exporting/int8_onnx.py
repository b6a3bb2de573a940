"""Eight-bit integers for ONNX files: static quantization by ONNX Runtime, with ranges from calibration inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.errors import DataError, ExportError, TenfoldError, require
from tenfold.exporting.program import first_words
from tenfold.exporting.quiet import quiet
from tenfold.exporting.runtime import OnnxModule, feeds
from tenfold.exporting.target import check_free, written_whole
from tenfold.profiling import compare_latency
from tenfold.records import Int8Record, Speedup
from tenfold.tracing.inputs import batch_size_of, call_model, tensors_in

Ranges = Literal["minmax", "entropy", "percentile"]

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    batches: Iterable[Any],
    *,
    operators: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    ranges: Ranges = "minmax",
    seconds: float = 1.0,
    overwrite: bool = False,
) -> Int8Record:
    """Return the record of an ONNX file in eight-bit integers, written to ``path`` whole or not at all.

    Static quantization (QDQ): weights to signed integers with a scale for each output channel, symmetric; activations
    to unsigned ones with a scale and a zero point from what they are on the calibration inputs (Jacob et al. 2018,
    arXiv 1712.05877). Compress and recover first, quantize last, with batch norm folded: a factor that is decomposed
    after rounding decomposes the rounding too.

    Args:
        source: a file in floating point, as ``export`` wrote it.
        path: the new file.
        batches: calibration inputs as the forward takes them, from the training set; a few hundred samples will do.
        operators: types of operators to quantize, such as ``("Conv",)``; all that ONNX Runtime can if None.
        keep: names of nodes to leave in floating point.
        ranges: how ranges are found: the extremes, or clipped by entropy or at a percentile.
        seconds: about how long to measure latency, both files in turns on one calibration sample; 0 for not at all.
        overwrite: whether ``path`` may exist.

    Raises:
        ExportError: there is no file, it cannot be quantized, or ``path`` exists.
        DataError: no calibration inputs.
        MissingExtraError: onnxruntime or onnx is not installed.
    """
    source, path = Path(source), Path(path)
    check_free(path, overwrite=overwrite)
    if not source.is_file():
        msg = f"there is no file {source}"
        raise ExportError(msg)
    for package in ("onnx", "onnxruntime"):
        require(package, "export")
    inputs = list(batches)
    samples = sum(batch_size_of(batch) or 1 for batch in inputs)
    if not samples:
        msg = "there are no calibration inputs: static quantization needs some, a few hundred are plenty"
        raise DataError(msg)
    with written_whole(path) as partial:
        try:
            _quantize(source, partial, inputs, operators, keep, ranges)
        except TenfoldError:
            raise
        except Exception as error:
            msg = f"{source} cannot be quantized: {first_words(error)}"
            raise ExportError(msg) from error
        noise, agreement = _compared(OnnxModule(source), OnnxModule(partial), inputs)
        return Int8Record(
            samples=samples,
            operators=_in_integers(partial),
            was_bytes=source.stat().st_size,
            noise=noise,
            agreement=agreement,
            speedup=_speedup(source, partial, inputs[0], seconds) if seconds else None,
        )


def _quantize(
    source: Path, target: Path, inputs: list[Any], operators: Sequence[str] | None, keep: Sequence[str], ranges: Ranges
) -> None:
    quantization: Any = require("onnxruntime.quantization", "export")
    methods = quantization.CalibrationMethod
    method = {"minmax": methods.MinMax, "entropy": methods.Entropy, "percentile": methods.Percentile}[ranges]
    with quiet():
        shaped = target.with_suffix(".shaped.onnx")
        _shape_inference(source, shaped)
        quantization.quantize_static(
            shaped,
            target,
            _reader(OnnxModule(source).names, inputs),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=None if operators is None else list(operators),
            nodes_to_exclude=list(keep),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=method,
        )


def _shape_inference(source: Path, target: Path) -> None:
    """Write the file with the shapes of all values in it, which the quantizer goes by, and operators merged."""
    shaping: Any = require("onnxruntime.quantization.shape_inference", "export")
    shaping.quant_pre_process(source, target, skip_symbolic_shape=True)


def _reader(names: list[str], inputs: list[Any]) -> Any:
    """Return the calibration inputs as ONNX Runtime reads them: one batch after the other, then None."""
    quantization: Any = require("onnxruntime.quantization", "export")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(inputs)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else feeds(names, batch)

    return Reader()


def _in_integers(file: Path) -> dict[str, int]:
    """Return how many operators of each type take dequantized values: those are what the runtime fuses."""
    onnx: Any = require("onnx", "export")
    nodes = onnx.load(file).graph.node
    dequantized = {output for node in nodes if node.op_type == _DEQUANTIZE for output in node.output}
    found = Counter(
        node.op_type
        for node in nodes
        if node.op_type not in (_QUANTIZE, _DEQUANTIZE) and node.input and node.input[0] in dequantized
    )
    if not found:
        msg = "nothing in this file could be quantized: no operator of the types asked for"
        raise ExportError(msg)
    return dict(sorted(found.items()))


def _compared(before: OnnxModule, after: OnnxModule, inputs: list[Any]) -> tuple[float, float | None]:
    """Return the relative change of the outputs, and how often the largest one stays the same."""
    off = size = 0.0
    same: list[Tensor] = []
    for batch in inputs:
        for one, other in zip(_outputs(before, batch), _outputs(after, batch), strict=True):
            off += float((one.double() - other.double()).square().sum())
            size += float(one.double().square().sum())
            if one.dim() == 2 and one.shape[1] > 1:
                same.append(one.argmax(1) == other.argmax(1))
    return (off / size) ** 0.5 if size else 0.0, float(torch.cat(same).double().mean()) if same else None


def _outputs(module: OnnxModule, batch: Any) -> list[Tensor]:
    return list(tensors_in((call_model(module, batch),)))


def _speedup(source: Path, target: Path, batch: Any, seconds: float) -> Speedup:
    from tenfold.exporting.program import at_batch

    one = at_batch(batch, 1)
    variants = {"before": (OnnxModule(source), one), "after": (OnnxModule(target), one)}
    try:
        return compare_latency(variants, seconds=seconds).speedups["after"]
    except TenfoldError:  # the file takes one size of the batch only
        variants = {"before": (OnnxModule(source), batch), "after": (OnnxModule(target), batch)}
        return compare_latency(variants, seconds=seconds).speedups["after"]
