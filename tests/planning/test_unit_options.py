"""Units in tables and plans: they only add options, cost what the flop counter sees, and come back from files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.allocation import choose, pruned
from tenfold.errors import PlanError, TenfoldWarning, UnknownNameError
from tenfold.explorer import Explorer
from tenfold.explorer.explorer import Query
from tenfold.explorer.server import Service
from tenfold.explorer.view import initial_view
from tenfold.layers import FactorizedLayer
from tenfold.planning import decide, tabulate
from tenfold.planning.plan import recost
from tenfold.planning.target import Target
from tenfold.planning.timing import Timing
from tenfold.profiling import LatencyTable, profile
from tenfold.records import LayerSpec, OptionTable, Plan, Recipe
from tenfold.runtime import Runtime
from tenfold.runtimes import runtime_named
from tenfold.surgery import apply
from tests.units.architectures import NETS, ids

QUIET = Runtime(measure=False)
BUDGET = {"params": 0.75}
ALL = ["mlp_width", "query_key", "value_output"]


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return NETS["bert"]()


@pytest.fixture(scope="module")
def data() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(seed, batch=8)} for seed in range(1, 13)]


@pytest.fixture(scope="module")
def decided(bert: nn.Module, data: list[Any]) -> Any:
    return decide(bert, {"input_ids": ids()}, Recipe.of({"budget": BUDGET, "units": ALL}), data=data, runtime=QUIET)


def distortion(plan: Plan) -> float:
    return sum(layer.distortion or 0.0 for layer in plan.layers)


@pytest.mark.parametrize("method", ["sequential", "independent"])
def test_a_tiny_bert_meets_its_budget_with_units(bert: nn.Module, data: list[Any], method: str, tmp_path: Path) -> None:
    inputs = {"input_ids": ids()}
    recipe = {"budget": BUDGET, "calibration": {"method": method}, "units": ALL}
    small = tenfold.compress(bert, inputs, recipe, data=data, runtime=QUIET)
    pairs = tenfold.compress(bert, inputs, {**recipe, "units": ()}, data=data, runtime=QUIET)
    plan = small.plan
    assert {unit.kind for unit in plan.narrowed} == {"mlp_width", "query_key", "value_output"}
    assert pairs.plan.units == ()
    assert distortion(plan) < distortion(pairs.plan)
    assert (small.record.after.params, small.record.after.macs) == (plan.after.params, plan.after.macs)
    assert plan.after.params <= 0.75 * plan.before.params
    layers = {layer.path: layer for layer in profile(small.model, inputs).layers}
    for unit in plan.narrowed:
        for path in unit.members:
            assert layers[path].cost == plan.layer(path).after
            assert not isinstance(small.model.get_submodule(path), FactorizedLayer)
        assert plan.layer(unit.pivot).rel_error is not None
        assert all(plan.layer(path).action == "keep" for path in unit.feeders)
        if not unit.settings.get("native"):  # which computes less outside of layers too
            assert unit.after == sum((plan.layer(path).after for path in unit.feeders), plan.layer(unit.pivot).after)
    small.save(tmp_path / "saved")
    loaded, again = tenfold.load(NETS["bert"](), tmp_path / "saved")
    assert again == plan
    found, wanted = loaded(**inputs).last_hidden_state, small.model(**inputs).last_hidden_state
    assert torch.equal(found, wanted)
    assert "width 24 →" in small.summary()


def test_a_unit_only_adds_options(decided: Any) -> None:
    table = decided.table
    assert all(len(unit.options) for unit in table.units)
    for share in (0.9, 0.8, 0.7, 0.62):
        recipe = Recipe.of(f"params={share}")
        with_units, without = choose(table, recipe), choose(table.replace(units=()), recipe)
        assert distortion(with_units) <= distortion(without) * (1 + 2e-3)
        assert with_units.after.params <= share * table.before.params
        kept = [unit for unit in with_units.units if unit.size is None]
        assert all(unit.reason and unit.before == unit.after for unit in kept)


def test_tables_and_plans_come_back_from_files(decided: Any, tmp_path: Path) -> None:
    decided.table.save(tmp_path / "options.json")
    table = OptionTable.load(tmp_path / "options.json")
    assert choose(table) == choose(decided.table)
    assert distortion(choose(pruned(table))) == pytest.approx(distortion(decided.plan), rel=2e-3)
    assert Plan.from_text(decided.plan.to_yaml()) == decided.plan


def test_a_plan_is_replayed_and_costed_again(bert: nn.Module, data: list[Any], decided: Any) -> None:
    plan = decided.plan
    assert recost(plan, profile(bert, {"input_ids": ids()})) == plan
    again = tenfold.compress(bert, {"input_ids": ids()}, plan, data=data, runtime=QUIET)
    assert again.plan.after == plan.after
    assert again.record.after.params == plan.after.params
    blind = apply(bert, plan)
    assert sum(p.numel() for p in blind.parameters()) == plan.after.params


def test_a_plan_edited_in_one_place_only_is_refused(bert: nn.Module, decided: Any) -> None:
    plan = decided.plan
    unit = plan.narrowed[0]
    smaller = unit.replace(size={"width": unit.size["width"] - 4})
    units = tuple(smaller if old.pivot == smaller.pivot else old for old in plan.units)
    with pytest.raises(PlanError, match="edit both"):
        apply(bert, plan.replace(units=units))
    layer = plan.layer(unit.pivot).replace(rank=smaller.size and {"rank": smaller.size["width"]})
    edited = plan.replace(
        units=units,
        layers=tuple(layer if old.path == layer.path else old for old in plan.layers),
    )
    costed = recost(edited, profile(bert, {"input_ids": ids()}))
    assert costed.after.params == sum(p.numel() for p in apply(bert, costed).parameters()) < plan.after.params


def test_a_unit_is_given_up_by_hand(bert: nn.Module, decided: Any) -> None:
    plan = decided.plan
    units = tuple(unit.replace(size=None) for unit in plan.units)
    pivots = {unit.pivot for unit in plan.units}
    layers = tuple(layer.replace(action="keep") if layer.path in pivots else layer for layer in plan.layers)
    edited = recost(plan.replace(units=units, layers=layers), profile(bert, {"input_ids": ids()}))
    model = apply(bert, edited)
    assert edited.narrowed == ()
    assert sum(p.numel() for p in model.parameters()) == edited.after.params > plan.after.params


def test_layers_kept_by_name_keep_their_unit(bert: nn.Module, data: list[Any]) -> None:
    recipe = Recipe.of({"budget": {"params": 0.8}, "keep": ["*.0.intermediate.dense"]})
    plan = decide(bert, {"input_ids": ids()}, recipe, data=data, runtime=QUIET).plan
    kept = next(unit for unit in plan.units if ".0." in unit.pivot)
    assert kept.size is None
    assert "kept as asked" in kept.reason


def test_units_do_not_depend_on_the_formats_of_layers(bert: nn.Module, data: list[Any]) -> None:
    recipe = Recipe.of({"budget": {"params": 0.92}, "formats": ["tucker2"], "units": ALL})
    plan = decide(bert, {"input_ids": ids()}, recipe, data=data, runtime=QUIET).plan
    assert len(plan.narrowed) == 4


def test_an_unknown_kind_is_refused_before_any_work(bert: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean mlp_width"):
        decide(bert, {"input_ids": ids()}, Recipe.of({"budget": BUDGET, "units": "mlp_widht"}), data=[])


def test_without_data_there_are_none_and_it_is_said(bert: nn.Module) -> None:
    recipe = Recipe.of({"budget": {"params": 0.8}, "units": "mlp_width"})
    with pytest.warns(TenfoldWarning, match="without data"):
        plan = decide(bert, {"input_ids": ids()}, recipe, runtime=QUIET).plan
    assert plan.units == ()


def test_rules_with_one_threshold_ignore_units(bert: nn.Module, data: list[Any]) -> None:
    recipe = Recipe.of({"budget": {"params": 0.8}, "rule": "ratio"})
    assert decide(bert, {"input_ids": ids()}, recipe, data=data, runtime=QUIET).plan.units == ()


def test_the_explorer_leaves_units_out(decided: Any) -> None:
    explorer = Explorer(decided.table)
    for share in (0.8, 0.7):
        plan = explorer.plan(Query(budget={"params": share}))
        assert plan.narrowed == ()
        assert [unit.pivot for unit in plan.units] == [own.unit.pivot for own in decided.table.units]
        assert plan.after.params <= share * plan.before.params
        assert any(unit.reason == "the explorer plans layers one by one" for unit in plan.units)
    words = f"{sum(own.options is not None for own in decided.table.units)} units of layers that could become narrower"
    assert words in initial_view(explorer)["left_out"]
    assert words in Service(explorer, name="bert", out=Path("explored.yaml")).page()


def test_a_clock_drops_sizes_that_are_not_faster(bert: nn.Module, data: list[Any], decided: Any) -> None:
    def milliseconds(spec: LayerSpec, in_shape: tuple[int, ...]) -> float:
        return 0.001 + spec.macs(in_shape) / 1e6 * (3.0 if getattr(spec, "out_channels", 16) < 16 else 1.0)

    cost = decided.profile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = Target(runtime_named("torch"), LatencyTable(cache=None, timer=milliseconds), cost)
    timing = Timing(target, layer_share=0.9, dense_ms=1.0)
    recipe = Recipe.of({"budget": {"params": 0.8}})
    table = tabulate(decided.source, cost, recipe, moments=decided.moments, timing=timing)
    for unit in table.units:
        assert unit.options is not None
        latency = unit.options.latency_ms
        assert unit.latency_ms == pytest.approx(sum(timing.now_ms(cost.layer(path)) for path in unit.unit.members))
        assert latency is not None
        assert (latency < unit.latency_ms).all()
        assert (latency[1:] >= latency[:-1]).all()
    plan = choose(table, Recipe.of({"budget": {"latency": 0.9}}))
    assert all(unit.latency_after_ms < unit.latency_before_ms for unit in plan.narrowed)
