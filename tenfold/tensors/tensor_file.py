"""Tensors in a safetensors file with a digest: read as they were written, or refused. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tenfold.errors import CheckpointError, first_line
from tenfold.tensors.digests import digest

DIGEST = "digest"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], sealed: Sequence[str]) -> None:
    """Write tensors and a header to ``path``; equal ones make equal files, byte for byte.

    Args:
        path: a new file in a place that nobody reads yet.
        tensors: that share no memory.
        header: further entries.
        sealed: names of the entries that the digest covers, besides all tensors.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    text = "".join(header[name] for name in sealed)
    try:
        save_file(stored, path, metadata={**header, DIGEST: digest(stored, text)})
        _sort_header(path)
    except SafetensorError as error:  # such as a full disk
        raise OSError(_reason(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and the entries of its header.

    A file that another process replaces meanwhile is read as it was before or as it is afterwards: safetensors opens
    it twice, by name, so it is read again where the name has come to stand for another file.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    while True:
        failure: Exception | None = None
        try:
            with path.open("rb") as held:  # while it is held, no other file gets its inode
                try:
                    with safe_open(path, framework="pt") as file:
                        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                        header = file.metadata() or {}
                except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                    failure = error
                if not os.path.samestat(os.fstat(held.fileno()), path.stat()):
                    continue
        except OSError as error:
            failure = error
        if failure is None:
            return tensors, header
        msg = f"{path} is damaged or not a safetensors file: {_reason(failure)}"
        raise CheckpointError(msg) from failure


def check_digest(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], sealed: Sequence[str]) -> None:
    """Raise CheckpointError unless tensors and header are those that ``write_tensors`` wrote."""
    if header.get(DIGEST) != digest(tensors, "".join(header.get(name, "") for name in sealed)):
        msg = f"{path} was changed after it was written: its contents do not match its digest."
        raise CheckpointError(msg)


def _reason(error: BaseException) -> str:
    """Return what went wrong, out of the words that safetensors puts around it."""
    found = error.strerror if isinstance(error, OSError) else None
    return found or first_line(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")


def _sort_header(path: Path) -> None:
    """Sort the header of a safetensors file in place, which has a random order otherwise."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # else something was escaped differently
            file.seek(8)
            file.write(text)
