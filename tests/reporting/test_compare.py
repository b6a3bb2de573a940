"""Comparisons: the right runs in one row, and the right numbers in it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from tenfold.records import Recipe
from tenfold.reporting.comparison import Group, best, compare
from tenfold.reporting.comparison_page import comparison
from tenfold.reporting.run_files import Run
from tenfold.reporting.tabular import as_csv, as_latex
from tests.reporting import runs
from tests.reporting.test_report import Page


def run(seed: int = 0, score: float = 0.9, **changes: Any) -> Run:
    made = runs.record(3, **{"task": "net", "seed": seed, **changes})
    return Run(
        f"run{seed}",
        made.replace(
            after=made.after.replace(score=score), plan=made.plan.replace(recipe=made.plan.recipe.replace(seed=seed))
        ),
    )


def test_runs_that_differ_in_their_seed_are_one_row() -> None:
    scores = [0.90, 0.91, 0.95]
    settings = [{"calibration": 200, "tuning": {"seed": seed}} for seed in range(3)]
    (group,) = compare([run(i, score, settings=settings[i]) for i, score in enumerate(scores)])
    assert (group.model, group.budget, group.seeds) == ("net", "30 % MACs", (0, 1, 2))
    assert group.method == "tucker2, global, 2 stages, 4 epochs"
    found = group.values["score"]
    assert (found.mean, found.sd, found.count) == (pytest.approx(mean(scores)), pytest.approx(stdev(scores)), 3)
    assert group.values["speedup"].mean == 2.0
    assert group.values["change"].mean == pytest.approx(mean(scores) - 0.92)
    doubtful = {"ratio": 120, "low": 0.1, "high": 900, "rounds": 5, "doubt": "others were busy"}
    (group,) = compare([run(0, 0.9, speedup=doubtful)])
    assert "speedup" not in group.values


def test_what_differs_otherwise_is_apart_and_named() -> None:
    groups = compare([run(settings={"calibration": n}) for n in (100, 200)] + [run(stages=())])
    assert [group.method for group in groups] == [
        "tucker2, global, 0 epochs",
        "tucker2, global, 2 stages, 4 epochs (calibration=100)",
        "tucker2, global, 2 stages, 4 epochs (calibration=200)",
    ]


def test_a_budget_of_absolute_numbers_is_a_share() -> None:
    made = runs.record(3)
    half = made.plan.replace(recipe=Recipe(budget={"max_macs": made.before.macs / 2}))
    (group,) = compare([Run("a", made.replace(plan=half))])
    assert group.budget == "50 % MACs"


def test_front() -> None:
    def group(macs: float, score: float) -> Group:
        made = runs.record(3, task="net")
        after = made.after.replace(macs=round(macs * made.before.macs), score=score)
        return compare([Run("a", made.replace(after=after))])[0]

    a, b, c, d = group(0.3, 0.90), group(0.5, 0.92), group(0.5, 0.91), group(0.6, 0.92)
    assert best([a, b, c, d]) == {a, b}


def test_csv_and_latex() -> None:
    groups = compare([run(0, 0.90), run(1, 0.92), run(0, 0.5, stages=(), speedup=None, task="other_net")])
    rows = list(csv.DictReader(io.StringIO(as_csv(groups))))
    assert [(row["model"], row["runs"], row["seeds"]) for row in rows] == [("net", "2", "0 1"), ("other_net", "1", "0")]
    assert float(rows[0]["score"]) == pytest.approx(0.91)
    assert float(rows[0]["score_sd"]) == pytest.approx(stdev([0.90, 0.92]))
    assert rows[1]["score_sd"] == ""
    table = as_latex(groups)
    assert "$91.00 \\pm 1.41$" in table
    assert "other\\_net" in table
    assert "30 \\% MACs" in table
    inner = [line for line in table.splitlines() if line.endswith("\\\\")]
    assert {line.replace("\\&", "").count("&") for line in inner} == {7}
    assert table.count("\\begin") == table.count("\\end") == 1


def test_a_loss_has_a_minus_as_wide_as_the_digits() -> None:
    page = comparison(compare([run(0, 0.90), run(1, 0.92)]))
    assert "−1.00" in page
    assert "-1.00" not in page


def test_page() -> None:
    page = Page(comparison(compare([run(0, 0.90), run(1, 0.92), run(0, stages=())])))
    assert all(address.startswith("#") for address in page.addresses)
    assert [row[1] for row in page.tables[0][1:]] == [
        "tucker2, global, 0 epochs",
        "tucker2, global, 2 stages, 4 epochs ★ best at its cost",
    ]
    assert len(page.tables[1]) == 4


def test_without_scores_there_is_no_front(tmp_path: Path) -> None:
    made = runs.record(3)
    bare = made.replace(after=made.after.replace(score=None), scores={})
    page = Page(comparison(compare([Run("a", bare)])))
    assert page.data == '{"charts":{}}'
