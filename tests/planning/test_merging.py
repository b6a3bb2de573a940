"""Stages that cost more than both multiplied out are merged where the plan is made."""

from __future__ import annotations

import pytest
import torch
from tenfold.planning.merging import without_idle_stages
from tenfold.ranks import Choose, Keep, RankProblem, rule_from
from torch import nn

from tenfold.formats import FORMATS
from tenfold.layers import spec_of
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import Call, Cost
from tenfold.surgery import apply


def problem(layer=None, shape=(1, 64, 8, 8), **options):
    spec = spec_of(layer or nn.Conv2d(64, 64, 3, padding=1))[0]
    cost = Cost(params=spec.num_params, macs=spec.macs(shape))
    return RankProblem("conv", spec, ("tucker2",), (Call(in_shape=shape),), cost, lambda: torch.empty(0), **options)


def test_a_factor_that_costs_more_than_it_saves_goes():
    found = without_idle_stages(problem(), Choose("tucker2", {"out": 20, "in": 62}, "so", 0.5))
    assert found == Choose("tucker2", {"out": 20, "in": 64}, "so; in 62 made full: cheaper without that factor", 0.5)
    stages = FORMATS.get("tucker2").structure(problem().spec, found.rank)
    assert [s.weight_shape for s in stages] == [(20, 64, 3, 3), (64, 20, 1, 1)]


@pytest.mark.parametrize("rank", [{"out": 20, "in": 20}, {"out": 20, "in": 64}, {"out": 40, "in": 44}])
def test_what_saves_something_stays(rank):
    chosen = Choose("tucker2", rank, "so")
    assert without_idle_stages(problem(), chosen) is chosen
    kept = Keep("so")
    assert without_idle_stages(problem(), kept) is kept


def test_fewer_parameters_for_more_multiplications_are_no_bargain():
    """Of a strided layer the factor in front runs at every position, and the core at a quarter of them."""
    strided = problem(nn.Conv2d(64, 64, 3, stride=2, padding=1))
    for most in range(40, 64):
        chosen = Choose("tucker2", {"out": 20, "in": most}, "so")
        found = without_idle_stages(strided, chosen)
        before, after = (strided.cost_at("tucker2", c.rank) for c in (chosen, found))
        assert after.params <= before.params
        assert after.macs <= before.macs


def test_nothing_is_merged_that_measures_slower():
    slow = problem(latency_ms=1.0, latency_at=lambda _, ranks: [2.0 if r["in"] == 64 else 0.5 for r in ranks])
    chosen = Choose("tucker2", {"out": 20, "in": 62}, "so")
    assert without_idle_stages(slow, chosen) is chosen


def test_the_distortion_is_that_of_the_new_ranks():
    minded = problem(distortion_at=lambda _: lambda ranks: 1.0 / ranks.prod(1))
    found = without_idle_stages(minded, Choose("tucker2", {"out": 20, "in": 62}, "so", 1 / 1240))
    assert found.distortion == pytest.approx(1 / 1280)


def test_plans_have_no_such_ranks_unless_somebody_asked_for_them():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), torch.randn(1, 32, 6, 6)
    with torch.no_grad():  # few outputs, and nearly all inputs
        narrow = torch.randn(32, 8) @ torch.randn(8, 31 * 9)
        model[0].weight.copy_(
            torch.einsum("oik,ij->ojk", narrow.view(32, 31, 9), torch.randn(31, 32)).view(32, 32, 3, 3)
        )
    cost = profile(model, x)
    options = {"formats": ["tucker2"], "keep_ends": False}
    made = plan(model, cost, rule=rule_from("energy", rel_error=1e-3), **options)
    assert made.layer("0").rank == {"out": 8, "in": 32}
    assert "in 31 made full" in made.layer("0").reason
    assert profile(apply(model, made), x).cost == made.after
    asked = plan(model, cost, rule=rule_from("fixed", ranks={"0": {"out": 8, "in": 31}}), **options)
    assert asked.layer("0").rank == {"out": 8, "in": 31}
