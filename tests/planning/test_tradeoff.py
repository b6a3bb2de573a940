"""The trade-off curve: what plans cost, what they predict, and which budgets no plan meets."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tenfold.decompositions import decompose
from tenfold.planning import plan, tradeoff
from tenfold.planning.tradeoff import BY_RULE, BY_WEIGHT
from tenfold.profiling import profile
from tenfold.records import Plan, Profile


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))


@pytest.fixture
def cost(model: nn.Sequential) -> Profile:
    return profile(model, torch.zeros(1, 48))


def test_weights_tell_the_distortion_where_the_rule_does_not(model: nn.Sequential, cost: Profile) -> None:
    def make(budget: Mapping[str, float]) -> Plan:
        return plan(model, cost, {"rule": "ratio", "budget": budget, "formats": "low_rank"})

    curve = tradeoff(model, cost, make, shares=[0.6, 0.001, 0.3])
    assert [p.budget for p in curve.points] == [0.3, 0.6]
    assert curve.unreachable == (0.001,)
    assert curve.distortion == BY_WEIGHT
    for point in curve.points:
        made = make({"macs": point.budget})
        assert point.cost == made.after
        ranks = [(model.get_submodule(layer.path).weight, layer.rank or {}) for layer in made.factorized]
        wanted = sum(decompose(weight, "low_rank", rank).rel_error ** 2 for weight, rank in ranks)  # type: ignore[arg-type]
        assert point.distortion == pytest.approx(wanted, rel=1e-5)


def test_the_rule_tells_the_distortion_where_it_can(model: nn.Sequential, cost: Profile) -> None:
    seen: list[tuple[int, int]] = []
    curve = tradeoff(
        model,
        cost,
        lambda budget: plan(model, cost, {"budget": budget, "formats": "low_rank"}),
        shares=[0.5, 0.75],
        score=lambda made: made.after.macs / made.before.macs,
        baseline=1.0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert curve.distortion == BY_RULE
    assert curve.rule["name"] == "global"
    distortions = [p.distortion or 0.0 for p in curve.points]
    assert distortions[0] > distortions[1] > 0
    assert [p.score for p in curve.points] == [p.cost.macs / cost.macs for p in curve.points]
    assert seen == [(1, 2), (2, 2)]
