"""Monotone fits: nearest monotone grids, and exact where measurements are monotone."""

from __future__ import annotations

import numpy as np
import pytest

from tenfold.profiling.latency.monotone import MonotoneFit, isotonic_grid


def test_isotonic_grid_rises_along_both_axes_and_leaves_monotone_grids_alone():
    rng = np.random.default_rng(0)
    noisy = np.add.outer(np.arange(6.0), np.arange(5.0)) + rng.normal(size=(6, 5))
    fitted = isotonic_grid(noisy, np.ones_like(noisy))
    assert (np.diff(fitted, axis=0) >= 0).all()
    assert (np.diff(fitted, axis=1) >= 0).all()
    assert np.array_equal(isotonic_grid(fitted, np.ones_like(fitted)), fitted)
    projected = np.square(fitted - noisy).sum()
    for other in (np.sort(np.sort(noisy, axis=0), axis=1), np.maximum.accumulate(np.maximum.accumulate(noisy), axis=1)):
        assert projected <= np.square(other - noisy).sum()


def test_measured_points_are_given_back_on_a_plane_with_holes():
    xs, ys = [8, 16, 32, 64], [8, 16, 32]

    def truth(x, y):
        return 0.05 + 1e-4 * x * y + 1e-3 * x

    points = {(x, y): truth(x, y) for x in (8, 32, 64) for y in (8, 32)}
    fit = MonotoneFit.through(xs, ys, points)
    at = np.array(list(points))
    np.testing.assert_allclose(fit(at[:, 0], at[:, 1]), list(points.values()), rtol=1e-9)
    np.testing.assert_allclose(fit([16, 16, 64], [8, 16, 16]), [truth(16, 8), truth(16, 16), truth(64, 16)], rtol=1e-6)


@pytest.mark.parametrize(("xs", "ys"), [((64,), (8, 16, 24, 48)), ((8, 24, 64), (32,)), ((8, 16, 64), (8, 24, 32))])
def test_time_never_falls_with_channels_however_noisy(xs, ys):
    rng = np.random.default_rng(3)
    points = {(x, y): float(rng.uniform(0.5, 2)) for x in xs for y in ys}
    fit = MonotoneFit.through(xs, ys, points)
    fine_x, fine_y = np.arange(xs[0], xs[-1] + 1), np.arange(ys[0], ys[-1] + 1)
    grid = fit(*(a.ravel() for a in np.meshgrid(fine_x, fine_y, indexing="ij"))).reshape(len(fine_x), len(fine_y))
    assert (np.diff(grid, axis=0) >= -1e-12).all()
    assert (np.diff(grid, axis=1) >= -1e-12).all()
    assert (grid > 0).all()


def test_one_point_is_enough_and_outside_the_edge_holds():
    fit = MonotoneFit.through([8, 16], [4], {(8, 4): 2.0})
    assert fit([1, 8], [4, 4]) == pytest.approx([2.0, 2.0])
    assert fit([16], [4])[0] == pytest.approx(fit([999], [4])[0])
