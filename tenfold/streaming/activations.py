"""Tensors of one depth of a network, batch by batch, in a file: what stays on the disk takes no memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import CheckpointError
from tenfold.files import atomic_write

_LENGTH = 8  # bytes at the end of a file that say how long the list of its tensors is


@dataclass(frozen=True, eq=False)
class Activations:
    """A file of tensors in order. It is there as a whole or not at all.

    Use ``writing`` to make one, and ``read`` for a tensor at a time; nothing else is held.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x"
        >>> with Activations.writing(file) as write:
        ...     write(torch.ones(2, 3))
        >>> Activations.of(file).read(0).shape
        torch.Size([2, 3])
    """

    path: Path
    entries: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, path: Path) -> Activations:
        """Open a file.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            with path.open("rb") as file:
                end = file.seek(-_LENGTH, os.SEEK_END)
                length = int.from_bytes(file.read(), "little")
                file.seek(end - length)
                entries = json.loads(file.read(length))
        except (OSError, ValueError) as error:
            msg = f"{path} cannot be read: {error}. Delete the folder of the run, and start again."
            raise CheckpointError(msg) from error
        return cls(path, tuple(entries))

    @staticmethod
    @contextmanager
    def writing(path: Path) -> Iterator[Callable[[Tensor], None]]:
        """Yield what adds a tensor; the file is there when all are.

        Raises:
            FileError: the disk is full, or cannot be written to.
        """
        entries: list[dict[str, Any]] = []
        with atomic_write(path) as partial, partial.open("wb") as file:

            def write(tensor: Tensor) -> None:
                stored = tensor.detach().contiguous().cpu()
                dtype = str(stored.dtype).removeprefix("torch.")
                entries.append({"at": file.tell(), "shape": list(stored.shape), "dtype": dtype})
                file.write(stored.reshape(-1).view(torch.uint8).numpy().data)

            yield write
            text = json.dumps(entries).encode()
            file.write(text + len(text).to_bytes(_LENGTH, "little"))

    @staticmethod
    @contextmanager
    def writing_all(paths: Sequence[Path]) -> Iterator[list[Callable[[Tensor], None]]]:
        """Yield what adds a tensor to each of several files."""
        with ExitStack() as stack:
            yield [stack.enter_context(Activations.writing(path)) for path in paths]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int) -> Tensor:
        """Return a tensor in memory of its own."""
        entry = self.entries[number]
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        found = torch.empty(shape, dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(entry["at"])
            file.readinto(found.reshape(-1).view(torch.uint8).numpy().data)
        return found


class ByBatch:
    """Tensors by the numbers of the batches of a network, in a file of each process that has some of them.

    Args:
        paths: of the files, in the order of the processes; opened when they are asked for.
        spots: for each batch the process that has it, and its place there.
    """

    def __init__(self, paths: Sequence[Path], spots: Sequence[tuple[int, int]]) -> None:
        self.paths, self.spots = paths, spots
        self._opened = cache(Activations.of)

    def read(self, number: int) -> Tensor:
        """Return the tensor of a batch."""
        owner, place = self.spots[number]
        return self._opened(self.paths[owner]).read(place)
