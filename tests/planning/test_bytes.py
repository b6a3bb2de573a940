"""Budgets of bytes: counted in the dtype of each tensor, buffers included, and met by what is stored in the end."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import tenfold
from tenfold.allocation import choose
from tenfold.errors import BudgetError, TenfoldError, TuningError
from tenfold.explorer import Explorer
from tenfold.explorer.explorer import Query
from tenfold.explorer.view import initial_view
from tenfold.iterative import stages
from tenfold.planning import tabulate
from tenfold.profiling import profile
from tenfold.records import OptionTable, Plan, Recipe

QUIET = tenfold.Runtime(measure=False)
pytestmark = pytest.mark.filterwarnings("ignore::tenfold.errors.TenfoldWarning")


class Mixed(nn.Module):
    """Two equal layers, the first in half precision, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(48, 48, dtype=torch.bfloat16)
        self.norm, self.full, self.head = nn.BatchNorm1d(48), nn.Linear(48, 48), nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.relu(self.full(self.norm(self.low(x.bfloat16()).float()))))
        return scores


@pytest.fixture
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def stored(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def expected(table: OptionTable, plan: Plan) -> float:
    """Return the bytes of the whole model by the columns of its table."""
    total = float(table.bytes or 0)
    for layer in table.eligible:
        own, column = plan.layer(layer.path), layer.column("bytes")
        rows = [
            row
            for row in range(1, len(column))
            if (place := layer.place(row))[0].format == own.format and place[0].rank(place[1]) == own.rank
        ]
        total += column[rows[0]] - column[0] if own.action == "factorize" else 0
    return total


@pytest.mark.parametrize("formats", ["low_rank", "interpolative", "tt_matrix"])
def test_what_is_counted_is_what_is_stored(mixed: nn.Module, formats: str) -> None:
    recipe = {"budget": "bytes=0.6", "formats": formats, "keep": ["head"]}
    result = tenfold.compress(mixed, torch.zeros(1, 48), recipe, runtime=QUIET)
    assert result.table is not None
    assert result.table.bytes == result.record.before.bytes == stored(mixed)
    assert result.record.after.bytes == stored(result.model) == expected(result.table, result.plan)
    assert 0.5 * stored(mixed) < stored(result.model) <= 0.6 * stored(mixed)


def test_the_choice_is_the_best_of_all_that_fit(mixed: nn.Module) -> None:
    """Of two equal layers the one in half precision is not worth much: parameters alone would not tell them apart."""
    table = tabulate(mixed, profile(mixed, torch.zeros(1, 48)), {"formats": "low_rank", "keep": ["head"]})
    half, full = table.eligible
    assert (half.itemsize, full.itemsize) == (2, 4)
    for share in (0.5, 0.7, 0.85):
        whole = float(table.bytes or 0)
        rest = whole - half.column("bytes")[0] - full.column("bytes")[0]
        pairs = product(range(len(half.column("bytes"))), range(len(full.column("bytes"))))
        fitting = [
            half.column("distortion")[i] + full.column("distortion")[j]
            for i, j in pairs
            if rest + half.column("bytes")[i] + full.column("bytes")[j] <= share * whole
        ]
        plan = choose(table, Recipe.of(f"bytes={share}"))
        found = 0.0
        for layer in (half, full):
            own = plan.layer(layer.path)
            if own.rank is not None:
                options = layer.of("low_rank")
                found += options.columns["distortion"][[options.rank(i) for i in range(len(options))].index(own.rank)]
        assert found == pytest.approx(min(fitting), rel=2e-3)


def test_units_and_other_limits_beside_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.Linear(32, 5)).eval()
    data = torch.randn(512, 32)
    for budget in ("bytes=0.6", "max_bytes=22kB,macs=0.8"):
        result = tenfold.compress(net, data[:1], budget, data=data, runtime=QUIET)
        assert result.plan.narrowed or "macs" in budget
        assert 0.5 * stored(net) < stored(result.model) <= 0.64 * stored(net)


@pytest.mark.parametrize("rule", [{"name": "energy"}, {"name": "ratio"}])
def test_rules_of_a_threshold_meet_it_too(mixed: nn.Module, rule: dict[str, Any]) -> None:
    recipe = {"budget": "bytes=0.7", "formats": "low_rank", "keep": ["head"], "rule": rule}
    result = tenfold.compress(mixed, torch.zeros(1, 48), recipe, runtime=QUIET)
    assert stored(result.model) <= 0.7 * stored(mixed)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("bytes=2", "is a share of the model, up to 1"),
        ("bytes=0", "must be a positive number"),
        ("max_bytes=many", "cannot read the size 'many'"),
        ("max_bytes=0", "must be a positive number"),
        ("byte=0.5", "Did you mean bytes"),
        ("bytes=0.01", r"lowest that .* can reach is bytes=0\.\d+ \(max_bytes=\d+\).*What stays of the bytes"),
    ],
)
def test_what_cannot_be_asked_for_is_said(mixed: nn.Module, budget: str, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        tenfold.compress(mixed, torch.zeros(1, 48), {"budget": budget, "formats": "low_rank"}, runtime=QUIET)


def test_where_bytes_are_not_counted_is_said(mixed: nn.Module) -> None:
    with pytest.raises(TenfoldError, match="as bytes are"):
        Recipe.of({"budget_of": {"full": "bytes=0.5"}})
    with pytest.raises(TuningError, match="stages do not count bytes"):
        stages(mixed, torch.zeros(1, 48), "bytes=0.5")
    table = tabulate(mixed, profile(mixed, torch.zeros(1, 48)), {"formats": "low_rank"}).replace(bytes=None)
    with pytest.raises(BudgetError, match="bytes that were not counted"):
        choose(table, Recipe.of("bytes=0.5"))
    with pytest.raises(BudgetError, match="nobody counted the bytes"):
        choose(table, Recipe.of("max_bytes=9000"))


def test_a_plan_that_was_edited_upwards_claims_no_bytes(mixed: nn.Module) -> None:
    example = torch.zeros(1, 48)
    wanted = {"budget": "bytes=0.6", "formats": "low_rank", "keep": ["head"]}
    plan = tenfold.compress(mixed, example, wanted, runtime=QUIET).plan
    assert tenfold.compress(mixed, example, plan, runtime=QUIET).plan.recipe.budget == plan.recipe.budget
    first, *_ = plan.factorized
    edited = plan.replace(
        layers=tuple(
            layer.replace(rank={"rank": layer.rank["rank"] + 1}) if layer is first and layer.rank else layer
            for layer in plan.layers
        )
    )
    assert not tenfold.compress(mixed, example, edited, runtime=QUIET).plan.recipe.budget


@pytest.mark.parametrize("formats", ["low_rank", "interpolative"])
def test_the_explorer_has_bytes_where_the_plan_was_made_for_them(mixed: nn.Module, formats: str) -> None:
    recipe = {"budget": "max_bytes=9kB", "formats": formats, "keep": ["head"]}
    result = tenfold.compress(mixed, torch.zeros(1, 48), recipe, runtime=QUIET)
    assert result.table is not None
    explorer = Explorer(result.table)
    view = initial_view(explorer)
    (asked,) = (budget for budget in view["budgets"] if budget["kind"] == "bytes")
    assert asked["asked"] == pytest.approx(9000 / stored(mixed))
    assert explorer.left(explorer.start, "bytes") == pytest.approx(stored(result.model) / stored(mixed))
    lower = explorer.plan(Query(budget={"bytes": 0.4}))
    assert stored(tenfold.compress(mixed, torch.zeros(1, 48), lower, runtime=QUIET).model) <= 0.4 * stored(mixed)
