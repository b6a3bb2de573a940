"""Rules against the papers' values, brute force and their own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.allocation import rule_from, select
from tenfold.allocation.rules.fixed import Fixed
from tenfold.allocation.rules.threshold import Energy, ErrorBound, Ratio
from tenfold.decompositions import decompose
from tenfold.errors import BudgetError, PlanError, RankError, TenfoldError, UnknownNameError
from tenfold.formats import FORMATS
from tenfold.patterns import check_patterns, first_match, matches
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import Plan
from tenfold.testing import check_rule
from tenfold.testing.rule_laws import RULE_LAWS
from tests.allocation.small import beside, conv, pick, picks, selection

# ---- ratio


@pytest.mark.parametrize(
    ("out", "inner", "rho", "ranks"),
    [(512, 512, 2, (309, 309)), (128, 64, 2, (67, 42)), (64, 64, 3, (30, 30)), (256, 128, 4, (88, 55))],
)
def test_ratio_gives_muscos_ranks(out, inner, rho, ranks):
    found = pick(conv(out, inner), Ratio(share=1 / rho, of="params"))
    assert (found.format, found.rank) == ("tucker2", {"out": ranks[0], "in": ranks[1]})


def test_ratio_stays_within_the_modes_where_musco_does_not():
    layer = conv(128, 512)
    found = pick(layer, Ratio(share=1 / 1.1, of="params"))  # MUSCO: 211 outputs of 128
    assert found.rank["out"] <= 128
    assert found.cost.params <= layer.weight.numel() / 1.1


@pytest.mark.parametrize(("k", "share"), [(1, 0.5), (0, 0.3), (3, 0.25)])
def test_ratio_of_a_matrix_is_the_closed_form(k, share):
    found = pick(conv(48, 32, k), Ratio(share=share, of="params"), formats=("low_rank",))
    assert found.rank == {"rank": math.floor(share * 48 * 32 * max(k * k, 1) / (48 + 32 * max(k * k, 1)))}


def test_ratio_of_macs_counts_the_stride():
    model = beside(layer=conv(32, 32, stride=(2, 2)))
    (found,) = picks(model, Ratio(share=0.5, of="macs"), formats=("tucker2",))
    layer = model.eligible("layer")
    above = layer.cost_at("tucker2", {k: v + 1 for k, v in found.rank.items()}).macs
    assert found.cost.macs <= layer.cost.macs / 2 < above
    assert found.rank != picks(model, Ratio(share=0.5, of="params"), formats=("tucker2",))[0].rank


def test_ratio_meets_a_budget_as_closely_as_one_share_for_all_can():
    model = beside(conv(16, 16), conv(24, 16), conv(20, 30, 0))
    limit = 0.5 * model.profile.macs
    table = model.table(Ratio(), ("tucker2", "low_rank"))
    best = 0
    for share in np.linspace(0.01, 1, 400):
        macs = select(table, table.recipe.replace(rule=Ratio(share=float(share)).to_dict())).cost.macs
        best = max(best, macs if macs <= limit else 0)
    assert best <= selection(model, Ratio(), {"macs": limit}).cost.macs <= limit


def test_a_second_limit_binds_too():
    model = beside(conv(16, 16), conv(20, 30, 0))
    macs, params = 0.7 * model.profile.macs, 0.4 * model.profile.params
    one = selection(model, Ratio(), {"macs": macs})
    both = selection(model, Ratio(), {"macs": macs, "params": params})
    assert one.cost.params > params >= both.cost.params


def test_impossible_budgets_name_the_lowest_cost():
    model = beside(layer=conv(16, 16))
    least = model.eligible("layer").saving_family("tucker2")[0][1].macs
    words = rf"the rule ratio can reach is macs=0\.\d+ \(max_macs={least}\)\. .*Raise the budget"
    with pytest.raises(BudgetError, match=words):
        selection(model, Ratio(), {"macs": 10.0})
    with pytest.raises(BudgetError, match="needs a number of its own or a budget"):
        selection(model, Ratio())


def test_the_global_rule_names_the_lowest_cost_too():
    model, rule = beside(conv(16, 16)), rule_from("global")
    (layer,) = model.table(rule, ("tucker2", "low_rank")).layers
    least = min(int(options.macs.min()) for options in layer.options)
    with pytest.raises(
        BudgetError, match=rf"formats and layers can reach is macs=0\.\d+ \(max_macs={least}\)\. .*Raise"
    ):
        selection(model, rule, {"macs": 10.0})


def test_a_budget_that_is_met_keeps_everything():
    model = beside(conv(16, 16))
    (found,) = picks(model, Ratio(), {"macs": model.profile.macs})
    assert (found.format, found.reason) == (None, "the budget is met as it is")


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 1.5}, {"share": -1}, {"of": "flops"}])
def test_ratio_refuses_nonsense(settings):
    with pytest.raises(TenfoldError):
        Ratio(**settings)


def test_what_saves_nothing_is_kept_with_the_reason():
    found = pick(conv(2, 2, 0), Ratio(share=0.9))
    assert found.format is None
    assert "low_rank" in found.reason


def test_the_first_format_that_saves_is_taken():
    found = picks(beside(conv(8, 8, 1), conv(8, 8, 3)), Ratio(share=0.5))
    assert [p.format for p in found] == ["low_rank", "tucker2"]


# ---- energy


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2"])
def test_energy_keeps_its_promise_with_the_smallest_ranks(bound, format):
    weight = (
        torch.randn(24, 24, 3, 3)
        * 0.6 ** torch.arange(24)[:, None, None]
        * 0.6 ** torch.arange(24)[:, None, None, None]
    )
    model = beside(layer=conv(24, 24, weight=weight))
    (found,) = picks(model, Energy(rel_error=bound), formats=(format,))
    assert decompose(weight, format, found.rank).rel_error <= bound
    share = bound**2 / len(found.rank)
    for name, matrix in FORMATS.get(format).unfoldings(weight[None], model.eligible("layer").spec).items():
        squares = np.linalg.svd(matrix[0].double().numpy(), compute_uv=False) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum()  # tails[r] is dropped at rank r
        assert tails[found.rank[name]] <= share * (1 + 1e-9)
        assert found.rank[name] == 1 or tails[found.rank[name] - 1] > share


def test_energy_is_the_same_bound_by_another_name():
    layer = conv(16, 16, weight=torch.randn(16, 16, 3, 3) * 0.5 ** torch.arange(16)[:, None, None])
    assert pick(layer, Energy(rel_error=0.6)) == pick(layer, Energy(energy=0.64))


def test_energy_gives_the_layer_with_the_steeper_spectrum_the_smaller_rank():
    steep = torch.randn(32, 32) * 0.7 ** torch.arange(32)
    model = beside(conv(32, 32, 0, steep), conv(32, 32, 0, torch.randn(32, 32) * 0.95 ** torch.arange(32)))
    a, b = picks(model, Energy(), {"params": 0.5 * model.profile.params})
    assert a.rank["rank"] < b.rank["rank"]


def test_energy_of_zero_is_rank_one():
    assert pick(conv(16, 16, 0, torch.zeros(16, 16)), Energy(rel_error=0.1)).rank == {"rank": 1}


@pytest.mark.parametrize(
    "settings", [{"rel_error": 0}, {"rel_error": 1.0}, {"energy": 2}, {"rel_error": 0.1, "energy": 0.9}]
)
def test_energy_refuses_nonsense(settings):
    with pytest.raises(TenfoldError):
        Energy(**settings)


# ---- fixed


def fixed(paths: tuple[str, ...], ranks: dict, **recipe: object) -> Plan:
    """Return the plan by given ranks of 16 → 16 convolutions at these paths."""
    model, x = nn.Sequential(), torch.zeros(1, 16, 8, 8)
    for path in paths:
        holder = model
        *parents, name = path.split(".")
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Sequential())
            holder = getattr(holder, parent)
        holder.add_module(name, conv(16, 16))
    formats = ("tucker2", "low_rank")
    return plan(model, profile(model, x), {"rule": Fixed(ranks).to_dict(), "formats": formats, **recipe})


def test_fixed_takes_numbers_names_and_patterns_first_match_first():
    paths = ("body.0", "body.1", "head")
    made = fixed(paths, {"body.1": {"out": 4}, "body.*": 3, "re:he.d": {"in": 5, "out": 6}})
    assert [p.rank for p in made.layers] == [{"out": 3, "in": 3}, {"out": 4, "in": 16}, {"out": 6, "in": 5}]
    assert made.layers[0].reason == "rank given for 'body.*'"
    kept = fixed(paths, {"head": 2}).layers[0]
    assert (kept.action, kept.reason) == ("keep", "no rank was given for this layer")


def test_fixed_checks_patterns_ranks_and_budgets():
    paths = ("layer1.conv1", "layer1.conv2")
    with pytest.raises(UnknownNameError, match=r"no layer matches 'layer1.conv3'\. Did you mean layer1.conv"):
        fixed(paths, {"layer1.conv3": 2})
    with pytest.raises(
        RankError, match=r"tucker2 rank out=99 is outside 1\.\.16 for a weight of shape \(16, 16, 3, 3\)"
    ):
        fixed(paths, {"*": 99})
    with pytest.raises(BudgetError, match=r"the rule fixed with these ranks can reach is macs=.*or try: .*lower ranks"):
        fixed(paths, {"*": 8}, budget={"max_macs": 1000.0})
    made = fixed(paths, {"*": 16})
    assert made.layers[0].reason == "tucker2 at the given rank would not make the layer cheaper"


# ---- names


def test_patterns():
    assert matches("a.b", "a.b")
    assert matches("a.*", "a.b.c")
    assert not matches("a.?", "a.bc")
    assert matches("re:a\\.(b|c)", "a.c")
    assert not matches("re:a", "ab")
    assert not matches("A.b", "a.b")
    assert first_match(["x", "a.*"], "q", aliases=["a.b"]) == "a.*"
    with pytest.raises(PlanError, match="is not a regular expression"):
        matches("re:(", "a")
    check_patterns(["a", "b*"], ["a", "bc"])


def test_rules_by_name():
    assert rule_from("ratio", share=0.4) == Ratio(share=0.4)
    with pytest.raises(UnknownNameError, match=r"unknown rank rule 'ratoi'. Did you mean ratio"):
        rule_from("ratoi")
    with pytest.raises(TenfoldError, match="the rule ratio has the settings share, of, not shares"):
        rule_from("ratio", shares=0.4)
    assert Ratio(share=0.4).to_dict() == {"name": "ratio", "share": 0.4, "of": "macs"}


@pytest.mark.parametrize(
    "rule",
    [Ratio(share=0.5), Ratio(share=0.3, of="params"), Ratio(of="params"), Energy(rel_error=0.3), Energy(energy=0.5)],
    ids=str,
)
def test_rules_with_numbers_of_their_own_obey_the_laws(rule):
    RULE_LAWS["choices"](rule)


def test_a_rule_object_can_be_checked_whole():
    check_rule(Fixed())


# ---- a number and a budget


def test_a_number_holds_beside_a_budget_or_is_refused():
    model = beside(conv(24, 24), conv(32, 24, 0))
    now = model.profile.macs
    for rule in (Ratio(share=0.3), Energy(rel_error=0.6), Energy(energy=0.6), ErrorBound(rel_error=0.6)):
        alone = selection(model, rule)
        cost = alone.cost.macs
        assert cost < 0.9 * now
        for limit in (now, cost):  # met before, or just so
            assert selection(model, rule, {"macs": limit}) == alone
        (name,) = (name for name in rule.numbers if getattr(rule, name) is not None)
        words = rf"with {name}=0\.\d can reach is macs=.* \(max_macs={cost}\).*leave it out"
        with pytest.raises(BudgetError, match=words):
            selection(model, rule, {"macs": cost - 1})
        assert selection(model, rule.without_number(), {"macs": cost - 1}).cost.macs < cost
