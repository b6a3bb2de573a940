"""Only what may change is calibrated: layers that are kept, for whatever reason, cost nothing and spoil nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.iterative import stages
from tenfold.pipeline import compress
from tenfold.planning import decide
from tenfold.planning.eligible import changeable
from tenfold.profiling import profile
from tenfold.records import Recipe
from tenfold.runtime import Runtime

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration data are few:tenfold.errors.CalibrationWarning")
ROWS = 1_000_000


class Language(nn.Module):
    """A model of words, its head tied to the table or not."""

    def __init__(self, words: int = 300, *, tied: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(words, 16), nn.Linear(16, words, bias=False)
        self.a, self.b = nn.Linear(16, 48), nn.Linear(48, 16)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(h + self.b(torch.relu(self.a(h))))


def ids(words: int = 300) -> list[Tensor]:
    return [torch.randint(0, words, (8, 16)) for _ in range(3)]


@pytest.mark.parametrize(
    ("model", "fields", "wanted"),
    [
        (Language(), {}, {"table", "a", "b", "head"}),
        (Language(), {"keep": ("head", "table")}, {"a", "b"}),
        (Language(tied=True), {}, {"a", "b"}),
        (Language(), {"formats": "tucker2"}, set()),
        (Language(), {"rule": {"name": "fixed", "ranks": {"a": 4}}}, {"a"}),
    ],
    ids=["all", "kept", "tied", "refused", "named"],
)
def test_what_a_recipe_cannot_change_is_not_calibrated(model: nn.Module, fields: Any, wanted: set[str]) -> None:
    recipe = Recipe.of({"formats": "low_rank", "keep_ends": False, "rule": {"name": "ratio", "share": 0.5}, **fields})
    data = ids()
    assert set(changeable(model.eval(), profile(model, data[0][:1]), recipe)) == wanted
    decision = decide(model, data[0][:1], recipe, data=data)
    assert set(decision.moments or {}) == wanted
    if wanted == {"a"}:
        assert decision.plan.layer("b").reason == "no rank was given for this layer"
        again = decide(model, data[0][:1], decision.plan, data=data)
        assert set(again.moments or {}) == {"a"}


def test_a_kept_table_of_a_million_rows_costs_nothing() -> None:
    model = nn.Sequential(nn.Embedding(ROWS, 2), nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 40)).eval()
    recipe = {"budget": {"macs": 0.8}, "formats": "low_rank", "keep": "0"}
    decision = decide(model, torch.zeros(1, 4).long(), Recipe.of(recipe), data=ids(ROWS))
    held = [t for own in (decision.moments or {}).values() for t in vars(own).values() if isinstance(t, Tensor)]
    assert held
    assert sum(t.nbytes for t in held) < 1 << 20


class Overflowing(nn.Module):
    """A layer that is fed infinity, beside two that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hot = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.hot(x.exp() * torch.inf)
        return self.b(torch.relu(self.a(x))) + torch.nan_to_num(scores, 0, 0, 0) * 0


class Unreached(nn.Module):
    """A layer that other inputs reach than those of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rare = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return self.rare(y) if len(x) == 1 else y


@pytest.mark.parametrize(("model", "kept"), [(Overflowing(), "hot"), (Unreached(), "rare")])
@pytest.mark.parametrize("method", ["sequential", "independent"])
def test_a_kept_layer_cannot_fail_the_run(model: nn.Module, kept: str, method: str) -> None:
    recipe = {
        "budget": {"macs": 0.9},
        "formats": "low_rank",
        "keep": kept,
        "keep_ends": False,
        "calibration": {"method": method},
    }
    data = [torch.randn(40, 24) for _ in range(3)]
    small = compress(model.eval(), torch.randn(1, 24), recipe, data=data, runtime=Runtime(measure=False))
    assert {layer.path for layer in small.plan.factorized} <= {"a", "b"}


def test_stages_calibrate_what_they_may_change() -> None:
    model, data = Overflowing().eval(), [torch.randn(40, 24) for _ in range(3)]
    recipe = {"budget": {"macs": 0.9}, "formats": "low_rank", "keep": "hot", "keep_ends": False}
    made = [stage.plan for stage in stages(model, data[0][:1], recipe, data=data)]
    assert {layer.path for plan in made for layer in plan.factorized} <= {"a", "b"}


def test_a_small_cache_changes_nothing() -> None:
    model, data = Language().eval(), ids()
    recipe = {"budget": {"params": 0.7}, "formats": "low_rank"}
    one, other = (
        compress(model, data[0][:1], recipe, data=data, runtime=Runtime(measure=False, max_cache=size)).model
        for size in ("4GiB", "1KiB")
    )
    for path, wanted in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[path], wanted)
