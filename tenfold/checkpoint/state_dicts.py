"""Weights of dense models as users have them: safetensors, or what torch.save wrote, read without running its code."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tenfold.errors import CheckpointError, first_line
from tenfold.files import atomic_write
from tenfold.tensors.tensor_file import read_tensors

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".th", ".tar", ".pkl")
NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
# Plain data that training scripts keep beside the weights: their arguments, and numbers of numpy.
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.float64(0).__reduce__()[0],
    *map(type, map(np.dtype, ("f8", "f4", "i8"))),
]
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


@dataclass(frozen=True, eq=False)
class StateDict:
    """Tensors by name, and what a file held beside them.

    Attributes:
        tensors: by name.
        key: under which they were; empty for the top level.
        dropped: names beside the tensors.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    dropped: tuple[str, ...] = ()


def read_state_dict(path: Path | str, *, key: str | None = None) -> StateDict:
    """Return the tensors in a file of weights, on the CPU.

    Files of torch.save are read by torch's loader for weights only, which builds tensors and plain containers and
    nothing else. The state dict may be nested under one of the usual names (``state_dict``, ``model`` ...); prefixes
    that DataParallel and torch.compile put before every name are taken off.

    Args:
        path: a .safetensors file, or one of torch.save.
        key: under which the state dict is, with dots between several; found by the usual names if None.

    Raises:
        CheckpointError: the file is missing, damaged, holds objects of other classes, or no state dict.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "net.pth"
        >>> torch.save({"epoch": 3, "state_dict": {"module.fc.bias": torch.zeros(2)}}, file)
        >>> read_state_dict(file).tensors, read_state_dict(file).dropped
        ({'fc.bias': tensor([0., 0.])}, ('epoch',))
    """
    path = Path(path).expanduser()
    if path.is_dir():
        msg = f"{path} is a folder; weights are one file. A compressed model is loaded as a checkpoint."
        raise CheckpointError(msg)
    if not path.is_file():
        msg = f"there is no weights file {path}"
        raise CheckpointError(msg)
    if path.suffix.lower() in PICKLED:
        return _nested(_unpickled(path), path, key)
    try:
        return _nested(read_tensors(path)[0], path, key)
    except CheckpointError as error:
        msg = f"{path} is not a readable .safetensors file ({first_line(error.__cause__ or error)})"
        raise CheckpointError(msg) from error


def write_state_dict(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Write tensors as a .safetensors file; those that share memory are stored each by itself.

    Raises:
        FileError: the file cannot be written.
    """
    stored = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with atomic_write(Path(path)) as partial:
        try:
            save_file(stored, partial)
        except SafetensorError as error:
            raise OSError(first_line(error)) from error


def _unpickled(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:  # torch itself ignores the checksums
                    msg = f"the checksum of {damaged} in it is wrong"
                    raise ValueError(msg)
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file ends in nearly any error of zipfile, pickle or torch
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is not None:
            msg = (
                f"{path} holds objects of {foreign[1]}, and reading these would run code of theirs. Save the state "
                "dict alone: torch.save(model.state_dict(), FILE)."
            )
        elif "TorchScript" in str(error):
            msg = f"{path} is a program of TorchScript: its weights are torch.jit.load(FILE).state_dict()"
        else:
            msg = f"{path} is damaged or no file of torch.save: {first_line(error)}"
        raise CheckpointError(msg) from error


def _nested(found: Any, path: Path, key: str | None) -> StateDict:
    """Return the state dict in what a file held."""
    if key is not None:
        inside = found
        for part in key.split("."):
            inside = inside.get(part) if isinstance(inside, Mapping) else None
        tensors = _tensors(inside)
        if not tensors:
            msg = f"{path} has no state dict under {key!r}. {_held(found)}"
            raise CheckpointError(msg)
        return StateDict(_unwrapped(tensors), key)
    own = _tensors(found)
    if own:
        return StateDict(_unwrapped(own), "", tuple(str(name) for name in found if name not in own))
    nested = [name for name in NESTED if isinstance(found, Mapping) and _tensors(found.get(name))]
    if not nested:
        msg = f"{path} holds no state dict. {_held(found)}"
        raise CheckpointError(msg)
    dropped = tuple(str(name) for name in found if name != nested[0])
    return StateDict(_unwrapped(_tensors(found[nested[0]])), nested[0], dropped)


def _tensors(value: Any) -> dict[str, Tensor]:
    """Return the tensors in a mapping by name; none of what is no mapping."""
    if not isinstance(value, Mapping):
        return {}
    return {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, Tensor)}


def _held(found: Any) -> str:
    names = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
    return f"It holds: {names or 'nothing'}."


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:  # one may be around the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors
