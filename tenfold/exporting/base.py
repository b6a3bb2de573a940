"""Export targets and settings. One subclass of ``Exporter`` in one file makes a target."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar

from pydantic import NonNegativeFloat, PositiveInt
from torch import nn

from tenfold.errors import ExportError, FileError, require
from tenfold.files import check_writable
from tenfold.records import Record
from tenfold.registry import Registry


class ExportConfig(Record):
    """How to export a model, and how closely the file must agree with it.

    Attributes:
        dynamic_batch: leave the first axis open, so that the file takes batches of any size.
        fuse_batchnorm: merge batch norms into the layers before them first, where that is exact.
        tolerance: largest error of an output, as a share of the largest entry of that output of the model. Outputs
            in half precision may be off by a few of their roundings in any case.
        opset: version of the ONNX operators; torch's default if None.
        seconds: time budget for measuring latency, model and file in turns; 0 to skip it.
    """

    dynamic_batch: bool = True
    fuse_batchnorm: bool = True
    tolerance: NonNegativeFloat = 1e-4
    opset: PositiveInt | None = None
    seconds: NonNegativeFloat = 1.0


class Exporter(abc.ABC):
    """A file format that runs without the Python code of the model.

    Attributes:
        suffix: how the names of its files usually end.
        packages: required besides torch; their versions go into the record.
        extra: the extra of tenfold that installs the packages.
        has_opset: whether its operators have versions to choose from.
        beside: suffixes of the files that it writes beside the one that is named, and that belong to it.
        max_batch: largest batch of a file with an open batch size; None for no limit.
    """

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    has_opset: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ()
    max_batch: ClassVar[int | None] = None

    def check(self) -> None:
        """Raise MissingExtraError if a required package is not installed."""
        for package in self.packages:
            require(package, self.extra)

    def check_free(self, path: Path, *, overwrite: bool) -> None:
        """Raise ExportError early if ``path``, or a file beside it, may not or cannot be written."""
        if self.beside and path.suffix != self.suffix:
            msg = f"{path.name}: the name has to end with {self.suffix}; {' and '.join(self.beside)} is written beside"
            raise ExportError(msg)
        for file in (path, *(path.with_suffix(suffix) for suffix in self.beside)):
            check_free(file, overwrite=overwrite)

    @abc.abstractmethod
    def write(self, program: Any, file: Path, *, opset: int | None) -> int | None:
        """Write a ``torch.export.ExportedProgram`` to a file; return the version of its operators, if it has one.

        Args:
            program: the model.
            file: does not exist yet.
            opset: version of the operators; the exporter's default if None.
        """

    @abc.abstractmethod
    def open(self, file: Path) -> nn.Module:
        """Return the file as a module, which runs the inputs of the model in the runtime of the target."""


EXPORTERS: Registry[Exporter] = Registry("export target")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ExportError early if ``path`` may not or cannot be written."""
    if path.is_dir():
        msg = f"{path} is a folder: name a file"
        raise ExportError(msg)
    if path.exists() and not overwrite:
        msg = f"{path} exists: choose another file, or say that it may be overwritten (overwrite=True, --overwrite)"
        raise ExportError(msg)
    try:
        check_writable(path)
    except FileError as error:
        msg = f"{error}. Choose another folder."
        raise ExportError(msg) from error
