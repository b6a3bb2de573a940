"""Omniglot from archives that look like its own."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.errors import DataError
from tenfold.tasks import load_task
from tenfold.tasks.omniglot import Omniglot
from tenfold.tasks.omniglot_files import BACKGROUND, RUNS

ALPHABETS = ("Early_Aramaic", "Greek", "Tagalog")


def picture(seed: int) -> bytes:
    """Return black strokes on white, 105×105, different for every seed."""
    pixels = np.full((105, 105), 255, dtype=np.uint8)
    pixels[seed % 7 * 15 : seed % 7 * 15 + 12, seed // 7 % 7 * 15 : seed // 7 % 7 * 15 + 12] = 0
    out = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Two background archives that share an alphabet, and runs whose tests show the exemplars in another order."""
    (tmp_path / "omniglot").mkdir()
    parts = (("Early_Aramaic", "Greek"), ("Greek", "Tagalog"))
    for name, alphabets in zip(BACKGROUND, parts, strict=True):
        with zipfile.ZipFile(tmp_path / "omniglot" / name, "w") as archive:
            for a in alphabets:
                for c in range(1, 12):
                    for k in range(1, 21):
                        seed = c + 11 * ALPHABETS.index(a)
                        archive.writestr(f"{name[:-4]}/{a}/character{c:02}/{c:04}_{k:02}.png", picture(seed))
    with zipfile.ZipFile(tmp_path / "omniglot" / RUNS, "w") as archive:
        for run in range(1, 21):
            lines = []
            for k in range(1, 21):
                shown = (k + run) % 20 + 1
                archive.writestr(f"run{run:02}/training/class{k:02}.png", picture(k))
                archive.writestr(f"run{run:02}/test/item{k:02}.png", picture(shown))
                lines.append(f"run{run:02}/test/item{k:02}.png run{run:02}/training/class{shown:02}.png")
            archive.writestr(f"run{run:02}/class_labels.txt", "\n".join(lines) + "\n")
    return tmp_path


class Nearest(torch.nn.Module):
    """Scores pictures by how near they are to their exemplars, pixel by pixel."""

    def forward(self, exemplars: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        return -(pictures - exemplars[:, None]).square().flatten(2).sum(2)


def test_the_runs_are_scored_among_twenty(archives: Path) -> None:
    task = load_task("omniglot", data=archives)
    assert task.evaluate(Nearest()) == 1.0
    assert task.evaluate(Nearest(), split="validation") == 1.0

    class Farthest(Nearest):
        def forward(self, exemplars: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
            return -super().forward(exemplars, pictures)

    assert task.evaluate(Farthest()) < 0.2


def test_pairs_are_what_they_say_and_are_seeded(archives: Path) -> None:
    task = Omniglot(data=archives)
    assert set(task.alphabets) == {"Early_Aramaic", "Greek", "Tagalog"}
    assert task.alphabets["Greek"].shape == (11, 20, 28, 28)
    batches = task.train_batches(0, batch_size=16, seed=0)
    ((exemplars, pictures), same), *_ = batches
    assert exemplars.shape == (16, 1, 28, 28)
    assert pictures.shape == (16, 4, 1, 28, 28)
    assert same.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 16
    ((again, _), _), *_ = batches
    assert torch.equal(again, exemplars)
    ((other, _), _), *_ = task.train_batches(1, batch_size=16, seed=0)
    assert not torch.equal(other, exemplars)
    near = -(pictures - exemplars[:, None]).square().flatten(2).sum(2)
    assert (near.argmax(1) == 0).float().mean() > 0.6  # distorted, but the same character


def test_missing_archives_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"github\.com/brendenlake/omniglot"):
        load_task("omniglot", data=tmp_path).evaluate(Nearest())
