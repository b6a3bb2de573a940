"""Models by name, without data and score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold.errors import CheckpointError, DataError, UnknownNameError
from tenfold.tasks import load_task
from tenfold.tasks.picture_folder import Look, PictureFolder, read_picture


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for i in range(5):
        pixels = np.full((8, 12, 3), 40 * i, dtype=np.uint8)
        image.fromarray(pixels).save(folder / ("inner" if i % 2 else ".") / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_are_normalised_and_cropped_to_the_middle(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = (51, 102, 153)  # the middle square
    image.fromarray(pixels).save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png", Look((4, 4), (0.2, 0.2, 0.2), (0.2, 0.1, 0.4)))
    assert torch.allclose(found, torch.tensor([0.0, 2.0, 1.0])[:, None, None].expand(3, 4, 4), atol=1e-6)


def test_a_folder_of_pictures_is_drawn_from_by_the_seed(pictures: Path) -> None:
    look = Look((4, 4))
    all_of_them = PictureFolder.chosen(pictures, look, None, batch_size=2, seed=0)
    assert [len(batch) for batch in all_of_them] == [2, 2, 1]
    assert len(all_of_them) == 3
    some = [PictureFolder.chosen(pictures, look, 3, batch_size=3, seed=s).paths for s in (1, 1, 2)]
    assert some[0] == some[1] != some[2]
    with pytest.raises(DataError, match="is not a folder"):
        PictureFolder.chosen(pictures / "none", look, None, batch_size=2, seed=0)


def test_a_model_of_torchvision_has_inputs_but_no_score(pictures: Path) -> None:
    pytest.importorskip("torchvision")
    task = load_task("torchvision:resnet18@32", data=pictures)
    assert task.id == "torchvision:resnet18@32"
    assert task.example_inputs(2).shape == (2, 3, 32, 32)
    assert task.calibration_size(0) == 5
    assert [b.shape for b in task.calibration_batches(4, batch_size=3, seed=0)] == [(3, 3, 32, 32), (1, 3, 32, 32)]
    assert not task.labelled
    with pytest.raises(DataError, match="without labels: it cannot be scored"):
        task.evaluate(task.build())
    with pytest.raises(DataError, match="trained on labels"):
        task.train_batches(0, batch_size=1, seed=0)
    with pytest.raises(DataError, match="give --data"):
        load_task("torchvision:resnet18").calibration_batches(1, batch_size=1, seed=0)


def test_names_that_a_library_does_not_have_get_near_ones() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(UnknownNameError, match="Did you mean resnet18"):
        load_task("torchvision:resnt18").build()
    with pytest.raises(UnknownNameError, match="no number of pixels"):
        _ = load_task("torchvision:resnet18@big").example_inputs()


def test_hf_names_need_a_model_and_say_in_one_line_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UnknownNameError, match="hf:FOLDER"):
        load_task("hf").build()
    with pytest.raises(CheckpointError, match="cannot be opened") as said:
        load_task(f"hf:{tmp_path}").build()
    assert "\n" not in str(said.value)
