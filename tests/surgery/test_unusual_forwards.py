"""Sequential fits of models that draw, remember, and route: replays see what whole forwards see, and fits gain by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tenfold.calibration.collect import collect_moments
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery import apply
from tenfold.surgery.sequential import apply_sequentially
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.decisions import Decisions, Imposed
from tenfold.tracing.memory import Memory
from tenfold.tracing.randomness import Randomness
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


@pytest.mark.parametrize("name", MODELS)
def test_fits_in_order_are_no_worse_than_each_on_its_own(name):
    model, data, held = build(name), batches(12), batches(4, seed=2)
    todo = plan(model, profile(model, data[0]), {"rule": {"name": "ratio", "share": 0.5}, "formats": ["low_rank"], "keep_ends": False, "keep": ["re:.*(router|score)"] if any(k in name for k in ("experts", "rows")) and name not in ("merged rows",) else []})
    paths = [layer.path for layer in todo.factorized]
    specs = {path: profile(model, data[0]).layer(path).spec for path in paths}
    alone = apply(model, todo, moments=collect_moments(model, data, specs))
    ordered = apply_sequentially(model, todo, data)
    first, second = lost(name, model, ordered, held), lost(name, model, alone, held)
    print(name, first, second)
    assert first < 1.1 * second
