"""Ranks from the noise: empirical variational Bayesian matrix factorization, weakened as much as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tenfold.errors import TenfoldError, WeightError

Threshold = Literal["approximate", "exact"]
Array = NDArray[np.float64]

# Singular values from a Gram matrix are rounding noise below this share of the largest one, float32 weights below
# 6e-8; taken at face value, their odd spectrum would be seen as structure.
_FLOOR = 1e-7
_GRID = 512
_NEAR = 1e-4  # how well a search by values finds a minimum, with room to spare


@dataclass(frozen=True, eq=False)
class EVBMFResult:
    """What the noise of a matrix leaves of it.

    Attributes:
        rank: number of singular values above ``cutoff``; 0 where all is noise.
        noise_variance: estimated variance of each entry's noise.
        cutoff: the singular value from which on a component is kept.
        shrunken: the kept singular values as the posterior mean has them, smaller than they were (rank,).
    """

    rank: int
    noise_variance: float
    cutoff: float
    shrunken: Array


def evbmf(singular_values: Tensor | ArrayLike, columns: int, *, threshold: Threshold = "approximate") -> EVBMFResult:
    """Return the rank that empirical variational Bayes gives an (L, M) matrix, L ≤ M, known by its spectrum.

    The global analytic solution (Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14:1-37) with unknown noise variance,
    which is searched between the bounds of Nakajima et al. (NIPS 2012): over its logarithm, on a grid first because the
    free energy of a slowly decaying spectrum has several minima. The result does not depend on the scale of the matrix.

    Args:
        singular_values: all L of them (the long tail is what tells the noise), in any order.
        columns: M, the longer side.
        threshold: ``approximate`` is the published 2.5129·√(L/M), ``exact`` the root that it stands for, which
            gives a slightly higher cutoff where L < M.

    Raises:
        WeightError: no values, values that are not finite, or more values than columns.

    Example:
        >>> import torch
        >>> noise = torch.randn(32, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> low = torch.linspace(-1, 1, 32)[:, None] * torch.linspace(-1, 1, 200)
        >>> evbmf(torch.linalg.svdvals(noise), 200).rank, evbmf(torch.linalg.svdvals(noise + 5 * low), 200).rank
        (0, 1)
    """
    values = _checked(singular_values, columns)
    scale = float(values[0])
    if scale == 0:
        return EVBMFResult(0, 0.0, 0.0, np.zeros(0))
    values = np.maximum(values / scale, _FLOOR)
    rows = len(values)
    alpha = rows / columns
    edge = _edge(alpha, threshold)
    noise = _noise_variance(values**2, columns, alpha, edge)
    cutoff = sqrt(columns * noise * edge)
    kept = values[values > cutoff]
    inverse = noise / kept**2
    spread = 1 - (rows + columns) * inverse
    shrunken = kept / 2 * (spread + np.sqrt(np.maximum(spread**2 - 4 * rows * columns * inverse**2, 0)))
    return EVBMFResult(len(kept), noise * scale * scale, cutoff * scale, shrunken * scale)


def _checked(singular_values: Tensor | ArrayLike, columns: int) -> Array:
    if isinstance(singular_values, Tensor):
        singular_values = singular_values.detach().cpu().double().numpy()
    values = np.sort(np.asarray(singular_values, dtype=np.float64))[::-1]
    if values.ndim != 1 or not 0 < len(values) <= columns:
        msg = f"EVBMF needs the 1 to {columns} singular values of a matrix with {columns} columns, not {values.shape}"
        raise WeightError(msg)
    if not np.isfinite(values).all() or values[-1] < 0:
        msg = "EVBMF needs finite singular values, none negative: the weight has NaN or infinite entries"
        raise WeightError(msg)
    return values


def _edge(alpha: float, threshold: Threshold) -> float:
    """Return x̄ = (1 + τ̄)(1 + α/τ̄): what σ²/(M·noise) must exceed for a component to be kept."""
    tau = 2.5129 * sqrt(alpha)
    if threshold == "exact":
        from scipy.optimize import brentq

        tau = float(brentq(lambda t: np.log1p(t) + alpha * np.log1p(t / alpha) - t, tau / 2, tau * 4, xtol=1e-14))
    elif threshold != "approximate":
        msg = f"threshold={threshold!r} must be {' or '.join(get_args(Threshold))}"
        raise TenfoldError(msg)
    return (1 + tau) * (1 + alpha / tau)


def _noise_variance(squares: Array, columns: int, alpha: float, edge: float) -> float:
    """Return the variance with the lowest free energy, between the bounds that theory gives."""
    from scipy.optimize import minimize_scalar

    rows = len(squares)
    bulk = min(ceil(rows / (1 + alpha)) - 1, rows - 1)
    low = log(max(squares[bulk] / (columns * edge), squares[bulk:].mean() / columns))
    high = log(squares.sum() / (rows * columns))
    if high - low < 1e-12:
        return exp(high)
    grid = np.linspace(low, high, _GRID)
    energy = _free_energy(grid, squares, columns, alpha, edge)
    best = int(energy.argmin())
    found = minimize_scalar(
        lambda v: float(_free_energy(np.array([v]), squares, columns, alpha, edge)[0]),
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]),
        method="bounded",
        options={"xatol": 1e-10},
    )
    at = float(found.x) if found.fun <= energy[best] else float(grid[best])
    return exp(_polished(at, squares, columns, alpha, edge))


def _polished(at: float, squares: Array, columns: int, alpha: float, edge: float) -> float:
    """Return the minimum near ``at`` to all digits: by values alone it is known to half of them."""
    from scipy.optimize import brentq

    def slope(log_noise: float) -> float:
        ratio = squares / (columns * np.exp(log_noise))
        x = ratio[ratio > edge] - (1 + alpha)
        root = np.sqrt(x * x - 4 * alpha)
        tau = (x + root) / 2
        steepness = (1 / (1 + tau) + alpha / (alpha + tau) - 1) * tau / root  # d term/dτ · dτ/dx
        return float(len(squares) - ratio.sum() - steepness @ (x + 1 + alpha))

    low, high = at - _NEAR, at + _NEAR
    return float(brentq(slope, low, high, xtol=1e-15)) if slope(low) < 0 < slope(high) else at


def _free_energy(log_noise: Array, squares: Array, columns: int, alpha: float, edge: float) -> Array:
    """Return twice the free energy per column, up to a constant, at each logarithm of the noise variance.

    All components add x − log x, which has a closed sum; only those above the edge need a term of their own.
    """
    rows = len(squares)
    unit = columns * np.exp(log_noise)  # the squared singular value at which x = 1
    energy = squares.sum() / unit + rows * log_noise
    above = np.searchsorted(-squares, -edge * unit)  # how many squares exceed edge·unit
    most = int(above.max())
    if most == 0:
        return energy  # type: ignore[no-any-return]
    inside = np.arange(most) < above[:, None]
    x = (squares[:most] / unit[:, None])[inside] - (1 + alpha)
    tau = (x + np.sqrt(x * x - 4 * alpha)) / 2
    terms = np.zeros(inside.shape)
    terms[inside] = np.log(1 + tau) + alpha * np.log(1 + tau / alpha) - tau
    return energy + terms.sum(1)  # type: ignore[no-any-return]
