"""Stacks of matrices are found by their use, taken apart without a change of outputs, planned, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tenfold
from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer, StackedLinear
from tenfold.planning import plan as make_plan
from tenfold.planning.unroll import unroll_for_plan
from tenfold.profiling import profile
from tenfold.records import Plan, Recipe
from tenfold.runtime import Runtime
from tenfold.surgery import apply, joined_projections, restack_, separate, separated, stacks, unstack_, unstacked
from tests.surgery.experts import COUNT, INNER, PATCHES, WIDTH, WORDS, Experts, RoutedViT

QUIET = Runtime(measure=False)
KINDS = {"blocks.0.experts": "up.T, down.T", "blocks.1.experts": "up.T, down.T"}
HALF = {"budget": {"params": 0.5}, "calibration": {"method": "independent"}}


def pictures(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=WORDS)
def vit(request: pytest.FixtureRequest) -> RoutedViT:
    torch.manual_seed(0)
    return RoutedViT(request.param).eval()


def test_stacks_are_taken_apart_without_a_change(vit: RoutedViT) -> None:
    x = pictures()
    assert stacks(vit, x) == KINDS
    assert separated(vit) == {}
    opened = separate(vit, KINDS)
    assert torch.allclose(opened(x), vit(x), atol=1e-5)
    assert unstacked(opened) == KINDS
    assert separate(opened, KINDS) is opened
    assert isinstance(vit.blocks[0].experts.up, nn.Parameter)
    back = restack_(copy.deepcopy(opened))
    assert torch.equal(back(x), vit(x))
    assert dict(back.named_parameters()).keys() == dict(vit.named_parameters()).keys()
    before, after = profile(vit, x), profile(opened, x)
    assert before.cost == after.cost
    assert before.uncounted == after.uncounted == {}
    met = COUNT if vit.blocks[0].experts.words == "dense" else 2
    outside = 2 * WIDTH * (3 * WIDTH + WIDTH + COUNT + 2 * PATCHES)  # per token, in two blocks
    assert before.macs == 4 * (PATCHES * (3 * 16 * WIDTH + outside + 2 * met * 2 * WIDTH * INNER) + WIDTH * 5) + (
        4 * PATCHES * 2 * COUNT * WIDTH if met == COUNT else 0
    )


def test_experts_run_on_their_tokens_alone() -> None:
    torch.manual_seed(0)
    experts, x = Experts().eval(), torch.randn(6, WIDTH)
    chosen = torch.tensor([[0, 2], [0, 3], [2, 0], [0, 2], [3, 2], [0, 2]])
    opened = unstack_(experts, {"": "up.T, down.T"})
    cost = profile(opened, (x, chosen, torch.ones(6, 2)))
    rows = {n: sum(c.in_shape[0] * c.count for c in cost.layer(f"up.{n}").calls) for n in range(COUNT)}
    assert rows == {0: 5, 1: 0, 2: 5, 3: 2}
    assert "no input is routed to it" in cost.layer("up.1").note


def test_compressing_with_data_saving_and_loading(vit: RoutedViT, tmp_path: Path) -> None:
    data = [pictures(32, seed) for seed in range(1, 5)]
    small = tenfold.compress(vit, pictures(), HALF, data=data, runtime=QUIET)
    assert small.record.after.params <= 0.5 * small.record.before.params
    assert small.record.after.macs == profile(small.model, pictures()).macs
    assert small.plan.unrolled.items() <= (KINDS | joined_projections(vit)).items()
    ranks = [layer.rank for layer in small.plan.factorized if ".up." in layer.path]
    assert ranks

    small.save(tmp_path / "small")
    fresh = RoutedViT(vit.blocks[0].experts.words)
    back, plan = tenfold.load(fresh, tmp_path / "small")
    assert torch.equal(back.eval()(pictures()), small.model.eval()(pictures()))
    assert plan.unrolled == small.plan.unrolled
    again = tenfold.compress(
        vit, pictures(), Plan.from_text(small.plan.to_yaml(), source="test"), data=data, runtime=QUIET
    )
    assert torch.equal(again.model.eval()(pictures()), small.model.eval()(pictures()))

    test = pictures(64, 9)
    blind = tenfold.compress(vit, pictures(), "params=0.5", runtime=QUIET)
    with torch.no_grad():
        lost = [float((net.model.eval()(test) - vit(test)).norm()) for net in (small, blind)]
    assert lost[0] < lost[1]

    small.model(pictures()).sum().backward()
    factors = [p for path, p in small.model.named_parameters() if ".stages." in path]
    assert all(p.grad is not None for p in factors)


class Switched(nn.Module):
    """Four experts, of which the first number of each row picks one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COUNT, 24, 24))
        self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.bmm(self.weight[x[:, 0].long()], x.unsqueeze(-1)).squeeze(-1))
        return scores


def rows(count: int, *numbers: int) -> Tensor:
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(count))
    x[:, 0] = torch.tensor(numbers).repeat(count)[:count] + 0.5
    return x


