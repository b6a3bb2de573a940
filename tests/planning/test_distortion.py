"""Distortions of different layers must be on one scale, and their sum that of the network."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from tenfold.planning.distortion import with_distortion
from tenfold.ranks import RankProblem
from torch import nn

from tenfold.calibration.collect import collect_moments, measurable
from tenfold.calibration.gradients import collect_gradients
from tenfold.errors import PlanError
from tenfold.formats import split_groups
from tenfold.profiling import profile


def problems(model: nn.Module, x: torch.Tensor) -> list[RankProblem]:
    return [
        RankProblem(
            layer.path,
            layer.spec,
            ("low_rank",),
            layer.calls,
            layer.cost,
            lambda layer=layer: split_groups(model.get_submodule(layer.path).weight.detach(), layer.spec),
        )
        for layer in profile(model, x[:1]).layers
        if layer.spec is not None
    ]


def test_the_predicted_distortion_is_the_squared_error_of_the_outputs():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    x = torch.randn(4000, 12) @ torch.randn(12, 12)
    moments, minds = collect_moments(model, [x]), collect_gradients(model, [x], measurable(model), draws=20)
    told = with_distortion(problems(model, x), {p: m.replace(output_gram=minds[p]) for p, m in moments.items()})
    from tenfold.decompositions import decompose

    for problem in told:
        layer = model.get_submodule(problem.path)
        metric = moments[problem.path].replace(output_gram=minds[problem.path])
        fit = decompose(layer.weight, "low_rank", {"rank": 3}, moments=metric)
        with torch.no_grad():
            wanted, kept = model(x), layer.weight.clone()
            layer.weight.copy_(fit.value.to_dense())
            layer.bias += fit.bias_shift
            actual = (model(x) - wanted).square().sum(1).mean()
            layer.weight.copy_(kept)
            layer.bias -= fit.bias_shift
        assert problem.distortion_at is not None
        assert problem.distortion_at("low_rank")(np.array([[3]]))[0] == pytest.approx(float(actual), rel=0.1)


def test_without_gradients_the_distortion_is_the_share_of_the_output():
    model, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(100, 12)
    (told,) = with_distortion(problems(model, x), collect_moments(model, [x]))
    assert told.distortion_at is not None
    curve = told.distortion_at("low_rank")(np.arange(0, 11)[:, None])
    assert curve[0] == pytest.approx(1.0, rel=1e-3)
    assert curve[-1] == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(curve) <= 0).all()


def test_distortions_on_different_scales_are_refused():
    model, x = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)), torch.randn(100, 12)
    moments = collect_moments(model, [x])
    with pytest.raises(PlanError, match="not on one scale"):
        with_distortion(
            problems(model, x), moments | {"0": moments["0"].replace(output_gram=torch.eye(10).double()[None])}
        )
    with pytest.raises(PlanError, match="no moments of layer '1'"):
        with_distortion(problems(model, x), {"0": moments["0"]})


def test_curves_are_remembered_for_the_very_moments_that_they_are_of():
    model, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(100, 12)
    (problem,) = problems(model, x)
    moments = collect_moments(model, [x])["0"]
    first = with_distortion([problem], {"0": moments})[0].distortion_at("low_rank")
    assert with_distortion([problem], {"0": moments})[0].distortion_at("low_rank") is first
    scale = torch.linspace(1, 9, 12, dtype=torch.float64)
    other, gone = (
        moments.replace(input_second_moment=moments.input_second_moment * scale * scale[:, None]),
        weakref.ref(moments),
    )
    del moments
    assert gone() is not None  # or else other moments may get its id
    again = with_distortion([problem], {"0": other})[0].distortion_at("low_rank")
    fresh = with_distortion(problems(model, x), {"0": other})[0].distortion_at("low_rank")
    np.testing.assert_allclose(again(np.array([[3]])), fresh(np.array([[3]])))
