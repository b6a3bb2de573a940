"""Layers that take the place of others: however they are made, they are made alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tenfold.calibration.collect import collect_moments
from tenfold.decompositions import DECOMPOSITIONS, Decomposition, default_algorithm
from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer
from tenfold.planning.single_layer import substitute
from tenfold.records import Cost, LayerPlan, Plan
from tenfold.surgery import apply, apply_sequentially, restructure_, with_errors
from tenfold.surgery.replacement import geometry


def planned(format: str, rank: dict[str, int], algorithm: Decomposition | None = None) -> Plan:
    """Return a plan of the layer ``0``."""
    layer = LayerPlan(
        path="0",
        kind="",
        action="factorize",
        format=format,
        rank=rank,
        algorithm=None if algorithm is None else algorithm.to_dict(),
        reason="",
        before=Cost(),
        after=Cost(),
    )
    return Plan(tenfold="", model="", before=Cost(), after=Cost(), layers=(layer,))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 6, 8, 8, generator=torch.Generator().manual_seed(i)) + 1.0 for i in range(2)]


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_measured_is_what_is_applied(bias: bool, model: nn.Sequential, batches: list[torch.Tensor]) -> None:
    if bias:
        model[0] = nn.Conv2d(6, 8, 3)
    moments = collect_moments(model, batches, {"0": geometry(model[0])[0]})
    alone = substitute(model[0], "low_rank", {"rank": 4}, metric=moments["0"])
    applied = apply(model, planned("low_rank", {"rank": 4}), moments=moments)[0]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), applied.parameters(), strict=True))
    assert not any(p.requires_grad for p in alone.parameters())


def test_a_plan_says_what_found_the_factors(model: nn.Sequential, batches: list[torch.Tensor]) -> None:
    named = DECOMPOSITIONS.get("hooi")(n_iter=3)
    plan = planned("tucker2", {"out": 4, "in": 3}, named)
    assert with_errors(plan, apply(model, plan)).layer("0").algorithm == named.to_dict()
    fitted = with_errors(plan, apply_sequentially(model, plan, batches)).layer("0").algorithm
    assert fitted is not None
    assert fitted["name"] == default_algorithm("tucker2", data_aware=True).name()
    again = planned("tucker2", {"out": 4, "in": 3}, Decomposition.from_dict(fitted))
    first, second = (apply_sequentially(model, p, batches)[0].weight for p in (plan, again))
    assert torch.equal(first.detach() + 0, second.detach() + 0)


def test_an_algorithm_that_does_not_exist_is_told_with_its_layer(
    model: nn.Sequential, batches: list[torch.Tensor]
) -> None:
    plan = planned("tucker2", {"out": 4, "in": 3})
    plan = plan.replace(layers=(plan.layers[0].replace(algorithm={"name": "hoooi"}),))
    for carry_out in (apply, lambda m, p: apply_sequentially(m, p, batches)):
        with pytest.raises(PlanError, match=r"layer '0'.*hooi"):
            carry_out(model, plan)


def test_settings_of_a_plan_count_where_nothing_knows_the_data(
    model: nn.Sequential, batches: list[torch.Tensor]
) -> None:
    named = DECOMPOSITIONS.get("tucker_cp")(slack=1.5, seed=3)
    plan = planned("tucker_cp", {"out": 6, "in": 5, "rank": 6}, named)
    layer = apply_sequentially(model, plan, batches)[0]
    assert isinstance(layer, FactorizedLayer)
    assert layer.fit is not None
    assert layer.fit.algorithm == named.to_dict()


def test_a_layer_that_nothing_serves_is_named() -> None:
    with pytest.raises(PlanError, match="the layer cannot be factorized"):
        geometry(nn.ReLU())
    with pytest.raises(PlanError, match=r"layer 'a\.b' cannot"):
        geometry(nn.ReLU(), "a.b")


def test_a_plan_for_another_layer_is_refused(model: nn.Sequential, batches: list[torch.Tensor]) -> None:
    plan = planned("low_rank", {"rank": 3})
    plan = plan.replace(layers=(plan.layers[0].replace(kind="Conv2d 6→8 5×5"),))
    for carry_out in (apply, restructure_, lambda m, p: apply_sequentially(m, p, batches)):
        with pytest.raises(PlanError, match="another model's plan"):
            carry_out(model, plan)


def test_the_structure_is_trained_as_the_layer_was(model: nn.Sequential) -> None:
    model[0] = nn.Conv2d(6, 8, 3)
    model[0].weight.requires_grad_(requires_grad=False)
    layer = restructure_(model, planned("low_rank", {"rank": 3}))[0]
    assert {name.rpartition(".")[2]: p.requires_grad for name, p in layer.named_parameters()} == {
        "weight": False,
        "bias": True,
    }


def hooked() -> nn.Sequential:
    """Return a network whose first layer has hooks that change what it takes and what it returns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 0.5 + 1.0,))
    model[0].register_forward_hook(lambda _, __, out: out * 3)
    return model


def test_hooks_are_no_part_of_what_is_fitted() -> None:
    model = hooked()
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    full = planned("low_rank", {"rank": 16})
    with torch.no_grad():
        same = apply_sequentially(model, full, batches)(batches[0])
        torch.testing.assert_close(same, model(batches[0]), rtol=1e-2, atol=1e-2)
        moments = collect_moments(model, batches, {"0": geometry(model[0])[0]}, dense=copy.deepcopy(model))
        torch.testing.assert_close(
            apply(model, full, moments=moments)(batches[0]), model(batches[0]), rtol=1e-2, atol=1e-2
        )
