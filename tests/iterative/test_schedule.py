"""Schedules: the way to the budget, what can be said in them, and what cannot."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tenfold.allocation.rules.evbmf import EVBMF
from tenfold.allocation.rules.threshold import Ratio
from tenfold.allocation.schedule import target_of
from tenfold.errors import TuningError
from tenfold.iterative import Schedule, musco
from tenfold.records import Budget, Cost, Recipe

COST = Cost(params=2000, macs=10_000)


def test_geometric_path_takes_the_same_share_each_time() -> None:
    limits = [Schedule(rounds=4).limits(n, Budget.of({"macs": 0.1}), COST)["macs"] for n in range(5)]
    steps = [b / a for a, b in pairwise(limits)]
    assert limits[0] == COST.macs
    assert limits[-1] == pytest.approx(1000)
    assert steps == pytest.approx([0.1**0.25] * 4)


def test_linear_path_takes_as_much_each_time() -> None:
    limits = [
        Schedule(rounds=4, path="linear").limits(n, Budget.of({"max_params": 400}), COST)["params"] for n in range(5)
    ]
    assert limits == pytest.approx([2000, 1600, 1200, 800, 400])


def test_each_count_has_its_own_way() -> None:
    budget = Budget(macs=0.25, params=0.64, latency=0.49)
    assert Schedule(rounds=2).limits(1, budget, COST) == pytest.approx({"macs": 5000, "params": 1600, "latency": 0.7})


def test_a_budget_above_the_model_stays_there() -> None:
    assert Schedule(rounds=2).limits(1, Budget(max_macs=20_000), COST) == {"macs": 10_000}


def test_where_the_rule_decides_there_are_no_limits_but_there_is_a_target() -> None:
    schedule, budget = Schedule(path="rule"), Budget(macs=0.5)
    assert schedule.limits(1, budget, COST) == {}
    assert target_of(budget, COST) == {"macs": 5000}
    assert not schedule.aims(budget)


def test_musco_as_published() -> None:
    recipe, schedule = musco(ft_every=3, nglobal_compress_iters=2, weaken=0.8, min_rank=21)
    assert schedule.rule_of(2, recipe) == EVBMF(weaken=0.8, min_rank=21)
    assert (schedule.layers_per_stage, schedule.rounds, schedule.path) == (3, 2, "rule")
    assert recipe.formats == ("tucker2", "low_rank")


def test_a_rule_for_each_round() -> None:
    schedule = Schedule(rounds=2, path="rule", rules=["evbmf", {"name": "ratio", "share": 0.7}])
    assert schedule.rule_of(1, Recipe()) == EVBMF()
    assert schedule.rule_of(2, Recipe()) == Ratio(share=0.7)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        musco(ft_every=1)[1],
        Schedule(rounds=2, rules=["global", "evbmf"]),
    ],
)
def test_written_down_and_read_again(schedule: Schedule) -> None:
    assert Schedule.from_text(schedule.to_yaml()) == schedule
    assert Schedule.from_text(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rounds": 0}, "rounds"),
        ({"path": "steep"}, "path"),
        ({"rounds": 1, "rules": ["nosuch"]}, "nosuch"),
        ({"rounds": 1, "rules": [{"name": "evbmf", "weaken": 2}]}, "weaken=2"),
        ({"rounds": 1, "rules": [{"weaken": 0.5}]}, "name"),
        ({"rounds": 3, "rules": ["evbmf", "ratio"]}, "2 rules for 3 rounds"),
        ({"stages": 3}, "stages"),
        ({"layers_per_stage": 0}, "layers_per_stage"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fields: dict[str, object], words: str) -> None:
    with pytest.raises(TuningError, match="invalid schedule") as caught:
        Schedule.of(fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limit_of_the_last_round_is_the_target_itself() -> None:
    budget = Budget(macs=1 / 3)
    assert math.isclose(Schedule(rounds=3).limits(3, budget, COST)["macs"], target_of(budget, COST)["macs"])


@pytest.mark.parametrize(
    ("budget", "schedule", "words"),
    [
        ("max_latency_ms=20", Schedule(), "a share of the original model's latency"),
        ("latency=0.5", Schedule(layers_per_stage=2), "leave layers_per_stage out"),
    ],
)
def test_latencies_that_stages_cannot_aim_at(budget: str, schedule: Schedule, words: str) -> None:
    with pytest.raises(TuningError, match=words):
        schedule.check(Recipe.of(budget))
