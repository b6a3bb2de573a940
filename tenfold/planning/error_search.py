"""The smallest ranks that reach an error, found by trial fits: bracketed, then closed by regula falsi."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.allocation.rules.threshold import ErrorBound
from tenfold.decompositions import Decomposition, decompose, default_algorithm
from tenfold.formats import FORMATS, Factorization, Rank, join_groups
from tenfold.planning.eligible import EligibleLayer
from tenfold.tensors import digest

Errors = dict[str, float]  # by rank, as JSON

_ROUND = 1e-13  # what rounding leaves of spectra, as a share of all
_FIRST = 8  # look first at one in so many of all
_MARGIN = 1.3  # beyond where a straight line crosses the bound, since errors fall ever more slowly


@dataclass
class ErrorSearch:
    """Trial fits of one layer, and what they came to.

    Attributes:
        layer: whose ranks are searched.
        weight: its dense weight, groups apart.
        rule: bound, precision and sweeps.
        known: errors of earlier fits, by key and rank.
        new: errors of this search, by key and rank.
    """

    layer: EligibleLayer
    weight: Tensor
    rule: ErrorBound
    known: dict[str, Errors] = field(default_factory=dict)
    new: dict[str, Errors] = field(default_factory=dict)

    def key(self, format: str) -> str:
        """Return what the errors of a format depend on: weight, data and algorithm."""
        return f"{self._digest()} {format} {json.dumps(self._algorithm(format).to_dict(), sort_keys=True)}"

    def errors(self, ranks: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
        """Return by format the error at each of its ranks (n, names), where it was looked at; else not a number.

        Formats after the first that has a rank within the bound are not looked at: the rule takes that one.
        """
        found = {format: np.full(len(rows), np.nan) for format, rows in ranks.items()}
        current = self.layer.current
        formats = [current[0]] if current is not None and current[0] in ranks else list(ranks)
        for format in formats:
            kind = FORMATS.get(format)
            exact = self.layer.moments is None and kind.svd_bounds_error and len(kind.rank_names) == 1
            found[format] = self._by_spectrum(format, ranks[format]) if exact else self._by_fits(format, ranks[format])
            if (found[format] <= float(self.rule.rel_error or 0.0) * (1 + _ROUND)).any():
                break
        return found

    def _by_spectrum(self, format: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The one spectrum of the weight tells the error at every rank, exactly."""
        (matrix,) = FORMATS.get(format).unfoldings(self.weight.double(), self.layer.spec).values()
        squares = torch.linalg.svdvals(matrix).square().sum(0)
        tails = (squares.sum() - squares.cumsum(0)) / squares.sum() - _ROUND
        errors = tails.clamp_min(0).sqrt().nan_to_num(0.0).cpu().numpy()
        return np.asarray(errors[np.minimum(rows[:, 0], len(errors)) - 1])

    def _by_fits(self, format: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        names, algorithm, key = FORMATS.get(format).rank_names, self._algorithm(format), self.key(format)
        ranks: list[Rank] = [dict(zip(names, row, strict=True)) for row in rows.tolist()]
        known = dict(self.known.get(key, {}))
        dense = join_groups(self.weight, self.layer.spec)
        found, fits = np.full(len(ranks), np.nan), dict[int, Factorization]()

        def error_at(index: int) -> float:
            rank = json.dumps(ranks[index], sort_keys=True)
            if rank not in known:
                start = fits[min(fits, key=lambda i: abs(i - index))] if fits else None
                spec, moments = self.layer.spec, self.layer.moments
                fit = decompose(dense, format, ranks[index], algorithm, spec=spec, moments=moments, start=start)
                fits[index] = fit.value
                known[rank] = fit.rel_error if fit.output_error is None else fit.output_error
            found[index] = known[rank]
            return known[rank]

        smallest_within(error_at, len(ranks), float(self.rule.rel_error or 0.0) * (1 + _ROUND), within=self.rule.within)
        self.new[key] = known
        return found

    def _algorithm(self, format: str) -> Decomposition:
        """Return the format's algorithm with few sweeps."""
        settings = default_algorithm(format, self.rule.seed, data_aware=self.layer.moments is not None).to_dict()
        if "n_iter" in settings:
            settings["n_iter"] = min(settings["n_iter"], self.rule.sweeps)
        return Decomposition.from_dict(settings)

    def _digest(self) -> str:
        moments = self.layer.moments
        text = f"{self.layer.spec} {'' if moments is None else moments.digest()}"
        return digest({"weight": self.weight}, text)


def smallest_within(
    error_at: Callable[[int], float], size: int, bound: float, *, within: float = 0.0, start: float = 1.0
) -> int | None:
    """Return the smallest index in [0, size) whose error is at most ``bound``; None where none is.

    Looks at ever larger indices, twice as large at most, until one is good; then, between the last bad one and the
    first good one, where the straight line between their errors crosses the bound (regula falsi), or in the middle
    where that moves one end only. What it returns it has looked at; errors that rise somewhere may make it larger.

    Args:
        error_at: the error at an index.
        size: how many there are.
        bound: to come within.
        within: stop when the smallest index that is good is known to this share of itself.
        start: the error before the first index.

    Example:
        >>> tried = []
        >>> smallest_within(lambda i: tried.append(i) or 1 - (i + 1) / 100, 100, 0.305), tried
        (69, [12, 25, 51, 75, 69, 68])
    """
    low, high, at_low, at_high, last = -1, size, start, bound, 0
    slope = 0.0
    while high - low > 1 and (high == size or high - low > max(1.0, within * (high + 1))):
        if high == size:
            far = _MARGIN * (at_low - bound) / slope if slope > 0 else low
            at = min(max(low + min(round(far), low) + 1, low + 1, size // _FIRST if low < 0 else 0), size - 1)
        else:
            share = (at_low - bound) / (at_low - at_high) if at_low > at_high else 0.5
            share = 0.5 if abs(last) > 1 else share
            at = min(max(low + round(share * (high - low)), low + 1), high - 1)
        error = error_at(at)
        if error <= bound:
            last = 0 if high == size else max(last, 0) + 1
            high, at_high = at, error
        else:
            last = 0 if high == size else min(last, 0) - 1
            slope = (at_low - error) / (at - low)
            low, at_low = at, error
    return None if high == size else high
