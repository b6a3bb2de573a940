"""A factorized layer that is only asked for the dtype of its weight multiplies nothing out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import tenfold
from tenfold.layers import FactorizedLayer
from tenfold.layers.lazy_weight import LazyWeight


@pytest.fixture
def layer() -> FactorizedLayer:
    net = nn.Linear(12, 10)
    plan = tenfold.plan(net, tenfold.profile(net, torch.ones(1, 12)), {"rule": {"name": "fixed", "ranks": {"": 3}}})
    found = tenfold.apply(net, plan)
    assert isinstance(found, FactorizedLayer)
    return found


def test_what_is_known_costs_nothing() -> None:
    def fail() -> torch.Tensor:
        raise AssertionError

    weight = LazyWeight.of((2, 3), torch.ones(1, dtype=torch.float64), fail)
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.ndim, weight.size(1)) == (torch.float64, (2, 3), 2, 3)
    assert weight.device == torch.device("cpu")
    assert weight.is_floating_point()
    with pytest.raises(AssertionError):
        weight + 1


def test_it_computes_like_the_product_of_the_factors(layer: FactorizedLayer) -> None:
    dense = layer.factorization().to_dense()
    x = torch.randn(4, 12)
    assert torch.equal(functional.linear(x, layer.weight, layer.bias), functional.linear(x, dense, layer.bias))
    assert torch.equal(layer.weight.T, dense.T)
    assert torch.equal(dense - layer.weight, torch.zeros_like(dense))
    assert layer.weight.tolist() == dense.tolist()
    assert torch.equal(layer.weight.detach(), dense)
    assert type(layer.weight.detach().clone()) is torch.Tensor


def test_gradients_reach_the_factors(layer: FactorizedLayer) -> None:
    layer.weight.square().sum().backward()
    found = [stage.weight.grad.clone() for stage in layer.stages]
    layer.zero_grad()
    layer.factorization().to_dense().square().sum().backward()
    for stage, grad in zip(layer.stages, found, strict=True):
        assert torch.equal(stage.weight.grad, grad)


def test_code_that_asks_for_the_dtype_costs_no_macs(layer: FactorizedLayer) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.to(self.fc.weight.dtype))

    cost = tenfold.profile(Asking(), torch.ones(1, 12))
    assert cost.macs == 12 * 3 + 3 * 10
    assert cost.other_macs == 0


def test_marks_of_all_factors_are_those_of_the_weight(layer: FactorizedLayer) -> None:
    layer.stages[0].weight.loaded = True
    assert not hasattr(layer.weight, "loaded")
    layer.stages[1].weight.loaded = True
    assert layer.weight.loaded is True
