"""Other budgets, and layers set by hand, from an option table that was read from a file."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tenfold.allocation import Override
from tenfold.errors import BudgetError, PlanError
from tenfold.explorer import Explorer, Query
from tenfold.planning import Timing, recost
from tenfold.planning.target import Target
from tenfold.profiling import LatencyTable
from tenfold.records import Plan
from tenfold.runtimes import runtime_named
from tenfold.surgery import apply
from tests.explorer.nets import Made

BUDGETS = [
    {"macs": 0.5},
    {"macs": 0.31},
    {"params": 0.25},
    {"params": 0.5, "macs": 0.4},
    {"max_macs": 100_000},
    {"macs": 1.0},
]


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.fixture(scope="module")
def explorer(made: Made) -> Explorer:
    return made.explorer()


def query(overrides: dict[str, Override] | None = None, **budget: float) -> Query:
    return Query.model_validate({"budget": budget, "overrides": overrides or {}})


def ask(explorer: Explorer, overrides: dict[str, Override] | None = None, **budget: float) -> Plan:
    return explorer.plan(query(overrides, **budget))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_what_is_left_out_of_the_file_is_never_chosen(made: Made, explorer: Explorer, budget: dict[str, float]) -> None:
    assert ask(explorer, **budget) == made.plan(**budget)


# ---- with a clock


def stage_ms(spec: Any, in_shape: tuple[int, ...]) -> float:
    return 0.1 + 1e-4 * spec.macs(in_shape) * (1 + 0.3 * (spec.out_channels % 16 > 0))


@pytest.fixture
def timed(made: Made) -> Made:
    clock = LatencyTable(cache=None, threads=1, timer=stage_ms, model_timer=lambda model, inputs: 5.0)
    layers = [layer for layer in made.profile.layers if layer.spec is not None]
    whole = sum(clock.layer_ms(layer.spec, layer.calls) for layer in layers)
    timing = Timing(
        Target(runtime_named("torch"), clock, made.profile), 0.8, dense_ms=2 * whole, best_share=0.9, tighten=0.95
    )
    return Made(made.model, timing=timing)


@pytest.mark.parametrize("budget", [{"latency": 0.6}, {"latency": 0.75, "params": 0.5}], ids=str)
def test_a_latency_budget_is_spent(timed: Made, budget: dict[str, float]) -> None:
    explorer = timed.explorer(latency=0.7)
    assert explorer.accounts.kinds == ("params", "macs", "latency")
    selection = explorer.select(query(**budget))
    assert selection.latency_share is not None
    assert 0.9 * budget["latency"] < selection.latency_share <= budget["latency"] * (1 + 1e-9)
    assert timed.timing is not None
    absolute = budget | {"max_latency_ms": budget["latency"] * timed.timing.dense_ms}
    del absolute["latency"]
    assert [p.rank for p in explorer.select(query(**absolute)).picks] == [p.rank for p in selection.picks]


def test_times_are_those_of_the_best_memory_format(timed: Made) -> None:
    dense = timed.explorer(latency=0.7).select(query())
    assert dense.latency_share == pytest.approx(1 / (0.9 * 0.95))


def test_latency_needs_a_clock(explorer: Explorer) -> None:
    with pytest.raises(BudgetError, match="not measured"):
        ask(explorer, latency=0.5)


# ---- by hand


def test_a_layer_set_by_hand_stays_and_the_others_make_up_for_it(made: Made, explorer: Explorer) -> None:
    options = explorer.table.layer("3").of("low_rank")
    option = len(options) - 1
    pinned = query({"3": Override(format="low_rank", option=option)}, macs=0.6)
    plan = explorer.plan(pinned)
    assert (plan.layer("3").format, plan.layer("3").rank) == ("low_rank", options.rank(option))
    assert plan.layer("3").reason == "set by hand"
    assert plan.layer("3").algorithm == {"name": "svd", **(plan.layer("3").algorithm or {})}
    assert "beside 1 layer set by hand" in plan.layer("7").reason
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert explorer.select(pinned).distortion >= explorer.select(query(macs=0.6)).distortion
    assert recost(plan, made.profile) == plan  # its costs are the real ones
    kept = ask(explorer, {"3": Override()}, macs=0.6)
    assert (kept.layer("3").action, kept.layer("3").after) == ("keep", kept.layer("3").before)
    assert kept.after.macs <= 0.6 * kept.before.macs


def test_around_what_is_set_by_hand_nothing_is_better(explorer: Explorer) -> None:
    """By trying all combinations of the other layers' options."""
    overrides = {"7": Override(format="low_rank", option=4), "5": Override()}
    table = explorer.table
    limit = 0.45 * table.before.macs
    free = [layer for layer in table.eligible if layer.path not in overrides]
    assert len(free) == 2
    found = explorer.select(query(overrides, macs=0.45))
    fixed = [pick for pick in found.picks if pick.path in overrides]
    saved = sum(table.layer(pick.path).before.macs - pick.cost.macs for pick in fixed)
    macs, distortions = ([layer.column(name) for layer in free] for name in ("macs", "distortion"))
    least = np.inf
    for rows in itertools.product(*(range(len(column)) for column in macs)):
        own = saved + sum(column[0] - column[row] for column, row in zip(macs, rows, strict=True))
        if table.before.macs - own <= limit:
            least = min(least, sum(float(column[row]) for column, row in zip(distortions, rows, strict=True)))
    assert found.distortion == pytest.approx(least + sum(pick.distortion or 0.0 for pick in fixed), rel=2e-3)


