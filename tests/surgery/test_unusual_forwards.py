"""Sequential fits of models that draw, remember, and route: replays see what whole forwards see, and fits gain."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold import Runtime, compress
from tenfold.calibration.collect import collect_moments, measurable
from tenfold.errors import CalibrationWarning
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import Plan
from tenfold.surgery import apply, with_errors
from tenfold.surgery.sequential import apply_sequentially
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.decisions import Decisions, Imposed
from tenfold.tracing.memory import Memory
from tenfold.tracing.randomness import Randomness, same_state
from tenfold.tracing.replay import Replay
from tenfold.tracing.trace import Tracer
from tests.surgery.unusual_forwards import ELSEWHERE, MODELS, batches, build


def whole(model: nn.Module, data: list[Tensor], decisions: list[Decisions]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return inputs and outputs of all layers in plain forwards: on the same noise, decisions and state, no more."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}

    def note(path):
        return lambda _m, args, y: seen.setdefault(path, []).append((args[0].clone(), y.clone()))

    handles = [layer.register_forward_hook(note(path)) for path, layer in layers.items()]
    for number, batch in enumerate(data):
        memory = Memory(model)
        ELSEWHERE.manual_seed(5)
        watched = Tracer(dict(model.named_modules()), watchers=[Imposed(decisions[number])])
        with Randomness(model).seeded(number), evaluating(model), watched:
            model(batch)
        memory.restore()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [4 << 30, 0])
def test_replays_see_what_whole_forwards_see(name, limit):
    model, data = build(name), batches(3)
    dense = Replay(model, data, limit=limit, changing=False)
    other = copy.deepcopy(model)
    changing = Replay(other, data, limit=limit, like=dense)
    wanted = whole(model, data, dense.decisions)
    layers = [path for path in dense.order if isinstance(model.get_submodule(path), nn.Linear)]
    assert layers == [path for path in changing.order if isinstance(model.get_submodule(path), nn.Linear)]
    for path in layers:
        now = whole(other, data, dense.decisions)
        for replay, found in ((dense, wanted), (changing, now)):
            assert len(replay.places(path)) == len(found[path])
            for x, y, (own_x, own_y) in zip(replay.inputs(path), replay.outputs(path), found[path], strict=True):
                assert torch.equal(x, own_x)
                assert torch.equal(y, own_y)
        with torch.no_grad():
            weight = other.get_submodule(path).weight
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))


def watched(model: nn.Module, decisions: Decisions) -> Tracer:
    return Tracer(dict(model.named_modules()), watchers=[Imposed(decisions)])


def lost(name: str, model: nn.Module, small: nn.Module, data: list[Tensor]) -> float:
    """Return the error of the outputs on held-out batches, of the noise and the state of the original."""
    found, wanted = [], []
    decisions = Replay(model, data, seed=100).decisions if name.startswith("pruned") else [Decisions()] * len(data)
    for number, batch in enumerate(data):
        for net, outputs in ((model, wanted), (small, found)):
            memory = Memory(net)
            with Randomness(net).seeded(100 + number), torch.no_grad(), watched(net, decisions[number]):
                outputs.append(net(batch))
            memory.restore()
    if any(x.shape != y.shape for x, y in zip(found, wanted, strict=True)):  # rows were dropped, others in each
        found, wanted = ([x.mean(0, keepdim=True) for x in outputs] for outputs in (found, wanted))
    x, y = torch.cat(found), torch.cat(wanted)
    return float((x - y).norm() / (y - y.mean(0)).norm())


def halved(model: nn.Module, example: Tensor) -> Plan:
    keep = [path for path, _ in model.named_modules() if path.endswith(("router", "score"))]
    recipe = {"rule": {"name": "ratio", "share": 0.5}, "formats": ["low_rank"], "keep_ends": False, "keep": keep}
    return plan(model, profile(model, example), recipe)


@pytest.mark.filterwarnings("ignore::tenfold.errors.CalibrationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_fits_in_order_are_no_worse_than_each_on_its_own(name):
    model, data, held = build(name), batches(8), batches(4, seed=2)
    todo, costs = halved(model, data[0]), profile(model, data[0])
    specs = {layer.path: costs.layer(layer.path).spec for layer in todo.factorized}
    alone = apply(model, todo, moments=collect_moments(model, data, specs))
    ordered = apply_sequentially(model, todo, data)
    assert lost(name, model, ordered, held) < 1.1 * lost(name, model, alone, held)


@pytest.mark.parametrize(("name", "why"), [("groups", "unique"), ("gamma noise", "draws as many random numbers")])
def test_layers_whose_rows_do_not_correspond_are_fitted_on_their_own(name, why):
    model, data = build(name), batches(4)
    todo = halved(model, data[0])
    with pytest.warns(CalibrationWarning, match=rf"2 of 6 layers are fitted each on its own.*'blocks\.1\.down'.*{why}"):
        new = apply_sequentially(model, todo, data)
    told = with_errors(todo, new)
    reasons = {layer.path: layer.reason for layer in told.layers if "; fitted on its own: " in layer.reason}
    assert set(reasons) == {"blocks.1.down", "last"}
    assert all(why in reason for reason in reasons.values())
    assert with_errors(told, new) == told
    specs = {path: spec for path, spec in measurable(model).items() if path in reasons}
    with Randomness(model).seeded(0):
        alone = apply(model, todo, moments=collect_moments(model, data, specs))
    for path in reasons:
        torch.testing.assert_close(new.get_submodule(path).weight, alone.get_submodule(path).weight)


@pytest.mark.parametrize("name", ["denoiser", "experts", "a generator of its own"])
def test_a_result_depends_on_no_generator_and_moves_none(name):
    results = []
    for seed in (1, 2):
        model, data = build(name), batches(4)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = Randomness(model).state()
        recipe = {"budget": {"macs": 0.6}, "keep": "*router" if name == "experts" else ()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            small = compress(model, data[0], recipe, data=data, runtime=Runtime(measure=False)).model
        assert same_state(before, Randomness(model).state())
        results.append(small.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
