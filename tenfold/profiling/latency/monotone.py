"""Monotone interpolation of measured times over one or two channel counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_FILLED_WEIGHT = 1e-3


def isotonic_grid(values: Array, weights: Array, *, sweeps: int = 50) -> Array:
    """Return the grid nearest to ``values`` that falls along neither axis (Dykstra's alternating projections)."""
    from scipy.optimize import isotonic_regression

    def along_rows(grid: Array, weights: Array) -> Array:
        return np.stack([isotonic_regression(row, weights=w).x for row, w in zip(grid, weights, strict=True)])

    if all((np.diff(values, axis=axis) >= 0).all() for axis in (0, 1)):
        return values.copy()
    if 1 in values.shape:
        return along_rows(values.reshape(1, -1), weights.reshape(1, -1)).reshape(values.shape)
    fitted = values.copy()
    by_row, by_column = np.zeros_like(values), np.zeros_like(values)
    for _ in range(sweeps):
        before = fitted
        rows = along_rows(fitted + by_row, weights)
        by_row = fitted + by_row - rows
        columns = along_rows((rows + by_column).T, weights.T).T
        by_column = rows + by_column - columns
        fitted = columns
        if np.abs(fitted - before).max() < 1e-9:
            break
    # Dykstra's projections converge in the limit only: the violations left are far below the noise of a measurement.
    return np.maximum.accumulate(np.maximum.accumulate(fitted, axis=0), axis=1)


@dataclass(frozen=True, eq=False)
class MonotoneFit:
    """Milliseconds as a non-decreasing function of input and output channels.

    Interpolates log time over log channels: PCHIP if one of the two never varies, bilinear otherwise. Constant beyond
    the edge of the grid.
    """

    xs: Array
    ys: Array
    grid: Array  # log milliseconds, (xs, ys)

    @classmethod
    def through(cls, xs: Sequence[int], ys: Sequence[int], points: Mapping[tuple[int, int], float]) -> MonotoneFit:
        """Return the fit on the grid ``xs`` × ``ys`` through milliseconds measured at some of its nodes.

        Args:
            xs: input channels, ascending.
            ys: output channels, ascending.
            points: (input, output channels) -> milliseconds > 0; at least one. Points off the grid help to fill nodes
                that were not measured.

        Example:
            >>> fit = MonotoneFit.through([8, 32], [64], {(8, 64): 1.0, (32, 64): 4.0})
            >>> fit([8, 16, 32], [64, 64, 64]).round(3).tolist()
            [1.0, 2.0, 4.0]
        """
        at = np.array(list(points), dtype=np.float64)
        logs = np.log(np.array(list(points.values()), dtype=np.float64))
        nodes = np.array([(x, y) for x in xs for y in ys], dtype=np.float64)
        values = _fill(nodes, at, logs).reshape(len(xs), len(ys))
        weights = np.array([[1.0 if (x, y) in points else _FILLED_WEIGHT for y in ys] for x in xs])
        return cls(np.array(xs, float), np.array(ys, float), isotonic_grid(values, weights))

    def __call__(self, x: ArrayLike, y: ArrayLike) -> Array:
        """Return milliseconds at pairs of channel counts."""
        x = np.clip(np.asarray(x, dtype=np.float64), self.xs[0], self.xs[-1])
        y = np.clip(np.asarray(y, dtype=np.float64), self.ys[0], self.ys[-1])
        if len(self.xs) == 1 or len(self.ys) == 1:
            axis, where = (self.ys, y) if len(self.xs) == 1 else (self.xs, x)
            return np.exp(_along(axis, self.grid.ravel(), where))
        from scipy.interpolate import RegularGridInterpolator

        plane: Any = RegularGridInterpolator((np.log(self.xs), np.log(self.ys)), self.grid)
        return np.exp(np.asarray(plane(np.stack([np.log(x), np.log(y)], axis=-1)), dtype=np.float64))


def _along(axis: Array, values: Array, where: Array) -> Array:
    if len(axis) == 1:
        return np.full(where.shape, values[0])
    from scipy.interpolate import PchipInterpolator

    curve: Any = PchipInterpolator(np.log(axis), values)
    return np.asarray(curve(np.log(where)), dtype=np.float64)


def _fill(nodes: Array, at: Array, logs: Array) -> Array:
    """Return log milliseconds at all nodes: a cost model through the measured points, corrected by the nearest ones.

    The model is overhead + channels moved + channels multiplied, with coefficients ≥ 0 that minimise relative errors;
    its residuals are spread with weights 1/distance² (Shepard 1968), which reproduces measured nodes exactly.
    """
    from scipy.optimize import nnls

    def features(p: Array) -> Array:
        return np.stack([np.ones(len(p)), p[:, 0], p[:, 1], p[:, 0] * p[:, 1]], axis=1)

    scale = features(at).max(axis=0)
    relative = features(at) / scale / np.exp(logs)[:, None]
    coefficients = nnls(relative, np.ones(len(at)))[0] / scale
    model = np.log(np.maximum(features(nodes) @ coefficients, 1e-12))
    residuals = logs - np.log(np.maximum(features(at) @ coefficients, 1e-12))
    distance = ((np.log(nodes)[:, None] - np.log(at)[None]) ** 2).sum(-1)
    weights = 1.0 / np.maximum(distance, 1e-12)
    return np.asarray(model + weights @ residuals / weights.sum(axis=1), dtype=np.float64)
