"""The weights file: safetensors with the plan in the header. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenfold import __version__
from tenfold.errors import CheckpointError, TenfoldError
from tenfold.records import Plan
from tenfold.tensors.tensor_file import check_digest, read_tensors, write_tensors

FORMAT = "pt"  # what some readers, transformers before version 5 among them, ask of every file
VERSION = 1
SEALED = ("plan", "aliases")


def write_weights(path: Path, state: Mapping[str, Tensor], plan: Plan) -> None:
    """Write a state dict and its plan to ``path``; tensors that share memory are stored once.

    Raises:
        OSError: the file cannot be written.
    """
    unique, aliases = _without_aliases(state)
    header = {"format": FORMAT, "version": str(VERSION), "tenfold": __version__}
    write_tensors(path, unique, header | {"plan": plan.to_json(), "aliases": json.dumps(aliases)}, SEALED)


def read_weights(path: Path) -> tuple[dict[str, Tensor], Plan]:
    """Return the state dict and the plan stored in ``path``, each tensor exactly as it was written.

    Raises:
        CheckpointError: the file is missing, truncated, not from tenfold, of a newer version, or modified.
    """
    if not path.is_file():
        msg = f"there is no checkpoint at {path}"
        raise CheckpointError(msg)
    state, header = read_tensors(path)
    _check_header(header, path)
    check_digest(path, state, header, SEALED)
    try:
        plan = Plan.from_text(header["plan"], source=f"the plan in {path}")
        aliases: dict[str, str] = json.loads(header["aliases"])
    except (TenfoldError, ValueError, KeyError) as error:
        msg = f"{path} has an unreadable header: {error}"
        raise CheckpointError(msg) from error
    return state | {name: state[target] for name, target in aliases.items()}, plan


def is_checkpoint(path: Path) -> bool:
    """Whether the header of the file is that of ``write_weights``."""
    try:
        with safe_open(path, framework="pt") as file:
            return {"tenfold", "plan"} <= set(file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _check_header(header: Mapping[str, str], path: Path) -> None:
    if not {"tenfold", "plan"} <= set(header):
        msg = f"{path} was not written by tenfold: it has no plan in its header. Dense weights are not a checkpoint."
        raise CheckpointError(msg)
    try:
        version = int(header.get("version", ""))
    except ValueError as error:
        msg = f"{path} has no readable version in its header"
        raise CheckpointError(msg) from error
    if version > VERSION:
        msg = f"{path} has version {version}, this tenfold reads up to {VERSION}: upgrade tenfold"
        raise CheckpointError(msg)


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor under its first name, and the other names as aliases of that."""
    first: dict[tuple[int, ...], str] = {}
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            msg = (
                f"{name} is a {type(tensor).__name__}, and files hold tensors only: make it a buffer, or take "
                "get_extra_state out of the model"
            )
            raise CheckpointError(msg)
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            kind = type(tensor).__name__
            msg = f"{name} is of the class {kind}, and files hold plain tensors only: save the model, then quantize it"
            raise CheckpointError(msg)
        key = (tensor.data_ptr(), tensor.storage_offset(), *tensor.shape, -1, *tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor
    return unique, aliases
