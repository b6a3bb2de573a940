"""Load the weights of a dense model from a .safetensors file, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tenfold.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".th")


def load_weights(model: M, path: Path | str) -> M:
    """Copy the tensors of a .safetensors file into ``model``, cast to its dtypes, and return it.

    The file must hold exactly the tensors of the model, with the same shapes; only the counters
    ``num_batches_tracked`` of batch norms may be absent, as in many published files.

    Raises:
        CheckpointError: the file is missing, not a safetensors file, truncated, or made for another model (the message
            names the first tensor that does not fit). The model is then unchanged.
    """
    path = Path(path).expanduser()
    found, wanted = _read(path), model.state_dict()
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in wanted]
    if missing or unexpected:
        msg = f"{path} does not fit this model: {_first('it lacks', missing)}{_first('it has the unknown', unexpected)}"
        raise CheckpointError(msg.rstrip("; "))
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            msg = (
                f"{path} does not fit this model: {key} has shape {tuple(value.shape)}, "
                f"the model needs {tuple(wanted[key].shape)}"
            )
            raise CheckpointError(msg)
        if value.is_floating_point() != wanted[key].is_floating_point():
            msg = f"{path} does not fit this model: {key} is {_dtype(value)}, the model needs {_dtype(wanted[key])}"
            raise CheckpointError(msg)
    with torch.no_grad():
        for key, value in found.items():
            wanted[key].copy_(value)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        msg = f"{path} is a folder; weights are one .safetensors file. A compressed model is loaded as a checkpoint."
        raise CheckpointError(msg)
    if not path.is_file():
        msg = f"there is no weights file {path}"
        raise CheckpointError(msg)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        hint = " Pickled files are not read: save the state dict with safetensors." if path.suffix in PICKLED else ""
        msg = f"{path} is not a readable .safetensors file ({error}).{hint}"
        raise CheckpointError(msg) from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first(what: str, keys: list[str]) -> str:
    """Return a phrase with the first of the keys and the number of others; empty for no keys."""
    if not keys:
        return ""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{what} {keys[0]}{more}; "
