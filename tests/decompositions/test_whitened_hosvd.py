"""Tensor regressions under the data: nested frames give the curve, sweeps go below it, and sketches are as good."""

from __future__ import annotations

import torch

from tenfold.decompositions import Moments, Sketch, decompose, error_curve
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec


def test_the_curve_is_met_or_undercut_by_fits() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(kind="linear", in_channels=96, out_channels=10, in_modes=(6, 4, 4))
    rows = torch.randn(700, 96) @ torch.randn(96, 96)
    format, weight, moments = FORMATS.get("tensor_regression"), torch.randn(10, 96), Moments.of(rows.double())
    curve = error_curve(weight[None], spec, format, moments)
    grid = format.rank_grid(spec, lambda n: range(2, n + 1, 2))
    claimed = curve(grid)
    for rank, most in zip(grid[::9].tolist(), claimed[::9], strict=True):
        named = dict(zip(format.rank_names, rank, strict=True))
        fit = decompose(weight, "tensor_regression", named, spec=spec, moments=moments)
        lost = moments.distortion(weight.double()[None], fit.value.to(torch.float64).to_grouped())
        assert lost <= 1.01 * most + 1e-6 * float(claimed.max())


def test_a_sketch_that_holds_all_rows_is_the_covariance() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(kind="linear", in_channels=60, out_channels=8, in_modes=(5, 4, 3))
    rows = (torch.randn(400, 60) @ torch.randn(60, 60)).double()
    dense, sketch = Moments.of(rows), Moments.of(rows).replace(input_second_moment=Sketch.of(rows))
    weight, rank = torch.randn(8, 60), {"out": 5, "in": 3, "height": 2, "width": 2}
    found = [
        decompose(weight, "tensor_regression", rank, spec=spec, moments=m).value.to_dense() for m in (dense, sketch)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    format = FORMATS.get("tensor_regression")
    curves = [error_curve(weight[None], spec, format, m)(format.rows([rank])) for m in (dense, sketch)]
    assert abs(curves[0] - curves[1]).max() < 1e-4 * curves[0].max()


def test_without_data_the_sweeps_lower_the_error_of_the_weight() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(kind="linear", in_channels=60, out_channels=8, in_modes=(5, 4, 3))
    weight, rank = torch.randn(8, 60), {"out": 5, "in": 3, "height": 2, "width": 2}
    start, swept = (
        decompose(weight, "tensor_regression", rank, {"name": "map_hooi", "n_iter": n}, spec=spec).rel_error
        for n in (0, 10)
    )
    assert swept < 0.999 * start
