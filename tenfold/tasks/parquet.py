"""Labelled pictures from Parquet files in the layout of the Hugging Face Hub, decoded once and cached."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenfold.errors import CheckpointError, DataError, require
from tenfold.files import atomic_write
from tenfold.tasks.in_memory import Split, TensorSet
from tenfold.tensors.tensor_file import check_digest, read_tensors, write_tensors

DATA_VARIABLE = "TENFOLD_DATA"
COLUMNS = ("img", "image")  # names of the picture in the Hub's data sets
_LAYOUT = 2  # of the files of decoded pictures: raise it when their meaning changes

logger = logging.getLogger("tenfold")


def load_images(
    dataset: str, split: Split, *, data: Path | None, shape: tuple[int, ...], classes: int, source: str
) -> TensorSet:
    """Return the pictures of a split as uint8 (samples, *shape), and their labels.

    Pictures are decoded once: the pixels are cached in ~/.cache/tenfold/decoded under a digest of the files' contents.

    Args:
        dataset: the name of the folder, such as "cifar10".
        split: "train" or "test".
        data: where to look; see :func:`find_shards`.
        shape: (channels, height, width) of every picture; 3 channels for colour, 1 for grey.
        classes: labels must lie in 0..classes-1.
        source: id of the data set on the Hub, for messages.

    Raises:
        DataError: files that are missing, empty, damaged or of another shape.
        MissingExtraError: pyarrow or Pillow is not installed.
    """
    shards = find_shards(dataset, split, data=data, source=source)
    name = f"{dataset}-{split}"
    images = _stored(name, shards) or _store(name, shards, _decode(shards, shape))
    low, high = int(images.labels.min()), int(images.labels.max())
    if images.inputs.shape[1:] != shape or low < 0 or high >= classes:
        msg = (
            f"{shards[0].parent} holds pictures of shape {tuple(images.inputs.shape[1:])} with labels {low}..{high}; "
            f"{dataset} needs {shape} with labels 0..{classes - 1}"
        )
        raise DataError(msg)
    return images


def find_shards(dataset: str, split: Split, *, data: Path | None = None, source: str) -> list[Path]:
    """Return the files ``{split}-*.parquet`` of a data set, in order.

    Only one place is searched: ``data`` if given, else $TENFOLD_DATA if set, else ~/.cache/tenfold/datasets. It is the
    folder of the data set, or one with a subfolder of its name; the files may be one level deeper, in the folders that
    the Hub uses (``data``, ``plain_text``, the name of the data set).

    Raises:
        DataError: there are none, or shards of a series are missing; the message names the place.
    """
    root = data_root(data)
    for folder in (base / sub for base in (root / dataset, root) for sub in ("", "data", "plain_text", dataset)):
        shards = sorted(folder.glob(f"{split}-*.parquet")) if folder.is_dir() else []
        if shards:
            _check_complete(shards)
            return shards
    what = "has no" if root.is_dir() else "is not a folder; need"
    msg = (
        f"no {dataset} data: {root} {what} {dataset}/{split}-*.parquet. Get {source} from the Hugging Face Hub "
        f"(Parquet files) and pass its folder as data=FOLDER (--data FOLDER) or in ${DATA_VARIABLE}."
    )
    raise DataError(msg)


def data_root(data: Path | None) -> Path:
    """Return the place to search: ``data`` if given, else $TENFOLD_DATA if set, else ~/.cache/tenfold/datasets."""
    if data is not None:
        return data.expanduser()
    named = os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "tenfold" / "datasets"


def _check_complete(shards: Sequence[Path]) -> None:
    """Refuse an incomplete series of shards: part of a set would have another score."""
    matches = [re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name) for path in shards]
    numbers = [(int(m[1]), int(m[2])) for m in matches if m]
    if not numbers:
        return
    missing = sorted(set(range(numbers[0][1])) - {n for n, _ in numbers})
    if missing or len({total for _, total in numbers}) > 1 or len(numbers) != numbers[0][1]:
        lacks = f"shard {missing[0]} is missing" if missing else "shards of several series lie together"
        msg = f"{shards[0].parent}: {lacks} ({', '.join(p.name for p in shards[:4])}). Fetch the data set again."
        raise DataError(msg)


def _decode(shards: Sequence[Path], shape: tuple[int, ...]) -> TensorSet:
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    labels: list[int] = []
    for shard in shards:
        for row, (encoded, label) in enumerate(_rows(shard)):
            pixels.append(_picture(encoded, shape, f"{shard} row {row}"))
            labels.append(label)
    if not pixels:
        msg = f"{shards[0].parent}: {', '.join(p.name for p in shards)} hold no rows. Fetch the data set again."
        raise DataError(msg)
    return TensorSet(torch.from_numpy(np.stack(pixels)), torch.tensor(labels))


def _rows(shard: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (encoded picture, label) of one file."""
    pyarrow: Any = require("pyarrow", "data")
    parquet: Any = require("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(shard) as file:
            names = file.schema_arrow.names
            column = next((c for c in COLUMNS if c in names), None)
            if column is None or "label" not in names:
                msg = f"{shard} has the columns {', '.join(names)}; need label and one of {', '.join(COLUMNS)}"
                raise DataError(msg)
            for batch in file.iter_batches(4096, columns=[column, "label"]):
                for picture, label in zip(*(c.to_pylist() for c in batch.select([column, "label"])), strict=True):
                    encoded = picture.get("bytes") if isinstance(picture, dict) else picture
                    if not isinstance(encoded, bytes) or not isinstance(label, int):
                        msg = f"{shard} has a row without the bytes of a picture or without a whole-number label"
                        raise DataError(msg)
                    yield encoded, label
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        msg = f"{shard} is not a readable Parquet file ({reason}). Fetch it again."
        raise DataError(msg) from error


def _picture(encoded: bytes, shape: tuple[int, ...], where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the pixels of one encoded picture as (channels, height, width)."""
    image: Any = require("PIL.Image", "data")
    try:
        with image.open(io.BytesIO(encoded)) as opened:
            pixels = np.asarray(opened.convert("RGB" if shape[0] == 3 else "L"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        msg = f"{where} is not a readable picture ({error})"
        raise DataError(msg) from error
    if pixels.shape[:2] != shape[1:]:
        size = f"{pixels.shape[1]}×{pixels.shape[0]}"
        msg = f"{where} is {size} pixels; need {shape[2]}×{shape[1]}: is it another data set?"
        raise DataError(msg)
    return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]


def _stored(name: str, sources: Sequence[Path]) -> TensorSet | None:
    """Return what was decoded from these source files before; None if nothing was, or the file is damaged."""
    path = _place(name, sources)
    try:
        if not path.is_file():
            return None
        tensors, header = read_tensors(path)
        check_digest(path, tensors, header, ())
        return TensorSet(tensors["images"], tensors["labels"])
    except (CheckpointError, KeyError, DataError) as error:
        logger.warning("decoded pictures in %s are unreadable (%s): decoding again", path, error)
        return None


def _store(name: str, sources: Sequence[Path], decoded: TensorSet) -> TensorSet:
    """Store ``decoded`` for these source files and return it; a folder that is not writable is no error."""
    path = _place(name, sources)
    try:
        with atomic_write(path) as partial:
            write_tensors(partial, {"images": decoded.inputs, "labels": decoded.labels}, {}, ())
    except OSError as error:
        logger.warning("cannot keep decoded pictures in %s (%s): the next run decodes again", path.parent, error)
    return decoded


def _place(name: str, sources: Sequence[Path]) -> Path:
    """Return the file of decoded pictures, named by a digest of the contents of the sources."""
    digest = hashlib.sha256(str(_LAYOUT).encode())
    for source in sources:
        try:
            with source.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            msg = f"cannot read {source} ({error.strerror})"
            raise DataError(msg) from error
    return Path.home() / ".cache" / "tenfold" / "decoded" / f"{name}-{digest.hexdigest()[:16]}.safetensors"
