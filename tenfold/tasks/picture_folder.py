"""Pictures of a folder in batches: resized, center-cropped and normalised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.errors import DataError, require
from tenfold.tasks.base import seeded

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Look:
    """Size (height, width) in pixels, and mean and standard deviation of the channels in 0..1."""

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class PictureFolder:
    """The pictures at ``paths`` in batches (samples, channels, height, width), read on iteration."""

    paths: tuple[Path, ...]
    look: Look
    batch_size: int

    @classmethod
    def chosen(cls, folder: Path, look: Look, samples: int | None, *, batch_size: int, seed: int) -> PictureFolder:
        """Return at most ``samples`` pictures, sampled by ``seed`` from a folder and its subfolders.

        Raises:
            DataError: there is no such folder, or no picture in it.
        """
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not found:
            what = "has no pictures" if folder.is_dir() else "is not a folder"
            msg = f"{folder} {what}: --data wants a folder of pictures ({', '.join(SUFFIXES)})"
            raise DataError(msg)
        order = torch.randperm(len(found), generator=seeded(seed)).tolist()
        return cls(tuple(found[i] for i in order[:samples]), look, batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.paths) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.paths), self.batch_size):
            yield torch.stack([read_picture(p, self.look) for p in self.paths[start : start + self.batch_size]])


def read_picture(path: Path, look: Look) -> Tensor:
    """Return a picture (channels, height, width), resized, center-cropped and normalised.

    Raises:
        DataError: the file cannot be read as a picture.
    """
    pil: Any = require("PIL.Image", "data")
    ops: Any = require("PIL.ImageOps", "data")
    height, width = look.size
    try:
        with pil.open(path) as opened:
            picture = ops.fit(opened.convert("RGB" if len(look.mean) == 3 else "L"), (width, height), pil.BICUBIC)
    except OSError as error:
        msg = f"{path} cannot be read as a picture: {error}"
        raise DataError(msg) from error
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32)).div(255)
    values = values.view(height, width, -1).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (look.mean, look.std))
    return values.sub(mean).div(std).contiguous()
