"""--fold and --algorithm: what they do to the plan and the model, and what is said of wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tenfold.checkpoint import load
from tenfold.records import Plan, RunRecord
from tenfold.tasks import load_task

Run = Callable[..., Any]
HALF = ("--budget", "macs=0.5", "--no-keep-ends")


def test_a_folded_model_is_written_read_and_scored(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("compress", "--task", tiny, *HALF, "--fuse-batchnorm", "--epochs", "1", "--out", "out", "--json")
    record = RunRecord.model_validate({k: v for k, v in outcome.json.items() if k != "out"})
    assert record.plan.fused == {"1": "0"}
    model, plan = load(load_task(tiny).build(), Path("out"))
    assert plan.fused == record.plan.fused
    assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    assert record.after.params == sum(p.numel() for p in model.parameters())
    assert tenfold("eval", "--task", tiny, "--checkpoint", "out", "--json").json["score"] == pytest.approx(
        record.after.score
    )


def test_a_plan_says_what_to_fold_and_compress_does_it(tenfold: Run, tiny: str) -> None:
    assert tenfold("plan", "--task", tiny, *HALF, "--fuse-batchnorm", "--out", "plan.yaml").code == 0
    assert Plan.load("plan.yaml").fused == {"1": "0"}
    assert (
        tenfold("compress", "--task", tiny, "--plan", "plan.yaml", "--no-tune", "--no-latency", "--out", "a").code == 0
    )
    assert Plan.load("a/plan.yaml").fused == {"1": "0"}
    assert tenfold("plan", "--task", tiny, *HALF, "--out", "bare.yaml").code == 0
    bare = ("compress", "--task", tiny, "--plan", "bare.yaml", "--no-tune", "--no-latency", "--out")
    assert tenfold(*bare, "b").code == 0
    assert Plan.load("b/plan.yaml").fused == {}
    assert tenfold(*bare, "c", "--fuse-batchnorm").code == 0
    assert Plan.load("c/plan.yaml").fused == {"1": "0"}


def test_the_algorithm_that_is_asked_for_is_in_the_plan(tenfold: Run, tiny: str) -> None:
    arguments = ("plan", "--task", tiny, *HALF, "--calibration-samples", "0", "--out", "plan.yaml")
    assert tenfold(*arguments, "--algorithms", "low_rank=whitened_svd", "--seed", "3").code == 0
    found = [layer.algorithm for layer in Plan.load("plan.yaml").factorized]
    assert found
    assert {(a["name"], a["seed"]) for a in found if a is not None} == {("whitened_svd", 3)}
    assert tenfold(*arguments).code == 0
    assert all(layer.algorithm["name"] == "svd" for layer in Plan.load("plan.yaml").factorized if layer.algorithm)


@pytest.mark.parametrize(
    ("given", "words", "code"),
    [
        (["tucker2"], ["cannot read --algorithms", "FORMAT=NAME"], 2),
        (["tucker2=hooi", "tucker2=hosvd"], ["each format once"], 2),
        (["tuker2=hooi"], ["unknown format 'tuker2'", "tucker2"], 1),
        (["tucker2=hoi"], ["unknown decomposition 'hoi'", "hooi"], 1),
        (["low_rank=hooi"], ["hooi does not find low_rank factors", "svd or whitened_svd"], 2),
        (["low_rank=svd", "tucker2=hooi"], ["tucker2 is not among the formats", "--formats"], 2),
    ],
)
def test_what_is_said_of_a_wrong_algorithm(
    tenfold: Run, tiny: str, given: list[str], words: list[str], code: int
) -> None:
    options = [part for text in given for part in ("--algorithms", text)]
    formats = ["--formats", "low_rank"] if len(given) == 2 and given[0].startswith("low") else []
    assert tenfold("plan", "--task", tiny, *HALF, *formats, *options).is_error(*words, code=code)
    assert not list(Path().iterdir())


def test_a_plan_decides_on_algorithms_too(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("compress", "--task", tiny, "--plan", "plan.yaml", "--algorithms", "low_rank=svd")
    assert outcome.is_error("leave --algorithms out", code=2)
