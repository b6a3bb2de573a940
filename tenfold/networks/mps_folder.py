"""The last complete sweep in one file, so that a run that was killed goes on to the same bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.errors import CheckpointError
from tenfold.files import atomic_write
from tenfold.tensors.tensor_file import check_digest, read_tensors, write_tensors

FILE_NAME = "sweeps.safetensors"
_SEALED = ("identity", "history")


@dataclass(frozen=True)
class SweepFolder:
    """A folder with the state of a run after its last sweep.

    Attributes:
        path: created if it does not exist.
        identity: of all that the run depends on; a folder of another run is refused.
    """

    path: Path
    identity: str

    def restore(self, model: nn.Module) -> list[dict[str, Any]]:
        """Put the stored cores into the model and return the history; nothing is stored: an empty list.

        Raises:
            CheckpointError: the file is damaged, or of another run.
        """
        file = self.path / FILE_NAME
        if not file.is_file():
            return []
        tensors, header = read_tensors(file)
        check_digest(file, tensors, header, _SEALED)
        if header["identity"] != self.identity:
            msg = f"{file} is of a run with other data or settings: name another folder, or remove this one"
            raise CheckpointError(msg)
        model.load_state_dict(tensors)
        history: list[dict[str, Any]] = json.loads(header["history"])
        return [{**row, "bonds": tuple(row["bonds"])} for row in history]

    def write(self, model: nn.Module, history: list[dict[str, Any]]) -> None:
        """Replace what is stored, as a whole or not at all.

        Raises:
            FileError: the file cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        header = {"identity": self.identity, "history": json.dumps(history)}
        with atomic_write(self.path / FILE_NAME) as partial:
            write_tensors(partial, model.state_dict(), header, _SEALED)
