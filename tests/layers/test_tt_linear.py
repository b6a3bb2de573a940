"""TT linear layers: the dense layer with the same weight is the oracle, in every order of contraction."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.layers import TTLinear
from tenfold.layers import tt_linear as module

SHAPES = [((2, 3, 4), (3, 2, 2), 3), ((4, 6), (5, 2), (2,)), ((2, 2, 3, 2), (2, 3, 1, 2), (2, 3, 2)), ((7,), (5,), ())]


@pytest.mark.parametrize(("ins", "outs", "ranks"), SHAPES)
def test_every_order_equals_the_dense_layer_and_costs_what_it_says(
    ins: Any, outs: Any, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = TTLinear(prod(ins), prod(outs), ranks, in_modes=ins, out_modes=outs, dtype=torch.float64)
    x = torch.randn(2, 3, prod(ins), dtype=torch.float64)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    orders = list(module._orders(len(ins)))
    costs = []
    for order in orders:
        monkeypatch.setattr(layer, "order", lambda _, order=order: order)
        with FlopCounterMode(display=False) as counter:
            found = layer(x)
        torch.testing.assert_close(found, wanted)
        assert counter.get_total_flops() == 2 * layer.macs(6)
        costs.append(layer.macs(6))
    monkeypatch.undo()
    assert layer.macs(6) == min(costs)


def test_many_rows_merge_cores_where_that_is_cheaper() -> None:
    layer = TTLinear(16, 16, 16, in_modes=(2, 2, 2, 2), out_modes=(2, 2, 2, 2))
    assert len(layer.order(1)[0]) > 1
    assert layer.order(10_000)[0] == ((0, 4),)
    merging = 2 * (16 * 64 + 4 * 16 * 16) * 16  # of neighbours, two and two and all: at most that
    assert 0 < layer.macs(10_000) - 10_000 * 16 * 16 <= merging


def test_gradients() -> None:
    layer = TTLinear(12, 8, 3, in_modes=(2, 3, 2), out_modes=(2, 2, 2), dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_a_trained_layer_at_full_rank_is_exact_and_stays_of_its_kind() -> None:
    dense = nn.Linear(24, 12, bias=False).double().eval()
    layer = TTLinear.from_linear(dense, 99, in_modes=(4, 6), out_modes=(3, 4))
    torch.testing.assert_close(layer.weight, dense.weight)
    assert layer.bias is None
    assert not layer.training
    norms = [float(core.detach()[..., :12].norm()) for core in layer.cores]
    assert max(norms) == pytest.approx(min(norms))


def test_the_weight_begins_with_the_variance_of_torch() -> None:
    layer, dense = TTLinear(512, 512, 4), nn.Linear(512, 512)
    assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(
        float(dense.weight.detach().std()), rel=0.02
    )


def test_an_empty_batch() -> None:
    assert TTLinear(12, 8, 3)(torch.zeros(0, 12)).shape == (0, 8)
