"""What a plan chose from: nothing that a budget could prefer is left out, and costs are the real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.planning.candidates import fronts
from tenfold.ranks import rule_from
from torch import nn

from tenfold.allocation.knapsack import solve
from tenfold.explorer import Explorer, Wish
from tenfold.planning import LayerTiming, candidates, candidates_for, plan, plan_fast, recost
from tenfold.planning.latency_budget import with_structure
from tenfold.profiling import profile
from tenfold.records import Candidates, Profile
from tests.planning import fakes

FORMATS = ("tucker2", "low_rank", "spatial")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return fakes.net()


@pytest.fixture(scope="module")
def costs(net: nn.Module) -> Profile:
    return fakes.costs(net)


@pytest.fixture(scope="module")
def found(net: nn.Module, costs: Profile) -> Candidates:
    made = plan(net, costs, rule=rule_from("global"), budget={"macs": 0.5}, formats=FORMATS, keep=["9"])
    return candidates(net, costs, made, formats=FORMATS, keep=["9"])


def test_costs_are_those_of_the_layers(costs: Profile, found: Candidates) -> None:
    from tenfold.ranks import RankProblem

    assert [layer.path for layer in found.layers] == ["0", "3", "7"]
    for layer in found.layers:
        known = costs.layer(layer.path)
        assert known.spec is not None
        problem = RankProblem(layer.path, known.spec, FORMATS, known.calls, known.cost, lambda: torch.empty(0))
        for options in layer.options:
            for i in range(0, len(options), 3):
                cost = problem.cost_at(options.format, options.rank(i))
                assert (options.params[i], options.macs[i]) == (cost.params, cost.macs)


def test_the_kept_layer_has_none_and_the_algorithms_are_those_of_the_plan(found: Candidates) -> None:
    planned = {str(layer.format): layer.algorithm for layer in found.plan.factorized}
    assert {format: found.algorithms[format] for format in planned} == planned
    assert "squared relative weight errors" in found.distortion
    assert found.time is None


@pytest.mark.parametrize("seed", range(6))
def test_fronts_lose_nothing(seed: int) -> None:
    """For any choice of budgets and limits, the optimum is the same one, to the tie."""
    rng = np.random.default_rng(seed)
    layers = [(rng.integers(1, 12, 40) / 8, rng.integers(1, 9, (40, 3)).astype(float)) for _ in range(4)]
    kept = [fronts(distortion, costs) for distortion, costs in layers]
    assert all(len(k) < 40 for k in kept)
    for names in ([0], [1], [2], [0, 1], [1, 2], [2, 0], [0, 1, 2]):
        for tight in (0.3, 0.6):
            low = sum(costs[:, names].min(0) for _, costs in layers)
            high = sum(costs[:, names].max(0) for _, costs in layers)
            limits = low + tight * (high - low)
            whole = solve([d for d, _ in layers], [c[:, names] for _, c in layers], limits)
            part = solve(
                [d[k] for (d, _), k in zip(layers, kept, strict=True)],
                [c[k][:, names] for (_, c), k in zip(layers, kept, strict=True)],
                limits,
            )
            assert tuple(int(k[i]) for k, i in zip(kept, part.choice, strict=True)) == whole.choice
            assert (part.distortion, part.cost, part.bound) == (whole.distortion, whole.cost, whole.bound)


def test_other_rules_have_no_candidates(net: nn.Module, costs: Profile) -> None:
    made = plan(net, costs, rule=rule_from("ratio", share=0.5), formats=FORMATS)
    assert candidates_for(net, costs, made, None, formats=FORMATS) is None


def test_layers_that_were_not_faster_have_none(net: nn.Module, costs: Profile) -> None:
    from types import SimpleNamespace

    choices = {"formats": FORMATS, "keep_ends": False, "seed": 0}
    slow = {"3": "tucker2 measures 2 ms, dense 1 ms: kept dense"}
    made = plan(net, costs, rule=rule_from("global"), budget={"macs": 0.9}, reasons=slow, **choices)
    fast = SimpleNamespace(timing=None, returned={"3": LayerTiming(1.0, 2.0, 0.5, 0.4, 0.6)})
    left = candidates_for(net, costs, made, fast, budget={"macs": 0.5}, workers=None, **choices)  # type: ignore[arg-type]
    assert left is not None
    assert "3" not in {layer.path for layer in left.layers}
    assert left.plan.layer("3").reason == slow["3"]


def test_a_layer_that_is_factorized_already_says_what_it_is() -> None:
    from tenfold.surgery import apply

    dense = fakes.net()
    made = plan(dense, fakes.costs(dense), rule=rule_from("global"), budget={"macs": 0.6}, formats=FORMATS)
    small = apply(dense, made)
    now = profile(small, fakes.inputs())
    again = plan(small, now, rule=rule_from("global"), budget={"macs": 0.8}, formats=FORMATS)
    left = candidates(small, now, again, formats=FORMATS)
    known = {layer.path: (layer.format, layer.rank) for layer in left.layers}
    assert {p: known[p] for p in known if known[p][0]} == {
        layer.path: (layer.format, layer.rank) for layer in made.factorized if layer.path in known
    }
    assert any(format for format, _ in known.values())


def test_candidates_of_a_plan_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explorers reckon with the clock of the final plan, and with what measuring whole models taught it."""
    from tests.planning.test_gate import FakeCompare, clock, model_ms

    compare = FakeCompare(bias=1.2)  # slower as a whole than the clock says
    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    torch.manual_seed(0)
    layers = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()]
    model, inputs = nn.Sequential(*layers, nn.Linear(32 * 64, 64)).eval(), torch.zeros(4, 32, 8, 8)
    one, batch = profile(model, inputs[:1]), profile(model, inputs)
    choices = {"formats": FORMATS, "keep_ends": False, "memory": {}}
    budget = {"latency": 0.6}
    fast = plan_fast(
        model, batch, inputs, clock=clock(), budget=budget, rule=rule_from("global"), compare=compare, **choices
    )
    made = recost(fast.plan, one).replace(budget=budget)
    found = candidates_for(model, one, made, fast, budget=budget, **choices)
    assert found is not None
    assert found.time is not None
    assert found.time.dense_ms == pytest.approx(model_ms(model, inputs))
    assert (found.time.batch_size, found.time.tighten < 1) == (4, True)
    explorer = Explorer(Candidates.model_validate_json(found.model_dump_json()))
    answer = explorer.answer(Wish(budget=budget))
    assert 0.5 < (answer.latency_share or 0) <= 0.6
    small = explorer.plan(answer)
    assert small.after == recost(small, one).after  # of one sample, whatever batch was timed
    assert 1.2 * model_ms(with_structure(model, small), inputs) == pytest.approx(0.6 * model_ms(model, inputs), rel=0.1)
