"""The LC algorithm finds the ranks with the weights, within a budget or for a price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold.checkpoint import load, save
from tenfold.errors import BudgetError, PlanError
from tenfold.layers import FactorizedLayer
from tenfold.profiling import profile
from tenfold.records import Profile
from tenfold.surgery import apply
from tenfold.training import LcConfig, LearnedRanks, LowRankConfig, LowRankResult, finetune, train_admm
from tests.training.narrow import CONFIG, Cut, accuracy, batches, cut_in_epoch, network, same, state

X = torch.zeros(1, 16)


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    model = network()
    finetune(model, batches, CONFIG)
    return model


def cost(layer: nn.Linear, rank: int) -> int:
    return rank * (layer.in_features + layer.out_features)


def best(layer: nn.Linear, price: float, strength: float, whole: int) -> int | None:
    """Return the best rank by trying all of them; None to stay dense."""
    values = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    dense = layer.in_features * layer.out_features
    ranks = [r for r in range(1, len(values) + 1) if cost(layer, r) < dense]
    totals = [price * cost(layer, r) / whole + strength / 2 * (values[r:] ** 2).sum() for r in ranks]
    return ranks[int(np.argmin(totals))] if min(totals) < price * dense / whole else None


@pytest.mark.parametrize("price", [0.01, 0.3, 3.0, 30.0, 1e6])
def test_the_c_step_is_exact(trained: nn.Sequential, price: float) -> None:
    """Against all ranks tried one by one in NumPy: the optimum of λC(r) + ρ/2·tail, with a strength for each layer."""
    strengths = {"0": 0.05, "3": 0.02, "6": 0.01}
    found = profile(trained, X)
    learned = LearnedRanks(trained, found, LcConfig(cost_weight=price, keep_ends=False))
    weights = {path: trained.get_submodule(path).weight.detach() for path in learned.paths}
    learned(trained, weights, torch.tensor([strengths[path] for path in learned.paths]))
    made = learned.plan_for(trained)
    for path, strength in strengths.items():
        expected = best(trained.get_submodule(path), price, strength, found.macs)
        assert (made.layer(path).rank or {}).get("rank") == expected
    assert made.recipe.rule == {"name": "lc", "cost_weight": price, "cost": "macs"}


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.4}, {"macs": 0.5, "params": 0.45}])
def test_budgets_are_met_by_the_smallest_price(trained: nn.Sequential, budget: dict[str, float]) -> None:
    learned = LearnedRanks(trained, profile(trained, X), LcConfig(budget=budget))
    weights = {path: trained.get_submodule(path).weight.detach() for path in learned.paths}
    images = learned(trained, weights, torch.ones(len(learned.paths)))
    made = learned.plan_for(trained)
    shares = {name: getattr(made.after, name) / getattr(made.before, name) for name in budget}
    assert all(shares[name] <= limit for name, limit in budget.items())
    assert any(shares[name] > limit - 0.03 for name, limit in budget.items())
    for path in learned.paths:
        rank = (made.layer(path).rank or {"rank": 10**6})["rank"]
        assert np.linalg.matrix_rank(images[path].numpy(), tol=1e-4) <= rank


def test_each_layer_takes_the_scheme_that_suits_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False)).eval()
    with torch.no_grad():
        first, second = torch.randn(16, 2), torch.randn(2, 16 * 9)
        model[0].weight.copy_((first @ second).reshape(16, 16, 3, 3))
        along, across = torch.randn(2, 16, 3), torch.randn(16, 2, 3)
        model[1].weight.copy_(torch.einsum("ria,orb->oiab", along, across))
    found = profile(model, torch.zeros(1, 16, 6, 6))
    learned = LearnedRanks(model, found, LcConfig(cost_weight=1e-3, formats="low_rank,spatial"))
    weights = {path: model.get_submodule(path).weight.detach() for path in learned.paths}
    images = learned(model, weights, torch.ones(2))
    layers = [learned.plan_for(model).layer(path) for path in ("0", "1")]
    assert [(layer.format, layer.rank) for layer in layers] == [("low_rank", {"rank": 2}), ("spatial", {"rank": 2})]
    for path, image in images.items():
        torch.testing.assert_close(image, weights[path], rtol=1e-4, atol=1e-4)


def train_lc(
    model: nn.Module, ranks: LcConfig, config: LowRankConfig | None = None, data: Any = batches, **options: Any
) -> LowRankResult:
    learned = LearnedRanks(model, profile(model, X), ranks)
    return train_admm(model, learned, data, config or LowRankConfig(train=CONFIG), **options)


def test_train_with_a_budget(trained: nn.Sequential, tmp_path: Path) -> None:
    """Within the budget, near low rank, better than the same ranks at once; and a plan like any other."""
    found = train_lc(trained, LcConfig(budget={"macs": 0.3}), evaluate=accuracy)
    assert found.plan.after.macs <= 0.3 * found.plan.before.macs
    assert profile(found.model, X).macs == found.plan.after.macs
    ranks = {path: m.rank for path, m in found.model.named_modules() if isinstance(m, FactorizedLayer)}
    assert ranks == {layer.path: layer.rank for layer in found.plan.factorized}
    assert max(rows[-1].primal for rows in found.training.residuals.values()) < 0.05
    assert accuracy(found.model) > accuracy(apply(trained, found.plan)) + 0.05
    save(found.model, found.plan, tmp_path / "saved")
    again, read = load(network(), tmp_path / "saved")
    assert same(state(again), state(found.model))
    assert read.recipe.rule["name"] == "lc"


def test_a_dearer_cost_gives_lower_ranks(trained: nn.Sequential) -> None:
    costs = [train_lc(trained, LcConfig(cost_weight=price)).plan.after.macs for price in (0.03, 0.1, 1.0)]
    assert costs[0] > costs[1] > costs[2]


def test_resumed_equals_uninterrupted(trained: nn.Sequential, tmp_path: Path) -> None:
    train = CONFIG.replace(epochs=4)
    config, ranks = LowRankConfig(train=train, tune=train.replace(epochs=1)), LcConfig(budget={"macs": 0.5})
    whole = train_lc(trained, ranks, config)
    with pytest.raises(Cut):
        train_lc(trained, ranks, config, cut_in_epoch(3), folder=tmp_path)
    found = train_lc(trained, ranks, config, folder=tmp_path)
    assert same(state(found.model), state(whole.model))
    assert found.plan == whole.plan
    finished = train_lc(trained, ranks, config, folder=tmp_path)
    assert finished.plan == whole.plan
    assert same(state(finished.model), state(whole.model))


def learn(model: nn.Module, found: Profile, **options: Any) -> Tensor:
    return LearnedRanks(model, found, LcConfig(**options)).chosen


def test_refusals(trained: nn.Sequential) -> None:
    found = profile(trained, X)
    for options in ({}, {"budget": {"macs": 0.5}, "cost_weight": 1.0}, {"budget": {"latency": 0.5}}):
        with pytest.raises(BudgetError, match="one of a budget of params or macs"):
            learn(trained, found, **options)
    with pytest.raises(PlanError, match=r"learned in the formats .*low_rank, spatial.*, not tucker2"):
        learn(trained, found, cost_weight=1.0, formats=["tucker2"])
    learned = LearnedRanks(trained, found, LcConfig(budget={"macs": 0.01}))
    weights = {path: trained.get_submodule(path).weight.detach() for path in learned.paths}
    with pytest.raises(BudgetError, match="Raise the budget"):
        learned(trained, weights, torch.ones(len(learned.paths)))
