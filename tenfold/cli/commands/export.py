"""tenfold export: a file that runs elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import NonNegativeFloat, PositiveInt

from tenfold.cli.source import Machine, Source
from tenfold.cli.terminal import Misuse, Options, Terminal
from tenfold.records import Seed

if TYPE_CHECKING:
    from tenfold.cli.source import Opened
    from tenfold.records import ExportRecord

ORDER = 57

_INT8_CALIBRATION, _CALIBRATION_BATCH = 512, 64


class File(Options):
    """File.

    Attributes:
        out: where to write.
        to: onnx, openvino, torch-export or executorch; see `tenfold list exports`.
        batch_size: samples in the example that is traced.
        fixed_batch: take batches of that size only.
        fuse_batchnorm: merge batch norm into the layers before it, where exact.
        tolerance: largest error of an output, by its largest entry.
        opset: version of the ONNX operators.
        int8: quantize to eight-bit integers (onnx only).
        calibration_samples: training samples for the ranges of --int8; 512 by default.
        seconds: about how long to measure latency; 0 for not at all.
        overwrite: write over a file that is there.
        seed: of the task and the choice of samples.
    """

    out: Path
    to: Annotated[str, "TARGET"] = "onnx"
    batch_size: PositiveInt = 1
    fixed_batch: bool = False
    fuse_batchnorm: bool = True
    tolerance: NonNegativeFloat = 1e-4
    opset: PositiveInt | None = None
    int8: bool = False
    calibration_samples: PositiveInt | None = None
    seconds: NonNegativeFloat = 2.0
    overwrite: bool = False
    seed: Seed = 0


def run(source: Source, machine: Machine, terminal: Terminal, file: File) -> None:
    """Write a model, dense (--weights) or compressed (--checkpoint), to a file that runs without its code.

    tenfold export --checkpoint half --to onnx --out half.onnx --int8 --calibration-samples 512

    The file is compared with the model on several batches first, and kept only if it computes the same. Batch norm is
    merged into the layers. What came of it goes into the record of the checkpoint too.

    With --json, one object: `target`, `file`, `bytes`, `opset`, `dynamic_batch`, `fused`, `parity` (largest error by
    size of the batch), `tolerance`, `int8`, `eager`, `latency`, `speedup`, `environment`.
    """
    _check(file)
    from tenfold.cli.source import open_source
    from tenfold.exporting.base import EXPORTERS, check_free
    from tenfold.reporting.introduce import export_lines

    EXPORTERS.get(file.to)().check()
    check_free(file.out, overwrite=file.overwrite)  # now, and not when the model has been opened
    terminal.step("open the model")
    opened = open_source(source, machine, file.seed)
    terminal.step("export")
    made = _in_integers(opened, file) if file.int8 else _in_floats(opened, file)
    if source.checkpoint is not None:
        _keep(source.checkpoint, made)
    for line in export_lines(made.replace(file=str(file.out))):
        terminal.say(line)
    terminal.result(made.model_dump(mode="json"))


def _check(file: File) -> None:
    """Raise a usage error for options that do not go together."""
    if file.to != "onnx" and (file.int8 or file.opset is not None):
        msg = f"{'--int8' if file.int8 else '--opset'} is for --to onnx."
        raise Misuse(msg)
    if file.calibration_samples is not None and not file.int8:
        msg = "--calibration-samples is for --int8."
        raise Misuse(msg)


def _in_floats(opened: Opened, file: File, path: Path | None = None) -> ExportRecord:
    """Return the record of the file in floating point; at another ``path`` its latency is not measured."""
    from tenfold.exporting import ExportConfig, export

    config = ExportConfig(
        dynamic_batch=not file.fixed_batch,
        fuse_batchnorm=file.fuse_batchnorm,
        tolerance=file.tolerance,
        opset=file.opset,
        seconds=file.seconds if path is None else 0,
    )
    inputs, overwrite = opened.inputs(file.batch_size), file.overwrite
    return export(opened.model, inputs, path or file.out, to=file.to, config=config, overwrite=overwrite)


def _in_integers(opened: Opened, file: File) -> ExportRecord:
    """Return the record of the quantized file; the one in floating point is not kept."""
    from tenfold.exporting import open_exported, quantize_onnx
    from tenfold.files import scratch
    from tenfold.profiling import measure_latency
    from tenfold.tracing import to_device

    samples, size = (
        file.calibration_samples or _INT8_CALIBRATION,
        file.batch_size if file.fixed_batch else _CALIBRATION_BATCH,
    )
    data = opened.task.calibration_batches(samples, batch_size=size, seed=file.seed)
    with scratch() as folder:
        plain = folder / file.out.name
        made = _in_floats(opened, file, plain)
        int8 = quantize_onnx(plain, file.out, data, seconds=file.seconds, overwrite=file.overwrite)
    latency = None
    if file.seconds:
        inputs = to_device(opened.inputs(file.batch_size), "cpu")
        latency = measure_latency(open_exported(file.out, to="onnx"), inputs, seconds=file.seconds / 2)
    return made.replace(bytes=file.out.stat().st_size, int8=int8, latency=latency)


def _keep(checkpoint: Path, made: ExportRecord) -> None:
    """Put the record of the file into that of the checkpoint; one of the same name goes."""
    from tenfold.checkpoint import read_record
    from tenfold.checkpoint.model_folder import RECORD
    from tenfold.files import locked

    if not (checkpoint / RECORD).is_file():
        return
    with locked(checkpoint / RECORD):
        record = read_record(checkpoint)
        if record is not None:
            others = tuple(old for old in record.exports if old.file != made.file)
            record.replace(exports=(*others, made)).save_sealed(checkpoint / RECORD)
