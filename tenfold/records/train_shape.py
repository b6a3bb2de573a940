"""Geometry of a table held as a tensor train: which cores are multiplied out once for all rows, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from math import prod
from typing import ClassVar

from tenfold.records.base import Spec

Shape = tuple[int, ...]
Segments = tuple[tuple[int, int], ...]

# What the steps of a gather cost beside their MACs, in MACs, as measured on CPU cores: a number read or written, a
# small product started, and how much slower a product is whose rows are shorter than a cache line of 16 numbers.
_MOVED = 2
_STARTED = 2000
_NARROW, _LINE = 2, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainShape:
    """The shape of a table (∏ row modes, ∏ column modes) held as a tensor train, cores (rows, r, columns, r').

    Row and column indices are mixed-radix numbers of their modes, the first mode the slowest. The formulas of costs
    hold for arrays of ranks as well.

    Example:
        >>> shape = TrainShape(row_modes=(25, 30, 40), col_modes=(4, 8, 8), ranks=(16, 16))
        >>> shape.core_shapes
        ((25, 1, 4, 16), (30, 16, 8, 16), (40, 16, 8, 1))
        >>> shape.num_params
        68160
    """

    row_modes: Shape
    col_modes: Shape
    ranks: Shape

    def __post_init__(self) -> None:
        if not len(self.row_modes) == len(self.col_modes) == len(self.ranks) + 1:
            msg = (
                f"a train of {len(self.row_modes)} row modes needs as many column modes and one rank fewer, "
                f"not {len(self.col_modes)} and {len(self.ranks)}"
            )
            raise ValueError(msg)

    @property
    def sides(self) -> Shape:
        """The ranks with those of the ends, which are 1."""
        return (1, *self.ranks, 1)

    @property
    def core_shapes(self) -> tuple[Shape, ...]:
        """The shape (row mode, r, column mode, r') of each core."""
        r = self.sides
        return tuple(
            (m, r[k], n, r[k + 1]) for k, (m, n) in enumerate(zip(self.row_modes, self.col_modes, strict=True))
        )

    @property
    def num_params(self) -> int:
        """Number of entries of all cores."""
        return sum(prod(shape) for shape in self.core_shapes)

    def segments(self, count: int) -> Segments:
        """Return how to find ``count`` rows: runs (start, stop) of cores that are multiplied out for all their rows.

        The runs are then joined row by row. A prefix that many rows share is so computed once: with few rows every
        core is a run of its own; with many, half of the train is. The cheapest of all ways by MACs and memory moved.
        """
        return _cheapest(self, max(count, 1))

    def cost(self, count: int) -> float:
        """Return what ``count`` rows cost on a CPU in MACs, memory moved included: to compare shapes, not to report."""
        return self.cost_by(self.segments(count), count)

    def macs(self, count: int) -> int:
        """Return the multiply-accumulates that ``count`` rows take."""
        return self.macs_by(self.segments(count), count)

    def cost_by(self, segments: Segments, count: int) -> int:
        """Return the ``cost`` of going by these segments."""
        count = max(count, 1)
        start, stop = segments[0]
        cost = count * _MOVED * prod(self.col_modes[start:stop]) * self.sides[stop]
        for segment in segments:
            macs, written = self._table(*segment)
            cost += macs + _MOVED * written
        for macs, read, width in self._joins(segments):
            cost += count * (_STARTED + _MOVED * read + macs * (1 + (_NARROW - 1) * (width < _LINE)))
        return cost

    def macs_by(self, segments: Segments, count: int) -> int:
        """Return the multiply-accumulates of going by these segments."""
        return sum(self._table(*s)[0] for s in segments) + count * sum(m for m, _, _ in self._joins(segments))

    def _table(self, start: int, stop: int) -> tuple[int, int]:
        """Return the MACs of multiplying out the cores from ``start`` to ``stop``, and the numbers written."""
        sides, rows, columns, macs, written = self.sides, self.row_modes, self.col_modes, 0, 0
        for k in range(start + 1, stop):
            size = sides[start] * sides[k + 1] * prod(rows[start : k + 1]) * prod(columns[start : k + 1])
            macs, written = macs + size * sides[k], written + size
        return macs, written

    def _joins(self, segments: Segments) -> Iterator[tuple[int, int, int]]:
        """Yield for each run after the first: MACs of joining one row, its numbers read, the length of its rows."""
        columns = prod(self.col_modes[: segments[0][1]])
        for start, stop in segments[1:]:
            width = prod(self.col_modes[start:stop]) * self.sides[stop]
            yield columns * self.sides[start] * width, self.sides[start] * width, width
            columns *= prod(self.col_modes[start:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class TTGatherSpec(Spec):
    """One gather of rows from a tensor train, the only sub-layer of a factorized embedding; the ids are its input.

    The weight is flat: all cores (row mode, r, column mode, r') one after the other and, where there is a
    ``padding_idx``, the row it stands for, which no gradient reaches.

    Example:
        >>> shape = TrainShape(row_modes=(3, 4), col_modes=(2, 3), ranks=(2,))
        >>> spec = TTGatherSpec(rows=11, shape=shape, padding_idx=0)
        >>> spec.weight_shape, spec.out_shape((5, 7))
        ((42,), (5, 7, 6))
    """

    rows: int
    shape: TrainShape
    padding_idx: int | None = None
    bias: ClassVar[bool] = False

    @property
    def in_channels(self) -> int:
        """Number of rows."""
        return self.rows

    @property
    def out_channels(self) -> int:
        """Number of columns."""
        return prod(self.shape.col_modes)

    @property
    def weight_shape(self) -> Shape:
        """Shape of the flat weight."""
        return (self.num_params,)

    @property
    def num_params(self) -> int:
        """Number of weights, the row of the padding included."""
        return self.shape.num_params + (0 if self.padding_idx is None else self.out_channels)

    def out_shape(self, in_shape: Shape) -> Shape:
        """Return the output shape for ids of shape ``in_shape``."""
        return (*in_shape, self.out_channels)

    def macs(self, in_shape: Shape) -> int:
        """Return the multiply-accumulates for ids of shape ``in_shape``, none of which repeats: at most so many."""
        return self.shape.macs(prod(in_shape))


def segmentations(order: int) -> tuple[Segments, ...]:
    """Return all ways to divide so many cores into runs.

    Example:
        >>> segmentations(2)
        (((0, 2),), ((0, 1), (1, 2)))
    """
    cuts = (cuts for size in range(order) for cuts in combinations(range(1, order), size))
    return tuple(tuple(pairwise((0, *c, order))) for c in cuts)


@lru_cache(maxsize=4096)
def _cheapest(shape: TrainShape, count: int) -> Segments:
    return min(segmentations(len(shape.row_modes)), key=lambda way: shape.cost_by(way, count))
