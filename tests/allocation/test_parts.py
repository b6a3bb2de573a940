"""Budgets of parts of a model: met on the part, with the rest of the model as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tenfold
from tenfold.allocation import Override, choose, select
from tenfold.allocation.parts import OUTSIDE
from tenfold.errors import BudgetError, RecipeError, TuningError, UnknownNameError
from tenfold.explorer.explorer import Explorer, Query
from tenfold.planning import plan, tabulate
from tenfold.planning.plan import recost
from tenfold.profiling import profile
from tenfold.records import Budget, Plan, Profile, Recipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.backbone = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
        )
        self.neck = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 96), nn.ReLU(), nn.Linear(96, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.backbone(self.stem(x).relu())).relu())


X = torch.zeros(2, 3, 8, 8)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net()


@pytest.fixture(scope="module")
def costs(net: nn.Module) -> Profile:
    return profile(net, X)


def cost_of(found: Plan, start: str, when: str) -> dict[str, int]:
    own = [getattr(layer, when) for layer in found.layers if layer.path.startswith(start)]
    return {"params": sum(c.params for c in own), "macs": sum(c.macs for c in own)}


@pytest.mark.parametrize(("kind", "share"), [("macs", 0.5), ("params", 0.4), ("macs", 0.73)])
def test_a_part_meets_its_budget_closely_and_the_rest_stays(net: nn.Module, costs: Profile, kind: str, share: float):
    found = plan(net, costs, {"budget_of": {"backbone.*": f"{kind}={share}"}, "rule": {"name": "global", "step": 1}})
    before, after = (cost_of(found, "backbone", when)[kind] for when in ("before", "after"))
    assert share * before * 0.99 <= after <= share * before
    rest = [layer for layer in found.layers if not layer.path.startswith("backbone")]
    assert all(layer.action == "keep" and layer.after == layer.before for layer in rest)
    assert {layer.reason for layer in rest} >= {OUTSIDE}
    assert all("proven" in layer.reason for layer in found.factorized)
    assert found.before - found.after == sum(
        (layer.before - layer.after for layer in found.layers), type(found.before)()
    )


def test_two_parts_have_a_budget_each_and_the_first_pattern_wins(net: nn.Module, costs: Profile):
    recipe = {"budget_of": {"head.*": "params=0.3", "backbone.0": "macs=0.6", "*": "macs=0.9"}}
    found = plan(net, costs, recipe)
    assert cost_of(found, "head", "after")["params"] <= 0.3 * cost_of(found, "head", "before")["params"]
    assert cost_of(found, "backbone.0", "after")["macs"] <= 0.6 * cost_of(found, "backbone.0", "before")["macs"]
    rest = [layer for layer in found.layers if layer.path in ("stem", "backbone.2", "neck")]
    whole = sum(layer.before.macs for layer in rest)
    assert 0 < sum(layer.after.macs for layer in rest) <= 0.9 * whole


def test_the_same_ranks_as_a_budget_of_a_model_that_is_the_part(net: nn.Module):
    part = nn.Sequential(net.backbone)  # type: ignore[arg-type]
    alone = plan(part, profile(part, torch.zeros(2, 32, 8, 8)), {"budget": "macs=0.5", "keep_ends": False})
    within = plan(net, profile(net, X), {"budget_of": {"backbone.*": "macs=0.5"}})
    ranks = {layer.path.removeprefix("0."): layer.rank for layer in alone.factorized}
    assert ranks == {layer.path.removeprefix("backbone."): layer.rank for layer in within.factorized}


@pytest.mark.parametrize("rule", ["ratio", "energy"])
def test_rules_with_a_threshold_spend_budgets_of_parts_too(net: nn.Module, costs: Profile, rule: str):
    found = plan(net, costs, {"budget_of": {"backbone.*": "macs=0.5"}, "rule": rule})
    assert cost_of(found, "backbone", "after")["macs"] <= 0.5 * cost_of(found, "backbone", "before")["macs"]
    assert {layer.path for layer in found.factorized} <= {"backbone.0", "backbone.2"}


def test_compress_meets_it_saves_and_says_it(net: nn.Module, tmp_path):
    recipe = {"budget_of": {"re:backbone.*|neck": "macs=0.5"}, "formats": "low_rank,tucker2"}
    made = tenfold.compress(net, X, recipe, data=torch.randn(32, 3, 8, 8), runtime=tenfold.Runtime(measure=False))
    assert {layer.path for layer in made.plan.factorized} <= {"backbone.0", "backbone.2", "neck"}
    assert profile(made.model, X).macs == made.plan.after.macs
    assert "macs=0.5 of re:backbone.*|neck" in made.summary()
    loaded, again = tenfold.load(Net(), made.save(tmp_path / "small"))
    assert again.recipe.budget_of == {"re:backbone.*|neck": Budget(macs=0.5)}
    torch.testing.assert_close(loaded.eval()(X), made.model.eval()(X))


def test_layers_by_hand_are_counted_in_their_part(net: nn.Module, costs: Profile):
    recipe = Recipe.of({"budget_of": {"backbone.*": "macs=0.8"}})
    table = tabulate(net, costs, recipe)
    found = select(table, recipe, overrides={"backbone.0": Override()})
    by_path = {pick.path: pick for pick in found.picks}
    assert by_path["backbone.0"].format is None
    before = sum(table.layer(path).before.macs for path in ("backbone.0", "backbone.2"))
    assert sum(by_path[path].cost.macs for path in ("backbone.0", "backbone.2")) <= 0.8 * before
    with pytest.raises(BudgetError, match="least that can be reached with the layers that are set by hand"):
        select(table, recipe.replace(budget_of={"backbone.*": "macs=0.5"}), overrides={"backbone.0": Override()})


def test_another_table_serves_and_the_explorer_takes_whole_budgets(net: nn.Module, costs: Profile):
    whole = tabulate(net, costs, "macs=0.5")
    found = choose(whole, Recipe.of({"budget_of": {"neck": "macs=0.5"}}))
    assert [layer.path for layer in found.factorized] == ["neck"]
    assert found.recipe.budget_of == {"neck": Budget(macs=0.5)}
    part = tabulate(net, costs, {"budget_of": {"backbone.*": "macs=0.5"}})
    assert Explorer(part).select(Query(budget={"macs": 0.9})).cost.macs <= 0.9 * costs.macs


def test_an_edited_plan_claims_only_the_parts_that_it_meets(net: nn.Module, costs: Profile):
    found = plan(net, costs, {"budget_of": {"backbone.*": "macs=0.5", "neck": "macs=0.6"}})
    layers = tuple(
        layer.replace(action="keep", format=None, rank=None) if layer.path == "neck" else layer
        for layer in found.layers
    )
    assert list(recost(found.replace(layers=layers), costs).recipe.budget_of) == ["backbone.*"]


def test_what_is_not_allowed_is_refused_with_the_way_out(net: nn.Module, costs: Profile):
    with pytest.raises(UnknownNameError, match=r"no layer matches 'bakbone.0'\. Did you mean backbone.0"):
        plan(net, costs, {"budget_of": {"bakbone.0": "macs=0.5"}})
    with pytest.raises(BudgetError, match=r"backbone\.\*: the budget macs=0.001 cannot be met"):
        plan(net, costs, {"budget_of": {"backbone.*": "macs=0.001"}})
    with pytest.raises(RecipeError, match="give one of them"):
        Recipe.of({"budget": "macs=0.5", "budget_of": {"head.*": "macs=0.5"}})
    for wrong in ("latency=0.5", {}):
        with pytest.raises(RecipeError, match="a time is one of the whole model"):
            Recipe.of({"budget_of": {"head.*": wrong}})
    with pytest.raises(TuningError, match="give budget in place of budget_of"):
        tenfold.allocation.Schedule().check(Recipe.of({"budget_of": {"head.*": "macs=0.5"}}))
