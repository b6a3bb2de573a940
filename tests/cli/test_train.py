"""tenfold train: the dense model is drawn to low rank, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tenfold.checkpoint import load
from tenfold.tasks import load_task
from tenfold.training import TuneConfig, finetune

Run = Callable[..., Any]


@pytest.fixture
def dense(tiny: str, tmp_path: Path) -> Path:
    """Return a file with weights of the tiny network after some training."""
    task = load_task(tiny)
    model = task.build()
    finetune(model, lambda epoch: task.train_batches(epoch, batch_size=40, seed=0), TuneConfig(epochs=5, lr=0.1))
    path = tmp_path / "dense.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_train_towards_a_plan(tenfold: Run, tiny: str, dense: Path) -> None:
    args = ("train", "--task", tiny, "--weights", dense, "--budget", "macs=0.6", "--epochs", "6", "--lr", "0.1")
    found = tenfold(*args, "--final-epochs", "1", "--out", "small", "--json").json
    assert found["after"]["macs"] <= 0.6 * found["before"]["macs"]
    assert set(found["scores"]) == {"original", "trained", "tuned"}
    assert found["settings"]["method"] == "admm"
    told = found["settings"]["towards"]
    assert len(told["residual_mean"]) == len(told["projected_score"]) == 6
    assert told["residual_mean"][-1] < told["residual_mean"][0]
    assert len(found["tuning"]) == 1
    task = load_task(tiny)
    small, plan = load(task.build(), Path("small"))
    assert task.evaluate(small) == found["after"]["score"]
    assert plan.factorized
    assert not Path(".small.tuning").exists()


def test_learned_ranks(tenfold: Run, tiny: str, dense: Path) -> None:
    args = ("train", "--task", tiny, "--weights", dense, "--method", "lc", "--epochs", "3", "--json")
    found = tenfold(*args, "--budget", "macs=0.6", "--out", "small").json
    assert found["after"]["macs"] <= 0.6 * found["before"]["macs"]
    assert found["plan"]["recipe"]["rule"]["name"] == "lc"
    assert {layer["format"] for layer in found["plan"]["layers"] if layer["action"] == "factorize"} == {"low_rank"}
    priced = tenfold(*args, "--cost-weight", "1e6", "--out", "least").json
    assert priced["after"]["macs"] < found["after"]["macs"]


def test_killed_run_ends_the_same(tenfold: Run, tiny: str, dense: Path) -> None:
    args = ("train", "--task", f"{tiny}:interrupted", "--weights", dense, "--budget", "macs=0.6", "--epochs", "3")
    whole = tenfold(*args, "--out", "whole", "--json").json
    Path("armed").touch()
    assert tenfold(*args, "--out", "small", "--json").code != 0
    assert list(Path(".small.tuning").rglob("*.safetensors"))
    Path("armed").unlink()
    found = tenfold(*args, "--out", "small", "--json").json
    assert found["scores"] == whole["scores"]
    assert found["settings"]["towards"]["residual_mean"] == whole["settings"]["towards"]["residual_mean"]
    assert Path("small/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_misuse(tenfold: Run, tiny: str, dense: Path) -> None:
    args = ("train", "--task", tiny, "--weights", dense)
    assert tenfold(*args, "--budget", "macs=0.5").is_error("--out FOLDER", code=2)
    assert tenfold(*args, "--method", "lc", "--rank", "0=2", "--out", "o").is_error("leave --rank out", code=2)
    assert tenfold(*args, "--cost-weight", "1", "--budget", "macs=0.5", "--out", "o").is_error("--method lc", code=2)
    assert tenfold(*args, "--method", "lc", "--out", "o").is_error("a budget of params or macs")


def test_plain_training_writes_weights_for_later(tenfold: Run, tiny: str) -> None:
    found = tenfold("train", "--task", tiny, "--method", "plain", "--epochs", "4", "--out", "own", "--json").json
    assert found["tuning"][-1]["loss"] < found["tuning"][0]["loss"]
    assert not Path(".own.tuning").exists()
    scored = tenfold("eval", "--task", tiny, "--weights", "own/model.safetensors", "--json").json
    assert found["score"] in scored.values() or found["score"] == scored.get("score")


def test_plain_training_that_was_cut_off_ends_the_same(tenfold: Run, tiny: str) -> None:
    args = ("train", "--task", f"{tiny}:interrupted", "--method", "plain", "--epochs", "3")
    whole = tenfold(*args, "--out", "whole", "--json").json
    Path("armed").touch()
    assert tenfold(*args, "--out", "cut").code != 0
    assert list(Path(".cut.tuning").rglob("*.safetensors"))
    Path("armed").unlink()
    cut = tenfold(*args, "--out", "cut", "--json").json
    assert cut["score"] == whole["score"]
    assert Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--weights", "x.safetensors"), "--weights"),
        (("--budget", "macs=0.5"), "--budget"),
        (("--rho", "0.2"), "--rho"),
        (("--distill", "0.5"), "--distill"),
    ],
)
def test_plain_training_refuses_what_it_does_not_use(tenfold: Run, tiny: str, more: Any, word: str) -> None:
    shown = tenfold("train", "--task", tiny, "--method", "plain", "--out", "own", *more)
    assert shown.is_error("--method plain", word, code=2)
