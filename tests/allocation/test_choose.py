"""From a table to a plan: budgets, layers set by hand, what may be left out, and tables that do not serve a rule."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.allocation import Override, choose, explorable, pareto, pruned, select
from tenfold.allocation.knapsack import solve
from tenfold.allocation.pareto import _front
from tenfold.errors import BudgetError, PlanError
from tenfold.planning import plan, tabulate
from tenfold.profiling import profile
from tenfold.records import Budget, Cost, FormatOptions, OptionTable, Profile, Recipe
from tenfold.surgery import apply
from tests.planning import fakes

FORMATS = ("tucker2", "low_rank", "spatial")
RECIPE = Recipe.of({"budget": {"macs": 0.5}, "formats": FORMATS, "keep": ["9"], "seed": 3})


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return fakes.net()


@pytest.fixture(scope="module")
def costs(net: nn.Module) -> Profile:
    return fakes.costs(net)


@pytest.fixture(scope="module")
def table(net: nn.Module, costs: Profile) -> OptionTable:
    return tabulate(net, costs, RECIPE)


def test_choosing_needs_no_torch() -> None:
    script = "import sys, tenfold.allocation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_plan_is_what_is_chosen_from_the_table(net: nn.Module, costs: Profile, table: OptionTable) -> None:
    assert plan(net, costs, RECIPE) == choose(table)
    for share in (0.4, 0.8):
        other = RECIPE.replace(budget=Budget(macs=share))
        assert plan(net, costs, other) == choose(table, other)
        assert choose(table, other).after.macs <= share * costs.macs


def test_costs_are_those_of_the_model_that_comes_of_it(net: nn.Module, table: OptionTable) -> None:
    made = choose(table)
    assert profile(apply(net, made), fakes.inputs()).cost == made.after


def test_the_table_names_every_layer_and_the_algorithms(table: OptionTable) -> None:
    assert [layer.path for layer in table.eligible] == ["0", "3", "7"]
    assert table.layer("9").keep_reason == "kept as asked by '9'"
    assert "squared" in table.distortion
    assert table.time is None
    made = choose(table)
    assert {str(layer.format): layer.algorithm for layer in made.factorized}.items() <= table.algorithms.items()
    assert all((layer.algorithm or {}).get("seed", 3) == 3 for layer in made.factorized)


def test_layers_set_by_hand_stay_and_the_rule_decides_on_the_others(table: OptionTable) -> None:
    options = table.layer("3").of("tucker2")
    hand = {"3": Override(format="tucker2", option=4), "7": Override()}
    made = choose(table, overrides=hand)
    assert (made.layer("3").rank, made.layer("3").reason) == (options.rank(4), "set by hand")
    assert (made.layer("7").action, made.layer("7").reason) == ("keep", "set by hand")
    assert made.after.macs <= 0.5 * made.before.macs
    assert made.recipe == RECIPE


def test_a_plan_wholly_by_hand_claims_only_the_budget_that_it_meets(table: OptionTable) -> None:
    small = {layer.path: Override(format=layer.options[0].format, option=0) for layer in table.eligible}
    assert choose(table, overrides=small).recipe.budget == Budget(macs=0.5)
    dense = {layer.path: Override() for layer in table.eligible}
    found = select(table, RECIPE, overrides=dense)
    assert not found.chosen
    assert found.cost == table.before
    assert not choose(table, overrides=dense).recipe.budget


@pytest.mark.parametrize(
    ("path", "override", "words"),
    [
        ("8", Override(), r"there is no choice for a layer '8'"),
        ("9", Override(), r"there is no choice for a layer '9'"),
        ("7", Override(format="tucker2"), r"layer '7' has no option 0 of tucker2; it has low_rank up to \d+"),
        ("7", Override(format="low_rank", option=999), r"layer '7' has no option 999 of low_rank"),
    ],
)
def test_what_cannot_be_set_by_hand_is_refused(table: OptionTable, path: str, override: Override, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        choose(table, overrides={path: override})


def test_what_is_set_by_hand_may_leave_too_little(table: OptionTable) -> None:
    with pytest.raises(BudgetError, match="the least that can be reached with the layers that are set by hand"):
        choose(table, RECIPE.replace(budget=Budget(macs=0.2)), overrides={"3": Override()})


def test_a_table_of_other_rows_or_columns_is_refused(net: nn.Module, costs: Profile, table: OptionTable) -> None:
    with pytest.raises(PlanError, match=r"tabulated for the rule global, not for ratio: tabulate them again"):
        choose(table, RECIPE.replace(rule={"name": "ratio"}))
    ratio = tabulate(net, costs, RECIPE.replace(rule={"name": "ratio"}))
    with pytest.raises(PlanError, match=r"tabulated for the rule ratio, not for error"):
        choose(ratio, RECIPE.replace(rule={"name": "error"}))
    shared = choose(ratio, RECIPE.replace(rule={"name": "ratio", "share": 0.3}, budget=Budget()))
    assert shared == plan(net, costs, RECIPE.replace(rule={"name": "ratio", "share": 0.3}, budget=Budget()))


def test_layers_that_are_kept_for_another_reason_have_no_options(table: OptionTable) -> None:
    less = table.kept({"3": "measures slower"})
    assert [layer.path for layer in less.eligible] == ["0", "7"]
    made = choose(less, RECIPE.replace(budget=Budget(macs=0.9)))
    assert (made.layer("3").action, made.layer("3").reason) == ("keep", "measures slower")


def test_only_a_table_with_distortions_can_be_explored(net: nn.Module, costs: Profile, table: OptionTable) -> None:
    assert explorable(table)
    assert not explorable(tabulate(net, costs, RECIPE.replace(rule={"name": "ratio"})))


def test_a_layer_that_is_factorized_already_says_what_it_is() -> None:
    dense = fakes.net()
    made = plan(dense, fakes.costs(dense), {"budget": {"macs": 0.6}, "formats": FORMATS})
    small = apply(dense, made)
    again = tabulate(small, profile(small, fakes.inputs()), {"budget": {"macs": 0.8}, "formats": FORMATS})
    known = {layer.path: (layer.format, layer.rank) for layer in again.eligible}
    assert {p: known[p] for p in known if known[p][0]} == {
        layer.path: (layer.format, layer.rank) for layer in made.factorized if layer.path in known
    }
    assert any(format for format, _ in known.values())
    stays = choose(again.kept(dict.fromkeys(known, "for now")), RECIPE.replace(budget=Budget(macs=1.0)))
    assert {layer.path: (layer.format, layer.rank) for layer in stays.layers if layer.format} == {
        path: now for path, now in known.items() if now[0]
    }


# ---- what no budget could prefer


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.9])
def test_pruned_tables_choose_the_same(table: OptionTable, share: float) -> None:
    less = pruned(table)
    sizes = [sum(len(options) for layer in t.eligible for options in layer.options) for t in (less, table)]
    assert sizes[0] < sizes[1]
    for budget in ({"macs": share}, {"params": share}, {"macs": share, "params": share}):
        recipe = RECIPE.replace(budget=Budget(**budget))
        try:
            expected = choose(table, recipe)
        except BudgetError:
            with pytest.raises(BudgetError):
                choose(less, recipe)
        else:
            assert choose(less, recipe) == expected


@pytest.mark.parametrize("seed", range(6))
def test_fronts_lose_nothing(seed: int) -> None:
    """For any choice of budgets and limits, the optimum is the same one, to the tie."""
    rng = np.random.default_rng(seed)
    layers = [(rng.integers(1, 12, 40) / 8, rng.integers(1, 9, (40, 3)).astype(float)) for _ in range(4)]
    kept = [_front(_options(distortion, costs)) for distortion, costs in layers]
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


def _options(distortion: np.ndarray, costs: np.ndarray) -> FormatOptions:
    ranks = np.arange(1, 1 + len(costs))[:, None]
    params, macs, latency = costs.T
    columns = {"distortion": distortion}
    return FormatOptions(
        format="x", names=("r",), ranks=ranks, params=params, macs=macs, latency_ms=latency, columns=columns
    )


def test_pareto_keeps_the_first_of_equal_options() -> None:
    assert pareto([0.5, 0.5, 0.1], [[2], [2], [3]]).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("made_for", "asked", "words"),
    [
        (
            {"name": "error", "rel_error": 0.3},
            {"name": "error", "rel_error": 0.6},
            "rel_error=0.3, not for rel_error=0.6",
        ),
        ({"name": "fixed", "ranks": {"3": 4}}, {"name": "fixed", "ranks": {"3": 6}}, "tabulated for ranks="),
        ({"name": "evbmf", "min_rank": 2}, {"name": "evbmf", "min_rank": 4}, "min_rank=2, not for min_rank=4"),
        ({"name": "global", "step": 4}, {"name": "global", "step": 2}, "step=4, not for step=2"),
    ],
)
def test_a_table_of_other_settings_is_refused(
    net: nn.Module, costs: Profile, made_for: dict[str, object], asked: dict[str, object], words: str
) -> None:
    """Its rows, or the errors of the few ranks that were fitted, would answer another question in silence."""
    made = tabulate(net, costs, RECIPE.replace(rule=made_for))
    with pytest.raises(PlanError, match=words):
        choose(made, RECIPE.replace(rule=asked))


def test_settings_that_only_select_may_change(net: nn.Module, costs: Profile) -> None:
    evbmf = RECIPE.replace(rule={"name": "evbmf", "min_rank": 2, "weaken": 0.8}, budget=Budget())
    less = evbmf.replace(rule={"name": "evbmf", "min_rank": 2, "weaken": 0.4})
    assert choose(tabulate(net, costs, evbmf), less).layers == plan(net, costs, less).layers


def test_a_plan_claims_the_recipe_that_its_table_was_made_for(table: OptionTable) -> None:
    made = choose(table, Recipe.of("macs=0.6"))
    assert made.recipe == table.recipe.replace(budget=Budget(macs=0.6))


def test_the_lowest_that_is_said_can_be_met(net: nn.Module, costs: Profile, table: OptionTable) -> None:
    for rule in ("global", "energy"):
        own = table if rule == "global" else tabulate(net, costs, RECIPE.replace(rule={"name": rule}))
        for kind in ("macs", "params"):
            with pytest.raises(BudgetError) as refused:
                choose(own, own.recipe.replace(budget=Budget.of({kind: 1e-3})))
            said = re.search(rf"can reach is ({kind}=[0-9.]+) \((max_{kind}=(\d+))\)\. ", str(refused.value))
            assert said, refused.value
            for budget in said.groups()[:2]:
                choose(own, own.recipe.replace(budget=Budget.parse(budget)))
            with pytest.raises(BudgetError):
                choose(own, own.recipe.replace(budget=Budget.of({f"max_{kind}": int(said[3]) - 1})))


def test_what_stays_is_said_by_reason_the_biggest_first() -> None:
    layers = [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 32))
    recipe = Recipe.of(
        {"budget": "macs=0.01", "formats": ["tucker2", "low_rank"], "keep": ["0", "3"], "keep_ends": False}
    )
    with pytest.raises(BudgetError) as refused:
        plan(net, profile(net, torch.zeros(1, 8, 8, 8)), recipe)
    stays = re.search(r"What stays of the MACs: (.*?)\. Raise the budget, or try: (.*)", str(refused.value))
    assert stays, refused.value
    *groups, rest = stays[1].split("; ")
    assert [group.partition(" in ")[2] for group in groups[:2]] == [
        "1 layer: kept as asked by '3'",
        "1 layer: kept as asked by '0'",
    ]
    assert "in 2 layers: a depthwise convolution" in stays[1]
    assert rest.endswith("as the least of the 1 that can be factorized")
    assert "keep fewer layers than keep='0' and '3'" in stays[2]
    lowest = re.search(r"can reach is macs=([0-9.]+) ", str(refused.value))
    assert lowest
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%", stays[1])]
    assert sum(shares) == pytest.approx(100 * float(lowest[1]), abs=0.3)


def test_budgets_that_exclude_each_other_name_the_lowest_of_each(table: OptionTable) -> None:
    options = FormatOptions(  # either few parameters or few MACs, and never both
        format="low_rank",
        names=("rank",),
        ranks=[[1], [2]],
        params=[10, 90],
        macs=[90, 10],
        columns={"distortion": [0.5, 0.5]},
    )
    layer = table.layer("7").replace(before=Cost(params=100, macs=100), options=(options,))
    either = table.replace(before=layer.before, layers=(layer,))
    with pytest.raises(BudgetError, match=r"not all .*alone: params=0\.1 \(.*=10\) and macs=0\.1 \(.*=10\)"):
        choose(either, RECIPE.replace(budget=Budget(params=0.5, macs=0.5)))
