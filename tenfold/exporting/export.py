"""export(): a file that runs elsewhere, kept only if it computes what the model does."""

from __future__ import annotations

import copy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.exporting.base import EXPORTERS, Exporter
from tenfold.exporting.parity import check_parity
from tenfold.exporting.program import first_words, program_of
from tenfold.exporting.target import check_free, written_whole
from tenfold.profiling import Comparison, compare_latency, environment
from tenfold.records import Environment, ExportRecord
from tenfold.surgery import fuse_batchnorm_
from tenfold.tracing import to_device
from tenfold.tracing.inputs import batch_size_of


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    to: str = "onnx",
    dynamic_batch: bool = True,
    fold: bool = True,
    tolerance: float = 1e-4,
    opset: int | None = None,
    seconds: float = 1.0,
    overwrite: bool = False,
) -> ExportRecord:
    """Return the record of a file that was written to ``path`` and runs without the code of the model.

    The file is opened in its runtime and compared with the model on batches of several sizes first: it is at ``path``
    whole and right, or not at all. Factorized layers are exported as what they run: plain layers, one after the other.

    Args:
        model: any module; stays as it is. It is exported in evaluation mode and from the CPU.
        example_inputs: what its forward takes; see ``call_model``.
        path: the file.
        to: the target: ``onnx``, ``torch-export`` (.pt2) or ``executorch`` (.pte); `tenfold list exports`.
        dynamic_batch: leave the first axis open, so that the file takes batches of any size.
        fold: merge batch norms into the layers before them first, where that is exact (see ``fuse_batchnorm``).
        tolerance: how far an output may be from that of the model, as a share of the largest entry of that output.
        opset: version of the ONNX operators; torch's default if None.
        seconds: about how long to measure latency, the model in torch and the file in turns; 0 for not at all.
        overwrite: whether ``path`` may exist.

    Raises:
        ExportError: ``path`` exists, an operation cannot be exported, or the file computes something else.
        MissingExtraError: a package that the target needs is not installed.
        UnknownNameError: no such target.
        ProfileError: the model does not run on the inputs.

    Example:
        >>> import tempfile, torch
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(net, torch.randn(1, 8), f"{folder}/net.pt2", to="torch-export", seconds=0)
        >>> made.target, list(made.parity), made.bytes > 0
        ('torch-export', [1, 2, 5], True)
    """
    path = Path(path)
    exporter = EXPORTERS.get(to)()
    check_free(path, overwrite=overwrite)
    exporter.check()
    dynamic_batch = dynamic_batch and batch_size_of(example_inputs) is not None
    inputs = to_device(example_inputs, "cpu")
    ready = copy.deepcopy(model).cpu().eval()
    folded = len(fuse_batchnorm_(ready, inputs).pairs) if fold else 0
    program = program_of(ready, inputs, dynamic_batch=dynamic_batch, max_batch=exporter.max_batch)
    with written_whole(path) as partial:
        found_opset = _write(exporter, program, partial, opset)
        exported = exporter.open(partial)
        parity = check_parity(ready, exported, inputs, dynamic_batch=dynamic_batch, tolerance=tolerance)
        timed = (
            compare_latency({"eager": (ready, inputs), "file": (exported, inputs)}, seconds=seconds)
            if seconds
            else None
        )
        size = partial.stat().st_size
        del exported
    return ExportRecord(
        target=to,
        file=path.name,
        bytes=size,
        opset=found_opset,
        dynamic_batch=dynamic_batch,
        folded=folded,
        parity=parity,
        tolerance=tolerance,
        environment=environment_of(exporter),
        **_timing(timed),
    )


def _write(exporter: Exporter, program: Any, file: Path, opset: int | None) -> int | None:
    try:
        return exporter.write(program, file, opset=opset)
    except TenfoldError:
        raise
    except Exception as error:
        msg = f"the model cannot be written as {exporter.suffix}: {first_words(error.__cause__ or error)}"
        raise ExportError(msg) from error


def _timing(timed: Comparison | None) -> dict[str, Any]:
    if timed is None:
        return {}
    return {
        "eager": timed.latencies["eager"],
        "latency": timed.latencies["file"],
        "speedup": timed.speedups["file"],
    }


def environment_of(exporter: Exporter) -> Environment:
    """Return the environment with the versions of the packages that wrote and run the file."""
    made = environment("cpu")
    found = {}
    for package in exporter.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # part of another distribution
            continue
    return made.replace(versions=made.versions | found)
