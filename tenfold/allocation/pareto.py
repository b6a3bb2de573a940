"""Options that no budget could prefer, found and dropped."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold.records import FormatOptions, LayerOptions, OptionTable

Array = NDArray[np.float64]
Picks = NDArray[np.intp]

_BLOCK = 128  # options compared with all others at once


def pareto(distortion: ArrayLike, costs: ArrayLike) -> Picks:
    """Return the indices of the options that no other one equals or beats on distortion and all costs, cheapest first.

    Of equal options the first is kept, and what rounding alone tells apart counts as equal: so a plan does not depend
    on the machine.

    Example:
        >>> pareto([0.5, 0.1, 0.2, 0.1], [[1], [3], [3], [4]]).tolist()
        [0, 1]
    """
    distortion = _rounded(np.asarray(distortion, dtype=np.float64), 20)  # spectra are those of matrices in float32
    costs = _rounded(columns_of(costs), 36)  # whole numbers stay as they are
    order = np.lexsort((np.arange(len(distortion)), *costs.T[::-1], distortion))  # what is beaten comes after
    kept: list[Picks] = []
    while len(order):
        head, order = order[:_BLOCK], order[_BLOCK:]
        head = head[~np.triu(_beats(costs, head, head), 1).any(0)]
        order = order[~_beats(costs, head, order).any(0)]
        kept.append(head)
    return np.concatenate(kept)[::-1] if kept else order


def _rounded(values: Array, bits: int) -> Array:
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits))


def _beats(costs: Array, these: Picks, those: Picks) -> NDArray[np.bool_]:
    """Return a table (these, those) of which cost nothing more than which."""
    return np.asarray((costs[these][:, None] <= costs[those]).all(2))


def columns_of(costs: ArrayLike) -> Array:
    """Return costs as a table (options, budgets), one column where there is one budget."""
    array = np.asarray(costs, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array


def explorable(table: OptionTable) -> bool:
    """Whether other budgets can be chosen from the table: it has every option's distortion."""
    return all("distortion" in options.columns for layer in table.eligible for options in layer.options)


def pruned(table: OptionTable) -> OptionTable:
    """Return the table without options that no budget could prefer, as it is kept on disk.

    Of each format the Pareto fronts of distortion and any combination of costs stay: every optimum is among them.
    """
    return table.replace(layers=tuple(_pruned(layer) for layer in table.layers))


def _pruned(layer: LayerOptions) -> LayerOptions:
    return layer.replace(options=tuple(options.only(_front(options)) for options in layer.options))


def _front(options: FormatOptions) -> Picks:
    costs = [options.params, options.macs, *([] if options.latency_ms is None else [options.latency_ms])]
    table = np.stack(costs, axis=1).astype(np.float64)
    budgets = range(table.shape[1])
    subsets = [list(names) for size in range(1, len(budgets) + 1) for names in combinations(budgets, size)]
    return np.unique(np.concatenate([pareto(options.columns["distortion"], table[:, names]) for names in subsets]))
