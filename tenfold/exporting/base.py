"""What a target of exports is. One subclass in one file makes a target."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tenfold.registry import Registry


class Exporter(abc.ABC):
    """A kind of file that runs without the Python code of the model.

    Attributes:
        suffix: how the names of its files usually end.
        packages: what it needs besides torch, whose versions belong into the record.
        max_batch: the largest batch that a file with an open batch size can take; None for any.
    """

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    max_batch: ClassVar[int | None] = None

    @abc.abstractmethod
    def check(self) -> None:
        """Raise MissingExtraError if a package that the target needs is not installed."""

    @abc.abstractmethod
    def write(self, program: Any, file: Path, *, opset: int | None) -> int | None:
        """Write a ``torch.export.ExportedProgram`` to a file; return the version of the operators, if there is one.

        Args:
            program: what the model computes.
            file: does not exist yet.
            opset: the version to use; the exporter's default if None.
        """

    @abc.abstractmethod
    def open(self, file: Path) -> nn.Module:
        """Return the file as a module: called with the inputs of the model, it runs in the runtime of the target."""


EXPORTERS: Registry[Exporter] = Registry("export target")
