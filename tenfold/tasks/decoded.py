"""Decoded pictures kept on disk, so that tens of thousands of PNGs are decoded once and not in every run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from tenfold.errors import DataError
from tenfold.records import atomic_write
from tenfold.tasks.in_memory import TensorSet

LAYOUT = 1  # raise when what is stored changes meaning

logger = logging.getLogger("tenfold")


def kept(name: str, sources: Sequence[Path]) -> TensorSet | None:
    """Return what was decoded from these source files before, or None. A damaged file counts as none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _place(name, sources)
    try:
        if not path.is_file():
            return None
        tensors = load_file(path)
        return TensorSet(tensors["images"], tensors["labels"])
    except (SafetensorError, OSError, KeyError, DataError) as error:
        logger.warning("decoded pictures in %s are unreadable (%s): decoding again", path, error)
        return None


def keep(name: str, sources: Sequence[Path], decoded: TensorSet) -> TensorSet:
    """Return ``decoded`` after storing it for these source files; a folder that cannot be written to is no error.

    The file appears whole or not at all.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _place(name, sources)
    try:
        with atomic_write(path) as partial:
            save_file({"images": decoded.inputs.contiguous(), "labels": decoded.labels}, partial)
    except (OSError, SafetensorError) as error:
        logger.warning("cannot keep decoded pictures in %s (%s): the next run decodes again", path.parent, error)
    return decoded


def _place(name: str, sources: Sequence[Path]) -> Path:
    """Return where the pictures of these files are kept: named by a digest of the contents, not of names or dates."""
    digest = hashlib.sha256(str(LAYOUT).encode())
    for source in sources:
        try:
            with source.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            msg = f"cannot read {source} ({error.strerror})"
            raise DataError(msg) from error
    return Path.home() / ".cache" / "tenfold" / "decoded" / f"{name}-{digest.hexdigest()[:16]}.safetensors"
