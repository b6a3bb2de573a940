"""Costs of a layer at many ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tenfold.formats import FORMATS
from tenfold.planning.eligible import EligibleLayer

Ints = NDArray[np.int64]


def costs_of(layer: EligibleLayer, format: str, ranks: Ints) -> tuple[Ints, Ints]:
    """Return parameters and MACs (n,) of all calls of a layer at many ``ranks`` (n, names)."""
    kind = FORMATS.get(format)
    params, macs = np.zeros(len(ranks), dtype=np.int64), np.zeros(len(ranks), dtype=np.int64)
    for call in layer.calls:
        params, once = kind.cost(layer.spec, ranks, call.in_shape)
        macs = macs + call.count * once
    return params, macs


def saves(layer: EligibleLayer, params: Ints, macs: Ints) -> NDArray[np.bool_]:
    """Return which costs (n,) are below what the layer costs now; a lookup is judged by its parameters."""
    now = layer.cost
    counted = macs if now.macs else np.zeros_like(macs)
    no_more = (params <= now.params) & (counted <= now.macs)
    return np.asarray(no_more & ((params < now.params) | (counted < now.macs)))
