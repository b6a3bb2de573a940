"""Recurrent networks from the command line: planned by their matrices, and loaded without being told how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenfold.records import Plan, RunRecord

Run = Callable[..., Any]
QUICK = ("--budget", "params=0.5", "--keep", "head", "--no-keep-ends")


@pytest.fixture
def series() -> str:
    return f"{Path(__file__).parent / 'recurrent_task.py'}:Series"


def test_matrices_of_an_lstm_from_plan_to_score(tenfold: Run, series: str) -> None:
    assert tenfold("plan", "--task", series, *QUICK, "--calibration-samples", "0", "--out", "plan.yaml").code == 0
    plan = Plan.load("plan.yaml")
    assert plan.unrolled == {"rnn": "LSTM"}
    assert {layer.path for layer in plan.factorized} <= {"rnn.cells.0.ih", "rnn.cells.0.hh"}
    assert plan.factorized

    asked = ("compress", "--task", series, "--json", "--calibration-samples", "0")
    dry = tenfold(*asked, *QUICK, "--dry-run").json
    assert dry["plan"] == plan.model_dump(mode="json")
    replayed = tenfold(*asked, "--plan", "plan.yaml", "--dry-run").json
    assert replayed["plan"]["after"] == dry["plan"]["after"]

    record = RunRecord.model_validate(
        {k: v for k, v in tenfold(*asked, *QUICK, "-o", "out").json.items() if k != "out"}
    )
    assert record.plan.unrolled == plan.unrolled
    assert record.after.params == plan.after.params
    score = tenfold("eval", "--task", series, "--checkpoint", "out", "--json").json["score"]
    assert score == record.after.score


def test_an_lstm_that_is_kept_is_left_closed(tenfold: Run, series: str) -> None:
    asked = ("plan", "--task", series, "--budget", "params=0.99", "--rank", "head=1", "--json")
    plan = tenfold(*asked).json["plan"]
    assert plan["unrolled"] == {}
    assert [layer["path"] for layer in plan["layers"]] == ["rnn", "head"]
    assert plan["layers"][0]["reason"].startswith("left whole")
