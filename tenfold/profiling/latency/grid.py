"""Grids of sub-layer geometries to time, from which the time of every rank is interpolated: lines and planes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tenfold.formats import FORMATS, Rank
from tenfold.formats.base import Ints
from tenfold.records import (
    ContractSpec,
    FoldSpec,
    LayerSpec,
    ReorderSpec,
    Shape,
    SharedSliceSpec,
    SubLayerSpec,
    TTGatherSpec,
)

LEVELS = 3
_MOST_COMBINATIONS = 400


@dataclass(frozen=True)
class Point:
    """One sub-layer on one input shape. Points of a ``family`` differ in their channels alone.

    ``depthwise``: it convolves each channel alone, however many the rank makes of them.
    """

    spec: SubLayerSpec
    in_shape: Shape
    depthwise: bool = False

    @property
    def family(self) -> str:
        """All but the channels, in one line."""
        spec, shape = self.spec, self.in_shape
        if isinstance(spec, SharedSliceSpec):
            return f"{spec.copies} folded {Point(spec.layer, shape).family}"
        if isinstance(spec, FoldSpec):
            return f"fold {Point(spec.layer, shape).family}"
        if isinstance(spec, ReorderSpec):
            place = len(shape) - 1 - spec.axes
            return f"reorder {spec.block} s{_times(spec.stride)} @{_times((*shape[:place], '*', *shape[place + 1 :]))}"
        if isinstance(spec, TTGatherSpec):
            modes = f"{_times(spec.shape.row_modes)} by {_times(spec.shape.col_modes)}"
            return f"gather {modes} @{_times(shape)}"
        if isinstance(spec, ContractSpec):
            carried = f" of {spec.modes[0]}x*x{spec.modes[2]}" if spec.is_middle else ""
            place = len(shape) - 1 - spec.axes
            return f"contract {spec.equation}{carried} @{_times((*shape[:place], '*', *shape[place + 1 :]))}"
        if spec.axes == 0:
            return f"{spec.kind} @{_times(shape if spec.kind == 'embedding' else (*shape[:-1], '*'))}"
        lead, sides = shape[: -spec.axes - 1], shape[-spec.axes :]
        padding = spec.padding if isinstance(spec.padding, str) else _times(spec.padding)
        groups = "*" if self.depthwise else spec.groups
        extra = "" if spec.padding_mode == "zeros" else f" {spec.padding_mode}"
        extra += f" o{_times(spec.output_padding)}" if any(spec.output_padding) else ""
        return (
            f"{spec.kind} k{_times(spec.kernel)} s{_times(spec.stride)} p{padding} d{_times(spec.dilation)}"
            f" g{groups}{extra} @{_times((*lead, '*', *sides))}"
        )

    @property
    def at(self) -> tuple[int, int]:
        """Input and output channels: of the matrix or the layer, without the features that are carried past it.

        Of a gather the two ranks. Of depthwise convolutions 1 and the channels, of other contractions 1 and the
        multiply-accumulates per position.
        """
        if isinstance(self.spec, SharedSliceSpec | FoldSpec):
            return self.spec.layer.in_channels, self.spec.layer.out_channels
        if isinstance(self.spec, TTGatherSpec):
            first, last = (*self.spec.shape.ranks, 1, 1)[:2]
            return first, last
        if not isinstance(self.spec, ContractSpec):
            if self.depthwise:
                return 1, self.spec.out_channels
            return self.spec.in_channels, self.spec.out_channels
        if self.spec.is_middle:
            return self.spec.weight_shape[1], self.spec.weight_shape[0]
        return 1, self.spec.macs(self.in_shape) * self.spec.in_channels // prod(self.in_shape)

    @property
    def key(self) -> str:
        """Family and channels, in one line."""
        x, y = self.at
        return f"{self.family} {x}->{y}"

    @classmethod
    def of(cls, spec: SubLayerSpec, in_shape: Shape, dense: LayerSpec | None = None) -> Point:
        """Return the point of a sub-layer, without its bias, which takes no time of its own.

        Of a layer ``dense`` with other groups, one with as many groups as channels is depthwise.
        """
        alone = isinstance(spec, LayerSpec) and spec.axes > 0 and spec.groups == spec.in_channels == spec.out_channels
        depthwise = alone and dense is not None and spec.groups != dense.groups  # type: ignore[union-attr]
        return cls(spec.replace(bias=False) if spec.bias else spec, in_shape, depthwise)


@dataclass(frozen=True)
class Curve:
    """A line or a plane through the points of one family: those with input channels in xs, output channels in ys."""

    family: str
    xs: tuple[int, ...]
    ys: tuple[int, ...]

    def holds(self, x: int, y: int) -> bool:
        """Return whether a sub-layer with these channels lies on it."""
        return (len(self.xs) > 1 or x == self.xs[0]) and (len(self.ys) > 1 or y == self.ys[0])


@dataclass(frozen=True)
class MeasurementGrid:
    """Points to time for one layer geometry in one format, coarse levels first, and the curves through them."""

    levels: tuple[tuple[Point, ...], ...]
    curves: tuple[Curve, ...]

    def curve(self, point: Point, x: Ints, y: Ints) -> Curve | None:
        """Return the curve that a sub-layer lies on at all these channels; None if no useful rank leads to it.

        One with as many inputs as outputs may lie where two lines cross: what else is asked for tells which is meant.
        """
        family, ends = point.family, [(int(f(x)), int(g(y))) for f in (np.min, np.max) for g in (np.min, np.max)]
        return next((c for c in self.curves if c.family == family and all(c.holds(*at) for at in ends)), None)


def measurement_grid(
    format: str, spec: LayerSpec, in_shape: Shape, *, step: int = 8, exact: bool = False
) -> MeasurementGrid:
    """Choose what to time for a layer geometry in a format.

    Args:
        format: name of the format.
        spec: the dense layer.
        in_shape: its input, batch included.
        step: channels come in multiples of this; small layers get a finer one.
        exact: small layers do not.

    Example:
        >>> dense = LayerSpec(kind="linear", in_channels=256, out_channels=128)
        >>> found = measurement_grid("low_rank", dense, (1, 256))
        >>> [c.ys for c in found.curves if c.xs == (256,)]
        [(1, 4, 8, 16, 24, 32, 48, 64, 96, 127, 128)]
        >>> [p.at[1] for p in found.levels[0] if p.at[0] == 256]
        [8, 32]
    """
    levels: list[tuple[Point, ...]] = []
    for level in range(LEVELS):
        roles = _roles(
            format, spec, in_shape, sample_ranks(format, spec, in_shape, level=level, step=step, exact=exact)
        )
        levels.append(tuple(sorted({p for role in roles for p in role}, key=lambda p: (p.family, p.at))))
    # The curves reach further than what is timed, so that every useful rank lies between two of their nodes.
    reach = sample_ranks(format, spec, in_shape, level=LEVELS, step=step, exact=exact, share=2.2)
    return MeasurementGrid(tuple(levels), _curves(_roles(format, spec, in_shape, reach)))


def stage_points(format: str, spec: LayerSpec, in_shape: Shape, rank: Rank) -> tuple[Point, ...]:
    """Return the sub-layers of a layer in this format at this rank, each with its input shape."""
    points, shape = [], in_shape
    for stage in FORMATS.get(format).structure(spec, rank):
        points.append(Point.of(stage, shape, spec))
        shape = stage.out_shape(shape)
    return tuple(points)


def stage_columns(
    format: str, spec: LayerSpec, in_shape: Shape, ranks: Sequence[Rank]
) -> Iterator[tuple[Point, Ints, Ints, Ints]]:
    """Iterate over the stages of a layer at many ranks at once: (one of them, which ranks, their x, their y).

    Ranks of which the same are full have the same stages but for their channels, where the format says these.
    """
    kind = FORMATS.get(format)
    most = kind.max_rank(spec)
    table = np.array([list((most | rank).values()) for rank in ranks], dtype=np.int64).reshape(-1, len(most))
    cases, member = np.unique(table == list(most.values()), axis=0, return_inverse=True)
    for number in range(len(cases)):
        rows = np.flatnonzero(member.reshape(-1) == number)
        channels = kind.channels(spec, table[rows])
        if channels is not None:
            first = stage_points(format, spec, in_shape, ranks[rows[0]])
            for point, (x, y) in zip(first, channels, strict=True):
                inner = 1 if point.depthwise else x
                yield point, rows, np.broadcast_to(inner, rows.shape), np.broadcast_to(y, rows.shape)
            continue
        for row in rows.tolist():
            for point in stage_points(format, spec, in_shape, ranks[row]):
                yield point, np.array([row]), np.array([point.at[0]]), np.array([point.at[1]])


def sample_ranks(
    format: str,
    spec: LayerSpec,
    in_shape: Shape,
    *,
    level: int,
    step: int = 8,
    exact: bool = False,
    share: float = 1.0,
) -> list[Rank]:
    """Return ranks spread over those with at most ``share`` of the dense MACs; the smallest if there are none."""
    kind = FORMATS.get(format)
    most = kind.max_rank(spec)
    ladders = {name: ladder(top, level=level, step=step, exact=exact) for name, top in most.items()}
    combinations: Iterable[Rank]
    if prod(len(v) for v in ladders.values()) <= _MOST_COMBINATIONS:
        combinations = (dict(zip(ladders, values, strict=True)) for values in itertools.product(*ladders.values()))
    else:
        family = kind.rank_family(spec)
        combinations = [family[n - 1] for n in ladder(len(family), level=level, step=1)]
    dense, ranks = spec.macs(in_shape), list(combinations)
    if not dense:
        return ranks
    _, macs = kind.cost(spec, kind.rows(ranks), in_shape)
    return [ranks[row] for row in np.flatnonzero(macs <= share * dense)] or ranks[:1]


def ladder(top: int, *, level: int, step: int = 8, exact: bool = False) -> tuple[int, ...]:
    """Return numbers up to ``top``: multiples of the step, and ``top`` itself, in ever wider gaps.

    At level 0 a factor of 4 apart, at level 1 of 2, at level 2 of about √2; at level 3 with both ends: 1 and top - 1.
    Small tops get a finer step unless it is ``exact``: then nothing between its multiples is worth measuring.

    Example:
        >>> ladder(64, level=0), ladder(64, level=1), ladder(64, level=2)
        ((8, 32, 64), (8, 16, 32, 64), (4, 8, 16, 24, 32, 48, 64))
    """
    step = step if exact else max(1, min(step, top // 8))
    rungs = {top}
    power = step
    while power < top:
        rungs.add(power)
        if level > 1 and power % (2 * step) == 0 and power * 3 // 2 < top:
            rungs.add(power * 3 // 2)
        power *= 4 if level == 0 else 2
    if level > 1 and not exact:
        rungs.add(max(1, step // 2))
    if level > 2:
        rungs |= {1, max(1, top - 1)}
    return tuple(sorted(rungs))


def _roles(format: str, spec: LayerSpec, in_shape: Shape, ranks: Iterable[Rank]) -> list[set[Point]]:
    """Return the sub-layers with the same role at these ranks: the i-th of n."""
    roles: dict[tuple[int, int], set[Point]] = {}
    for rank in ranks:
        stages = stage_points(format, spec, in_shape, rank)
        for index, point in enumerate(stages):
            roles.setdefault((len(stages), index), set()).add(point)
    return list(roles.values())


def _curves(roles: Iterable[set[Point]]) -> tuple[Curve, ...]:
    """Return lines where one channel count varies, and planes where both do.

    A plane includes the rest of its family, such as the core of a partial Tucker, which is the edge of the plane.
    """
    positions: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for role in roles:
        for family, group in itertools.groupby(sorted(role, key=lambda p: p.family), key=lambda p: p.family):
            at = {p.at for p in group}
            positions.setdefault((family, _direction(at)), set()).update(at)
    planes = {family for family, direction in positions if direction == "plane"}
    merged: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for (family, direction), at in positions.items():
        merged.setdefault((family, "plane" if family in planes else direction), set()).update(at)
    return tuple(_as_curves(merged))


def _direction(at: set[tuple[int, int]]) -> str:
    xs, ys = {x for x, _ in at}, {y for _, y in at}
    if len(xs) == 1:
        return f"in {min(xs)}"
    return f"out {min(ys)}" if len(ys) == 1 else "plane"


def _as_curves(merged: dict[tuple[str, str], set[tuple[int, int]]]) -> Iterator[Curve]:
    for (family, _), at in merged.items():
        yield Curve(family, tuple(sorted({x for x, _ in at})), tuple(sorted({y for _, y in at})))


def _times(numbers: Iterable[int | str]) -> str:
    return "x".join(map(str, numbers))
