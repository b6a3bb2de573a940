"""Omniglot's own archives, read without unpacking: background alphabets, and the twenty one-shot runs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.errors import DataError, require
from tenfold.tasks.parquet import DATA_VARIABLE, data_root

BACKGROUND = ("images_background_small1.zip", "images_background_small2.zip")
RUNS = "all_runs.zip"
SIDE = 28


def background(data: Path | None) -> dict[str, Tensor]:
    """Return the drawings of each alphabet, uint8 (characters, 20, 28, 28), ink being 255; by name, in order.

    Raises:
        DataError: archives that are missing or damaged.
    """
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in BACKGROUND:
        with _opened(data, name) as archive:
            for file in sorted(archive.namelist()):
                parts = file.split("/")
                if len(parts) == 4 and file.endswith(".png"):
                    found.setdefault((parts[1], parts[2]), {})[parts[3]] = drawing(archive.read(file), file)
    alphabets: dict[str, list[Tensor]] = {}
    for (alphabet, _), drawings in sorted(found.items()):
        alphabets.setdefault(alphabet, []).append(torch.stack([drawings[key] for key in sorted(drawings)]))
    return {name: torch.stack(characters) for name, characters in alphabets.items()}


def one_shot_runs(data: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return exemplars and tests of the runs, uint8 (20, 20, 28, 28) each, and which exemplar each test shows (20, 20).

    Raises:
        DataError: an archive that is missing or damaged.
    """
    exemplars, tests, answers = [], [], []
    with _opened(data, RUNS) as archive:
        for run in range(1, 21):
            rows = sorted(line.split() for line in archive.read(f"run{run:02}/class_labels.txt").decode().splitlines())
            shown = [f"run{run:02}/training/class{k:02}.png" for k in range(1, 21)]
            exemplars.append(torch.stack([drawing(archive.read(file), file) for file in shown]))
            tests.append(torch.stack([drawing(archive.read(test), test) for test, _ in rows]))
            answers.append(torch.tensor([shown.index(answer) for _, answer in rows]))
    return torch.stack(exemplars), torch.stack(tests), torch.stack(answers)


def drawing(encoded: bytes, where: str) -> Tensor:
    """Return a drawing (28, 28) as uint8, ink being 255, by means over areas; raises DataError if it is none."""
    image: Any = require("PIL.Image", "data")
    try:
        pixels = np.asarray(image.open(io.BytesIO(encoded)).convert("L"), dtype=np.float32)
    except Exception as error:
        msg = f"{where} is no readable picture ({error})"
        raise DataError(msg) from error
    ink = torch.from_numpy(255 - pixels)[None, None]
    return F.interpolate(ink, (SIDE, SIDE), mode="area")[0, 0].round().byte()


def _opened(data: Path | None, name: str) -> zipfile.ZipFile:
    root = data_root(data)
    for folder in (root / "omniglot", root):
        if (folder / name).is_file():
            try:
                return zipfile.ZipFile(folder / name)
            except (OSError, zipfile.BadZipFile) as error:
                msg = f"{folder / name} is damaged: {error}"
                raise DataError(msg) from error
    msg = (
        f"no omniglot data: {root} has no omniglot/{name}. Get {', '.join((*BACKGROUND, RUNS))} from "
        f"github.com/brendenlake/omniglot and pass their folder as data=FOLDER (--data FOLDER) or in ${DATA_VARIABLE}."
    )
    raise DataError(msg)
