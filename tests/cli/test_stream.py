"""stream, and what is done with the folder that it writes: eval, streamed or not, report and explore."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save_file

from tenfold.checkpoint import load_pretrained
from tests.language import folder, small_llama, text_folder

Run = Callable[..., Any]
ASKED = ("--budget", "params=0.8", "--calibration-samples", "24", "--tokens", "16", "--out", "small")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("lm") / "model", small_llama(hidden_size=48, intermediate_size=96))


@pytest.fixture
def model(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return text_folder(tmp_path / "texts")


def test_stream_then_eval_then_report_then_explore(
    model: Path, data: Path, tenfold: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    asked = ("stream", model, "--data", data, *ASKED, "--max-memory", "8GB")
    with monkeypatch.context() as patch:
        patch.setattr("tenfold.streaming.block_fits.Fitting.run", interrupt)
        assert tenfold(*asked).is_error("the same command goes on after the last complete block", code=130)
    assert Path(".small.streaming/run.txt").is_file()
    made = tenfold(*asked)
    assert made.code == 0, made.err
    assert "going on with the run in .small.streaming" in made.err
    assert "Agreement with the original" in made.out
    assert "Saved in small" in made.out
    assert "streaming takes up to" in made.err
    assert "of disk" in made.err
    assert not list(Path().glob(".small*"))
    whole = tenfold("eval", "--checkpoint", "small", "--data", data, "--json").json
    streamed = tenfold(
        "eval", "--checkpoint", "small", "--data", data, "--streamed", "--batch-size", "4", "--json"
    ).json
    assert streamed["score"] == pytest.approx(whole["score"], rel=1e-5)
    assert streamed["elsewhere"] == pytest.approx(whole["elsewhere"], rel=1e-5)
    assert {key: streamed[key] for key in ("params", "macs", "bytes", "task")} == {
        key: whole[key] for key in ("params", "macs", "bytes", "task")
    }
    dense = ("eval", "--task", f"lm:{model}@16", "--data", data, "--json")
    assert tenfold(*dense, "--streamed").json["score"] == pytest.approx(tenfold(*dense).json["score"], rel=1e-5)
    assert tenfold("report", "small").code == 0
    assert "params=0.8" in Path("small/report.html").read_text()
    monkeypatch.setattr("tenfold.explorer.server.serve", lambda _service, *, ready, **_: ready("http://here/"))
    assert tenfold("explore", "small", "--json").json["url"] == "http://here/"
    assert load_pretrained("small").config.hidden_size == 48


def test_weights_alone(model: Path, tenfold: Run) -> None:
    made = tenfold("stream", model, *ASKED[:2], "--calibration-method", "none", "--out", "small", "--json")
    assert made.code == 0, made.err
    assert made.json["agreement"] is None
    assert made.json["after"]["params"] <= 0.8 * made.json["before"]["params"]
    assert made.json["task"] == f"lm:{model}"
    assert tenfold("stream", model, *ASKED).is_error("small is there already")


def test_what_is_wrong_is_said_in_one_line_before_work(model: Path, data: Path, tenfold: Run) -> None:
    def refused(*words: str, more: tuple[str, ...] = (), code: int = 1) -> None:
        assert tenfold("stream", model, "--data", data, *ASKED, *more).is_error(*words, code=code)
        assert {path.name for path in Path().iterdir()} == {"model", "texts"}

    refused("the least that this takes is", more=("--max-memory", "1MiB"))
    refused("cannot read the size", more=("--max-memory", "plenty"))
    refused("needs the whole model at once", more=("--calibration-refine", "3"))
    refused("blocks.nothing", more=("--blocks", "blocks.nothing"))
    assert tenfold("stream", model, "--out", "small").is_error("budget")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    state = load(whole)
    weights.write_bytes(whole[: len(whole) // 2])
    refused("truncated, damaged")
    save_file({name: tensor for name, tensor in state.items() if "layers.1" not in name}, weights, {"format": "pt"})
    refused("does not hold 'model.layers.1")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    refused("lacks b.safetensors")
    shutil.rmtree(model)
    assert tenfold("stream", model, *ASKED).is_error("there is no folder")
    assert tenfold("eval", "--task", "digits", "--streamed").is_error("--streamed is for language models", code=2)
