"""Schedules: the way to the budget, what can be said in them, and what cannot."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from tenfold.ranks.evbmf import EVBMF
from tenfold.ranks.ratio import Ratio

from tenfold.errors import TuningError
from tenfold.iterative import Schedule
from tenfold.records import Cost

COST = Cost(params=2000, macs=10_000)


def test_geometric_path_takes_the_same_share_each_time() -> None:
    limits = [Schedule(rounds=4, budget={"macs": 0.1}).limits(n, COST)["macs"] for n in range(5)]
    steps = [b / a for a, b in pairwise(limits)]
    assert limits[0] == COST.macs
    assert limits[-1] == pytest.approx(1000)
    assert steps == pytest.approx([0.1**0.25] * 4)


def test_linear_path_takes_as_much_each_time() -> None:
    limits = [Schedule(rounds=4, budget={"params": 400}, path="linear").limits(n, COST)["params"] for n in range(5)]
    assert limits == pytest.approx([2000, 1600, 1200, 800, 400])


def test_each_count_has_its_own_way() -> None:
    schedule = Schedule(rounds=2, budget={"macs": 0.25, "params": 0.64, "latency": 0.49})
    assert schedule.limits(1, COST) == pytest.approx({"macs": 5000, "params": 1600, "latency": 0.7})


def test_a_budget_above_the_model_stays_there() -> None:
    assert Schedule(rounds=2, budget={"macs": 20_000}).limits(1, COST) == {"macs": 10_000}


def test_where_the_rule_decides_there_are_no_limits_but_there_is_a_target() -> None:
    schedule = Schedule(budget={"macs": 0.5}, path="rule", rule={"name": "ratio", "share": 0.8})
    assert schedule.limits(1, COST) == {}
    assert schedule.target(COST) == {"macs": 5000}
    assert not schedule.aims


def test_musco_as_published() -> None:
    schedule = Schedule.musco(ft_every=3, nglobal_compress_iters=2, weaken=0.8, min_rank=21)
    assert schedule.rule_of(2) == EVBMF(weaken=0.8, min_rank=21)
    assert (schedule.layers_per_stage, schedule.rounds, schedule.path) == (3, 2, "rule")
    assert schedule.formats == ("tucker2", "low_rank")


def test_a_rule_for_each_round() -> None:
    schedule = Schedule(rounds=2, path="rule", rule=["evbmf", {"name": "ratio", "share": 0.7}])
    assert schedule.rule_of(1) == EVBMF()
    assert schedule.rule_of(2) == Ratio(share=0.7)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule.musco(ft_every=1),
        Schedule(rounds=2, budget={"macs": 0.3}, rule=["global", "evbmf"], keep=("fc",), keep_ends=False),
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
        ({"rule": "nosuch"}, "nosuch"),
        ({"rule": {"name": "evbmf", "weaken": 2}}, "weaken=2"),
        ({"rule": {"weaken": 0.5}}, "a rule needs its name"),
        ({"rounds": 3, "rule": ["evbmf", "ratio"]}, "2 rules for 3 rounds"),
        ({"budget": {"macs": -1}}, "budget.macs"),
        ({"budget": {"latency": 20.0}}, "a share of the original model's latency"),
        ({"budget": {"latency": 0.5}, "layers_per_stage": 2}, "leave layers_per_stage out"),
        ({"stages": 3}, "stages"),
        ({"layers_per_stage": 0}, "layers_per_stage"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fields: dict[str, object], words: str) -> None:
    with pytest.raises(TuningError, match="this schedule cannot be") as caught:
        Schedule.of(fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limit_of_the_last_round_is_the_target_itself() -> None:
    schedule = Schedule(rounds=3, budget={"macs": 1 / 3})
    assert math.isclose(schedule.limits(3, COST)["macs"], schedule.target(COST)["macs"])
