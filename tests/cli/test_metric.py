"""A task whose score is no fraction says so, and the commands show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenfold.checkpoint import read_record
from tenfold.records import Metric, RunRecord, SensitivityTable

Run = Callable[..., Any]
METRIC = Metric(name="perplexity", better="lower")
EPOCH = ("--epochs", "1")
FAST = ("--no-latency", "--budget", "macs=0.6", *EPOCH)


@pytest.fixture
def task(tiny: str) -> str:
    return f"{tiny}Loss"


def test_a_perplexity_is_shown_as_such_from_end_to_end(tenfold: Run, task: str) -> None:
    shown = tenfold("eval", "--task", task).out
    assert "test set: perplexity " in shown
    assert "%" not in shown
    found = tenfold("eval", "--task", task, "--json").json
    assert found["metric"] == METRIC.model_dump()
    assert found["score"] > 1
    made = tenfold("compress", "--task", task, *FAST, "-o", "out").out
    assert "perplexity, tuned" in made
    record = read_record(Path("out"))
    assert record is not None
    assert record.metric == METRIC
    assert record.scores["original"] == found["score"]
    assert "| perplexity (lower is better) |" in Path("out/README.md").read_text(encoding="utf-8")
    assert tenfold("tune", "--task", task, "--checkpoint", "out", "--out", "more", "--epochs", "1").code == 0
    assert read_record(Path("more")).metric == METRIC  # type: ignore[union-attr]
    compared = tenfold("compare", "out", "more")
    assert "perplexity" in compared.out
    assert tenfold("compare", "out", "--json").json[0]["metric"] == METRIC.model_dump()
    assert tenfold("report", "out").code == 0


def test_stages_and_sensitivities_know_the_metric(tenfold: Run, task: str) -> None:
    made = tenfold("stages", "--task", task, "--budget", "macs=0.6", "--rounds", "1", *EPOCH, "--json", "-o", "s")
    found = made.json
    assert found.pop("out")
    assert RunRecord.model_validate(found).metric == METRIC
    args = ("--task", task, "--formats", "low_rank")
    assert (
        "perplexity of the model"
        in tenfold("sensitivity", *args, "--ranks", "2", "--samples", "20", "--out", "t.json").out
    )
    assert SensitivityTable.load("t.json").metric == METRIC
    plan = tenfold("plan", *args, "--table", "t.json", "--rule", "accuracy_drop", "--set", "drop=1.5", "--json").json
    assert any("costs the score at most 1.5 alone" in layer["reason"] for layer in plan["plan"]["layers"])


def test_a_percentage_that_does_not_say_so_is_refused(tenfold: Run, tiny: str) -> None:
    for command in (("eval",), ("compress", *FAST)):
        outcome = tenfold(*command, "--task", f"{tiny}Percent")
        assert outcome.is_error("a score is a fraction from 0 to 1", "metric=tenfold.Metric")
        assert "calibrate" not in outcome.err
        assert "plan ..." not in outcome.err
