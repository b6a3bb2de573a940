"""tenfold stages: from end to end, killed and given again, and what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tenfold.iterative import Schedule
from tenfold.records import Recipe, RunRecord

Run = Callable[..., Any]
RULE = ("--path", "rule", "--rule", "ratio", "--set", "share=0.7", "--formats", "low_rank", "--no-keep-ends")
QUICK = (*RULE, "--rounds", "2", "--epochs", "2", "--threads", "1", "--train-as", "factors")


def test_stages_from_end_to_end(tenfold: Run, tiny: str) -> None:
    budget = ("--budget", "macs=0.5", "--rounds", "2", "--final-epochs", "1", "--epochs", "1")
    found = tenfold("stages", "--task", tiny, *budget, "--json", "--out", "out").json
    assert found.pop("out") == "out"
    record = RunRecord.model_validate(found)
    assert [stage.final for stage in record.stages] == [False, False, True]
    assert record.stages[0].after.macs <= 0.5**0.5 * record.before.macs
    assert record.after.macs <= 0.5 * record.before.macs
    assert [epoch["stage"] for epoch in record.tuning] == [1, 2, 3]
    assert record.after.score == record.scores["tuned"]
    assert record.settings["schedule"]["rounds"] == 2
    assert {p.name for p in Path().iterdir()} == {"out", "out.stages"}
    names = {"stage-0001", "stage-0002", "stage-0003", "latest", "record.json", "run.json"}
    assert {p.name for p in Path("out.stages").iterdir()} == names
    for path in ("out", "out.stages/stage-0003"):
        assert tenfold("eval", "--task", tiny, "--checkpoint", path, "--json").json["score"] == record.after.score
    shown = tenfold("stages", "--task", tiny, *budget, "--out", "out")  # which is finished
    assert "training only" in shown.out
    assert "going on after stage 3" in shown.err


def test_killed_and_given_again(tenfold: Run, tiny: str) -> None:
    task = f"{tiny}:killed"
    args = ("stages", "--task", task, *QUICK, "--quiet")
    assert tenfold(*args, "--out", "whole").code == 0
    Path("armed").touch()
    done = subprocess.run([sys.executable, "-m", "tenfold", *args, "--out", "out"], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not Path("out").exists()
    Path("armed").unlink()
    assert tenfold(*args, "--out", "out").code == 0
    files = [Path(path, "model.safetensors") for path in ("whole", "out")]
    whole, resumed = map(load_file, files)
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])] == []
    assert files[0].read_bytes() == files[1].read_bytes()


def test_interrupted_says_how_to_go_on(tenfold: Run, tiny: str) -> None:
    Path("armed").touch()
    outcome = tenfold("stages", "--task", f"{tiny}:interrupted", *QUICK, "--out", "out")
    assert outcome.is_error("the same command goes on where it was", "out.stages", code=130)


def test_a_schedule_from_a_file(tenfold: Run, tiny: str) -> None:
    schedule = Schedule(rounds=2, path="rule", epochs=1)
    Path("stages.yaml").write_text(schedule.to_yaml())
    recipe = Recipe(rule={"name": "ratio", "share": 0.5}, keep_ends=False)
    recipe.save("recipe.yaml")
    files = ("--recipe", "recipe.yaml", "--schedule", "stages.yaml")
    found = tenfold("stages", "--task", tiny, *files, "--rounds", "1", "--json", "--out", "out").json
    assert Schedule.of(found["settings"]["schedule"]) == schedule.replace(rounds=1)
    assert Recipe.of(found["plan"]["recipe"]) == recipe
    assert len(found["stages"]) == 1


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (("--budget", "macs=0.001"), ("the target of the schedule is out of reach",), 1),
        (("--budget", "latency=3.5"), ("--budget", "latency=3.5", "max_latency_ms"), 1),
        (("--schedule", "nosuch.yaml"), ("--schedule nosuch.yaml", "No such file"), 1),
        (("--plan", "plan.yaml"), ("--plan",), 2),
        (("--path", "steep"), ("steep",), 2),
    ],
)
def test_errors(tenfold: Run, tiny: str, args: tuple[str, ...], words: tuple[str, ...], code: int) -> None:
    assert tenfold("stages", "--task", tiny, *args, "--out", "out").is_error(*words, code=code)


def test_a_folder_of_another_run(tenfold: Run, tiny: str) -> None:
    args = ("stages", "--task", tiny, *RULE, "--rounds", "1", "--out", "out", "--quiet")
    assert tenfold(*args, "--epochs", "1").code == 0
    assert tenfold(*args, "--epochs", "2").is_error("holds another run", "epochs is 1 there and 2 here")
    assert tenfold(*args, "--epochs", "2", "--run", "another").code == 0


def test_a_schedule_that_is_none(tenfold: Run, tiny: str) -> None:
    Path("plan.yaml").write_text("rounds: many\n")
    assert tenfold("stages", "--task", tiny, "--schedule", "plan.yaml").is_error("plan.yaml", "rounds")


def test_folded_in_the_end(tenfold: Run, tiny: str) -> None:
    args = (*RULE, "--rounds", "1", "--epochs", "1", "--fuse-batchnorm", "--algorithms", "low_rank=svd", "--json")
    record = RunRecord.model_validate(
        {
            name: value
            for name, value in tenfold("stages", "--task", tiny, *args, "--out", "out").json.items()
            if name != "out"
        }
    )
    score = tenfold("eval", "--task", tiny, "--checkpoint", "out", "--json").json
    assert record.plan.fused
    assert record.after.params < record.stages[-1].after.params
    assert score["score"] == pytest.approx(record.after.score, abs=0.02)


def test_help(tenfold: Run) -> None:
    outcome = tenfold("stages", "--help")
    assert outcome.code == 0
    assert "--layers-per-stage" in outcome.out
