"""Exported files as modules, to measure their latency, accuracy and parity like those of a model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.exporting.base import EXPORTERS
from tenfold.registry import did_you_mean


def open_exported(path: str | Path, *, to: str | None = None) -> nn.Module:
    """Open an exported file as a module that is called like its model, without parameters and on the CPU.

    ``compare_latency`` and ``Task.evaluate`` take it like any model.

    Args:
        path: the file.
        to: its target; by default that of the suffix.

    Raises:
        ExportError: the file is missing or damaged, or has an unknown suffix.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"there is no file {path}"
        raise ExportError(msg)
    by_suffix = {kind.suffix: name for name, kind in EXPORTERS.items()}
    if to is None and path.suffix not in by_suffix:
        msg = f"{path.name} does not tell what it is. {did_you_mean(path.suffix, by_suffix)} Or name the target."
        raise ExportError(msg)
    exporter = EXPORTERS.get(to or by_suffix[path.suffix])()
    exporter.check()
    try:
        return exporter.open(path)
    except TenfoldError:
        raise
    except Exception as error:
        msg = f"{path} cannot be opened: {' '.join(str(error).split())[:300]}"
        raise ExportError(msg) from error
