"""Export a model to a file for another runtime, kept only if its outputs agree with the model's."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.exporting.base import EXPORTERS, ExportConfig, Exporter
from tenfold.exporting.parity import check_parity
from tenfold.profiling import compare_latency, environment
from tenfold.records import Environment, ExportRecord, atomic_write
from tenfold.runtimes.program import first_words, program_of
from tenfold.surgery import fuse_batchnorm_
from tenfold.tensors.finite import check_finite
from tenfold.tracing import copied, to_device
from tenfold.tracing.inputs import batch_size_of


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    to: str = "onnx",
    config: ExportConfig | None = None,
    overwrite: bool = False,
) -> ExportRecord:
    """Write a model to a file that runs without its code, and return the record of the file.

    Use it to run the result in ONNX Runtime, OpenVINO, ExecuTorch or wherever there is no Python.

    The file is opened in its runtime and compared with the model on batches of several sizes first; only a file that
    agrees is kept. Factorized layers are exported as what they run: plain layers, one after the other.

    Args:
        model: any module, left unchanged; exported in evaluation mode and from the CPU.
        example_inputs: inputs of its forward; see ``call_model``.
        path: the file.
        to: the target: ``onnx``, ``openvino`` (.xml, and .bin beside), ``torch-export`` (.pt2) or ``executorch``
            (.pte); `tenfold list exports`.
        config: ``ExportConfig()`` by default.
        overwrite: whether ``path`` may exist.

    Raises:
        ExportError: ``path`` exists, an operation cannot be exported, or the file does not run or computes
            something else.
        WeightError: a parameter or buffer has NaN or infinity.
        MissingExtraError: a package that the target needs is not installed.
        UnknownNameError: no such target.
        ProfileError: the model does not run on the inputs.

    Example:
        >>> import tempfile, torch
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     untimed = ExportConfig(seconds=0)
        ...     record = export(net, torch.randn(1, 8), f"{folder}/net.pt2", to="torch-export", config=untimed)
        >>> record.target, list(record.parity), record.bytes > 0
        ('torch-export', [1, 2, 5], True)
    """
    path, config = Path(path), config or ExportConfig()
    exporter = EXPORTERS.get(to)()
    exporter.check_free(path, overwrite=overwrite)
    exporter.check()
    if config.opset is not None and not exporter.has_opset:
        msg = f"{to} has no opset: leave it out"
        raise ExportError(msg)
    check_finite(model)
    dynamic = config.dynamic_batch and batch_size_of(example_inputs) is not None
    inputs = to_device(example_inputs, "cpu")
    eager = copied(model).cpu().eval()
    fused = len(fuse_batchnorm_(eager, inputs).pairs) if config.fuse_batchnorm else 0
    most = exporter.max_batch and max(exporter.max_batch, batch_size_of(inputs) or 1)
    program = program_of(eager, inputs, dynamic_batch=dynamic, max_batch=most)
    with atomic_write(path, exporter.beside) as partial:
        opset = _write(exporter, program, partial, config.opset)
        exported = _opened(exporter, partial, eager)
        parity = check_parity(
            eager, exported, inputs, dynamic_batch=dynamic, tolerance=config.tolerance, max_batch=most
        )
        timed: dict[str, Any] = {}
        if config.seconds:
            both = compare_latency({"eager": (eager, inputs), "file": (exported, inputs)}, seconds=config.seconds)
            timed = {**both.latencies, "speedup": both.speedups["file"]}
            timed["latency"] = timed.pop("file")
        size = sum(partial.with_suffix(suffix).stat().st_size for suffix in (partial.suffix, *exporter.beside))
        del exported
    return ExportRecord(
        target=to,
        file=path.name,
        bytes=size,
        opset=opset,
        dynamic_batch=dynamic,
        fused=fused,
        parity=parity,
        tolerance=config.tolerance,
        environment=environment_of(exporter),
        **timed,
    )


def _write(exporter: Exporter, program: Any, file: Path, opset: int | None) -> int | None:
    try:
        return exporter.write(program, file, opset=opset)
    except TenfoldError:
        raise
    except Exception as error:
        msg = f"the model cannot be written as {exporter.suffix}: {first_words(error.__cause__ or error)}"
        raise ExportError(msg) from error


def _opened(exporter: Exporter, file: Path, model: nn.Module) -> nn.Module:
    try:
        return exporter.open(file)
    except TenfoldError:
        raise
    except Exception as error:
        msg = f"the {exporter.suffix} file does not run here, so it was not kept: {first_words(error)}."
        if {p.dtype for p in model.parameters()} - {
            torch.float32
        }:  # not every runtime has every operator in every dtype
            msg += " Export the model in float32: model.float(), and inputs in float32."
        raise ExportError(msg) from error


def environment_of(exporter: Exporter) -> Environment:
    """Return the environment, with the versions of the packages that write and run the file."""
    current, versions = environment("cpu"), {}
    for package in exporter.packages:
        with suppress(PackageNotFoundError):  # part of another distribution
            versions[package] = version(package)
    return current.replace(versions=current.versions | versions)
