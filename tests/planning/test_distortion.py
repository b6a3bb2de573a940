"""Distortions of different layers must be on one scale, and their sum that of the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.calibration.collect import collect_moments, measurable
from tenfold.calibration.gradients import collect_gradients
from tenfold.decompositions import Moments, decompose
from tenfold.errors import PlanError
from tenfold.planning import tabulate
from tenfold.planning.eligible import EligibleLayer, eligible_layer
from tenfold.planning.error_curves import BY_DATA, distortion_curve
from tenfold.profiling import profile


def eligible(model: nn.Module, x: torch.Tensor, path: str, moments: Moments) -> EligibleLayer:
    return eligible_layer(model, profile(model, x[:1]).layer(path), ["low_rank"], moments)


def test_the_predicted_distortion_is_the_squared_error_of_the_outputs():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    x = torch.randn(4000, 12) @ torch.randn(12, 12)
    moments, grams = collect_moments(model, [x]), collect_gradients(model, [x], measurable(model), draws=20)
    for path in ("0", "1"):
        layer, metric = model.get_submodule(path), moments[path].replace(output_gram=grams[path])
        fit = decompose(layer.weight, "low_rank", {"rank": 3}, moments=metric)
        with torch.no_grad():
            wanted, kept = model(x), layer.weight.clone()
            layer.weight.copy_(fit.value.to_dense())
            layer.bias += fit.bias_shift
            actual = (model(x) - wanted).square().sum(1).mean()
            layer.weight.copy_(kept)
            layer.bias -= fit.bias_shift
        own = eligible(model, x, path, metric)
        found = distortion_curve(own, "low_rank", own.load_weight())(np.array([[3]]))
        assert found[0] == pytest.approx(float(actual), rel=0.1)


def test_without_gradients_the_distortion_is_the_share_of_the_output():
    model, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(100, 12)
    own = eligible(model, x, "0", collect_moments(model, [x])["0"])
    curve = distortion_curve(own, "low_rank", own.load_weight())(np.arange(0, 11)[:, None])
    assert curve[0] == pytest.approx(1.0, rel=1e-3)
    assert curve[-1] == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(curve) <= 0).all()


def test_distortions_on_different_scales_are_refused_and_unseen_layers_kept():
    model, x = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)), torch.randn(100, 12)
    moments, cost = collect_moments(model, [x]), profile(model, x)
    scaled = moments["0"].replace(output_gram=torch.eye(10).double()[None])
    with pytest.raises(PlanError, match="not on one scale"):
        tabulate(model, cost, "macs=0.5", moments=moments | {"0": scaled})
    table = tabulate(model, cost, "macs=0.9", moments={"0": scaled})
    assert table.distortion == BY_DATA
    assert "no moments" in str(table.layer("1").keep_reason)
