"""Without the model, the plans that ``tenfold.plan`` makes with it; and layers set by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.calibration import calibrate, called_layers
from tenfold.errors import BudgetError, PlanError
from tenfold.exploring import Explorer, Pin, Wish
from tenfold.planning import Timing, recost
from tenfold.profiling import LatencyTable
from tenfold.records import Plan
from tenfold.surgery import apply
from tests.exploring.nets import Made, X

BUDGETS = [
    {"macs": 0.5},
    {"macs": 0.31},
    {"params": 0.25},
    {"params": 0.5, "macs": 0.4},
    {"macs": 100_000},
    {"macs": 1.0},
]


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.fixture(scope="module")
def explorer(made: Made) -> Explorer:
    return made.explorer()


def ask(explorer: Explorer, pins: dict[str, Pin] | None = None, **budget: float) -> Plan:
    return explorer.plan(explorer.answer(Wish(budget=budget, pins=pins or {})))


# ---- the same as with the model


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_plans_are_those_of_plan(made: Made, explorer: Explorer, budget: dict[str, float]) -> None:
    assert ask(explorer, **budget) == made.plan(**budget)


@pytest.mark.filterwarnings("ignore::tenfold.errors.CalibrationWarning")
def test_plans_by_data_are_those_of_plan() -> None:
    bare = Made()
    batches = [torch.randn(32, *X.shape[1:], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    moments = calibrate(bare.model, batches, called_layers(bare.profile))
    made = Made(bare.model, moments=moments, seed=3)
    explorer = made.explorer()
    for budget in BUDGETS[:4]:
        assert ask(explorer, **budget) == made.plan(**budget)
    assert "unlabeled data" in explorer.candidates.damage


def test_settings_of_the_rule_hold(made: Made) -> None:
    settings = {"step": 5, "gap": 0.05}
    explorer = made.explorer(made.plan(settings, macs=0.6))
    assert ask(explorer, macs=0.45) == made.plan(settings, macs=0.45)


def test_chains_of_cores_and_embeddings_too() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(60, 32), nn.Conv1d(32, 40, 3, padding=1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.mix(self.table(ids).transpose(1, 2))

    torch.manual_seed(0)
    made = Made(
        Words().eval(), torch.zeros(2, 9, dtype=torch.long), formats=("tensor_train", "low_rank"), keep_ends=False
    )
    explorer = made.explorer(made.plan(params=0.6))
    for budget in ({"params": 0.6}, {"params": 0.3}, {"params": 0.5, "macs": 0.9}):
        assert ask(explorer, **budget) == made.plan(**budget)


def test_layers_that_are_factorized_already(made: Made) -> None:
    small = apply(made.model, made.plan(macs=0.7))
    again = Made(small)
    explorer = again.explorer(again.plan(macs=0.6))
    for share in (0.8, 0.6, 1.0):
        assert ask(explorer, macs=share) == again.plan(macs=share)


def test_a_rank_that_a_plan_makes_full() -> None:
    """Two stages multiplied out may cost less than both, and are no better option where damage says otherwise."""

    def damages(path: str, format: str) -> Any:
        return lambda ranks: np.where((ranks == [2, 12]).all(1), 0.01, 1.0)

    made = Made(damages=damages, formats=("tucker2",), keep=["0", "5", "7"])
    explorer = made.explorer(made.plan(macs=0.75))
    plan = made.plan(macs=0.8)
    assert plan.layer("3").rank == {"out": 2, "in": 24}
    assert plan.layer("3").reason.endswith("in 12 made full: cheaper without that factor")
    assert ask(explorer, macs=0.8) == plan


# ---- with a clock


def stage_ms(spec: Any, in_shape: tuple[int, ...]) -> float:
    return 0.1 + 1e-4 * spec.macs(in_shape) * (1 + 0.3 * (spec.out_channels % 16 > 0))


@pytest.fixture
def timed(made: Made) -> tuple[Made, Timing]:
    clock = LatencyTable(cache=None, threads=1, timer=stage_ms, model_timer=lambda model, inputs: 5.0)
    layers = [layer for layer in made.profile.layers if layer.spec is not None]
    whole = sum(clock.layer_ms(layer.spec, layer.calls) for layer in layers)
    timing = Timing(clock, made.profile, 0.8, dense_ms=2 * whole, best_share=0.9, tighten=0.95)
    return Made(made.model, timing=timing), timing


@pytest.mark.parametrize("budget", [{"latency": 0.6}, {"latency": 0.75, "params": 0.5}, {"macs": 0.5}], ids=str)
def test_milliseconds_are_reckoned_as_plan_reckons(timed: tuple[Made, Timing], budget: dict[str, float]) -> None:
    made, timing = timed
    explorer = made.explorer(made.plan(latency=0.7))
    assert explorer.ledger.kinds == ("params", "macs", "latency")
    answer = explorer.answer(Wish(budget=budget))
    plan = made.plan(**budget)
    assert explorer.plan(answer) == plan
    assert answer.latency_share is not None
    if "latency" in budget:
        assert 0.9 * budget["latency"] < answer.latency_share <= budget["latency"] * (1 + 1e-9)
        absolute = budget | {"latency": budget["latency"] * timing.dense_ms}
        assert [p.rank for p in explorer.answer(Wish(budget=absolute)).picks] == [p.rank for p in answer.picks]
    dense = explorer.answer(Wish())
    assert dense.latency_share == pytest.approx(1 / (0.9 * 0.95))  # in the memory format of the clock


def test_latency_needs_a_clock(explorer: Explorer) -> None:
    with pytest.raises(BudgetError, match="without a clock"):
        ask(explorer, latency=0.5)


# ---- by hand


def test_a_layer_set_by_hand_stays_and_the_others_make_up_for_it(made: Made, explorer: Explorer) -> None:
    options = explorer.tables["3"].layer.of("low_rank")
    option = len(options) - 1
    answer = explorer.answer(Wish(budget={"macs": 0.6}, pins={"3": Pin(format="low_rank", option=option)}))
    plan = explorer.plan(answer)
    assert (plan.layer("3").format, plan.layer("3").rank) == ("low_rank", options.rank(option))
    assert plan.layer("3").reason == "set by hand"
    assert plan.layer("3").algorithm == {"name": "svd", **(plan.layer("3").algorithm or {})}
    assert "beside 1 layer set by hand" in plan.layer("7").reason
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert answer.damage >= explorer.answer(Wish(budget={"macs": 0.6})).damage
    assert recost(plan, made.profile) == plan  # its costs are the real ones
    kept = ask(explorer, {"3": Pin()}, macs=0.6)
    assert (kept.layer("3").action, kept.layer("3").after) == ("keep", kept.layer("3").before)
    assert kept.after.macs <= 0.6 * kept.before.macs


def test_around_what_is_set_by_hand_nothing_is_better(explorer: Explorer) -> None:
    """By trying all combinations of the other layers' options."""
    pins = {"7": Pin(format="low_rank", option=4), "5": Pin()}
    limit = 0.45 * explorer.base.before.macs
    free = [table for path, table in explorer.tables.items() if path not in pins]
    assert len(free) == 2
    fixed = [explorer.tables[path].pick(explorer.tables[path].row(pin)) for path, pin in pins.items()]
    saved = sum(explorer.tables[pick.path].cost.macs - pick.cost.macs for pick in fixed)
    least = np.inf
    for rows in itertools.product(*(range(len(table.columns["damage"])) for table in free)):
        own = saved + sum(t.columns["macs"][0] - t.columns["macs"][r] for t, r in zip(free, rows, strict=True))
        if explorer.base.before.macs - own <= limit:
            least = min(least, sum(float(t.columns["damage"][r]) for t, r in zip(free, rows, strict=True)))
    found = explorer.answer(Wish(budget={"macs": 0.45}, pins=pins))
    assert found.damage == pytest.approx(least + sum(pick.damage for pick in fixed), rel=2e-3)


