"""Reference routines in plain NumPy, written apart from the package: slow, short and obvious."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq, minimize_scalar


def evbmf_rank(g: np.ndarray, M: int, *, exact: bool = False) -> tuple[int, float, float]:
    """Rank, noise variance and cutoff from all singular values of an (L, M) matrix."""
    g = np.maximum(g, 1e-12 * g[0])
    L = len(g)
    a = L / M
    tb = (
        brentq(lambda t: np.log1p(t) / t + np.log1p(t / a) / (t / a) - 1.0, 1e-6, 1e3) if exact else 2.5129 * np.sqrt(a)
    )
    xb = (1 + tb) * (1 + a / tb)

    def omega(ls: float) -> float:
        x = g**2 / (M * np.exp(ls))
        z = x[x > xb]
        t = 0.5 * (z - (1 + a) + np.sqrt((z - (1 + a)) ** 2 - 4 * a))
        return float(np.sum(x - np.log(x)) + np.sum(np.log1p(t) + a * np.log1p(t / a) - t))

    Hb = int(min(np.ceil(L / (1 + a)) - 1, L - 1))
    hi = np.sum(g**2) / (L * M)
    lo = max(g[Hb] ** 2 / (M * xb), np.mean(g[Hb:] ** 2) / M)
    grid = np.linspace(np.log(lo), np.log(hi), 512)
    k = int(np.argmin([omega(v) for v in grid]))
    bounds = (grid[max(k - 1, 0)], grid[min(k + 1, 511)])
    s2 = float(np.exp(minimize_scalar(omega, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x))
    cutoff = float(np.sqrt(M * s2 * xb))
    return int(np.sum(g > cutoff)), s2, cutoff


def lagrange_alloc(  # noqa: C901
    gains: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: float, iters: int = 200
) -> list[int]:
    """One index per layer; gains and costs do not decrease along each layer."""

    def pick(lam: float) -> list[int]:
        return [int(np.argmax(g - lam * c)) for g, c in zip(gains, costs, strict=True)]

    def cost(p: Sequence[int]) -> float:
        return float(sum(c[i] for c, i in zip(costs, p, strict=True)))

    if cost(pick(0.0)) <= budget:
        return pick(0.0)
    lo, hi = 0.0, 1.0
    while cost(pick(hi)) > budget:
        hi *= 2
    for _ in range(iters):
        m = 0.5 * (lo + hi)
        lo, hi = (m, hi) if cost(pick(m)) > budget else (lo, m)
    p = pick(hi)
    while True:
        best = None
        for i, (g, c) in enumerate(zip(gains, costs, strict=True)):
            for j in range(p[i] + 1, len(g)):
                dc = c[j] - c[p[i]]
                if dc > budget - cost(p):
                    break
                r = (g[j] - g[p[i]]) / max(dc, 1e-12)
                if r > 0 and (best is None or r > best[0]):
                    best = (r, i, j)
        if best is None:
            return p
        p[best[1]] = best[2]


def dp_alloc(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: float, bins: int = 2000) -> list[int]:
    """Exact up to the rounding of costs, which are rounded up to a multiple of budget/bins."""
    q = budget / bins
    f = np.zeros(bins + 1)
    table = []
    for e, c in zip(losses, costs, strict=True):
        ci = np.ceil(np.asarray(c) / q - 1e-9).astype(int)
        g, a = np.full(bins + 1, np.inf), np.zeros(bins + 1, int)
        for j, (ej, cj) in enumerate(zip(e, ci, strict=True)):
            if cj > bins:
                continue
            v = np.full(bins + 1, np.inf)
            v[cj:] = f[: bins + 1 - cj] + ej
            m = v < g
            g[m], a[m] = v[m], j
        f = g
        table.append((a, ci))
    b, out = bins, []
    for a, ci in reversed(table):
        out.append(int(a[b]))
        b -= ci[a[b]]
    return out[::-1]


def brute_force(distortions: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: np.ndarray) -> float:
    """Least distortion of all choices within the limits; infinite when there is none."""
    best = np.inf
    for p in itertools.product(*(range(len(d)) for d in distortions)):
        if (sum(c[i] for c, i in zip(costs, p, strict=True)) <= limits).all():
            best = min(best, float(sum(d[i] for d, i in zip(distortions, p, strict=True))))
    return best
