"""What a report needs of the weights: spectra of every factorized layer, curves where they are cheap or asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.planning import analyse, plan
from tenfold.profiling import profile


@pytest.mark.parametrize("fits", [False, True])
def test_sums_of_terms_have_a_spectrum_and_by_fits_a_curve(fits: bool) -> None:
    """What lies beyond R in the spectrum of one unfolding is lost by R terms in any case."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(48, 32))
    cost = profile(net, torch.zeros(1, 8, 4, 4))
    recipe = {"rule": {"name": "fixed", "ranks": {"0": 6, "2": 5}}, "formats": "cp3,low_rank"}
    conv, linear = analyse(net, cost, plan(net, cost, recipe), fits=fits).layers
    values = torch.linalg.svdvals(net[0].weight.detach().flatten(1).double())
    assert conv.spectra["rank"].values == pytest.approx((values / values[0]).tolist(), rel=1e-3)
    assert linear.curve
    assert bool(conv.curve) == fits
    for point in conv.curve:
        beyond = values[point.rank["rank"] :].norm() / values.norm()
        assert point.error >= 0.99 * float(beyond)
