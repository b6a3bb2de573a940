"""Safetensors files of a large model, read tensor by tensor: nothing is in memory that was not asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenfold import __version__
from tenfold.errors import CheckpointError, FileError, TenfoldError, first_line
from tenfold.files import read_text
from tenfold.records import Plan
from tenfold.records.parsing import parse_json
from tenfold.tensors import digest
from tenfold.tensors.tensor_file import DIGEST, check_digest, read_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class WeightFiles:
    """The tensors of a folder of safetensors files by name.

    Attributes:
        folder: that was opened.
        tensors: what lies where.
    """

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, folder: str | Path) -> Self:
        """Open a folder: by its index, else its one file, else all files there; every header is read and checked.

        Raises:
            CheckpointError: there are none; a shard is missing, truncated or no safetensors file; the index names
                tensors that its files do not hold, or two files hold the same tensor.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            msg = f"there is no folder {folder}" if not folder.exists() else f"{folder} is a file: pass its folder"
            raise CheckpointError(msg)
        wanted = _indexed(folder) if (folder / INDEX).is_file() else None
        files = {folder / name for name in wanted.values()} if wanted else _alone(folder)
        found: dict[str, Stored] = {}
        for file in sorted(files):
            for name, stored in _header(file).items():
                if name in found:
                    msg = f"{name} lies in {found[name].file.name} and in {file.name} of {folder}: remove one of them"
                    raise CheckpointError(msg)
                found[name] = stored
        for name, where in (wanted or {}).items():
            if name not in found or found[name].file.name != where:
                msg = f"{INDEX} in {folder} says that {where} holds {name!r}, and it does not: fetch both again"
                raise CheckpointError(msg)
        return cls(folder, found)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some tensors, each in memory of its own, as they are stored."""
        found: dict[str, Tensor] = {}
        for name in sorted(names, key=lambda name: (self.tensors[name].file, name)):
            with _opened(self.tensors[name].file) as file:  # what was read stays mapped for as long as a file is open
                found[name] = file.get_tensor(name).clone()
        return found

    @property
    def bytes(self) -> int:
        """Those of all tensors."""
        return sum(torch.Size(own.shape).numel() * own.dtype.itemsize for own in self.tensors.values())


def _indexed(folder: Path) -> dict[str, str]:
    try:
        found = parse_json(read_text(folder / INDEX, "an index of weights"))
        named = {str(name): str(file) for name, file in found["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{folder / INDEX} is no index of weights: {first_line(error)}"
        raise CheckpointError(msg) from error
    odd = next((file for file in named.values() if Path(file).name != file), None)
    if odd is not None or not named:
        msg = f"{folder / INDEX} names {odd!r}, which is not a file beside it" if odd else f"{INDEX} names no tensor"
        raise CheckpointError(msg)
    missing = sorted({file for file in named.values() if not (folder / file).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        msg = f"{folder} lacks {missing[0]}{more}, which its index names: fetch it, or the whole folder again"
        raise CheckpointError(msg)
    return named


def _alone(folder: Path) -> set[Path]:
    files = {folder / SINGLE} if (folder / SINGLE).is_file() else set(folder.glob("*.safetensors"))
    if not files:
        msg = f"{folder} holds no .safetensors files: convert the weights first (save_pretrained, or save_file)"
        raise CheckpointError(msg)
    return files


def _header(path: Path) -> dict[str, Stored]:
    with _opened(path) as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(name)
            found[name] = Stored(path, tuple(part.get_shape()), _dtype(part.get_dtype(), name, path))
        return found


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        msg = f"{path} ({size:,} bytes) is truncated, damaged or no safetensors file: {first_line(error)}"
        raise CheckpointError(msg) from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _dtype(name: str, tensor: str, path: Path) -> torch.dtype:
    if name not in _DTYPES:
        msg = f"{tensor} in {path} has the type {name}, of packed weights: weights in floating point can be compressed"
        raise CheckpointError(msg)
    return _DTYPES[name]


def index_text(shards: Sequence[Path], plan: Plan) -> str:
    """Return the text of the index of a compressed model: what each file holds, and the plan of the whole.

    Args:
        shards: files that ``write_tensors`` wrote, under the names that they are to have.
        plan: carried out on the model.
    """
    placed: dict[str, str] = {}
    seals = []
    for shard in shards:
        placed |= dict.fromkeys(_header(shard), shard.name)
        seals.append(_seal(shard))
    text = plan.to_json()
    about = {
        "total_size": sum(shard.stat().st_size for shard in shards),
        "format": "pt",
        "tenfold": __version__,
        "plan": text,
        DIGEST: digest({}, "".join((text, *seals))),
    }
    return json.dumps({"metadata": about, "weight_map": dict(sorted(placed.items()))}, indent=1) + "\n"


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds a compressed model in several files."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return False
    try:
        return "plan" in parse_json(read_text(folder / INDEX, "an index of weights"))["metadata"]
    except (ValueError, KeyError, TypeError, FileError):
        return False


def plan_of_shards(folder: Path) -> Plan:
    """Return the plan of a compressed model in several files, whose weights are not looked at.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        about = parse_json(read_text(folder / INDEX, "an index of weights"))["metadata"]
        return Plan.from_text(about["plan"], source=f"the plan in {folder / INDEX}")
    except (TenfoldError, ValueError, KeyError, TypeError) as error:
        msg = f"{folder / INDEX} does not say how the model was compressed: {first_line(error)}"
        raise CheckpointError(msg) from error


def read_shards(folder: Path) -> tuple[dict[str, Tensor], Plan]:
    """Return the tensors and the plan of a compressed model in several files, each tensor exactly as it was written.

    Raises:
        CheckpointError: a file is missing, damaged or was changed.
    """
    files = WeightFiles.of(folder)
    about = parse_json(read_text(folder / INDEX, "an index of weights"))["metadata"]
    state: dict[str, Tensor] = {}
    seals = []
    for shard in sorted({stored.file for stored in files.tensors.values()}):
        tensors, header = read_tensors(shard)
        check_digest(shard, tensors, header, ())
        seals.append(header[DIGEST])
        state |= tensors
    if about.get(DIGEST) != digest({}, "".join((about["plan"], *seals))):
        msg = f"{folder} was changed after it was written: its index does not match its weights"
        raise CheckpointError(msg)
    return state, plan_of_shards(folder)


def _seal(shard: Path) -> str:
    with _opened(shard) as file:
        return str((file.metadata() or {}).get(DIGEST))
