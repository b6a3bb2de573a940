"""A rule chooses between units and their layers as if it had tried every combination."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tenfold.allocation import choose
from tenfold.allocation.choose import Override
from tenfold.errors import BudgetError
from tenfold.records import Cost, FormatOptions, LayerOptions, OptionTable, Recipe, Unit, UnitOptions

WHOLE = 1000


def format_options(format: str, params: list[int], distortion: list[float], names: tuple[str, ...]) -> FormatOptions:
    ranks = np.arange(1, len(params) + 1)[:, None]
    costs = np.array(params)
    return FormatOptions(
        format=format, names=names, ranks=ranks, params=costs, macs=2 * costs, columns={"distortion": distortion}
    )


def table(seed: int, *, kept: str | None = None) -> OptionTable:
    """Return four layers of 100 parameters, two of which are a unit, with random distortions that fall with cost."""
    random = np.random.default_rng(seed)

    def falling(count: int) -> list[float]:
        return np.sort(random.exponential(size=count))[::-1].tolist()

    layers = [
        LayerOptions(
            path=path,
            before=Cost(params=100, macs=200),
            keep_reason=kept if path == "up" else None,
            options=() if kept and path == "up" else (format_options("low_rank", [20, 50, 80], falling(3), ("rank",)),),
        )
        for path in ("first", "up", "down", "last")
    ]
    sizes = [60, 100, 140, 180]
    unit = UnitOptions(
        unit=Unit(kind="mlp_width", path="", pivot="down", feeders=("up",), full={"width": 5}),
        before=Cost(params=200, macs=400),
        options=format_options("mlp_width", sizes, falling(4), ("width",)),
        pivot=format_options("tucker1", [1, 2, 3, 4], [0.0] * 4, ("rank",)),
        algorithm={"name": "column_selection"},
        params={path: np.array(sizes) // 2 for path in ("up", "down")},
        macs={path: np.array(sizes) for path in ("up", "down")},
    )
    return OptionTable(
        tenfold="",
        model="",
        recipe=Recipe.of("params=0.5"),
        before=Cost(params=WHOLE, macs=2 * WHOLE),
        layers=tuple(layers),
        algorithms={"low_rank": {"name": "svd"}},
        units=(unit,),
    )


def best(made: OptionTable, most: float) -> float:
    """Return the least distortion within so many parameters, of all combinations there are."""
    layers = {layer.path: layer for layer in made.layers}

    def rows(path: str) -> list[tuple[float, float]]:
        layer = layers[path]
        own = [(100.0, 0.0)]
        for options in layer.options:
            own += list(zip(options.params.tolist(), options.columns["distortion"].tolist(), strict=True))
        return own

    options = made.units[0].options
    assert options is not None
    pairs = [(a + b, d + e) for (a, d), (b, e) in product(rows("up"), rows("down"))]
    pairs += list(zip(options.params.tolist(), options.columns["distortion"].tolist(), strict=True))
    totals = (
        (WHOLE - 400 + sum(cost for cost, _ in chosen), sum(lost for _, lost in chosen))
        for chosen in product(rows("first"), pairs, rows("last"))
    )
    return min(lost for cost, lost in totals if cost <= most)


@pytest.mark.parametrize("kept", [None, "kept as asked"])
@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_over_units_and_layers_is_found(seed: int, kept: str | None) -> None:
    made = table(seed, kept=kept)
    for share in (0.9, 0.8, 0.75, 0.7):
        plan = choose(made, Recipe.of(f"params={share}"))
        assert sum(layer.distortion or 0.0 for layer in plan.layers) == pytest.approx(best(made, share * WHOLE))
        assert plan.after.params <= share * WHOLE
        inside = sum(layer.after.params for layer in plan.layers)
        assert plan.after.params == WHOLE - 400 + inside
        for unit in plan.narrowed:
            assert plan.layer("down").format == "tucker1"
            assert plan.layer("up").after.params == unit.after.params // 2
            assert "narrowed with down" in plan.layer("up").reason


def test_both_budgets_at_once() -> None:
    plan = choose(table(1), Recipe.of({"budget": {"params": 0.8, "macs": 0.75}}))
    assert plan.after.params <= 0.8 * WHOLE
    assert plan.after.macs <= 1.5 * WHOLE


def test_a_layer_set_by_hand_takes_its_unit_apart() -> None:
    plan = choose(table(2), Recipe.of("params=0.8"), overrides={"up": Override()})
    assert plan.narrowed == ()
    assert plan.layer("up").action == "keep"


def test_a_budget_below_all_units_says_what_can_be_met() -> None:
    with pytest.raises(BudgetError, match="cannot be met: the lowest"):
        choose(table(3), Recipe.of("params=0.3"))
