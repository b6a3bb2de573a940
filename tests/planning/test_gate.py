"""The gate and the latency budget under fake clocks: what is slower returns to dense, what is promised is met."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tenfold.ranks import rule_from
from torch import nn

from tenfold.errors import BudgetError
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.planning import LayerBench, LayerTiming, Timing, plan, plan_fast, plan_never_slower
from tenfold.planning.latency_budget import with_structure
from tenfold.planning.layer_bench import neutral_layer, together
from tenfold.profiling import Comparison, LatencyTable, profile
from tenfold.records import ContractSpec, Latency, LayerSpec, Speedup
from tenfold.surgery import apply

FAST, SLOW = LayerTiming(2.0, 1.0, 2.0, 1.9, 2.1), LayerTiming(1.0, 1.25, 0.8, 0.7, 0.9)
OVERHEAD_MS = 0.3  # of everything that is no layer


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 64, 64)).eval()


X = torch.zeros(1, 32, 8, 8)


@pytest.fixture(scope="module")
def costs(net):
    return profile(net, X)


def stage_ms(spec, in_shape):
    return 0.01 + spec.macs(in_shape) / 1e6


def model_ms(model, inputs):
    """Return the time of a model whose every layer takes ``stage_ms`` and whose rest takes ``OVERHEAD_MS``."""
    total = OVERHEAD_MS

    def add(module, args, _output):
        nonlocal total
        spec, _ = spec_of(module)
        total += stage_ms(spec, tuple(args[0].shape)) if spec is not None else 0

    hooks = [m.register_forward_hook(add) for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return total


@dataclass
class FakeCompare:
    """Stands in for ``compare_latency``: every model takes ``model_ms``, times ``bias`` when it is factorized."""

    bias: float = 1.0
    channels_last: float = 1.0  # factor on models in that memory format
    asked: int = 0

    def __call__(self, variants, *, seconds, threads):
        self.asked += 1
        times = {}
        for name, (model, inputs) in variants.items():
            ms = model_ms(model, inputs) - (OVERHEAD_MS if name in ("dense", "factorized") else 0.0)
            last = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
            times[name] = (
                (self.channels_last if last else 1.0)
                * ms
                * (self.bias if name.startswith(("after", "factorized")) else 1.0)
            )
        latencies = {
            n: Latency(median_ms=t, low_ms=t, high_ms=t, runs=9, threads=1, device="cpu", dtype="float32")
            for n, t in times.items()
        }
        first = next(iter(times.values()))
        speedups = {
            n: Speedup(ratio=first / t, low=0.99 * first / t, high=1.01 * first / t, rounds=9) for n, t in times.items()
        }
        return Comparison(latencies, speedups)


@pytest.fixture
def fake(monkeypatch):
    compare = FakeCompare()
    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    return compare


def clock():
    return LatencyTable(cache=None, threads=1, timer=stage_ms, model_timer=model_ms)


def make_of(net, costs, **options):
    def make(reasons):
        return plan(net, costs, rule=rule_from("ratio", share=0.5), keep_ends=False, reasons=reasons, **options)

    return make


def test_a_slower_layer_stays_dense_with_what_was_measured_and_the_rest_is_planned_anew(net, costs):
    asked = []

    def make(reasons):
        asked.append(dict(reasons))
        return make_of(net, costs)(reasons)

    result = plan_never_slower(make, lambda p: {x.path: SLOW if x.path == "2" else FAST for x in p.factorized})
    kept = result.plan.layer("2")
    assert kept.action == "keep"
    assert kept.reason.startswith("tucker2 out=")
    assert kept.reason.endswith("measures 1.25 ms, dense 1 ms: kept dense")
    assert [layer.path for layer in result.plan.factorized] == ["0", "4"]
    assert asked[0] == {}
    assert set(asked[1]) == {"2"}
    assert result.returned == {"2": SLOW}
    assert (result.plan.layer("0").latency_before_ms, result.plan.layer("0").latency_after_ms) == (2.0, 1.0)


def test_what_is_only_perhaps_faster_stays_dense_and_says_so(net, costs):
    perhaps = LayerTiming(1.0, 0.9, 1.11, 0.95, 1.3)
    result = plan_never_slower(make_of(net, costs), lambda p: {x.path: perhaps for x in p.factorized})
    assert result.plan.factorized == ()
    assert "1.11 times faster, 95 % 0.95 to 1.30" in result.plan.layer("0").reason


def test_with_a_learner_a_layer_has_a_second_chance_at_other_ranks(net, costs):
    learned, shares = [], iter([0.5, 0.25, 0.25])

    def make(reasons):
        return plan(net, costs, rule=rule_from("ratio", share=next(shares)), keep_ends=False, reasons=reasons)

    big = make_of(net, costs)({}).layer("2").rank

    def check(p):
        return {x.path: SLOW if x.path == "4" or (x.path == "2" and x.rank == big) else FAST for x in p.factorized}

    result = plan_never_slower(make, check, learn=lambda layer, timing: learned.append((layer.path, timing)))
    assert result.plan.layer("2").action == "factorize"
    assert result.plan.layer("4").action == "keep"
    assert len(learned) == len({(p, id(t), i) for i, (p, t) in enumerate(learned)}) == 6


def test_equal_geometries_are_measured_once(net, costs):
    compare = FakeCompare()
    bench = LayerBench(costs, compare=compare)
    timings = bench(make_of(net, costs)({}))
    assert set(timings) == {"0", "2", "4"}
    assert compare.asked == 2
    assert timings["0"] == timings["2"]
    dense = stage_ms(costs.layer("0").spec, (1, 32, 8, 8))
    assert timings["0"].before_ms == pytest.approx(dense)
    assert timings["0"].faster()


def test_what_stays_undecided_is_measured_again_for_longer(net, costs):
    asked = []

    def compare(variants, *, seconds, threads):
        asked.append(seconds)
        result = FakeCompare()(variants, seconds=seconds, threads=threads)
        low = 0.9 if seconds < 1 else 1.05
        speedups = {n: Speedup(ratio=1.1, low=low, high=1.2, rounds=5) for n in variants}
        return Comparison(result.latencies, speedups)

    timing = LayerBench(costs, compare=compare)(make_of(net, costs, keep=["0", "2"])({}))["4"]
    assert asked == [0.4, 1.6]
    assert timing.faster()


def test_several_calls_add_up():
    both = together([(2, FAST), (1, SLOW)])
    assert both.before_ms == pytest.approx(5)
    assert both.after_ms == pytest.approx(3.25)
    assert both.ratio == pytest.approx(5 / 3.25)
    assert both.low < both.ratio < both.high


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7, 0.9])
def test_a_latency_budget_is_met_from_below(net, costs, fake, share):
    result = plan_fast(
        net, costs, X, clock=clock(), budget={"latency": share}, rule=rule_from("ratio"), keep_ends=False, compare=fake
    )
    before = model_ms(net, X)
    after = model_ms(with_structure(net, result.plan), X)
    assert after <= share * before
    assert after >= 0.9 * share * before
    assert result.met
    assert result.rounds == 1
    assert all(t.faster() for t in result.layers.values())


def test_a_model_slower_than_predicted_is_planned_anew_until_the_budget_is_met(net, costs, monkeypatch):
    compare = FakeCompare(bias=1.3)
    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    result = plan_fast(
        net, costs, X, clock=clock(), budget={"latency": 0.6}, rule=rule_from("ratio"), keep_ends=False, compare=compare
    )
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
    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    result = plan_fast(
        deep,
        profile(deep, x),
        x,
        clock=clock(),
        budget={"latency": share},
        rule=rule_from("global"),
        keep_ends=False,
        compare=compare,
    )
    assert result.met
    assert result.share >= 0.96 * share
    assert result.rounds <= 3


def test_absolute_budgets_are_milliseconds(net, costs, fake):
    wanted = 0.7 * model_ms(net, X)
    assert wanted > 1
    result = plan_fast(
        net, costs, X, clock=clock(), budget={"latency": wanted}, rule=rule_from("ratio"), keep_ends=False, compare=fake
    )
    assert 0.9 * wanted <= model_ms(with_structure(net, result.plan), X) <= wanted


@pytest.mark.parametrize("bias", [1.0, 10.0])
def test_without_a_latency_budget_the_clock_is_not_asked_and_the_gate_stands(net, costs, bias):
    def refuse(*_):
        raise AssertionError

    still = LatencyTable(cache=None, threads=1, timer=refuse, model_timer=refuse)
    compare, rule = FakeCompare(bias=bias), rule_from("ratio", share=0.5)
    result = plan_fast(net, costs, X, clock=still, rule=rule, keep_ends=False, compare=compare)
    assert bool(result.plan.factorized) == (bias == 1)
    assert set(result.returned) == (set() if bias == 1 else {"0", "2", "4"})
    assert result.met


def test_what_cannot_be_met_is_an_error_or_comes_as_near_as_it_can(net, costs, fake):
    arguments = {"clock": clock(), "rule": rule_from("ratio"), "keep_ends": False, "compare": fake}
    impossible = {"latency": OVERHEAD_MS / 2 / model_ms(net, X)}
    with pytest.raises(BudgetError, match="what no plan changes"):
        plan_fast(net, costs, X, budget=impossible, **arguments)
    keep = plan_fast(net, costs, X, budget={"latency": 0.5}, strict=False, keep=["0"], rounds=12, **arguments)
    assert keep.speedup.ratio > 1


def test_folded_models_are_planned_and_measured_against_the_folded_dense_one(fake):
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(3)]
    net = nn.Sequential(*(module for block in blocks for module in block)).eval()
    asked = []

    def compare(variants, **how):
        asked.extend(sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model, _ in variants.values())
        return fake(variants, **how)

    options = {"clock": clock(), "budget": {"latency": 0.5}, "rule": rule_from("ratio"), "keep_ends": False}
    result = plan_fast(net, profile(net, X), X, fold=True, compare=compare, **options)
    assert set(asked) == {0}
    assert result.met
    assert result.plan.fused == {"1": "0", "4": "3", "7": "6"}
    small = apply(net, result.plan)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert model_ms(small, X) <= 0.5 * model_ms(fold(net, X), X)
    assert plan_fast(net, profile(net, X), X, compare=compare, **options).plan.fused == {}


def test_a_latency_budget_needs_a_clock(net, costs):
    with pytest.raises(BudgetError, match="needs latencies"):
        plan(net, costs, rule=rule_from("ratio"), budget={"latency": 0.5})


def test_what_is_no_layer_is_set_apart(net, costs, fake):
    timing = Timing.of(net, X, clock())
    assert timing.layer_share == pytest.approx(1 - OVERHEAD_MS / model_ms(net, X))
    assert timing.dense_ms == pytest.approx(model_ms(net, X))
    everything = plan(net, costs, rule=rule_from("ratio"), keep_ends=False, budget={"latency": 1.0}, timing=timing)
    assert everything.factorized == ()
    assert everything.layer("0").reason == "the budget is met as it is"


def test_the_timing_of_other_budgets_is_left_alone(net, costs, fake):
    timing = Timing.of(net, X, clock())
    budget = {"macs": 0.5}
    bare = plan(net, costs, rule=rule_from("ratio"), budget=budget)
    assert plan(net, costs, rule=rule_from("ratio"), budget=budget, timing=timing) == bare
    budget = {"macs": 0.5, "latency": 0.4}
    both = plan(net, costs, rule=rule_from("ratio"), keep_ends=False, budget=budget, timing=timing)
    assert both.after.macs <= 0.5 * costs.macs


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(kind="conv", in_channels=8, out_channels=4, kernel=(3, 3), padding=(1, 1), groups=2, bias=True),
        LayerSpec(kind="linear", in_channels=8, out_channels=4),
        ContractSpec(modes=(2, 4), equation="...ab,cb->...ac", weight_shape=(4, 4)),
    ],
    ids=str,
)
def test_made_up_layers_keep_values_in_range(spec):
    layer = neutral_layer(spec, torch.empty(0))
    shape = (2, 8, 5, 5) if getattr(spec, "kernel", ()) else (2, 8)
    with torch.no_grad():
        out = layer(torch.ones(shape))
    assert out.min() >= 0.1
    assert out.max() <= 1 + 1e-6


def test_the_memory_format_that_is_faster_takes_over(net, costs, monkeypatch):
    compare = FakeCompare(channels_last=0.5)
    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    formats = []

    def watch(variants, **options):
        formats.extend(n for n in variants if n == "after")
        layouts = [v[1].is_contiguous(memory_format=torch.channels_last) for n, v in variants.items() if n == "after"]
        formats.extend(layouts)
        return compare(variants, **options)

    result = plan_fast(
        net, costs, X, clock=clock(), budget={"latency": 0.6}, rule=rule_from("ratio"), keep_ends=False, compare=watch
    )
    assert formats[:2] == ["after", False]
    assert formats[-1] is True
    assert result.met
    assert result.share == pytest.approx(0.6, rel=0.1)


def test_a_model_that_is_not_faster_as_a_whole_is_never_handed_back(net, costs, monkeypatch):
    def compare(variants, **options):
        return FakeCompare(bias=1.0 if "factorized" in variants else 50.0)(variants, **options)

    monkeypatch.setattr("tenfold.profiling.latency.memory_format.compare_latency", compare)
    with pytest.raises(BudgetError, match="no plan makes the model faster"):
        plan_fast(
            net,
            costs,
            X,
            clock=clock(),
            budget={"latency": 0.5},
            rule=rule_from("ratio"),
            keep_ends=False,
            strict=False,
            compare=compare,
        )
