"""The same drop for every layer: the smallest rank that scores well enough, with few questions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import Any

import pytest
import torch
from torch import nn

from tenfold.allocation import rule_from
from tenfold.allocation.rules.threshold import AccuracyDrop
from tenfold.errors import BudgetError, RankError, TenfoldError
from tenfold.formats import Rank
from tenfold.planning import Score, Sensitivity, plan
from tenfold.planning.rule_columns import _bisect, gallop
from tenfold.profiling import profile
from tenfold.records import Metric, Plan, Recipe
from tenfold.records.metric import FRACTION
from tenfold.testing.tables import SideBySide
from tests.allocation.small import beside, conv, picks
from tests.planning.fakes import BASELINE, Scorer, costs, inputs, net

SIZE = 128
FORMATS = ("tucker2", "low_rank")
ONE = {"formats": ("low_rank",)}


def layers(*names: str) -> SideBySide:
    return beside(**{f"layer_{name}": conv(SIZE, SIZE, 0, torch.zeros(SIZE, SIZE)) for name in names})


class Table:
    """Scores that fall below 0.9 − drop exactly under a rank, by layer; the error is 1 − rank/size."""

    baseline, metric = 0.9, FRACTION

    def __init__(self, needs: dict[str, int], drop: float = 0.01, *, error: float = 1.0) -> None:
        self.needs = {f"layer_{name}": rank for name, rank in needs.items()}
        self.drop, self.slope = drop, error
        self.asked: list[tuple[str, int]] = []

    def score(self, path: str, format: str, rank: Rank) -> float:
        assert (path, rank["rank"]) not in self.asked, "asked twice"
        self.asked.append((path, rank["rank"]))
        return self.baseline - (0 if rank["rank"] >= self.needs[path] else 2 * self.drop)

    def errors(self, path: str, format: str, ranks: Sequence[Rank]) -> list[float]:
        assert len(ranks) <= 8
        return [1 + self.slope * (self.needs[path] - r["rank"]) / SIZE for r in ranks]

    def curve(self, path: str, format: str, ranks: Sequence[Rank]) -> list[float]:
        """A straight line from 0.4 at the smallest rank up to the baseline at ``needs``."""
        return [0.9 - 0.5 * max(0, self.needs[path] - r["rank"]) / self.needs[path] for r in ranks]

    def distortion_at(self, path: str, format: str) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("needs", [1, 2, 17, 40, 63])
def test_finds_the_smallest_rank_that_is_good_enough(needs: int) -> None:
    table = Table({"a": needs})
    (found,) = picks(layers("a"), AccuracyDrop(drop=0.01), scores=table, **ONE)
    assert found.rank == {"rank": needs}
    assert len(table.asked) <= 2 * ceil(log2(63)) + 1


def test_a_layer_that_no_rank_serves_is_kept_with_the_reason() -> None:
    table = Table({"a": SIZE, "b": 30})
    kept, taken = picks(layers("a", "b"), AccuracyDrop(drop=0.01), scores=table, **ONE)
    assert (kept.format, kept.reason) == (None, "every rank that is cheaper costs the score more than 0.01")
    assert taken.rank == {"rank": 30}


def test_the_error_says_where_to_look_and_the_score_decides() -> None:
    needs = {str(i): 10 + 5 * i for i in range(10)}
    told, lied = Table(needs), Table(needs, error=-1.0)
    for table in (told, lied):
        found = picks(layers(*needs), AccuracyDrop(drop=0.01), scores=table, **ONE)
        assert [(pick.rank or {})["rank"] for pick in found] == list(needs.values())
    later = [path for path, _ in told.asked if path != "layer_0"]
    assert len(later) <= 3 * 9  # the rank that will do, that the one below will not, and what rounding takes
    assert len(told.asked) < len(lied.asked)


def test_every_rank_that_scores_exactly_enough_is_enough() -> None:
    scores = Table({"a": 20}, drop=0.005)  # loses exactly 0.01 below rank 20: 0.9 - 0.01 rounds to below 0.89
    (found,) = picks(layers("a"), AccuracyDrop(drop=0.01), scores=scores, **ONE)
    assert found.rank == {"rank": 1}


def test_steps_try_a_coarser_grid() -> None:
    table = Table({"a": 17})
    (found,) = picks(layers("a"), AccuracyDrop(drop=0.01, step=8), scores=table, **ONE)
    assert found.rank == {"rank": 24}
    assert all(rank % 8 == 0 for _, rank in table.asked)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.9])
def test_a_budget_sets_the_drop(share: float) -> None:
    table, model = Table({"a": 60, "b": 20}), layers("a", "b")
    limit = share * model.profile.macs
    found = picks(model, AccuracyDrop(), {"macs": limit}, scores=table, **ONE)
    ranks = [(pick.rank or {"rank": SIZE // 2})["rank"] for pick in found]
    used = sum(2 * SIZE * r for r in ranks)
    assert used <= limit
    assert used >= limit - 2 * SIZE * 4 or ranks == [60, 20]  # more would gain nothing
    if share == 0.3:  # 38 components for both, at one drop: a/60 = b/20
        assert abs(ranks[0] / 60 - ranks[1] / 20) < 0.06
    assert table.asked == []


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TenfoldError, match=r"drop=-0.5 must be 0 or more"):
        AccuracyDrop(drop=-0.5)
    with pytest.raises(BudgetError, match=r"drop=1.5 of a score that is a fraction must be in"):
        picks(layers("a"), AccuracyDrop(drop=1.5), scores=Table({"a": 3}), **ONE)
    with pytest.raises(RankError, match="step=0"):
        AccuracyDrop(step=0)
    with pytest.raises(BudgetError, match=r"needs scores of the model"):
        picks(layers("a"), rule_from("accuracy_drop", drop=0.01))
    with pytest.raises(BudgetError, match="a number of its own or a budget"):
        picks(layers("a"), AccuracyDrop(), scores=Table({"a": 3}), **ONE)
    with pytest.raises(BudgetError, match="cannot be met"):
        picks(layers("a"), AccuracyDrop(), {"macs": 10}, scores=Table({"a": 3}), **ONE)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 30])
def test_searches_agree_with_looking_at_everything(size: int) -> None:
    for first in range(size + 1):
        assert _bisect(lambda i, first=first: i >= first, 0, size) == first  # type: ignore[misc]
        for guess in range(size + 2):
            seen: list[int] = []

            def good(i: int, seen: list[int] = seen, first: int = first) -> bool:
                seen.append(i)
                return i >= first

            assert gallop(good, guess, size) == first
            assert len(seen) == len(set(seen))
            assert all(0 <= i < size for i in seen)


def dropping(model: nn.Module, scores: Sensitivity, drop: float | None = None, **recipe: Any) -> Plan:
    rule = AccuracyDrop(drop=drop).to_dict()
    return plan(model, costs(model), {"rule": rule, "formats": FORMATS, **recipe}, scores=scores)


def test_the_plan_keeps_the_drop_and_a_second_one_costs_nothing(tmp_path: Any) -> None:
    model, file = net(), tmp_path / "table.json"
    weights = {"3": 0.9, "7": 0.04}
    scorer = Scorer(weights)
    found = Sensitivity(model, costs(model), {"formats": FORMATS}, evaluate=scorer, path=file)
    made = dropping(model, found, 0.05, keep=["0", "9"])
    assert made.recipe.rule == {"name": "accuracy_drop", "drop": 0.05, "step": 1}
    assert made.layer("7").rank == {"rank": 1}
    assert "as measured" in made.layer("7").reason
    assert made.layer("3").action == "keep"  # 0.9·(1 − r/16) ≤ 0.05 from r = 16 on, which saves nothing
    assert "costs the score more than 0.05" in made.layer("3").reason
    again = Sensitivity(model, costs(model), {"formats": FORMATS}, evaluate=Scorer(weights, stop=0), path=file)
    assert dropping(model, again, 0.05, keep=["0", "9"]) == made
    half = dropping(model, found, budget={"macs": 0.7})
    assert 0.6 < half.after.macs / half.before.macs <= 0.7
    assert scorer.calls[0] == {}


def test_scores_of_a_network_confirm_the_drop() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    x = torch.randn(400, 32)
    labels = model(x).argmax(1)

    def evaluate(candidate: nn.Module) -> float:
        return float((candidate(x).argmax(1) == labels).double().mean())

    cost = profile(model, x[:1])
    recipe = Recipe(rule=AccuracyDrop(drop=0.3).to_dict(), formats="low_rank", keep_ends=False)
    found = Sensitivity(model, cost, recipe, evaluate=evaluate, batches=[x[:64]])
    made = plan(model, cost, recipe, scores=found)
    assert found.baseline == 1.0
    assert made.factorized
    for layer in made.factorized:
        rank = layer.rank or {}
        assert found.score(layer.path, "low_rank", rank) >= 0.7
        if rank["rank"] > 1:
            assert found.score(layer.path, "low_rank", {"rank": rank["rank"] - 1}) < 0.7


def test_cp_ranks_keep_the_drop_too(tmp_path: Any) -> None:
    """The per-layer bound of Phan et al. 2020: the smallest CP rank whose score falls by no more; the table resumes."""
    model = net()
    model[3].weight.data = low_rank_kernel(6) + 0.02 * torch.randn(16, 16, 3, 3)
    x = inputs(samples=32)
    target = model(x)

    def evaluate(candidate: nn.Module) -> float:
        with torch.no_grad():
            missed = (candidate(x) - target).square().mean() / target.var()
        return float(1 - missed)

    def search() -> Sensitivity:
        return Sensitivity(model, costs(model), {"formats": "cp3"}, evaluate=evaluate, path=tmp_path / "table.json")

    scores, recipe = search(), {"formats": "cp3", "keep": ["0", "7", "9"]}
    made = dropping(model, scores, 0.02, **recipe)
    rank = (made.layer("3").rank or {})["rank"]
    assert scores.score("3", "cp3", {"rank": rank}) >= scores.baseline - 0.02
    assert scores.score("3", "cp3", {"rank": rank - 1}) < scores.baseline - 0.02
    assert 2 <= rank <= 8
    assert dropping(model, search(), 0.02, **recipe) == made


def low_rank_kernel(rank: int) -> torch.Tensor:
    """Return a kernel (16, 16, 3, 3) of that CP rank."""
    a, b, c = (torch.randn(n, rank) for n in (16, 16, 9))
    return torch.einsum("or,ir,kr->oik", a, b, c).reshape(16, 16, 3, 3) / 10


def test_a_score_of_which_less_is_better_makes_the_plan_of_its_negative() -> None:
    """Perplexities with drops above 1, which no share of a fraction can be."""
    model, weights = net(), {"0": 0.1, "3": 0.3, "7": 0.6}
    cost, batches = costs(model), [inputs()]
    names = {1.0: Metric(name="perplexity", better="lower"), -1.0: Metric(name="negative perplexity")}

    def made(sign: float, rule: dict[str, Any], **recipe: Any) -> Plan:
        def evaluate(own: nn.Module) -> float:
            return sign * (5.0 + 40 * (BASELINE - Scorer(weights)(own)))

        score = Score(evaluate, metric=names[sign])
        found = Sensitivity(model, cost, {"formats": FORMATS}, evaluate=score, batches=batches)
        assert found.table.metric == names[sign]
        return plan(model, cost, {"rule": rule, "formats": FORMATS, **recipe}, scores=found)

    for rule, recipe in (
        ({"name": "accuracy_drop", "drop": 2.0}, {}),
        ({"name": "accuracy_drop", "drop": 8.0}, {}),
        ({"name": "accuracy_drop"}, {"budget": "macs=0.3"}),
        ({"name": "global"}, {"budget": "macs=0.3"}),
    ):
        lower, higher = (made(sign, rule, **recipe) for sign in names)
        assert lower.factorized
        assert lower == higher
    assert made(1.0, {"name": "accuracy_drop", "drop": 8.0}).after.macs < lower.before.macs
