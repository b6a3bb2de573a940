"""Rules against the papers' values, brute force and their own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tenfold.ranks import Choose, Keep, RankProblem, check_patterns, first_match, matches, rule_from, total_cost
from tenfold.ranks.candidates import grids
from tenfold.ranks.energy import Energy
from tenfold.ranks.error_bound import ErrorBound
from tenfold.ranks.ratio import Ratio

from tenfold.allocation.rules.fixed import Fixed
from tenfold.errors import BudgetError, PlanError, RankError, TenfoldError, UnknownNameError
from tenfold.formats import FORMATS, split_groups
from tenfold.records import Call, Cost, LayerSpec
from tenfold.testing import check_rule
from tenfold.testing.rule_laws import RULE_LAWS


def problem(out, inner, k=3, formats=("tucker2", "low_rank"), weight=None, path="layer", size=8, **options):
    kind = "conv" if k else "linear"
    kernel = (k, k) if k else ()
    padding = (k // 2, k // 2) if k else ()
    spec = LayerSpec(kind=kind, in_channels=inner, out_channels=out, kernel=kernel, padding=padding, **options)
    weight = torch.randn(spec.weight_shape) if weight is None else weight
    shape = (1, inner, size, size) if k else (1, inner)
    return RankProblem(
        path=path,
        spec=spec,
        formats=tuple(f for f in formats if FORMATS.get(f).unsupported_reason(spec) is None),
        calls=(Call(in_shape=shape),),
        cost=Cost(params=spec.num_params, macs=spec.macs(shape)),
        load_weight=lambda: split_groups(weight, spec),
    )


# ---- ratio


@pytest.mark.parametrize(
    ("out", "inner", "rho", "ranks"),
    [(512, 512, 2, (309, 309)), (128, 64, 2, (67, 42)), (64, 64, 3, (30, 30)), (256, 128, 4, (88, 55))],
)
def test_ratio_gives_muscos_ranks(out, inner, rho, ranks):
    (choice,) = Ratio(share=1 / rho, of="params").select([problem(out, inner)])
    assert choice == Choose("tucker2", {"out": ranks[0], "in": ranks[1]}, choice.note)


def test_ratio_stays_within_the_modes_where_musco_does_not():
    layer = problem(128, 512)
    (choice,) = Ratio(share=1 / 1.1, of="params").select([layer])  # MUSCO: 211 outputs of 128
    assert choice.rank["out"] <= 128
    assert layer.cost_at("tucker2", choice.rank).params <= layer.cost.params / 1.1


@pytest.mark.parametrize(("k", "share"), [(1, 0.5), (0, 0.3), (3, 0.25)])
def test_ratio_of_a_matrix_is_the_closed_form(k, share):
    layer = problem(48, 32, k, formats=["low_rank"])
    (choice,) = Ratio(share=share, of="params").select([layer])
    assert choice.rank == {"rank": math.floor(share * 48 * 32 * max(k * k, 1) / (48 + 32 * max(k * k, 1)))}


def test_ratio_of_macs_counts_the_stride():
    spec = {"stride": (2, 2)}
    layer = problem(32, 32, formats=["tucker2"], **spec)
    (choice,) = Ratio(share=0.5, of="macs").select([layer])
    now = layer.cost_at("tucker2", choice.rank).macs
    above = layer.cost_at("tucker2", {k: v + 1 for k, v in choice.rank.items()}).macs
    assert now <= layer.cost.macs / 2 < above
    assert choice.rank != Ratio(share=0.5, of="params").select([layer])[0].rank


def test_ratio_meets_a_budget_as_closely_as_one_share_for_all_can():
    layers = [problem(16, 16, path="a"), problem(24, 16, path="b"), problem(20, 30, 0, path="c")]
    total = sum((p.cost for p in layers), Cost())
    choices = Ratio().select(layers, {"macs": 0.5 * total.macs})
    best = 0
    for share in np.linspace(0.01, 1, 400):
        macs = total_cost(layers, Ratio(share=float(share)).select(layers)).macs
        best = max(best, macs if macs <= 0.5 * total.macs else 0)
    assert total_cost(layers, choices).macs >= best


def test_a_second_limit_binds_too():
    layers = [problem(16, 16, path="a"), problem(20, 30, 0, path="c")]
    total = sum((p.cost for p in layers), Cost())
    one = Ratio().select(layers, {"macs": 0.7 * total.macs})
    both = Ratio().select(layers, {"macs": 0.7 * total.macs, "params": 0.4 * total.params})
    assert total_cost(layers, one).params > 0.4 * total.params >= total_cost(layers, both).params


def test_impossible_budgets_name_the_lowest_cost():
    layer = problem(16, 16)
    least = layer.family("tucker2")[0][1].macs
    with pytest.raises(BudgetError, match=rf"macs 10 \(lowest {least:,}\)\. Raise the budget"):
        Ratio().select([layer], {"macs": 10.0})
    with pytest.raises(BudgetError, match="needs a number of its own or a budget"):
        Ratio().select([layer])


def test_the_global_rule_names_the_lowest_cost_too():
    layer = problem(16, 16)
    least = min(int(grid.macs.min()) for grid in grids(layer))
    with pytest.raises(BudgetError, match=rf"layers that can be factorized .* macs 10 \(lowest {least:,}\)\. Raise"):
        rule_from("global").select([layer], {"macs": 10.0})


def test_a_budget_that_is_met_keeps_everything():
    layer = problem(16, 16)
    assert Ratio().select([layer], {"macs": layer.cost.macs}) == (Keep("the budget is met as it is"),)


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 1.5}, {"share": -1}, {"of": "flops"}])
def test_ratio_refuses_nonsense(settings):
    with pytest.raises(TenfoldError):
        Ratio(**settings)


def test_what_saves_nothing_is_kept_with_the_reason():
    (choice,) = Ratio(share=0.9).select([problem(2, 2, 0)])
    assert isinstance(choice, Keep)
    assert "low_rank" in choice.reason


def test_the_first_format_that_saves_is_taken():
    one, two = problem(8, 8, 1), problem(8, 8, 3)
    assert [c.format for c in Ratio(share=0.5).select([one, two])] == ["low_rank", "tucker2"]


# ---- energy


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2"])
def test_energy_keeps_its_promise_with_the_smallest_ranks(bound, format):
    from tenfold.decompositions import decompose

    weight = (
        torch.randn(24, 24, 3, 3)
        * 0.6 ** torch.arange(24)[:, None, None]
        * 0.6 ** torch.arange(24)[:, None, None, None]
    )
    layer = problem(24, 24, formats=[format], weight=weight)
    (choice,) = Energy(rel_error=bound).select([layer])
    assert decompose(weight, format, choice.rank).rel_error <= bound
    share = bound**2 / len(choice.rank)
    for name, matrix in FORMATS.get(format).unfoldings(weight[None], layer.spec).items():
        squares = np.linalg.svd(matrix[0].double().numpy(), compute_uv=False) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum()  # tails[r] is dropped at rank r
        assert tails[choice.rank[name]] <= share * (1 + 1e-9)
        assert choice.rank[name] == 1 or tails[choice.rank[name] - 1] > share


def test_energy_is_the_same_bound_by_another_name():
    layer = problem(16, 16, weight=torch.randn(16, 16, 3, 3) * 0.5 ** torch.arange(16)[:, None, None])
    assert Energy(rel_error=0.6).select([layer]) == Energy(energy=0.64).select([layer])


def test_energy_gives_the_layer_with_the_steeper_spectrum_the_smaller_rank():
    steep = torch.randn(32, 32) * 0.7 ** torch.arange(32)
    layers = [
        problem(32, 32, 0, weight=steep),
        problem(32, 32, 0, weight=torch.randn(32, 32) * 0.95 ** torch.arange(32)),
    ]
    total = sum((p.cost for p in layers), Cost())
    a, b = Energy().select(layers, {"params": 0.5 * total.params})
    assert a.rank["rank"] < b.rank["rank"]


def test_energy_of_zero_is_rank_one():
    (choice,) = Energy(rel_error=0.1).select([problem(16, 16, 0, weight=torch.zeros(16, 16))])
    assert choice.rank == {"rank": 1}


@pytest.mark.parametrize(
    "settings", [{"rel_error": 0}, {"rel_error": 1.0}, {"energy": 2}, {"rel_error": 0.1, "energy": 0.9}]
)
def test_energy_refuses_nonsense(settings):
    with pytest.raises(TenfoldError):
        Energy(**settings)


# ---- fixed


def test_fixed_takes_numbers_names_and_patterns_first_match_first():
    layers = [problem(16, 16, path=p) for p in ("body.0", "body.1", "head")]
    choices = Fixed({"body.1": {"out": 4}, "body.*": 3, "re:he.d": {"in": 5, "out": 6}}).select(layers)
    assert [c.rank for c in choices] == [{"out": 3, "in": 3}, {"out": 4, "in": 16}, {"out": 6, "in": 5}]
    assert choices[0].note == "rank given for 'body.*'"
    assert Fixed({"head": 2}).select(layers)[0] == Keep("no rank was given for this layer")


def test_fixed_checks_patterns_ranks_and_budgets():
    layers = [problem(16, 16, path="layer1.conv1"), problem(16, 16, path="layer1.conv2")]
    with pytest.raises(UnknownNameError, match=r"no layer matches 'layer1.conv3'\. Did you mean layer1.conv"):
        Fixed({"layer1.conv3": 2}).select(layers)
    with pytest.raises(
        RankError, match=r"tucker2 rank out=99 is outside 1\.\.16 for a weight of shape \(16, 16, 3, 3\)"
    ):
        Fixed({"*": 99}).select(layers)
    with pytest.raises(BudgetError, match=r"the fixed ranks cost .* over the budget: lower them"):
        Fixed({"*": 8}).select(layers, {"macs": 1000.0})
    (choice, _) = Fixed({"*": 16}).select(layers)
    assert choice == Keep("tucker2 at the given rank would not make the layer cheaper")


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
    layers = [problem(24, 24, path="a"), problem(32, 24, 0, path="b")]
    now = sum(p.cost.macs for p in layers)
    for rule in (Ratio(share=0.3), Energy(rel_error=0.6), Energy(energy=0.6), ErrorBound(rel_error=0.6)):
        alone = rule.select(layers)
        cost = total_cost(layers, alone).macs
        assert cost < 0.9 * now
        for limit in (now, cost):  # met before, or just so
            assert rule.select(layers, {"macs": limit}) == alone
        (name,) = (name for name in rule.numbers if getattr(rule, name) is not None)
        words = rf"with {name}=0\.\d does not meet the budget.* keep macs {cost:,} \(allowed .*leave it out"
        with pytest.raises(BudgetError, match=words):
            rule.select(layers, {"macs": cost - 1})
        assert total_cost(layers, rule.without_number().select(layers, {"macs": cost - 1})).macs < cost
