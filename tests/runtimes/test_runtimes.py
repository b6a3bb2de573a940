"""Every runtime runs what the model computes, and says what it lacks before anything is measured."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import BudgetError, ExportError, MissingExtraError, ProfileError, UnknownNameError
from tenfold.planning import decide
from tenfold.planning.target import Target
from tenfold.profiling import LatencyTable
from tenfold.records import LayerSpec, Recipe
from tenfold.runtime import Runtime
from tenfold.runtimes import RUNTIMES, Conditions, LayerPair, runtime_named
from tenfold.surgery import apply
from tests.planning.made_up_time import model_ms, three_layers

X = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
GRAPHS = [name for name in RUNTIMES.names() if not name.startswith("torch")]


def there(name: str) -> bool:
    return all(find_spec(package) for package in RUNTIMES.get(name).packages)


@pytest.fixture(params=RUNTIMES.names())
def runtime(request):
    if not there(request.param):
        pytest.skip(f"{request.param} is not installed")
    return runtime_named(request.param)


def test_a_model_computes_in_every_runtime_what_it_computes_in_torch(runtime):
    torch.manual_seed(0)
    layers = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 64)]
    net = nn.Sequential(nn.BatchNorm2d(32), *layers).eval()
    wanted = net(X)
    for layout in runtime.memory_formats(X):
        made, inputs = runtime.ready(net, X, layout, 1)
        found = made(inputs)
        allowed = 0.05 if runtime.name.endswith("int8") else 1e-4
        assert (found - wanted).abs().max() <= allowed * wanted.abs().max()


def test_layers_are_timed_in_turns(runtime):
    spec = LayerSpec(kind="conv", in_channels=32, out_channels=32, kernel=(3, 3), padding=(1, 1))
    stages = (spec.mix(32, 16), spec.core(16, 16), spec.mix(16, 32))
    pair = LayerPair(spec, "tucker2", {"out": 16, "in": 16}, (1, 32, 8, 8), stages)
    found = runtime.compare_layer(pair, Conditions(threads=1), seconds=0.02, compare=tenfold.profiling.compare_latency)
    assert set(found.speedups) == {"dense", "factorized"}
    assert all(latency.median_ms > 0 for latency in found.latencies.values())


def test_a_runtime_that_lacks_a_precision_says_so_first():
    with pytest.raises(ProfileError, match="onnxruntime is timed with weights in float32, and the model has float64"):
        runtime_named("onnxruntime").check(nn.Linear(2, 2).double(), torch.zeros(1, 2).double())


def test_a_runtime_that_lacks_a_device_says_so_first():
    with pytest.raises(ProfileError, match="onnxruntime runs on cpu, and the model is on meta"):
        runtime_named("onnxruntime").check(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2, device="meta"))


def test_an_unknown_runtime_names_those_that_there_are():
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        tenfold.compress(three_layers(), X, {"budget": "latency=0.5", "runtime": "onnxrt"})


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(RUNTIMES.get("openvino"), "packages", ("no_such_package",))
    with pytest.raises(MissingExtraError, match=r"tenfold\[openvino\]"):
        tenfold.compress(three_layers(), X, {"budget": "latency=0.5", "runtime": "openvino"})


def blocky(block: int):
    """Return a clock of a runtime that works in blocks of channels, and detests what is no multiple of four."""

    def milliseconds(spec, in_shape):
        inner, outer = (-(-n // block) * block for n in (spec.in_channels // spec.groups, spec.out_channels))
        penalty = 3.0 if spec.out_channels % 4 or spec.in_channels % 4 else 1.0
        return 0.001 + penalty * inner * outer * torch.Size(spec.kernel).numel() * 1e-6

    return milliseconds


def clock(runtime="torch", block=16):
    return LatencyTable(runtime=runtime, cache=None, threads=1, timer=blocky(block), model_timer=model_ms)


@pytest.mark.parametrize(("block", "step"), [(16, 16), (8, 8), (4, 4), (1, 4)])
def test_the_blocks_of_a_runtime_are_found_by_measuring(block, step):
    table = clock(block=block)
    assert table.step_of(LayerSpec(kind="conv", in_channels=3, out_channels=5, kernel=(3, 3))) == step
    assert table.step_of(LayerSpec(kind="linear", in_channels=3, out_channels=5)) == step


def test_a_runtime_without_blocks_has_none():
    table = LatencyTable(cache=None, threads=1, timer=lambda spec, in_shape: 0.01 + spec.macs(in_shape) / 1e6)
    assert table.step_of(LayerSpec(kind="conv", in_channels=3, out_channels=5, kernel=(3, 3))) == 1


@pytest.mark.parametrize("rule", ["global", "energy", "ratio"])
def test_ranks_come_in_blocks_whatever_the_rule(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    x = torch.zeros(1, 64, 8, 8)
    settings = {"energy": {"name": "energy", "energy": 0.5}, "ratio": {"name": "ratio", "share": 0.5}}
    recipe = Recipe(
        budget="macs=0.6" if rule == "global" else None,
        rule=settings.get(rule, rule),
        keep_ends=False,
        gate=False,
        runtime="torch",
        formats=("tucker2", "low_rank"),
    )
    plan = decide(net, x, recipe, runtime=Runtime(clock=clock())).plan
    assert plan.factorized
    for layer in plan.factorized:
        assert all(rank % 16 == 0 for rank in layer.rank.values()), layer
        assert "torch works in blocks of 16 channels" in layer.reason
    free = decide(net, x, recipe.replace(runtime=None)).plan
    assert any(rank % 16 for layer in free.factorized for rank in layer.rank.values())


def test_formats_of_other_parts_than_plain_layers_are_no_candidates_where_they_cannot_be_timed():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    recipe = Recipe(budget="params=0.5", formats=("tt_matrix",), keep_ends=False, runtime="onnxruntime")
    with pytest.raises(BudgetError, match="tt_matrix has other parts than plain layers, and onnxruntime times no"):
        decide(net, torch.zeros(1, 64), recipe, runtime=Runtime(clock=clock("onnxruntime")))


def test_a_layer_that_the_runtime_cannot_build_stays_with_that_reason(monkeypatch):
    def refuse(spec, in_shape):
        if spec.kind == "conv" and spec.in_channels == 32:
            msg = "no such kernel"
            raise ExportError(msg)
        return 0.01 + spec.macs(in_shape) / 1e6

    table = LatencyTable(cache=None, threads=1, timer=refuse)
    net = three_layers()
    target = Target.of(Recipe(), net, X, Runtime(clock=table))
    reasons = target.kept(("tucker2", "low_rank"))
    assert reasons == dict.fromkeys(("0", "2"), "torch cannot build it: no such kernel")
    assert set(target.refused) == {"0", "2"}


def test_a_clock_of_another_runtime_is_refused():
    with pytest.raises(ProfileError, match="the clock measures in onnxruntime and the recipe is for torch"):
        decide(three_layers(), X, Recipe.of("latency=0.5"), runtime=Runtime(clock=clock("onnxruntime")))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_plan_and_the_record_name_the_runtime(name):
    if not there(name):
        pytest.skip(f"{name} is not installed")
    net = three_layers()
    recipe = Recipe(budget="macs=0.7", keep_ends=False, runtime=name, gate=False)
    small = tenfold.compress(net, X, recipe, runtime=Runtime(clock=clock(name)))
    assert small.plan.recipe.runtime == name
    assert small.record.after.latency.runtime == name
    assert torch.allclose(small.model(X), apply(net, small.plan)(X), atol=1e-5)
