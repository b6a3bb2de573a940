"""Load the weights of a dense model from a file, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tenfold.checkpoint.state_dicts import read_state_dict
from tenfold.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)


def load_weights(model: M, path: Path | str) -> M:
    """Copy the tensors of a .safetensors file, or of one of torch.save, into ``model``, cast to its dtypes; return it.

    The file must hold exactly the tensors of the model, with the same shapes; only the counters
    ``num_batches_tracked`` of batch norms may be absent, as in many published files. See
    ``tenfold.checkpoint.state_dicts.read_state_dict`` for how files of torch.save are read.

    Raises:
        CheckpointError: the file is missing, damaged, holds no weights, or was made for another model (the message
            names the first tensor that does not fit). The model is then unchanged.
    """
    path = Path(path).expanduser()
    found, wanted = read_state_dict(path).tensors, model.state_dict()
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


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first(what: str, keys: list[str]) -> str:
    """Return a phrase with the first of the keys and the number of others; empty for no keys."""
    if not keys:
        return ""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{what} {keys[0]}{more}; "
