"""The error at many ranks from a few fits on each of some lines: for formats whose first rank tells the line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tenfold.formats import Factorization
from tenfold.records import LayerSpec

Curve = Callable[[NDArray[np.int64]], NDArray[np.float64]]

# Fits on each line.
_FITS = 3


class BySlices:
    """Ranks with the same first number lie on one line: by their parameters, between a few fits, geometrically.

    The full rank, at which such formats are the dense layer, is no part of a line. What is asked for is fitted once.

    Example:
        >>> from tenfold.formats import FORMATS
        >>> spec = LayerSpec(kind="conv", in_channels=64, out_channels=64, kernel=(3, 3))
        >>> asked = []
        >>> def at(ranks):
        ...     asked.extend(ranks.tolist())
        ...     return 1.0 / ranks[:, 1]
        >>> curve = BySlices(spec, FORMATS.get("block_term"), at)
        >>> found = curve(np.array([[c, r, r] for c in (2, 4) for r in range(1, 21)]))
        >>> len(found), len(asked), bool((np.diff(found[:20]) < 0).all())
        (40, 6, True)
    """

    def __init__(self, spec: LayerSpec, format: type[Factorization], at: Curve) -> None:
        self._spec, self._format, self._at = spec, format, at
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the error (n,) at ranks (n, names), of which there may be none."""
        ranks = ranks.reshape(-1, len(self._format.rank_names))
        found = np.empty(len(ranks))
        full = [self._format.max_rank(self._spec)[name] for name in self._format.rank_names]
        dense = (ranks == full).all(1)
        found[dense] = [self._fitted(row) for row in ranks[dense]]
        for first in np.unique(ranks[~dense, 0]):
            (rows,) = np.nonzero(~dense & (ranks[:, 0] == first))
            found[rows] = self._line(ranks[rows])
        return found

    def _line(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        sizes = np.array([self._size(row) for row in ranks.tolist()])
        order = np.argsort(sizes, kind="stable")
        places = np.unique(np.linspace(0, len(order) - 1, min(_FITS, len(order))).round().astype(int))
        knots = order[places]
        errors = np.maximum([self._fitted(row) for row in ranks[knots]], np.finfo(np.float64).tiny)
        falling = np.log(np.minimum.accumulate(errors))  # more parameters do no worse where fits are good ones
        return np.asarray(np.exp(np.interp(np.log(sizes), np.log(sizes[knots]), falling)))

    def _fitted(self, row: NDArray[np.int64]) -> float:
        key = tuple(row.tolist())
        if key not in self._known:
            self._known[key] = float(self._at(row[None])[0])
        return self._known[key]

    def _size(self, row: list[int]) -> int:
        return self._format.num_params(self._spec, dict(zip(self._format.rank_names, row, strict=True)))
