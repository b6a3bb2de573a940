"""The same drop for every layer: the smallest rank that scores well enough, with few questions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import Any

import pytest
import torch
from tenfold.ranks import RankProblem, rule_from
from tenfold.ranks.accuracy_drop import AccuracyDrop, _bisect, _gallop
from torch import nn

from tenfold.errors import BudgetError, RankError, TenfoldError
from tenfold.formats import Rank
from tenfold.planning import Sensitivity, plan
from tenfold.profiling import profile
from tenfold.records import Call, Cost, LayerSpec
from tests.planning.fakes import Scorer, costs, inputs, net

SIZE = 128
FORMATS = ("tucker2", "low_rank")


def problem(path: str, size: int = SIZE) -> RankProblem:
    spec = LayerSpec(kind="linear", in_channels=size, out_channels=size)
    call = Call(in_shape=(1, size), out_shape=(1, size))
    cost = Cost(params=spec.num_params, macs=spec.macs((1, size)))
    return RankProblem(path, spec, ("low_rank",), (call,), cost, lambda: torch.zeros(1, size, size))


class Table:
    """Scores that fall below 0.9 − drop exactly under a rank, by layer; the error is 1 − rank/size."""

    baseline = 0.9

    def __init__(self, needs: dict[str, int], drop: float = 0.01, *, error: float = 1.0) -> None:
        self.needs, self.drop, self.slope = needs, drop, error
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


@pytest.mark.parametrize("needs", [1, 2, 17, 40, 63])
def test_finds_the_smallest_rank_that_is_good_enough(needs: int) -> None:
    table = Table({"a": needs})
    (choice,) = AccuracyDrop(drop=0.01, scores=table).select([problem("a")])
    assert choice.rank == {"rank": needs}  # type: ignore[union-attr]
    assert len(table.asked) <= 2 * ceil(log2(63)) + 1


def test_a_layer_that_no_rank_serves_is_kept_with_the_reason() -> None:
    table = Table({"a": SIZE, "b": 30})
    kept, taken = AccuracyDrop(drop=0.01, scores=table).select([problem("a"), problem("b")])
    assert kept.reason == "every rank that is cheaper costs more than 1 points of score"  # type: ignore[union-attr]
    assert taken.rank == {"rank": 30}  # type: ignore[union-attr]


def test_the_error_says_where_to_look_and_the_score_decides() -> None:
    needs = {str(i): 10 + 5 * i for i in range(10)}
    told, lied = Table(needs), Table(needs, error=-1.0)
    problems = [problem(path) for path in needs]
    for table in (told, lied):
        choices = AccuracyDrop(drop=0.01, scores=table).select(problems)
        assert [c.rank["rank"] for c in choices] == list(needs.values())  # type: ignore[union-attr]
    later = [path for path, _ in told.asked if path != "0"]
    assert len(later) <= 3 * 9  # the rank that will do, that the one below will not, and what rounding takes
    assert len(told.asked) < len(lied.asked)


def test_every_rank_that_scores_exactly_enough_is_enough() -> None:
    scores = Table({"a": 20}, drop=0.005)  # loses exactly 0.01 below rank 20: 0.9 - 0.01 rounds to below 0.89
    (choice,) = AccuracyDrop(drop=0.01, scores=scores).select([problem("a")])
    assert choice.rank == {"rank": 1}  # type: ignore[union-attr]


def test_steps_try_a_coarser_grid() -> None:
    table = Table({"a": 17})
    (choice,) = AccuracyDrop(drop=0.01, step=8, scores=table).select([problem("a")])
    assert choice.rank == {"rank": 24}  # type: ignore[union-attr]
    assert all(rank % 8 == 0 for _, rank in table.asked)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.9])
def test_a_budget_sets_the_drop(share: float) -> None:
    needs = {"a": 60, "b": 20}
    problems = [problem(path) for path in needs]
    limit = share * sum(p.cost.macs for p in problems)
    table = Table(needs)
    choices = AccuracyDrop(scores=table).select(problems, {"macs": limit})
    ranks = [getattr(c, "rank", {"rank": SIZE // 2})["rank"] for c in choices]
    used = sum(2 * SIZE * r for r in ranks)
    assert used <= limit
    assert used >= limit - 2 * SIZE * 4 or ranks == [60, 20]  # more would gain nothing
    if share == 0.3:  # 38 components for both, at one drop: a/60 = b/20
        assert abs(ranks[0] / 60 - ranks[1] / 20) < 0.06
    assert table.asked == []


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TenfoldError, match=r"drop=1.5 must be in"):
        AccuracyDrop(drop=1.5)
    with pytest.raises(RankError, match="step=0"):
        AccuracyDrop(step=0)
    with pytest.raises(BudgetError, match=r"needs scores of the model"):
        rule_from("accuracy_drop", drop=0.01).select([problem("a")])
    with pytest.raises(BudgetError, match="a number of its own or a budget"):
        AccuracyDrop(scores=Table({"a": 3})).select([problem("a")])
    with pytest.raises(BudgetError, match="cannot be met"):
        AccuracyDrop(scores=Table({"a": 3})).select([problem("a")], {"macs": 10})


@pytest.mark.parametrize("size", [0, 1, 2, 7, 30])
def test_searches_agree_with_looking_at_everything(size: int) -> None:
    for first in range(size + 1):
        assert _bisect(lambda i, first=first: i >= first, 0, size) == first  # type: ignore[misc]
        for guess in range(size + 2):
            seen: list[int] = []

            def good(i: int, seen: list[int] = seen, first: int = first) -> bool:
                seen.append(i)
                return i >= first

            assert _gallop(good, guess, size) == first
            assert len(seen) == len(set(seen))
            assert all(0 <= i < size for i in seen)


def test_the_plan_keeps_the_drop_and_a_second_one_costs_nothing(tmp_path: Any) -> None:
    model, file = net(), tmp_path / "table.json"
    weights = {"3": 0.9, "7": 0.04}
    scorer = Scorer(weights)
    found = Sensitivity(model, costs(model), formats=FORMATS, evaluate=scorer, path=file)
    rule = AccuracyDrop(drop=0.05, scores=found)
    made = plan(model, costs(model), rule=rule, formats=FORMATS, keep=["0", "9"])
    assert made.rule == {"name": "accuracy_drop", "drop": 0.05, "step": 1}
    assert made.layer("7").rank == {"rank": 1}
    assert "as measured" in made.layer("7").reason
    assert made.layer("3").action == "keep"  # 0.9·(1 − r/16) ≤ 0.05 from r = 16 on, which saves nothing
    assert "costs more than 5 points" in made.layer("3").reason
    again = Sensitivity(model, costs(model), formats=FORMATS, evaluate=Scorer(weights, stop=0), path=file)
    assert (
        plan(model, costs(model), rule=AccuracyDrop(drop=0.05, scores=again), formats=FORMATS, keep=["0", "9"]) == made
    )
    half = plan(model, costs(model), rule=AccuracyDrop(scores=found), formats=FORMATS, budget={"macs": 0.7})
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
    found = Sensitivity(model, cost, evaluate=evaluate, calibration=[x[:64]], formats=["low_rank"])
    made = plan(model, cost, rule=AccuracyDrop(drop=0.3, scores=found), formats=["low_rank"], keep_ends=False)
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
        return Sensitivity(model, costs(model), formats=["cp3"], evaluate=evaluate, path=tmp_path / "table.json")

    scores = search()
    rule = AccuracyDrop(drop=0.02, scores=scores)
    made = plan(model, costs(model), rule=rule, formats=["cp3"], keep=["0", "7", "9"])
    rank = (made.layer("3").rank or {})["rank"]
    assert scores.score("3", "cp3", {"rank": rank}) >= scores.baseline - 0.02
    assert scores.score("3", "cp3", {"rank": rank - 1}) < scores.baseline - 0.02
    assert 2 <= rank <= 8
    again = AccuracyDrop(drop=0.02, scores=search())
    assert plan(model, costs(model), rule=again, formats=["cp3"], keep=["0", "7", "9"]) == made


def low_rank_kernel(rank: int) -> torch.Tensor:
    """Return a kernel (16, 16, 3, 3) of that CP rank."""
    a, b, c = (torch.randn(n, rank) for n in (16, 16, 9))
    return torch.einsum("or,ir,kr->oik", a, b, c).reshape(16, 16, 3, 3) / 10
