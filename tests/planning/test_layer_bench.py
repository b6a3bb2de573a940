"""Layers in turns under a made-up clock: what is slower returns to dense, and what is measured once is known."""

from __future__ import annotations

import pytest
import torch

from tenfold.allocation import choose
from tenfold.planning import LayerBench, LayerTiming, keep_slower_layers_dense, tabulate
from tenfold.planning.layer_bench import together
from tenfold.profiling import Comparison, profile
from tenfold.profiling.latency.layer_timer import neutral_layer
from tenfold.records import ContractSpec, LayerSpec, Speedup
from tests.planning.made_up_time import FakeCompare, stage_ms, three_layers

FAST, SLOW = LayerTiming(2.0, 1.0, 2.0, 1.9, 2.1), LayerTiming(1.0, 1.25, 0.8, 0.7, 0.9)


@pytest.fixture(scope="module")
def net():
    return three_layers()


X = torch.zeros(1, 32, 8, 8)


@pytest.fixture(scope="module")
def costs(net):
    return profile(net, X)


def make_of(net, costs, share=0.5, **options):
    """Return a function that makes the plan without the layers that were slower."""
    table = tabulate(net, costs, {"rule": {"name": "ratio", "share": share}, "keep_ends": False, **options})
    return lambda reasons: choose(table.kept(dict(reasons)))


def test_a_slower_layer_stays_dense_with_what_was_measured_and_the_rest_is_planned_anew(net, costs):
    asked = []

    def make(reasons):
        asked.append(dict(reasons))
        return make_of(net, costs)(reasons)

    result = keep_slower_layers_dense(make, lambda p: {x.path: SLOW if x.path == "2" else FAST for x in p.factorized})
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
    result = keep_slower_layers_dense(make_of(net, costs), lambda p: {x.path: perhaps for x in p.factorized})
    assert result.plan.factorized == ()
    assert "1.11 times faster, 95 % 0.95 to 1.30" in result.plan.layer("0").reason


def test_with_a_learner_a_layer_has_a_second_chance_at_other_ranks(net, costs):
    learned, shares = [], iter([0.5, 0.25, 0.25])

    def make(reasons):
        return make_of(net, costs, next(shares))(reasons)

    big = make_of(net, costs)({}).layer("2").rank

    def check(p):
        return {x.path: SLOW if x.path == "4" or (x.path == "2" and x.rank == big) else FAST for x in p.factorized}

    result = keep_slower_layers_dense(make, check, learn=lambda layer, timing: learned.append((layer.path, timing)))
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
