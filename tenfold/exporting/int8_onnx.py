"""Eight-bit integers for ONNX files: static quantization by ONNX Runtime, with ranges from calibration inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import DataError, ExportError, TenfoldError, require
from tenfold.exporting.base import check_free
from tenfold.exporting.onnx_rescale import rescale_
from tenfold.exporting.onnx_rounding import round_weights_
from tenfold.profiling import compare_latency
from tenfold.records import Int8Record, Speedup, atomic_write
from tenfold.registry import as_names
from tenfold.runtimes.onnx_int8 import Ranges, preprocess, quantize_static
from tenfold.runtimes.onnx_module import OnnxModule
from tenfold.runtimes.onnx_notes import write_bare
from tenfold.runtimes.program import first_words
from tenfold.runtimes.quiet import quiet
from tenfold.tracing.input_batches import InputBatches
from tenfold.tracing.inputs import arguments, call_model, tensors_in
from tenfold.tracing.samples import count_samples

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    batches: Iterable[Any],
    *,
    operators: str | Sequence[str] | None = None,
    keep: str | Sequence[str] = (),
    ranges: Ranges = "minmax",
    seconds: float = 1.0,
    overwrite: bool = False,
) -> Int8Record:
    """Quantize an ONNX file to eight-bit integers at ``path``, and return the record of the new file.

    Static quantization (QDQ): weights to signed integers with a scale for each output channel, symmetric; activations
    to unsigned ones with a scale and a zero point from the calibration inputs (Jacob et al. 2018,
    arXiv 1712.05877). Before, channels between two convolutions are rescaled (``onnx_rescale``); afterwards, weights of
    convolutions are rounded for the outputs of their layer (``onnx_rounding``). Compress and fine-tune first, quantize
    last, with batch norm fused: decomposing rounded weights would fit the rounding too.

    Args:
        source: a file in floating point, written by ``export``.
        path: the new file.
        batches: calibration inputs of the forward, from the training set; a few hundred samples suffice.
        operators: types of operators to quantize, such as ``("Conv",)``; all that ONNX Runtime supports if None.
        keep: names of nodes to leave in floating point.
        ranges: calibration of ranges: minimum and maximum, or clipped by entropy or at a percentile.
        seconds: time budget for measuring latency, both files in turns on one calibration sample; 0 to skip it.
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
    inputs = _inputs(source, batches)
    samples = count_samples(inputs)
    if not samples:
        msg = "there are no calibration inputs: static quantization needs some, a few hundred are plenty"
        raise DataError(msg)
    with atomic_write(path) as partial:
        try:
            rescaled, fitted = _quantize(source, partial, inputs, as_names(operators), as_names(keep), ranges)
        except TenfoldError:
            raise
        except Exception as error:
            msg = f"{source} cannot be quantized: {first_words(error)}"
            raise ExportError(msg) from error
        noise, agreement = _compared(OnnxModule(source), OnnxModule(partial), inputs)
        return Int8Record(
            samples=samples,
            operators=_in_integers(partial),
            rescaled=rescaled,
            rounded=fitted,
            was_bytes=source.stat().st_size,
            noise=noise,
            agreement=agreement,
            speedup=_speedup(source, partial, inputs[0], seconds) if seconds else None,
        )


def _quantize(
    source: Path, target: Path, inputs: list[Any], operators: Sequence[str] | None, keep: Sequence[str], ranges: Ranges
) -> tuple[int, int]:
    """Write the quantized file; return how many tensors were rescaled, and the weights of how many layers rounded."""
    onnx: Any = require("onnx", "export")
    ready = target.with_suffix(".ready.onnx")
    with quiet():
        preprocess(source, ready)
    model = onnx.load(ready)
    known = rescale_(model, inputs) if operators is None or "Conv" in operators else {}
    write_bare(model, ready)
    quantize_static(ready, target, inputs, operators=operators, keep=keep, ranges=ranges, known=known)
    quantized = onnx.load(target)
    fitted = round_weights_(quantized, model, inputs)
    write_bare(quantized, target)
    return len(known), fitted


def _inputs(source: Path, batches: Any) -> list[Any]:
    """Return the inputs of the file from what a user has: with labels, as a data set, or in one piece."""
    net = OnnxModule(source)
    if isinstance(batches, list) and all(len(list(tensors_in(arguments(b)))) == len(net.names) for b in batches):
        return batches
    return list(InputBatches(batches, net, net.example_inputs))


def _in_integers(file: Path) -> dict[str, int]:
    """Count the operators of each type with dequantized inputs: those the runtime fuses."""
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
    """Return the relative change of the outputs, and the share of samples with the same largest output."""
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
    from tenfold.runtimes.program import at_batch

    one = at_batch(batch, 1)
    variants = {"before": (OnnxModule(source), one), "after": (OnnxModule(target), one)}
    try:
        return compare_latency(variants, seconds=seconds).speedups["after"]
    except TenfoldError:  # the file takes one size of the batch only
        variants = {"before": (OnnxModule(source), batch), "after": (OnnxModule(target), batch)}
        return compare_latency(variants, seconds=seconds).speedups["after"]
