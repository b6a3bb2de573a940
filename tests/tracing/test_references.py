"""Layers that a forward reaches by other ways than the children of its module are copied and replaced there too."""

from __future__ import annotations

import collections
import dataclasses
import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.layers import FactorizedLayer
from tenfold.runtime import Runtime
from tenfold.surgery import densify, put
from tenfold.tracing import copied

Way = Callable[["Net"], Callable[[Tensor], Tensor]]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Layers in a frozen dataclass."""

    first: Any
    rest: tuple[Any, ...]


class Slot:
    """A layer in a slot."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Runner:
    """A plain object that knows the network and runs its layers."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, z: Tensor) -> Tensor:
        return torch.relu(self.net.b(torch.relu(self.net.a(z))))


def chain(layers: Any, z: Tensor) -> Tensor:
    for layer in layers:
        z = torch.relu(layer(z))
    return z


class Net(nn.Module):
    """Two layers that the forward reaches in some way, and one that it calls."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.held: Any = WAYS[way](self)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.held(x) if callable(self.held) else chain(RUN.get(self.way, list)(self.held), x)
        scores: Tensor = self.c(z)
        return scores


def nested_closure(net: Net) -> Callable[[Tensor], Tensor]:
    layers = [net.a, net.b]

    def inner(z: Tensor) -> Tensor:
        return chain(layers, z)

    def outer(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: function(z) + 0

    return outer(inner)


WAYS: dict[str, Callable[[Net], Any]] = {
    "list": lambda net: [net.a, net.b],
    "tuple in a dict": lambda net: {"steps": (net.a, [net.b])},
    "deque": lambda net: collections.deque([net.a, net.b]),
    "keys of a dict": lambda net: {net.a: 1, net.b: 2},
    "frozen dataclass": lambda net: Steps(net.a, (net.b,)),
    "slots": lambda net: [Slot(net.a), Slot(net.b)],
    "weak references": lambda net: [weakref.ref(net.a), weakref.ref(net.b)],
    "modules outside of the tree": lambda net: [nn.Sequential(net.a, nn.ReLU()), nn.Sequential(net.b)],
    "closure": lambda net: lambda z: torch.relu(net.b(torch.relu(net.a(z)))),
    "closure in a closure": nested_closure,
    "defaults": lambda net: [lambda z, layer=layer: layer(z) for layer in (net.a, net.b)],
    "partial": lambda net: functools.partial(chain, [net.a, net.b]),
    "partial by keyword": lambda net: functools.partial(
        lambda z, last, first: chain((first, last), z), last=net.b, first=net.a
    ),
    "bound methods": lambda net: [net.a.__call__, net.b.__call__],
    "object": Runner,
    "compiled": lambda net: [torch.compile(net.a, backend="eager"), net.b],
    "compiled function": lambda net: torch.compile(lambda z: chain((net.a, net.b), z), backend="eager"),
}
RUN: dict[str, Callable[[Any], Any]] = {
    "tuple in a dict": lambda held: (held["steps"][0], held["steps"][1][0]),
    "frozen dataclass": lambda held: (held.first, *held.rest),
    "slots": lambda held: [slot.layer for slot in held],
    "weak references": lambda held: [ref() for ref in held],
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_data", [False, True])
def test_what_is_planned_is_what_runs_and_what_is_loaded(way: str, with_data: bool, tmp_path: Path) -> None:
    net, x = Net(way).eval(), torch.randn(64, 32)
    before = net(x)
    recipe = {"budget": "params=0.5", "keep_ends": False}
    small = tenfold.compress(net, x[:1], recipe, data=[x] if with_data else None, runtime=Runtime(measure=False))
    assert {layer.path for layer in small.plan.factorized} & {"a", "b"}
    assert small.record.after.macs == small.plan.after.macs < small.record.before.macs
    dense = densify(small.model)
    with torch.no_grad():
        after = small.model(x)
        assert not torch.allclose(after, before)
        assert torch.equal(net(x), before)
        torch.testing.assert_close(dense(x), after, rtol=1e-4, atol=1e-5)
        small.save(tmp_path / "small")
        assert torch.equal(tenfold.load(Net(way).eval(), tmp_path / "small")[0].eval()(x), after)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_runs_its_own_layers(way: str) -> None:
    net, x = Net(way).eval(), torch.randn(3, 32)
    before = net(x).detach()
    twin = copied(net)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.a.weight.zero_()
        twin.b.bias.fill_(1)
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)


def test_functions_that_share_a_variable_go_on_sharing_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2))

    def counter() -> tuple[Callable[[], int], Callable[[], int]]:
        count = [net, 0]

        def step() -> int:
            nonlocal count
            count = [net, count[1] + 1]
            return count[1]

        def read() -> int:
            return count[1]

        return step, read

    net.step, net.read = counter()
    twin = copied(net)
    twin.step()
    assert (twin.read(), net.read()) == (1, 0)


def test_objects_that_the_copy_shares_stay_those_of_the_original() -> None:
    class Shared:
        def __deepcopy__(self, memo: Any) -> Shared:
            return self

    net = nn.Sequential(nn.Linear(2, 2))
    shared = Shared()
    net.shared, shared.run = shared, lambda x: net[0](x) + 0
    twin = copied(net)
    assert twin.shared is shared
    assert shared.run.__closure__[0].cell_contents is net


def test_a_long_chain_of_objects_is_followed() -> None:
    class Link:
        def __init__(self, behind: Any) -> None:
            self.behind = behind

    net = nn.Sequential(nn.Linear(2, 2))
    link: Any = net[0]
    for _ in range(5000):
        link = Link(link)
    net.chain = link
    layer = nn.Linear(2, 2)
    put(net, {"0": layer})
    while isinstance(link, Link):
        link = link.behind
    assert link is layer


def test_replacing_follows_hooks() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    net[1].register_forward_hook(lambda _m, _args, out: out + net[0](out))
    x = torch.randn(4, 8)
    small = tenfold.compress(net, x, {"budget": "params=0.7", "keep_ends": False}, runtime=Runtime(measure=False)).model
    assert any(isinstance(m, FactorizedLayer) for m in small)
    assert small[1]._forward_hooks
    dense = densify(small)
    torch.testing.assert_close(dense(x), small(x), rtol=1e-4, atol=1e-5)