def test_experts_are_planned_by_the_tokens_of_the_data() -> None:
    torch.manual_seed(0)
    net = Switched().eval()
    recipe = {"budget": {"params": 0.8}, "calibration": {"method": "independent"}, "keep": "head"}
    small = tenfold.compress(net, rows(20, 0, 1), recipe, data=[rows(300, 0, 2), rows(300, 2)], runtime=QUIET)
    layers = {n: small.plan.layer(f"weight.{n}") for n in range(COUNT)}
    assert [layers[n].action for n in range(COUNT)] == ["factorize", "keep", "factorize", "keep"]
    assert layers[1].reason == "no moments of its inputs, which a plan by data needs: none of the data reach it"
    assert layers[3].reason == "never called by this forward: no input is routed to it"
    assert (layers[2].before.macs, layers[2].after.macs) == (0, 0)  # of the example inputs
    assert small.plan.after.params == small.record.after.params
    assert small.plan.after.macs == small.record.after.macs

    blind = tenfold.compress(net, rows(20, 0, 1), {**recipe, "calibration": {"method": "none"}}, runtime=QUIET)
    assert [blind.plan.layer(f"weight.{n}").action for n in range(COUNT)] == ["factorize"] * 2 + ["keep"] * 2


class Modules(nn.Module):
    """The same with experts that are modules, and run on no rows where nothing is routed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(COUNT))
        self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            own = torch.where(x[:, 0].long() == number)[0]
            y = y.index_add(0, own, expert(x[own]))
        scores: Tensor = self.head(y)
        return scores


def test_experts_that_are_modules_are_planned_alike() -> None:
    torch.manual_seed(0)
    net = Modules().eval()
    recipe = {"budget": {"params": 0.8}, "calibration": {"method": "independent"}, "keep": "head"}
    small = tenfold.compress(net, rows(20, 0, 1), recipe, data=[rows(300, 0, 2), rows(300, 2)], runtime=QUIET)
    layers = {n: small.plan.layer(f"experts.{n}") for n in range(COUNT)}
    assert [layers[n].action for n in range(COUNT)] == ["factorize", "keep", "factorize", "keep"]
    assert layers[1].reason == "no moments of its inputs, which a plan by data needs: none of the data reach it"
    assert layers[3].reason == "never called by this forward: no input is routed to it"


def test_a_module_that_runs_on_no_rows_saw_none() -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    cost = profile(net, torch.randn(0, 24))
    assert "no input is routed to it" in cost.layer("1").note


def test_idle_experts_stay_whole_in_one_line_with_all_that_they_hold() -> None:
    torch.manual_seed(0)
    vit = RoutedViT().eval()
    kept = ["blocks.0.experts.*.*"]
    small = tenfold.compress(vit, pictures(), {"budget": {"params": 0.75}, "keep": kept}, runtime=QUIET)
    assert small.plan.unrolled == {"blocks.1.experts": KINDS["blocks.1.experts"]}
    line = small.plan.layer("blocks.0.experts")
    assert (line.kind, line.action) == ("Experts", "keep")
    assert line.before.params == sum(p.numel() for p in vit.blocks[0].experts.parameters())
    assert line.reason.startswith("left whole, since none of its 8 matrices is factorized")
    assert small.plan.after.params == profile(small.model, pictures()).params


@pytest.mark.parametrize("recipe", [{"budget": {"params": 0.9}, "keep": ["blocks.*.experts"]}, "latency=0.9"])
def test_named_as_a_whole_or_under_a_limit_of_latency_they_stay(recipe: dict[str, object] | str) -> None:
    vit = RoutedViT().eval()
    assert unroll_for_plan(vit, Recipe.of(recipe), pictures()) is vit


class Uses(nn.Module):
    """Parameters of three axes that are no stacks, or not only, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 3))
        self.table = nn.Parameter(torch.randn(4, 6, 6))
        self.both = nn.Parameter(torch.randn(3, 4, 4))
        self.idle = nn.Parameter(torch.randn(3, 4, 4))
        self.single = nn.Parameter(torch.randn(1, 4, 4))
        self.stack = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv1d(x, self.kernel, padding=1) + (self.table[:, :, 0] * 2)
        x = (x.mT @ self.both[0] @ self.both[0].T).mT
        return torch.stack([x.mT @ w.T for w in self.stack]) @ self.single[0]


def test_what_is_used_otherwise_is_no_stack() -> None:
    torch.manual_seed(0)
    net, x = Uses().eval(), torch.randn(2, 4, 6)
    assert stacks(net, x) == {"": "stack"}
    assert "holds stacks of matrices" in profile(net, x).layer("").note


def test_what_two_modules_share_is_left_alone() -> None:
    net = nn.Sequential(Switched(), Switched())
    net[1].weight = net[0].weight
    assert stacks(net, rows(4, 0, 1).abs()) == {}


def test_a_forward_that_wants_a_parameter_is_left_alone() -> None:
    class Strict(Switched):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.weight, nn.Parameter):
                raise TypeError(self.weight)
            return super().forward(x)

    assert stacks(Strict(), rows(4, 0, 1)) == {}


def test_plans_for_other_models_are_refused() -> None:
    net = Switched()
    with pytest.raises(PlanError, match="the model has no parameter 'gate' that stacks matrices"):
        unstack_(net, {"": "weight, gate"})
    assert isinstance(net.weight, nn.Parameter)
    opened = separate(net, {"": "weight"})
    made = make_plan(opened, profile(opened, rows(8, 0, 1)), {"budget": {"params": 0.9}, "keep_ends": False})
    small = apply(net, made)
    assert isinstance(small.weight, StackedLinear)
    assert any(isinstance(layer, FactorizedLayer) for layer in small.weight.children())
