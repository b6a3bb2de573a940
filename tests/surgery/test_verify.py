"""A plan is carried out only if the forward runs its layers as it ran the dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.errors import PlanError, TenfoldWarning
from tenfold.records import Cost, LayerPlan, Plan
from tenfold.runtime import Runtime
from tenfold.surgery import verify, warn_of_costs

HELD: dict[str, Any] = {}
QUIET = Runtime(measure=False)


class Net(nn.Module):
    """Three layers; what the forward does with them is up to the derived class."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)


class ThroughGlobal(Net):
    def __init__(self) -> None:
        super().__init__()
        HELD["steps"] = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for layer in HELD["steps"]:
            x = torch.relu(layer(x))
        return self.c(x)  # type: ignore[no-any-return]


class PassesOver(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                x = layer(x)
        return x


class ActivatesLinear(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
            if type(layer).__name__ == "Linear":
                x = torch.relu(x)
        return x


class ScalesTheLast(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x)))
        return x * 2 if isinstance(self.b, nn.Linear) else x


class AsksForParameters(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))) + sum(p.mean() for p in self.b.parameters())  # type: ignore[no-any-return]


class OtherStructure(Net):
    def forward(self, x: Tensor) -> Any:
        out = self.c(self.b(self.a(x)))
        return (out,) if isinstance(self.a, nn.Linear) else out


class Fails(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.b, nn.Linear):
            raise TypeError("only linear layers")  # noqa: TRY003, EM101
        return self.c(self.b(self.a(x)))  # type: ignore[no-any-return]


def planned(*paths: str) -> Plan:
    layers = (
        LayerPlan(
            path=p,
            kind="Linear 32→32",
            action="factorize",
            format="low_rank",
            rank={"rank": 4},
            reason="",
            before=Cost(),
            after=Cost(),
        )
        for p in paths
    )
    return Plan(tenfold="", model="", before=Cost(), after=Cost(), layers=tuple(layers))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            ThroughGlobal,
            r"layer 'a' runs 0 times once factorized, 1 times before: the forward still runs a Linear outside",
        ),
        (PassesOver, r"layer 'a' runs 0 times once factorized, 1 times before: the forward asks for its class"),
        (ActivatesLinear, r"what enters layer 'b' changes once 'a' or 'b' is factorized.*keep 'a' or 'b'"),
        (ScalesTheLast, r"the output of the model changes once 'b' is factorized"),
        (AsksForParameters, r"the output of the model changes once 'b' is factorized"),
        (OtherStructure, r"the output of the model changes once 'b' is factorized"),
        (Fails, r"with 'a', 'b' factorized, Fails does not run on inputs .*: TypeError: only linear layers\. Keep"),
    ],
)
def test_a_forward_that_does_otherwise_is_refused(kind: type[Net], words: str) -> None:
    torch.manual_seed(0)
    net, x = kind().eval(), torch.randn(4, 32)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(PlanError, match=words):
        verify(net, planned("a", "b"), x)
    with pytest.raises(PlanError):
        tenfold.compress(net, x, planned("a", "b"), runtime=QUIET)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("kind", [ThroughGlobal, PassesOver, ActivatesLinear])
def test_the_refusal_comes_before_the_fits_by_data(kind: type[Net]) -> None:
    x = torch.randn(64, 32)
    with pytest.raises(PlanError, match=r"[Kk]eep 'a'"):
        tenfold.compress(kind().eval(), x, planned("a", "b"), data=[x], runtime=QUIET)


def test_layers_that_are_kept_may_be_asked_for_anything() -> None:
    x = torch.randn(4, 32)
    verify(ScalesTheLast().eval(), planned("a", "c"), x)
    verify(Fails().eval(), planned("a", "c"), x)


class Routed(Net):
    """Which expert a row goes to depends on values, which factorizing changes."""

    def forward(self, x: Tensor) -> Tensor:
        score = self.a(x)
        left = score.mean(-1) > 0
        out = torch.zeros_like(score)
        for expert, rows in ((self.b, left), (self.c, ~left)):
            if rows.any():
                out[rows] = expert(score[rows])
        return out


class Drawn(Net):
    """Random numbers of torch's own generator."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)) + torch.randn_like(x))  # type: ignore[no-any-return]


class Counts(Net):
    """No two forwards are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.c(self.b(self.a(x)) * self.runs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Routed, Drawn, Counts])
def test_a_forward_that_depends_on_values_or_chance_is_not_refused(kind: type[Net]) -> None:
    torch.manual_seed(1)
    verify(kind().eval(), planned("a", "b", "c"), torch.randn(16, 32))


def test_random_state_and_modes_are_kept() -> None:
    net, x = Drawn().train(), torch.randn(4, 32)
    state = torch.get_rng_state()
    verify(net, planned("a"), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


def test_other_costs_than_planned_are_told() -> None:
    net = Routed().eval()
    x = torch.randn(16, 32)
    cost = tenfold.profile(net, x)
    plan = planned("a").replace(after=cost.cost)
    warn_of_costs(plan, cost, cost)
    other = tenfold.profile(net, torch.cat([x, x]))
    with pytest.warns(TenfoldWarning, match=r"takes [\d,]+ MACs, and its plan says [\d,]+: 'a' runs on other shapes"):
        warn_of_costs(plan, cost, other)
