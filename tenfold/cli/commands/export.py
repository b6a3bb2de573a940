"""tenfold export: a file that runs elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tenfold.cli.options import Machine, Source
from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from tenfold.cli.sources import Opened
    from tenfold.records import ExportRecord

ORDER = 57

_INT8_CALIBRATION, _CALIBRATION_BATCH = 512, 64

_PANEL = "File"


@dataclass(frozen=True)
class File:
    """What to write, and what it has to be."""

    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="Where to write.", show_default=False, rich_help_panel=_PANEL),
    ]
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET", help="onnx, torch-export or executorch; see `list exports`.", rich_help_panel=_PANEL
        ),
    ] = "onnx"
    batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples in the example that is traced.", rich_help_panel=_PANEL)
    ] = 1
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Take batches of that size only.", rich_help_panel=_PANEL)
    ] = False
    fold: Annotated[
        bool, typer.Option(help="Merge batch norm into the layers before it, where exact.", rich_help_panel=_PANEL)
    ] = True
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest error of an output, by its largest entry.", rich_help_panel=_PANEL)
    ] = 1e-4
    opset: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Version of the ONNX operators.", rich_help_panel=_PANEL)
    ] = None
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize to eight-bit integers (onnx only).", rich_help_panel=_PANEL)
    ] = False
    calibration: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Training samples for the ranges of --int8; 512 by default.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    seconds: Annotated[
        float,
        typer.Option(min=0, help="About how long to measure latency; 0 for not at all.", rich_help_panel=_PANEL),
    ] = 2.0
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over a file that is there.", rich_help_panel=_PANEL)
    ] = False


def run(source: Source, machine: Machine, terminal: Terminal, file: File) -> None:
    """Write a model, dense (--weights) or compressed (--checkpoint), to a file that runs without its code.

    tenfold export --checkpoint half --to onnx --out half.onnx --int8 --calibration 512

    The file is compared with the model on several batches first, and kept only if it computes the same. Batch norm is
    merged into the layers. What came of it goes into the record of the checkpoint too.

    With --json, one object: `target`, `file`, `bytes`, `opset`, `dynamic_batch`, `folded`, `parity` (largest error by
    size of the batch), `tolerance`, `int8`, `eager`, `latency`, `speedup`, `environment`.
    """
    _check(file)
    with terminal.session():
        from tenfold.cli.sources import open_source

        terminal.step("open the model")
        opened = open_source(source, machine)
        terminal.step("export")
        made = _in_integers(opened, file, machine.seed) if file.int8 else _in_floats(opened, file)
        if source.checkpoint is not None:
            _keep(source.checkpoint, made)
        for line in _lines(file.out, made):
            terminal.say(line)
        terminal.result(made.model_dump(mode="json"))


def _check(file: File) -> None:
    """Raise a usage error for options that do not go together."""
    if file.to != "onnx" and (file.int8 or file.opset is not None):
        msg = f"{'--int8' if file.int8 else '--opset'} is for --to onnx."
        raise Misuse(msg)
    if file.calibration is not None and not file.int8:
        msg = "--calibration is for --int8."
        raise Misuse(msg)


def _in_floats(opened: Opened, file: File, path: Path | None = None) -> ExportRecord:
    """Return the record of the file in floating point; at another ``path`` its latency is not measured."""
    from tenfold.exporting import ExportConfig, export

    config = ExportConfig(
        dynamic_batch=not file.fixed_batch,
        fuse_batchnorm=file.fold,
        tolerance=file.tolerance,
        opset=file.opset,
        seconds=file.seconds if path is None else 0,
    )
    inputs, overwrite = opened.inputs(file.batch), file.overwrite
    return export(opened.model, inputs, path or file.out, to=file.to, config=config, overwrite=overwrite)


def _in_integers(opened: Opened, file: File, seed: int) -> ExportRecord:
    """Return the record of the quantized file; the one in floating point is not kept."""
    import tempfile

    from tenfold.exporting import open_exported, quantize_onnx
    from tenfold.exporting.base import check_free
    from tenfold.profiling import measure_latency
    from tenfold.tracing import to_device

    check_free(file.out, overwrite=file.overwrite)
    samples, size = file.calibration or _INT8_CALIBRATION, file.batch if file.fixed_batch else _CALIBRATION_BATCH
    data = opened.task.calibration_batches(samples, batch_size=size, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / file.out.name
        made = _in_floats(opened, file, plain)
        int8 = quantize_onnx(plain, file.out, data, seconds=file.seconds, overwrite=file.overwrite)
    latency = None
    if file.seconds:
        inputs = to_device(opened.inputs(file.batch), "cpu")
        latency = measure_latency(open_exported(file.out, to="onnx"), inputs, seconds=file.seconds / 2)
    return made.replace(bytes=file.out.stat().st_size, int8=int8, latency=latency)


def _keep(checkpoint: Path, made: ExportRecord) -> None:
    """Put the record of the file into that of the checkpoint; one of the same name goes."""
    from tenfold.checkpoint import read_record
    from tenfold.checkpoint.model_folder import RECORD
    from tenfold.records import write_text

    record = read_record(checkpoint) if checkpoint.is_dir() else None
    if record is not None:
        others = tuple(old for old in record.exports if old.file != made.file)
        write_text(checkpoint / RECORD, record.replace(exports=(*others, made)).to_json())


def _lines(out: Path, made: ExportRecord) -> list[str]:
    from tenfold.reporting.numbers import milliseconds, percent

    opset = f", opset {made.opset}" if made.opset else ""
    batches = "batches of any size" if made.dynamic_batch else "one size of the batch"
    folded = f", {made.folded} batch norms merged" if made.folded else ""
    lines = [f"{out}: {made.target}{opset}, {made.bytes:,} bytes, {batches}{folded}"]
    errors = ", ".join(f"{error:.1e} at batch {size}" for size, error in made.parity.items())
    lines.append(f"largest error against the model: {errors}")
    if made.int8 is not None:
        number = sum(made.int8.operators.values())
        same = "" if made.int8.agreement is None else f", {percent(made.int8.agreement)} the same answer"
        lines.append(
            f"int8: {number} operators, {made.int8.was_bytes:,} bytes before, outputs change by "
            f"{percent(made.int8.noise)}{same} ({made.int8.samples} samples)"
        )
    speedup = made.int8.speedup if made.int8 is not None else made.speedup
    if made.latency is not None and speedup is not None:
        than = "the file in floating point" if made.int8 is not None else "the model in torch"
        ratio = f"{speedup.ratio:.3g} [{speedup.low:.3g}–{speedup.high:.3g}]"
        lines.append(f"latency: {milliseconds(made.latency.median_ms)}, {ratio} times as fast as {than}")
    return lines
