"""The commands that measure what layers minds, draw it, and plan by it."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenfold.records import Plan, SensitivityTable, TradeOff
from tenfold.tasks import Task

Run = Callable[..., Any]
SMALL = ("--calibration-samples", "40", "--formats", "low_rank")


def test_errors_are_measured_shown_and_kept(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("sensitivity", "--task", tiny, *SMALL)
    assert outcome.code == 0
    table = SensitivityTable.load("sensitivity-tiny-plain.json")
    assert table.key.samples == 40
    assert table.baseline is None
    assert {layer.path for layer in table.compressible} == {"0", "3", "5"}
    assert "Not compressible" in outcome.out
    nearest = min(table.layer("3").points, key=lambda p: abs(p.cost.macs / (24 * 24) - 0.5))
    assert f"{nearest.output_error:.3f}" in outcome.out


def test_a_second_run_measures_nothing(tenfold: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("sensitivity", "--task", tiny, *SMALL, "--samples", "20", "--out", "t.json", "--json")
    first = tenfold(*args).json
    assert first["baseline"] is not None
    assert all(p["score"] is not None for layer in first["layers"] for p in layer["points"])
    monkeypatch.setattr(Task, "evaluate", lambda *a, **k: pytest.fail("measured twice"))
    assert tenfold(*args).json == first


def test_scores_are_added_to_errors_and_other_conditions_refused(tenfold: Run, tiny: str) -> None:
    args = ("sensitivity", "--task", tiny, *SMALL, "--out", "t.json", "--ranks", "2")
    assert tenfold(*args).code == 0
    assert tenfold(*args, "--samples", "20").code == 0
    assert tenfold(*args, "--samples", "10").is_error("other conditions", "about")
    assert tenfold(*args, "--seed", "5").is_error("other conditions", "seed")


def test_an_interrupt_keeps_what_was_measured(tenfold: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("sensitivity", "--task", tiny, *SMALL, "--samples", "20", "--out", "t.json", "--ranks", "3")
    calls: list[float] = []
    evaluate = Task.evaluate

    def stop(*a: Any, **k: Any) -> float:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(evaluate(*a, **k))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Task, "evaluate", stop)
        outcome = tenfold(*args)
    assert outcome.is_error("the same command goes on with what is in t.json", code=130)
    kept = SensitivityTable.load("t.json")
    assert sum(p.score is not None for layer in kept.layers for p in layer.points) == 2
    assert tenfold(*args).code == 0
    whole = SensitivityTable.load("t.json")
    assert all(p.score is not None for layer in whole.layers for p in layer.points)


def test_the_curves_are_drawn(tenfold: Run, tiny: str) -> None:
    pytest.importorskip("matplotlib")
    outcome = tenfold("sensitivity", "--task", tiny, *SMALL, "--plot", "curves.png")
    assert "curves.png" in outcome.out
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    with Path("curves.csv").open(encoding="utf-8") as file:
        assert {row["path"] for row in csv.DictReader(file)} >= {"0", "3", "5"}


def test_plan_by_accuracy_drop_fills_the_table(tenfold: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("plan", "--task", tiny, "--formats", "low_rank", "--rule", "accuracy_drop", "--set", "drop=0.2")
    args = (*args, "--table", "t.json", "--samples", "20", "--no-keep-ends")
    assert tenfold(*args, "--out", "plan.yaml").code == 0
    made, table = Plan.load("plan.yaml"), SensitivityTable.load("t.json")
    assert made.recipe.rule == {"name": "accuracy_drop", "drop": 0.2}
    assert made.factorized
    for layer in made.factorized:
        (point,) = [p for p in table.layer(layer.path).points if p.rank == layer.rank]
        assert (point.score or 0) >= (table.baseline or 0) - 0.2 - 1e-9
    monkeypatch.setattr(Task, "evaluate", lambda *a, **k: pytest.fail("measured twice"))
    assert tenfold(*args, "--out", "again.yaml").code == 0
    assert Plan.load("again.yaml") == made
    assert tenfold(*args, "--samples", "0").code == 0  # the table says on how many samples


def test_plan_without_scores_says_what_is_missing(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("plan", "--task", tiny, "--rule", "accuracy_drop", "--set", "drop=0.1", "--samples", "0")
    assert outcome.is_error("needs scores of the model")


def test_plan_draws_other_budgets(tenfold: Run, tiny: str) -> None:
    pytest.importorskip("matplotlib")
    args = ("plan", "--task", tiny, "--formats", "low_rank", "--budget", "macs=0.6", "--plot", "budgets.png")
    outcome = tenfold(*args, "--out", "plan.yaml")
    assert outcome.code == 0
    assert "tenfold: drawn in budgets.png, budgets.csv, budgets.json\n" in outcome.err
    assert Path("budgets.png").read_bytes().startswith(b"\x89PNG")
    curve = TradeOff.from_text(Path("budgets.json").read_text(encoding="utf-8"))
    assert curve.budget == "macs"
    with Path("budgets.csv").open(encoding="utf-8") as file:
        (chosen,) = [row for row in csv.DictReader(file) if row["chosen"] == "1"]
    assert abs(int(chosen["macs"]) - Plan.load("plan.yaml").after.macs) <= 24 * 24
    assert tenfold("plan", "--task", tiny, "--plan", "plan.yaml", "--plot", "x.png").is_error("leave one out", code=2)


def test_fitted_ranks_show_their_progress_and_go_on_from_their_table(
    tenfold: Run, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("plan", "--task", tiny, "--rule", "error", "--set", "rel_error=0.9", "--formats", "tt_matrix")
    args = (*args, "--table", "fits.json", "--json", "--calibration-samples", "0", "--verbose")
    first = tenfold(*args)
    assert first.code == 0
    seen = [(int(done), int(total)) for done, total in re.findall(r"weigh options: (\d+) of (\d+)", first.err)]
    assert seen[-1][0] == seen[-1][1] == len(seen) > 1
    assert Path("fits.json").is_file()
    monkeypatch.setattr("tenfold.planning.error_search.decompose", lambda *a, **k: pytest.fail("fitted twice"))
    assert tenfold(*args).json["plan"] == first.json["plan"]
