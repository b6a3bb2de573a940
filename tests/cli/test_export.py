"""`tenfold export`: the file, what is said of it, and the record of the checkpoint."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch

from tenfold.checkpoint import load, read_record
from tenfold.cli import main
from tenfold.exporting import open_exported
from tenfold.profiling import Comparison
from tenfold.records import Latency, Speedup
from tenfold.tasks import load_task
from tests.cli.conftest import TINY

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the tiny network at 0.6 of its MACs, made once."""
    folder = tmp_path_factory.mktemp("made") / "small"
    arguments = ("compress", "--task", TINY, "--budget", "macs=0.6", "--no-tune", "--quiet", "--out", str(folder))
    assert main(list(arguments)) == 0
    return folder


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint, to write to."""
    return shutil.copytree(made, tmp_path / "small")


def test_a_checkpoint_becomes_a_file_that_computes_the_same(tenfold, tiny: str, small: Path) -> None:
    done = tenfold("export", "--task", tiny, "--checkpoint", small, "--out", "a.onnx", "--seconds", "0.05", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["target"] == "onnx"
    assert found["fused"] == 1
    assert found["bytes"] == Path("a.onnx").stat().st_size
    assert max(found["parity"].values()) < found["tolerance"]
    assert found["latency"]["median_ms"] > 0
    record = read_record(small)
    assert record is not None
    assert [made.model_dump(mode="json") for made in record.exports] == [found]
    model, _ = load(load_task(tiny).build(), small)
    x = torch.randn(7, 8)
    torch.testing.assert_close(open_exported("a.onnx")(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_integers_are_calibrated_on_the_task_and_take_the_place_of_the_file(tenfold, tiny: str, small: Path) -> None:
    arguments = ("export", "--task", tiny, "--checkpoint", small, "--out", "a.onnx", "--seconds", "0")
    assert tenfold(*arguments).code == 0
    assert tenfold(*arguments).is_error("a.onnx exists", "--overwrite")
    done = tenfold(*arguments, "--int8", "--calibration-samples", "96", "--overwrite", "--json")
    assert done.code == 0, done.err
    int8 = done.json["int8"]
    assert int8["samples"] == 96
    assert int8["noise"] < 0.1
    assert int8["agreement"] > 0.9
    assert sum(int8["operators"].values()) >= 3
    record = read_record(small)
    assert record is not None
    assert len(record.exports) == 1  # of one name there is one file
    assert record.exports[0].int8 is not None


def test_what_does_not_go_together_is_refused(tenfold, tiny: str) -> None:
    arguments = ("export", "--task", tiny, "--out", "a.onnx")
    assert tenfold(*arguments, "--to", "onx").is_error("unknown export target", "onnx")
    assert tenfold(*arguments, "--to", "torch-export", "--int8").is_error("--int8", "onnx", code=2)
    assert tenfold(*arguments, "--calibration-samples", "9").is_error("--calibration-samples", "--int8", code=2)
    assert not Path("a.onnx").exists()


def test_no_factor_is_printed_where_none_can_be_claimed(
    tenfold, tiny: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(variants, *, seconds: float) -> Comparison:
        busy = "4 other processes were busy"
        time = {"low_ms": 1, "high_ms": 3, "runs": 5, "threads": 2, "device": "cpu", "dtype": "float32", "load": busy}
        wide = Speedup(ratio=120, low=77.6, high=900, rounds=5, doubt=busy)
        return Comparison({n: Latency(median_ms=2, **time) for n in variants}, dict.fromkeys(variants, wide))

    module = importlib.import_module("tenfold.exporting.export")  # the function has the name of its module
    monkeypatch.setattr(module, "compare_latency", compare)
    done = tenfold("export", "--task", tiny, "--checkpoint", small, "--out", "a.onnx", "--seconds", "0.05")
    assert "latency: 2.00 ms, against the model in torch not measured: 4 other processes were busy" in done.out
    assert "120" not in done.out