def test_all_set_by_hand_claims_only_what_is_met(explorer: Explorer) -> None:
    overrides = {layer.path: Override() for layer in explorer.table.eligible}
    plan = ask(explorer, overrides, macs=0.5, params=1.0)
    assert plan.recipe.budget.given == {"params": 1.0}
    assert plan.after == plan.before
    assert plan.factorized == ()


def test_without_a_budget_all_others_stay(explorer: Explorer) -> None:
    plan = ask(explorer, {"3": Override(format="tucker2")})
    assert [layer.path for layer in plan.factorized] == ["3"]
    assert plan.layer("3").reason == "set by hand"
    assert plan.layer("7").reason == "no budget asks for less of it"


@pytest.mark.parametrize(
    ("overrides", "budget", "error", "words"),
    [
        ({"nowhere": Override()}, {}, PlanError, "no choice for a layer 'nowhere'"),
        ({"1": Override()}, {}, PlanError, "no choice for a layer '1'"),
        (
            {"3": Override(format="tucker2", option=10_000)},
            {},
            PlanError,
            "no option 10000 of tucker2; it has",
        ),
        ({"3": Override(format="cp4")}, {}, PlanError, "no option 0 of cp4"),
        ({}, {"macs": 0.05}, BudgetError, "the budget macs=0.05 cannot be met: .*lowest"),
        ({"3": Override()}, {"macs": 0.2}, BudgetError, "with the layers that are set by hand"),
    ],
)
def test_what_cannot_be_says_why(
    explorer: Explorer, overrides: dict[str, Override], budget: dict[str, float], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        explorer.select(query(overrides, **budget))


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_least_can_be_reached_and_nothing_below(explorer: Explorer, kind: str) -> None:
    least = explorer.least(kind)
    selection = explorer.select(query(**{kind: least * (1 + 1e-9)}))
    assert explorer.left(selection, kind) == pytest.approx(least)
    with pytest.raises(BudgetError):
        explorer.select(query(**{kind: 0.99 * least}))


def test_a_saved_plan_is_carried_out(made: Made, explorer: Explorer, tmp_path: Any) -> None:
    plan = ask(explorer, {"3": Override(format="tucker2", option=3)}, macs=0.5)
    plan.save(tmp_path / "explored.yaml")
    again = Plan.load(tmp_path / "explored.yaml")
    assert again == plan
    small = apply(made.model, again)
    assert small[3].rank == plan.layer("3").rank
    assert Made(small).profile.cost == plan.after
