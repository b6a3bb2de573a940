"""Models by name, without data and score."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold.checkpoint import load_pretrained
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


class Evil:
    def __reduce__(self) -> object:
        return os.mkdir, ("hacked",)


def test_cached_weights_of_torchvision_are_checked_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder, weights = tmp_path / "checkpoints", models.ResNet18_Weights.DEFAULT
    folder.mkdir()
    file, task = folder / weights.url.rpartition("/")[2], load_task("torchvision:resnet18")
    torch.save({"a": Evil()}, file)
    with pytest.raises(CheckpointError, match="another hash than its name says: delete it"):
        task.dense()
    trained = models.resnet18().state_dict()
    torch.save(trained, file)
    named = file.rename(folder / f"resnet18-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")
    monkeypatch.setattr(type(weights), "url", property(lambda _: f"https://nowhere.invalid/{named.name}"))
    found = task.dense().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    torch.save({"a": Evil()}, file)
    evil = file.rename(folder / f"resnet18-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")
    monkeypatch.setattr(type(weights), "url", property(lambda _: f"https://nowhere.invalid/{evil.name}"))
    with pytest.raises(CheckpointError, match=r"holds objects of posix\.mkdir"):
        task.dense()
    assert not (tmp_path / "hacked").exists()
    assert "get_state_dict" not in vars(weights)


def test_code_in_a_folder_of_transformers_is_refused_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    config = {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("import os\nos.mkdir('hacked')\n")
    for work in (lambda: load_task(f"hf:{tmp_path}").build(), lambda: load_pretrained(tmp_path)):
        with pytest.raises(
            CheckpointError, match="brings Python code of its own, and tenfold never runs that"
        ) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"architectures": 5}', "\x00", '{"model_type": "bert", "hidden_size": "x"}', "{}"]
)
def test_an_odd_config_is_one_line(text: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be|names no class") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
