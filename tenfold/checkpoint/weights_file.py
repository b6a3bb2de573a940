"""The weights file: safetensors with the plan in the header. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tenfold import __version__
from tenfold.errors import CheckpointError, PlanError, TenfoldError
from tenfold.records import Plan
from tenfold.tensors import digest

FORMAT = "tenfold"
VERSION = 1


def write_weights(path: Path, state: Mapping[str, Tensor], plan: Plan) -> None:
    """Write a state dict and its plan to ``path``; tensors that share memory are stored once."""
    unique, aliases = _without_aliases(state)
    stored = {name: t.detach().contiguous().cpu() for name, t in unique.items()}
    text, shared = plan.to_json(), json.dumps(aliases)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "tenfold": __version__,
        "plan": text,
        "aliases": shared,
        "digest": digest(stored, text + shared),
    }
    save_file(stored, path, metadata=header)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place, which has a random order otherwise.

    Equal models then have equal files, byte for byte.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # else something was escaped differently
            file.seek(8)
            file.write(text)


def read_weights(path: Path) -> tuple[dict[str, Tensor], Plan]:
    """Return the state dict and the plan stored in ``path``, each tensor exactly as it was written.

    Raises:
        CheckpointError: the file is missing, truncated, not from tenfold, of a newer version, or modified.
    """
    if not path.is_file():
        msg = f"there is no checkpoint at {path}"
        raise CheckpointError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(header, path)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        msg = f"{path} is damaged or not a safetensors file: {error}"
        raise CheckpointError(msg) from error
    if header.get("digest") != digest(state, header["plan"] + header.get("aliases", "")):
        msg = f"{path} was changed after it was written: its contents do not match its digest. Save the model again."
        raise CheckpointError(msg)
    try:
        plan = Plan.from_text(header["plan"], source=f"the plan in {path}")
        aliases: dict[str, str] = json.loads(header["aliases"])
    except (PlanError, TenfoldError, ValueError, KeyError) as error:
        msg = f"{path} has an unreadable header: {error}"
        raise CheckpointError(msg) from error
    return state | {name: state[target] for name, target in aliases.items()}, plan


def is_checkpoint(path: Path) -> bool:
    """Whether the header of the file is that of ``write_weights``."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _check_header(header: Mapping[str, str], path: Path) -> None:
    if header.get("format") != FORMAT or "plan" not in header:
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
