"""A sketch must do what the matrix does that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.decompositions import Moments, Sketch, decompose, error_curve
from tenfold.decompositions.covariance import add_ridge, channel_blocks, mean_variance
from tenfold.decompositions.weighted_als import Weighted
from tenfold.errors import WeightError
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec

F64 = torch.float64
SPEC = LayerSpec(kind="conv", in_channels=6, out_channels=8, kernel=(3, 3))
RANKS = [("low_rank", {"rank": 4}), ("spatial", {"rank": 5}), ("tucker2", {"out": 4, "in": 3}), ("tucker2", {"out": 4})]


def data(rows: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, correlated input rows with a mean, and targets that are not quite what the weight makes."""
    mix = torch.linalg.qr(torch.randn(54, 54, dtype=F64)).Q * torch.logspace(0, -1.5, 54, dtype=F64)
    x = torch.randn(rows, 54, dtype=F64) @ mix.T + 0.3
    weight = torch.randn(8, 6, 3, 3, dtype=F64)
    return weight, x, (x + 0.2 * x.roll(1, 1)) @ weight.flatten(1).T + 0.1 * torch.randn(rows, 8, dtype=F64)


def both(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[Moments, Moments]:
    """Return the moments with the matrix and with the sketch that keeps every row."""
    full = Moments.of(x, y)
    return full, full.replace(input_second_moment=Sketch.of(x, y), cross=None)


def some() -> Sketch:
    """Return a sketch of two groups with every part of it in use."""
    return Sketch(torch.randn(2, 5, 12, dtype=F64), torch.rand(2, 12, dtype=F64), torch.zeros(2, 5, dtype=F64))


def test_products_and_blocks_are_those_of_the_matrix():
    sketch = some()
    dense, left = sketch.dense(), torch.randn(2, 4, 12, dtype=F64)
    assert sketch.shape == dense.shape
    torch.testing.assert_close(left @ sketch, left @ dense)
    torch.testing.assert_close(sketch.sandwich(left), left @ dense @ left.mT)
    torch.testing.assert_close(sketch.quadratic(left), (left @ dense * left).sum(-1))
    torch.testing.assert_close(sketch.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(mean_variance(sketch), mean_variance(dense))
    torch.testing.assert_close(add_ridge(sketch, 0.1).dense(), add_ridge(dense, 0.1))
    torch.testing.assert_close(sketch.scaled(torch.tensor([2.0, 3.0])).dense()[1], 3 * dense[1])
    torch.testing.assert_close(channel_blocks(sketch, 3), channel_blocks(dense, 3))
    kernel, v = torch.randn(2, 7, 4, 3, dtype=F64), torch.randn(2, 4, 2, dtype=F64)
    for own, wanted in zip(
        Weighted.of(kernel, sketch).explained(v), Weighted.of(kernel, dense).explained(v), strict=True
    ):
        torch.testing.assert_close(own, wanted)


def test_without_any_variance_a_ridge_is_the_identity():
    nothing = Sketch.of(torch.ones(4, 6)).centred(torch.ones(1, 6, dtype=F64))
    torch.testing.assert_close(add_ridge(nothing, 0.1).dense()[0], torch.eye(6, dtype=F64))


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("about_zero", [False, True])
def test_moments_with_all_rows_are_the_moments(targets, about_zero):
    weight, x, y = data()
    full, sketched = both(x, y if targets else None)
    if about_zero:
        full, sketched = full.uncentered(), sketched.uncentered()
    flat = weight.flatten(1)[None]
    other = flat + 0.1 * torch.randn_like(flat)
    torch.testing.assert_close(sketched.covariance(0.1).dense(), full.covariance(0.1))
    torch.testing.assert_close(sketched.regression_target(flat, 1e-3), full.regression_target(flat, 1e-3))
    for own, wanted in zip(sketched.errors(flat, other), full.errors(flat, other), strict=True):
        torch.testing.assert_close(own, wanted)
    assert sketched.distortion(flat, other) == pytest.approx(full.distortion(flat, other), rel=1e-4)
    torch.testing.assert_close(sketched.bias_shift(flat, other), full.bias_shift(flat, other))
    torch.testing.assert_close(sketched.channel_covariance(9), full.channel_covariance(9))


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_every_format_is_fitted_as_with_the_matrix(format, rank, targets):
    weight, x, y = data()
    wanted, own = (decompose(weight, format, rank, moments=m) for m in both(x, y if targets else None))
    torch.testing.assert_close(own.value.to_dense(), wanted.value.to_dense(), rtol=1e-4, atol=1e-5)
    assert own.output_error == pytest.approx(wanted.output_error, rel=1e-6)
    torch.testing.assert_close(own.bias_shift, wanted.bias_shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2"])
def test_curves_are_those_of_the_matrix(format):
    weight, x, _ = data()
    full, sketched = both(x)
    minded = torch.diag(torch.logspace(0, -2, 8, dtype=F64))[None]
    ranks = np.array([(2, 3), (4, 6)] if format == "tucker2" else [(1,), (4,), (8,)])
    wanted, own = (
        error_curve(weight[None], SPEC, FORMATS.get(format), m.replace(output_gram=minded))(ranks)
        for m in (full, sketched)
    )
    assert own == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_fewer_rows_than_the_width_draw_nothing_where_they_say_nothing():
    weight, x, y = data(rows=20)
    full, sketched = both(x, y)
    flat = weight.flatten(1)[None]
    goal = sketched.regression_target(flat, 1e-4)
    torch.testing.assert_close(goal, full.regression_target(flat, 1e-4), rtol=1e-6, atol=1e-6)
    beyond = torch.linalg.svd(x - x.mean(0))[2][20:]
    torch.testing.assert_close(goal @ beyond.T, flat @ beyond.T)


def test_a_sketch_of_another_width_or_with_nan_is_refused():
    weight, x, _ = data()
    _, sketched = both(x)
    with pytest.raises(
        WeightError, match=r"input_second_moment of shape \(1, 54, 54\), this layer needs \(1, 27, 27\)"
    ):
        decompose(weight[:, :3], "low_rank", {"rank": 2}, moments=sketched)
    broken = sketched.replace(input_second_moment=Sketch.of(x / 0))
    with pytest.raises(WeightError, match="input_second_moment of the moments is not finite"):
        decompose(weight, "low_rank", {"rank": 2}, moments=broken)
