"""Options of layers that are trains from the start: modes and ranks where they are not given, and how cores begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import prod
from typing import Any, TypedDict

from tenfold.errors import RankError
from tenfold.records import TrainShape
from tenfold.tensors.modes import mode_factors

# Up to this order all orders of the modes are compared; that many rows at once are taken for usual.
_COMPARED = 5
_USUAL = 1024


class CoreOptions(TypedDict, total=False):
    """How cores are drawn: ``std`` of the entries of the weight, ``device`` and ``dtype`` as in torch."""

    std: float | None
    device: Any
    dtype: Any


def each_rank(ranks: int | Sequence[int], order: int) -> tuple[int, ...]:
    """Return one rank for each bond of a train of ``order`` cores, exactly as they were asked for.

    Raises:
        RankError: not one positive rank for each bond.

    Example:
        >>> each_rank(16, 3)
        (16, 16)
    """
    found = (ranks,) * (order - 1) if isinstance(ranks, int) else tuple(ranks)
    if len(found) != order - 1 or min(found, default=1) < 1:
        msg = f"a train of {order} cores has {order - 1} ranks ≥ 1, not {found}"
        raise RankError(msg)
    return found


def row_modes_for(rows: int, order: int) -> tuple[int, ...]:
    """Return balanced modes for the rows of a table, padded where that pays."""
    return mode_factors(rows, order).modes


def column_modes(columns: int, row_modes: Sequence[int], ranks: int | Sequence[int]) -> tuple[int, ...]:
    """Return balanced modes of the columns, in the order in which lookups are cheapest.

    Example:
        >>> column_modes(256, (25, 30, 40), 16)
        (8, 4, 8)
    """
    order = len(row_modes)
    modes = mode_factors(columns, order, pad=False).modes
    if order > _COMPARED:
        return modes
    bonds = each_rank(ranks, order)

    def cost(col_modes: tuple[int, ...]) -> tuple[float, int]:
        shape = TrainShape(row_modes=tuple(row_modes), col_modes=col_modes, ranks=bonds)
        return shape.cost(_USUAL), prod(col_modes[: order // 2])

    return min(sorted(set(permutations(modes))), key=cost)
