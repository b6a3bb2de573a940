"""Costs of a layer at many ranks."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from tenfold.formats import FORMATS
from tenfold.planning.eligible import EligibleLayer

Ranks = NDArray[np.int64]
Numbers = NDArray[np.int64]
_CHAIN = 2
_TRIED = 64


def costs_of(problem: EligibleLayer, format: str, ranks: Ranks) -> tuple[Numbers, Numbers]:
    """Return parameters and MACs (n,) of a layer at many ``ranks`` (n, names): as ``cost_at`` does, but fast.

    All costs are multilinear in the ranks as long as the same of them are full (a full side may have no factor). So
    each such case is evaluated at two neighbouring values of each rank and continued in whole numbers, which is exact;
    that is checked at its far end, and a format whose costs are of another form is evaluated rank by rank. Formats with
    more than two ranks are chains of cores, and say themselves what makes a case.
    """
    kind = FORMATS.get(format)
    names = kind.rank_names
    found = np.zeros((len(ranks), 2), dtype=np.int64)
    if len(names) > _CHAIN:
        keys: dict[Hashable, list[int]] = {}
        for row, values in enumerate(ranks.tolist()):
            keys.setdefault(kind.cost_case(problem.spec, dict(zip(names, values, strict=True))), []).append(row)
        for rows in keys.values():
            found[rows] = _chained(problem, format, ranks[rows])
        return found[:, 0], found[:, 1]
    full = np.array([kind.max_rank(problem.spec)[name] for name in names])
    cases, member = np.unique(ranks == full, axis=0, return_inverse=True)
    for number, case in enumerate(cases):
        (places,) = np.nonzero(member.reshape(-1) == number)
        found[places] = _case(problem, format, ranks[places], case)
    return found[:, 0], found[:, 1]


def _case(problem: EligibleLayer, format: str, ranks: Ranks, case: NDArray[np.bool_]) -> Numbers:
    """Return costs (n, 2) at ranks of which the same are full."""
    free = np.flatnonzero(~case)
    if len(ranks) <= 2 ** len(free) + 2:
        return _one_by_one(problem, format, ranks)
    corners = np.repeat(ranks[:1], 2 ** len(free), axis=0)
    steps = np.array(list(product((0, 1), repeat=len(free))), dtype=np.int64).reshape(len(corners), len(free))
    base = ranks[:, free].min(0)
    stretch = np.where(ranks[:, free].max(0) > base, 1, 0)  # an axis with one rank only has no slope to find
    corners[:, free] = base + steps * stretch
    parts = _one_by_one(problem, format, corners).reshape(*(2,) * len(free), 2)
    for axis in range(len(free)):  # values at the corners to coefficients of the products of (rank − base)
        first, second = np.take(parts, 0, axis), np.take(parts, 1, axis)
        parts = np.stack([first, second - first], axis)
    powers = (ranks[:, None, free] - base) ** steps  # (n, corners, free)
    found = powers.prod(2) @ parts.reshape(len(corners), 2)
    ends = np.unique(np.concatenate([found[:, 0].argmax(keepdims=True), found[:, 1].argmax(keepdims=True)]))
    if (found[ends] != _one_by_one(problem, format, ranks[ends])).any():
        return _one_by_one(problem, format, ranks)
    return np.asarray(found)


def _chained(problem: EligibleLayer, format: str, ranks: Ranks) -> Numbers:
    """Return costs (n, 2) at ranks of a chain of cores: sums of products of neighbouring ranks, as long as they are.

    The coefficients follow from a few ranks, and others, spread over the rest, tell whether that was right.
    """
    kind, names = FORMATS.get(format), FORMATS.get(format).rank_names
    rows = [kind.cost_terms(problem.spec, dict(zip(names, row, strict=True))) for row in ranks.tolist()]
    terms = np.array([(*row, 1) for row in rows], dtype=np.float64)
    known = np.unique(np.linspace(0, len(ranks) - 1, 2 * terms.shape[1]).round().astype(int))
    if len(ranks) < 2 * len(known):
        return _one_by_one(problem, format, ranks)
    exact = _one_by_one(problem, format, ranks[known])
    scale = terms.max(0)
    coefficients, *_ = np.linalg.lstsq(terms[known] / scale, exact, rcond=1e-11)
    found = (terms / scale @ coefficients).round().astype(np.int64)
    tried = np.unique(np.concatenate([found.argmax(0), found.argmin(0), np.arange(1, len(ranks), _TRIED)]))
    if (found[known] != exact).any() or (found[tried] != _one_by_one(problem, format, ranks[tried])).any():
        return _one_by_one(problem, format, ranks)
    return np.asarray(found)


def _one_by_one(problem: EligibleLayer, format: str, ranks: Ranks) -> Numbers:
    names = FORMATS.get(format).rank_names
    costs = [problem.cost_at(format, dict(zip(names, row, strict=True))) for row in ranks.tolist()]
    return np.array([(cost.params, cost.macs) for cost in costs], dtype=np.int64).reshape(-1, 2)


def saves(layer: EligibleLayer, params: Numbers, macs: Numbers) -> NDArray[np.bool_]:
    """Return which costs (n,) are below what the layer costs now; a lookup is judged by its parameters."""
    now = layer.cost
    counted = macs if now.macs else np.zeros_like(macs)
    no_more = (params <= now.params) & (counted <= now.macs)
    return np.asarray(no_more & ((params < now.params) | (counted < now.macs)))