def test_all_set_by_hand_claims_only_what_is_met(explorer: Explorer) -> None:
    pins = {path: Pin() for path in explorer.tables}
    plan = ask(explorer, pins, macs=0.5, params=1.0)
    assert plan.budget == {"params": 1.0}
    assert plan.after == plan.before
    assert plan.factorized == ()


def test_without_a_budget_all_others_stay(explorer: Explorer) -> None:
    plan = ask(explorer, {"3": Pin(format="tucker2")})
    assert [layer.path for layer in plan.factorized] == ["3"]
    assert plan.layer("7").reason == "no budget asks for less of it"


@pytest.mark.parametrize(
    ("pins", "budget", "error", "words"),
    [
        ({"nowhere": Pin()}, {}, PlanError, "no choice for a layer 'nowhere'"),
        ({"1": Pin()}, {}, PlanError, "no choice for a layer '1'"),
        (
            {"3": Pin(format="tucker2", option=10_000)},
            {},
            PlanError,
            "no option 10000 of tucker2; it has",
        ),
        ({"3": Pin(format="cp3")}, {}, PlanError, "no option 0 of cp3"),
        ({}, {"flops": 0.5}, BudgetError, "a budget names params or macs"),
        ({}, {"macs": -1.0}, BudgetError, "positive number"),
        ({}, {"macs": 0.001}, BudgetError, r"asks for 0\.1% of the MACs; .* is the least that can be reached$"),
        ({"3": Pin()}, {"macs": 0.2}, BudgetError, "with the layers that are set by hand"),
    ],
)
def test_what_cannot_be_says_why(
    explorer: Explorer, pins: dict[str, Pin], budget: dict[str, float], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        explorer.answer(Wish(budget=budget, pins=pins))


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_least_can_be_reached_and_nothing_below(explorer: Explorer, kind: str) -> None:
    least = explorer.least(kind)
    answer = explorer.answer(Wish(budget={kind: least * (1 + 1e-9)}))
    assert explorer.left(answer, kind) == pytest.approx(least)
    with pytest.raises(BudgetError):
        explorer.answer(Wish(budget={kind: 0.99 * least}))


def test_a_saved_plan_is_carried_out(made: Made, explorer: Explorer, tmp_path: Any) -> None:
    plan = ask(explorer, {"3": Pin(format="tucker2", option=3)}, macs=0.5)
    plan.save(tmp_path / "explored.yaml")
    again = Plan.load(tmp_path / "explored.yaml")
    assert again == plan
    small = apply(made.model, again)
    assert small[3].rank == plan.layer("3").rank
    assert Made(small).profile.cost == plan.after
