"""Ranks from the noise: empirical variational Bayesian matrix factorization, weakened as much as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, log, prod, sqrt
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tenfold.errors import BudgetError, TenfoldError, WeightError
from tenfold.formats import FORMATS, Rank
from tenfold.ranks.base import (
    RULES,
    Choice,
    Keep,
    Limits,
    OneKnobRule,
    RankProblem,
    beyond,
    first_saving,
    total_cost,
    within,
)

Threshold = Literal["approximate", "exact"]
Array = NDArray[np.float64]

# Singular values from a Gram matrix are rounding noise below this share of the largest one, float32 weights below
# 6e-8; taken at face value, their odd spectrum would be seen as structure.
_FLOOR = 1e-7
_GRID = 512


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
    return exp(float(found.x) if found.fun <= energy[best] else float(grid[best]))


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


@RULES.register("evbmf")
@dataclass(frozen=True)
class EVBMF(OneKnobRule):
    """Ranks that stand out of the noise (EVBMF), weakened: no data, no budget and no tolerance needed.

    Each unfolding of the format gets the rank that ``evbmf`` finds in its spectrum (Kim et al. 2016, arXiv 1511.06530);
    these ranks are extreme, so only the share ``weaken`` of the way from the present rank down to them is gone at once
    (MUSCO: Gusak et al. 2019, arXiv 1903.09973). An unfolding that is all noise keeps its rank. With a budget,
    ``weaken`` is found that meets it.

    The groups of a convolution share one rank, found in their pooled spectrum. The k-th largest squares of g groups add
    up to g times a typical group's, so this is the spectrum of one group at a larger scale: it counts as a matrix with
    the columns of one group (with g times as many, pure noise would be taken for structure).

    Where the layer has the format already, the spectrum is that of its core: as many values as the rank is now, and
    as many columns as the other ranks leave.

    Attributes:
        weaken: in [0, 1]; 1 takes the EVBMF rank itself, 0 changes nothing. MUSCO uses 0.7 to 0.9.
        min_rank: no rank is taken below this one.
        threshold: ``approximate`` or ``exact``, see ``evbmf``.
    """

    weaken: float = 0.8
    min_rank: int = 8
    threshold: Threshold = "approximate"

    def __post_init__(self) -> None:
        if not 0 <= self.weaken <= 1:
            msg = f"weaken={self.weaken} must be in [0, 1]: the share of the way down to the EVBMF rank"
            raise TenfoldError(msg)
        if isinstance(self.min_rank, bool) or self.min_rank < 1:
            msg = f"min_rank={self.min_rank} must be a whole number from 1 on"
            raise TenfoldError(msg)
        if self.threshold not in get_args(Threshold):
            msg = f"threshold={self.threshold!r} must be {' or '.join(get_args(Threshold))}"
            raise TenfoldError(msg)

    def knob(self) -> float | None:
        """Return the share of the way that is left out."""
        return 1 - self.weaken

    def choose(self, problem: RankProblem, knob: float) -> Choice:
        """Return the weakened EVBMF ranks in the first format that they make cheaper."""
        weaken = 1 - knob
        found = {format: self.extreme(problem, format) for format in problem.formats}
        if not any(rank for ranks in found.values() for rank in ranks.values()):
            return Keep("EVBMF finds nothing but noise in this weight")

        def weakened(format: str) -> Rank:
            now = _rank_now(problem, format)
            ranks = {name: _weakened(now[name], rank, weaken, self.min_rank) for name, rank in found[format].items()}
            return FORMATS.get(format).covering(problem.spec, ranks)

        return first_saving(problem, weakened, f"EVBMF ranks, weakened by {weaken:.3g}")

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the choices at the configured ``weaken``, or at the smallest one that respects the limits."""
        if limits:
            least = total_cost(problems, [self.choose(p, 0.0) for p in problems])
            if not within(least, limits):
                raise BudgetError(_out_of_range(problems, least, limits))
            return self.within_limits(problems, limits)
        return super().select(problems)

    def extreme(self, problem: RankProblem, format: str) -> Rank:
        """Return the EVBMF rank of each unfolding, 0 where there is only noise."""
        cache, key = problem._cache, ("evbmf", format, self.threshold)  # noqa: SLF001  (kept for what rules compute)
        if key not in cache:
            spectra, columns = problem.spectra(format), _columns_now(problem, format)
            now = _rank_now(problem, format)
            cache[key] = {
                name: evbmf(values[: min(now[name], columns[name])], columns[name], threshold=self.threshold).rank
                for name, values in spectra.items()
            }
        return cache[key]  # type: ignore[no-any-return]


def unfolding_columns(problem: RankProblem, format: str) -> Rank:
    """Return the length of the longer side of each unfolding, by rank name, without touching the weight."""
    shapes = FORMATS.get(format).unfoldings(torch.empty(problem.spec.group_shape, device="meta"), problem.spec)
    return {name: max(matrix.shape[-2:]) for name, matrix in shapes.items()}


def _full(problem: RankProblem, format: str) -> Rank:
    return FORMATS.get(format).max_rank(problem.spec)


def _rank_now(problem: RankProblem, format: str) -> Rank:
    """Return the ranks to weaken from: those of the layer if it has this format, else the full ones."""
    if problem.current is not None and problem.current[0] == format:
        return _full(problem, format) | problem.current[1]
    return _full(problem, format)


def _columns_now(problem: RankProblem, format: str) -> Rank:
    """Return the columns of each unfolding of the core: the share of the weight's that the other ranks leave."""
    now, full = _rank_now(problem, format), _full(problem, format)
    left = {name: prod(now[n] / full[n] for n in now if n != name) for name in now}
    return {name: max(round(size * left[name]), 1) for name, size in unfolding_columns(problem, format).items()}


def _weakened(now: int, extreme: int, weaken: float, min_rank: int) -> int:
    if now <= min_rank or extreme == 0:
        return now
    return max(int(now - weaken * (now - extreme)), min_rank)


def _out_of_range(problems: Sequence[RankProblem], least: Any, limits: Limits) -> str:
    now = total_cost(problems, [Keep("")] * len(problems))
    parts = [
        f"{name} {limit:,.0f} (weaken reaches {low:,} to {getattr(now, name):,})"
        for name, low, limit in beyond(least, limits)
    ]
    return (
        f"EVBMF cannot meet the budget: the layers that can be factorized would have to fit into {', '.join(parts)}. "
        "Raise the budget, lower min_rank, or use a rule such as ratio or energy."
    )
