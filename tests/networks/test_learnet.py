"""Predicted layers: torch's own layers with the weights multiplied out, sample by sample, are the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.errors import WeightError
from tenfold.networks import OneShotSiamese, PredictedConv2d, PredictedLinear, WholeConv2d


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_predicted_diagonal_makes_a_matrix_of_each_sample() -> None:
    torch.manual_seed(0)
    layer = PredictedLinear(5, 4, 3, dtype=torch.float64)
    x, diagonal = randn(2, 6, 5), randn(2, 3)
    for k in range(2):
        weight = layer.outer.weight @ diagonal[k].diag() @ layer.inner.weight
        torch.testing.assert_close(layer(x, diagonal)[k], F.linear(x[k], weight, layer.outer.bias))


def test_predicted_filters_make_a_convolution_of_each_sample() -> None:
    torch.manual_seed(0)
    layer = PredictedConv2d(3, 4, 3, 5, dtype=torch.float64)
    x, filters = randn(2, 6, 3, 8, 7), randn(2, layer.predicted)
    found = layer(x, filters)
    for k in range(2):
        core = F.normalize(filters[k].view(5, 9), dim=1).view(5, 3, 3)
        weight = torch.einsum("ow,wxy,wi->oixy", layer.outer.weight[:, :, 0, 0], core, layer.inner.weight[:, :, 0, 0])
        torch.testing.assert_close(found[k], F.conv2d(x[k], weight, layer.outer.bias, padding=1))
    torch.testing.assert_close(layer(x, 7 * filters), found)  # the size of what is predicted does not matter


def test_whole_layers_are_convolutions_of_each_sample() -> None:
    layer = WholeConv2d(3, 4, 3, dtype=torch.float64)
    x, filters = randn(2, 6, 3, 8, 7), randn(2, layer.predicted)
    assert layer.predicted == 9 * 3 * 4 > PredictedConv2d(3, 4, 3).predicted == 9 * 3
    for k in range(2):
        weight = F.normalize(filters[k].view(4, 27), dim=1).view(4, 3, 3, 3)
        torch.testing.assert_close(layer(x, filters)[k], F.conv2d(x[k], weight, padding=1))


@pytest.mark.parametrize("kind", ["learnet", "shared", "whole"])
def test_each_exemplar_decides_for_its_own_group(kind: Any) -> None:
    torch.manual_seed(0)
    net = OneShotSiamese(4, kind, side=8).double().eval()
    exemplars, pictures = randn(3, 1, 8, 8), randn(3, 5, 1, 8, 8)
    found = net(exemplars, pictures)
    for k in range(3):
        torch.testing.assert_close(net(exemplars[k : k + 1], pictures[k : k + 1])[0], found[k])
    other = exemplars.clone()
    other[0] += 1
    moved = net(other, pictures)
    assert not torch.allclose(moved[0], found[0])
    torch.testing.assert_close(moved[1:], found[1:])
    same = net(exemplars, exemplars[:, None])  # a picture is never farther from itself than from another
    assert bool((same >= net(exemplars, exemplars.flip(0)[:, None])).all())


def test_the_predictor_is_trained() -> None:
    torch.manual_seed(0)
    net = OneShotSiamese(4, side=8)
    net(torch.rand(2, 1, 8, 8), torch.rand(2, 3, 1, 8, 8)).sum().backward()
    assert net.predictor is not None
    assert all(float(p.grad.abs().max()) > 0 for p in net.predictor[-1].parameters())  # type: ignore[union-attr, operator]


def test_refusals_say_why() -> None:
    with pytest.raises(WeightError, match="kernel_size=2 is odd"):
        PredictedConv2d(2, 2, 2)
    with pytest.raises(WeightError, match=r"\(2, 9\); \(2, 27\) is asked for"):
        PredictedConv2d(3, 2, 3)(torch.randn(2, 1, 3, 4, 4), torch.randn(2, 9))
    with pytest.raises(WeightError, match="kind='twin'"):
        OneShotSiamese(4, "twin")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="side=30"):
        OneShotSiamese(4, side=30)
