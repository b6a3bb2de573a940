"""The latency budget under a made-up clock: what is promised is met, as measured."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tenfold.allocation import choose
from tenfold.errors import BudgetError
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.planning import LatencySearch, Timing, decide, plan, plan_within_latency, recost, tabulate
from tenfold.planning.latency_budget import with_structure
from tenfold.planning.target import Target
from tenfold.profiling import Comparison, LatencyTable, profile
from tenfold.records import OptionTable, Recipe, Speedup
from tenfold.runtime import Runtime
from tenfold.surgery import apply, fuse_batchnorm
from tests.planning.made_up_time import OVERHEAD_MS, FakeCompare, model_ms, stage_ms, three_layers
from tests.planning.made_up_time import clock as made_up


@pytest.fixture(scope="module")
def net():
    return three_layers()


X = torch.zeros(1, 32, 8, 8)


@pytest.fixture(scope="module")
def costs(net):
    return profile(net, X)


@pytest.fixture
def fake(monkeypatch):
    compare = FakeCompare()
    monkeypatch.setattr("tenfold.planning.timing.compare_latency", compare)
    return compare


def target_of(net, x, clock=None):
    return Target.of(Recipe(), net, x, Runtime(clock=clock or made_up()))


def fast(net, x, budget=None, *, clock=None, rule="ratio", formats=None, keep=(), fuse=False, gate=None, **search):
    """Return the plan within a budget, by a made-up clock."""
    recipe = Recipe(budget=budget, rule=rule, keep=keep, keep_ends=False, fuse_batchnorm=fuse, gate=gate)
    recipe = recipe if formats is None else recipe.replace(formats=formats)
    cost = profile(net, x)
    table = tabulate(net, cost, recipe)
    return plan_within_latency(net, table, x, target_of(net, x, clock), LatencySearch(**search))


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7, 0.9])
def test_a_latency_budget_is_met_from_below(net, costs, fake, share):
    result = fast(net, X, {"latency": share}, compare=fake)
    before = model_ms(net, X)
    after = model_ms(with_structure(net, result.plan), X)
    assert after <= share * before
    assert after >= 0.9 * share * before
    assert result.met
    assert result.rounds == 1
    assert all(t.faster() for t in result.layers.values())


def test_a_model_slower_than_predicted_is_planned_anew_until_the_budget_is_met(net, costs, monkeypatch):
    compare = FakeCompare(bias=1.3)
    monkeypatch.setattr("tenfold.planning.timing.compare_latency", compare)
    result = fast(net, X, {"latency": 0.6}, compare=compare)
    after = 1.3 * model_ms(with_structure(net, result.plan), X)
    assert after <= 0.6 * model_ms(net, X)
    assert after >= 0.5 * model_ms(net, X)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_what_the_clock_learns_on_the_way_is_not_taken_twice(monkeypatch, share):
    """A chain of stages takes 1.5 times their sum: measured once, every later plan is as predicted."""
    torch.manual_seed(0)
    deep = nn.Sequential(*[m for _ in range(6) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]).eval()
    x = torch.zeros(1, 64, 8, 8)

    class Chained(FakeCompare):
        def __call__(self, variants, *, seconds, threads):
            found = super().__call__(variants, seconds=seconds, threads=threads)
            times = {name: found.latencies[name].median_ms + slower(*variants[name]) for name in variants}
            first = next(iter(times.values()))
            latencies = {n: found.latencies[n].replace(median_ms=t, low_ms=t, high_ms=t) for n, t in times.items()}
            ratios = {n: first / t for n, t in times.items()}
            return Comparison(latencies, {n: Speedup(ratio=r, low=r, high=r, rounds=9) for n, r in ratios.items()})

    def slower(model, inputs):
        chains = [m for m in model.modules() if isinstance(m, FactorizedLayer)]
        return 0.5 * sum(model_ms(chain, inputs if chain is model else x) - OVERHEAD_MS for chain in chains)

    compare = Chained()
    monkeypatch.setattr("tenfold.planning.timing.compare_latency", compare)
    result = fast(deep, x, {"latency": share}, rule="global", compare=compare)
    assert result.met
    assert result.share >= 0.96 * share
    assert result.rounds <= 3


def test_absolute_budgets_are_milliseconds(net, costs, fake):
    wanted = 0.7 * model_ms(net, X)
    assert wanted > 1
    result = fast(net, X, {"max_latency_ms": wanted}, compare=fake)
    assert 0.9 * wanted <= model_ms(with_structure(net, result.plan), X) <= wanted


@pytest.mark.parametrize("bias", [1.0, 10.0])
def test_the_gate_stands_without_a_latency_budget(net, fake, bias):
    rule = {"name": "ratio", "share": 0.5}
    result = fast(net, X, rule=rule, gate=True, compare=FakeCompare(bias=bias))
    assert bool(result.plan.factorized) == (bias == 1)
    assert set(result.returned) == (set() if bias == 1 else {"0", "2", "4"})
    assert result.met


def test_options_that_the_clock_calls_slower_are_none(net, fake):
    """A budget of MACs would be met by layers that take longer than they did."""

    def slow(spec, in_shape):
        return 100.0 if spec.kernel == (1, 1) else stage_ms(spec, in_shape)

    clock = LatencyTable(cache=None, threads=1, timer=slow, model_timer=model_ms)
    result = fast(net, X, {"macs": 0.7}, clock=clock, rule="global", gate=True, compare=fake)
    assert all(layer.format == "spatial" or layer.kind.startswith("Linear") for layer in result.plan.factorized)
    with pytest.raises(BudgetError, match="no rank of tucker2 or low_rank is faster in torch"):
        fast(
            net, X, {"macs": 0.7}, clock=clock, rule="global", formats=("tucker2", "low_rank"), gate=True, compare=fake
        )


def test_without_a_gate_no_layer_is_sent_back(net, fake):
    slow = FakeCompare(bias=1.2)
    gated, free = (fast(net, X, {"macs": 0.5}, rule="global", gate=gate, compare=slow) for gate in (None, False))
    assert not free.returned
    assert free.plan.after.macs <= 0.5 * free.plan.before.macs
    assert gated.plan.layers == free.plan.layers  # no clock is asked for: the recipe names neither runtime nor latency


def test_what_cannot_be_met_is_an_error_or_comes_as_near_as_it_can(net, costs, fake):
    impossible = {"latency": OVERHEAD_MS / 2 / model_ms(net, X)}
    with pytest.raises(
        BudgetError, match=r"rule ratio can reach is latency=0\.239 .*18\.3% activations, the interpreter"
    ):
        fast(net, X, impossible, compare=fake)
    keep = fast(net, X, {"latency": 0.5}, keep=["0"], strict=False, rounds=12, compare=fake)
    assert keep.speedup.ratio > 1


def test_fused_models_are_planned_and_measured_against_the_fused_dense_one(fake):
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(3)]
    net = nn.Sequential(*(module for block in blocks for module in block)).eval()
    asked = []

    def compare(variants, **how):
        asked.extend(sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model, _ in variants.values())
        return fake(variants, **how)

    result = fast(net, X, {"latency": 0.5}, fuse=True, compare=compare)
    assert set(asked) == {0}
    assert result.met
    assert result.plan.fused == {"1": "0", "4": "3", "7": "6"}
    small = apply(net, result.plan)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert model_ms(small, X) <= 0.5 * model_ms(fuse_batchnorm(net, X), X)
    assert fast(net, X, {"latency": 0.5}, compare=compare).plan.fused == {}


def test_a_latency_out_of_reach_names_what_takes_the_time_and_the_lowest_that_can_be_met(net, costs, fake):
    recipe = {"budget": {"latency": 0.05}, "keep": ["0"], "keep_ends": False}
    table = tabulate(net, costs, recipe, timing=Timing.of(net, X, target_of(net, X), seconds=0.1))
    with pytest.raises(BudgetError) as refused:
        choose(table)
    said = re.search(r"latency=([0-9.]+) \(max_latency_ms=([0-9.]+)\)\. .*of the time: (.*?) in", str(refused.value))
    assert said, refused.value
    assert said[3] == f"{stage_ms(spec_of(net[0])[0], X.shape) / model_ms(net, X):.1%}"
    for budget in (f"latency={said[1]}", f"max_latency_ms={said[2]}"):
        assert choose(table, Recipe.of({**recipe, "budget": budget})).factorized


def test_a_latency_budget_needs_a_clock(net, costs):
    for budget in ({"latency": 0.5}, {"max_latency_ms": 0.5}):
        with pytest.raises(BudgetError, match=r"latenc.* not measured|needs latencies|needs measured latencies"):
            plan(net, costs, {"rule": "ratio", "budget": budget})


def test_what_is_no_layer_is_set_apart(net, costs, fake):
    timing = Timing.of(net, X, target_of(net, X))
    assert timing.layer_share == pytest.approx(1 - OVERHEAD_MS / model_ms(net, X))
    assert timing.dense_ms == pytest.approx(model_ms(net, X))
    everything = plan(net, costs, {"rule": "ratio", "keep_ends": False, "budget": {"latency": 1.0}}, timing=timing)
    assert everything.factorized == ()
    assert everything.layer("0").reason == "the budget is met as it is"


def test_the_timing_of_other_budgets_is_left_alone(net, costs, fake):
    timing = Timing.of(net, X, target_of(net, X))
    recipe = {"rule": "ratio", "budget": {"macs": 0.5}}
    assert plan(net, costs, recipe, timing=timing) == plan(net, costs, recipe)
    recipe = {"rule": "ratio", "keep_ends": False, "budget": {"macs": 0.5, "latency": 0.4}}
    both = plan(net, costs, recipe, timing=timing)
    assert both.after.macs <= 0.5 * costs.macs


def test_the_memory_format_that_is_faster_takes_over(net, costs, monkeypatch):
    compare = FakeCompare(channels_last=0.5)
    monkeypatch.setattr("tenfold.planning.timing.compare_latency", compare)
    formats = []

    def watch(variants, **options):
        formats.extend(n for n in variants if n == "after")
        layouts = [v[1].is_contiguous(memory_format=torch.channels_last) for n, v in variants.items() if n == "after"]
        formats.extend(layouts)
        return compare(variants, **options)

    result = fast(net, X, {"latency": 0.6}, compare=watch)
    assert formats[:2] == ["after", False]
    assert formats[-1] is True
    assert result.met
    assert result.share == pytest.approx(0.6, rel=0.1)


def test_a_model_that_is_not_faster_as_a_whole_is_never_handed_back(net, costs, monkeypatch):
    def compare(variants, **options):
        return FakeCompare(bias=1.0 if "factorized" in variants else 50.0)(variants, **options)

    monkeypatch.setattr("tenfold.planning.timing.compare_latency", compare)
    with pytest.raises(BudgetError, match="no plan makes the model faster"):
        fast(net, X, {"latency": 0.5}, strict=False, compare=compare)


def test_the_table_of_a_plan_by_the_clock(monkeypatch):
    """Explorers go by the clock of the final plan, and by what measuring whole models taught it."""
    compare = FakeCompare(bias=1.2)  # slower as a whole than the clock says
    monkeypatch.setattr("tenfold.planning.timing.compare_latency", compare)
    monkeypatch.setattr(LatencySearch, "__init__", _with(compare, LatencySearch.__init__))
    model, batch = three_layers(), torch.zeros(4, 32, 8, 8)
    recipe = Recipe.of({"budget": {"latency": 0.6}, "keep_ends": False})
    runtime = Runtime(clock=made_up(), latency_inputs=batch)
    decision = decide(model, batch[:1], recipe, runtime=runtime)
    table = OptionTable.model_validate_json(decision.table.model_dump_json())
    assert table.time.dense_ms == pytest.approx(model_ms(model, batch))
    assert (table.time.batch_size, table.time.tighten < 1) == (4, True)
    small = choose(table)
    assert small.after == recost(small, profile(model, batch[:1])).after  # of one sample, whatever batch was timed
    assert 1.2 * model_ms(with_structure(model, small), batch) == pytest.approx(0.6 * model_ms(model, batch), rel=0.1)
    assert decision.timed.met


def _with(compare, init):
    return lambda self, **options: init(self, **{"compare": compare, **options})


def test_a_plan_that_is_late_says_what_the_time_is_left_for(net, costs, monkeypatch):
    """Small models measure 1.4 times what their layers take: no plan gets there, and what was measured is told."""

    def compare(variants, **options):
        return FakeCompare(bias=1.0 if "factorized" in variants else 1.4)(variants, **options)

    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    with pytest.raises(BudgetError) as refused:
        fast(net, X, {"latency": 0.6}, keep=["0"], compare=compare, rounds=1)
    said = str(refused.value)
    lowest = re.search(r"latency=([0-9.]+) \(max_latency_ms=([0-9.]+); 95 % interval of the share ([0-9.]+) to", said)
    assert lowest, said
    assert float(lowest[2]) == pytest.approx(float(lowest[1]) * model_ms(net, X), abs=2e-3)
    assert float(lowest[3]) < float(lowest[1])
    assert f"{OVERHEAD_MS / model_ms(net, X):.1%} activations, the interpreter" in said
    assert re.search(r"% in 2 as tucker2 out=\d+,in=\d+, [0-9.]+ times faster than dense \(95 % [0-9.]+ to", said)
    kept = stage_ms(spec_of(net[0])[0], X.shape) / model_ms(net, X)
    assert f"{kept:.1%} in 1 layer: " in said
    for way in ("fewer layers than keep='0'", "fuse_batchnorm=True", "another runtime than torch", "more threads"):
        assert way in said
