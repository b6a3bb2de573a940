"""Fits are judged by samples that they have not seen, against the change of the outputs itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.calibration import calibrate, called_layers
from tenfold.decompositions import HeldOutCurve, decompose
from tenfold.planning import tabulate
from tenfold.planning.eligible import eligible_layer
from tenfold.planning.error_curves import distortion_curve
from tenfold.profiling import profile
from tenfold.records import Calibration


def planned_and_true(model, path, rank, seen, new):
    """Return what a layer at a rank loses on new samples: as planned, without judging samples, and in truth."""
    known = calibrate(model, seen, settings=Calibration(draws=8))[path]
    layer = model.get_submodule(path)
    judged, plain = (
        eligible_layer(model, profile(model, new[:1]).layer(path), ["low_rank"], moments)
        for moments in (known, known.replace(held_out=None))
    )
    curves = (distortion_curve(own, "low_rank", own.load_weight()) for own in (judged, plain))
    expected, by_rows = (float(curve(np.array([[rank]]))[0]) for curve in curves)
    fit = decompose(layer.weight, "low_rank", {"rank": rank}, spec=judged.spec, moments=known)
    with torch.no_grad():
        before = model(new)
        layer.weight.copy_(fit.value.to_dense())
        layer.bias += fit.bias_shift
        return expected, by_rows, float((model(new) - before).square().sum(1).mean())


def test_errors_that_point_the_same_way_at_all_positions_add_up():
    model = nn.Sequential(nn.Conv2d(6, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    mix = torch.randn(6, 6)

    def maps(count):  # each sample of one colour, with little variation over its 64 positions
        return torch.einsum("bchw,dc->bdhw", torch.randn(count, 6, 1, 1) + 0.1 * torch.randn(count, 6, 8, 8), mix)

    expected, by_rows, actual = planned_and_true(model, "0", 3, list(maps(800).split(100)), maps(2000))
    assert expected == pytest.approx(actual, rel=0.3)
    assert by_rows < actual / 20


def test_a_layer_that_saw_fewer_rows_than_it_has_inputs_looks_as_dangerous_as_it_is():
    model = nn.Sequential(nn.Linear(96, 80))
    expected, by_rows, actual = planned_and_true(model, "0", 40, [torch.randn(48, 96)], torch.randn(2000, 96))
    assert actual / 3 < expected < 3 * actual
    assert by_rows < actual / 20


def test_outputs_that_move_with_every_step_of_a_sequence_add_up_over_the_steps():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x + sum(self.layer(x) for _ in range(4)) / 4

    seen, new = list(torch.randn(600, 8).split(50)), torch.randn(2000, 8)
    expected, _, actual = planned_and_true(Shared(), "layer", 4, seen, new)
    assert expected == pytest.approx(actual, rel=0.35)


def test_a_layer_that_moves_no_output_is_kept_and_said_to_be_beyond_the_data():
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # its outputs are cut off on every sample
    x = torch.randn(64, 24)
    cost = profile(model, x[:1])
    known = calibrate(model, list(x.split(8)), called_layers(cost))
    table = tabulate(model, cost, "macs=0.9", moments=known)
    assert "the data cannot judge it" in str(table.layer("0").keep_reason)


def test_moments_are_those_of_all_samples_whoever_judges():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(160, 6)
    for batches in ([x], list(x.split(10))):
        known = calibrate(model, batches)["0"]
        assert known.count == 160
        torch.testing.assert_close(known.mean[0].float(), x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(known.input_second_moment[0].float(), x.T @ x / 160, rtol=1e-4, atol=1e-5)
        assert known.held_out.samples == 40


def test_a_curve_never_says_that_more_rank_costs_more():
    curve = HeldOutCurve.of([9.0, 4.0, 1.0, 1e-20], [5.0, 1.0, 2.0, 1e-20], 10)
    found = curve(np.array([9.0, 4.0, 2.0, 1.0, 0.1, 0.0]))
    assert (np.diff(found) <= 0).all()
    assert found[-1] == 0
    assert not HeldOutCurve.of([0.0, 0.0], [0.0, 0.0], 10).known


def test_what_shifts_all_scores_alike_costs_predictions_nothing():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4000, 6)
    ones = torch.ones(5, dtype=torch.float64)
    shares, held_out = {}, {}
    for loss in ("outputs", "fisher"):
        known = calibrate(model, list(x.split(100)), settings=Calibration(loss=loss))["0"]
        gram = known.output_gram[0].double()
        shares[loss] = float(ones @ gram @ ones / gram.trace())
        held_out[loss] = known.held_out
    assert shares["outputs"] == pytest.approx(1, abs=0.1)
    assert shares["fisher"] < 0.02
    assert held_out["fisher"].samples == held_out["outputs"].samples == 1000


def test_the_divergence_of_predictions_is_what_a_fit_costs():
    model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(8000, 12)
    with torch.no_grad():
        model[0].weight.mul_(3)
    known = calibrate(model, list(x[:6000].split(100)), settings=Calibration(loss="fisher"))["0"]
    fit = decompose(
        model[0].weight, "low_rank", {"rank": 6}, spec=called_layers(profile(model, x[:1]))["0"], moments=known
    )
    error = known.distortion(model[0].weight[None].double(), fit.value.to_dense()[None].double())
    with torch.no_grad():
        own = model(x[6000:]).log_softmax(1)
        model[0].weight.copy_(fit.value.to_dense())
        model[0].bias += fit.bias_shift
        other = model(x[6000:]).log_softmax(1)
    divergence = float(nn.functional.kl_div(other, own, log_target=True, reduction="batchmean"))
    assert float(error) / 2 == pytest.approx(divergence, rel=0.35)


@pytest.mark.parametrize(("samples", "draws", "judged"), [(40, 1, 70), (40, 9, 90), (400, 1, 100)])
def test_few_long_samples_are_judged_by_more_draws_of_labels(samples: int, draws: int, judged: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9)).eval(), torch.randn(samples, 20, 6)
    known = calibrate(model, [x], settings=Calibration(loss="fisher", draws=draws))
    assert known["0"].held_out is not None
    assert known["0"].held_out.samples == judged
