"""The command line in this process, in an empty folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tenfold.cli import main

TINY = str(Path(__file__).parent / "tiny_task.py") + ":Tiny"


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)

    def is_error(self, *words: str, code: int = 1) -> bool:
        """Whether the command ended with this code, nothing on stdout, and one line that has all the words."""
        lines = [line for line in self.err.splitlines() if line.startswith("tenfold: error: ")]
        assert self.code == code, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        for word in words:
            assert word in lines[0], lines[0]
        return True


Run = Callable[..., Outcome]


@pytest.fixture
def tenfold(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def tiny() -> str:
    """Return the text that loads the tiny task."""
    return TINY


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes weights of the tiny network, some of them changed, and returns the file."""
    from tenfold.tasks import load_task

    def write(**changes: Tensor) -> Path:
        state = load_task(TINY).build().state_dict()
        state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        path = tmp_path / "weights.safetensors"
        save_file({name: torch.as_tensor(tensor).contiguous() for name, tensor in state.items()}, path)
        return path

    return write
