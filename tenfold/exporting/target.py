"""Files that are whole or not there: written beside their place, checked, and moved into it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold.errors import ExportError


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ExportError if nothing can be written to ``path``: better known early."""
    if path.is_dir():
        msg = f"{path} is a folder: name a file"
        raise ExportError(msg)
    if path.exists() and not overwrite:
        msg = f"{path} exists: choose another file, or say that it may be overwritten (overwrite=True, --overwrite)"
        raise ExportError(msg)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a place to write to; what lies there in the end moves to ``path``, unless something goes wrong.

    Raises:
        ExportError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:
        msg = f"cannot write to {path.parent}: {error.strerror or error}. Choose another folder."
        raise ExportError(msg) from error
    with folder as name:
        partial = Path(name) / path.name
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
