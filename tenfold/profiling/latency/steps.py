"""What numbers of channels a runtime is built for: kernels work on blocks, and a part of one costs a whole one."""

from __future__ import annotations

from collections.abc import Mapping

from tenfold.profiling.latency.grid import Point
from tenfold.records import LayerSpec

_BASE, _WIDE, _SIDE, _ROWS = 32, 64, 16, 64
_STEPS = (32, 16, 8, 4)
_MOST_OF = 0.75  # of what a whole step costs, the first channel beyond a multiple has to cost
_NOTABLE = 1.1  # a step that costs less than this shows nothing


def probe_points(spec: LayerSpec) -> dict[int, tuple[Point, ...]]:
    """Return sub-layers to time for each number of channels in the middle of a factorized layer of such a kind.

    Example:
        >>> sorted(probe_points(LayerSpec(kind="linear", in_channels=8, out_channels=8)))
        [32, 33, 34, 36, 40, 48, 64]
    """
    ranks = [_BASE, *(_BASE + s // 2 for s in _STEPS), _BASE + 1, _BASE + _STEPS[0]]
    return {rank: _chain(spec, rank) for rank in sorted(set(ranks))}


def step_from(times: Mapping[int, float]) -> int:
    """Return the largest step that the times show, from milliseconds by number of channels; 1 if none does.

    They show a step of s where one channel beyond a multiple of s costs most of what s channels cost, and so do s / 2.

    Example:
        >>> blocks = {r: -(-r // 16) for r in (32, 33, 34, 36, 40, 48, 64)}
        >>> step_from(blocks), step_from({r: r for r in blocks})
        (16, 1)
    """
    least = times.get(_BASE)
    if least is None:
        return 1
    for step in _STEPS:
        whole, first, half = (times.get(_BASE + s) for s in (step, 1, step // 2))
        if whole is None or first is None or half is None or whole < _NOTABLE * least:
            continue
        if min(first, half) - least >= _MOST_OF * (whole - least):
            return step
    return 1


def _chain(spec: LayerSpec, rank: int) -> tuple[Point, ...]:
    """Return a layer to a number of channels, one that keeps it, and one back to many."""
    if spec.axes == 0:
        into = LayerSpec(kind="linear", in_channels=4 * _WIDE, out_channels=rank)
        back = LayerSpec(kind="linear", in_channels=rank, out_channels=4 * _WIDE)
        return Point.of(into, (_ROWS, 4 * _WIDE)), Point.of(back, (_ROWS, rank))
    sides = (_SIDE,) * spec.axes
    one, three = (1,) * spec.axes, (3,) * spec.axes
    into = LayerSpec(kind="conv", in_channels=_WIDE, out_channels=rank, kernel=one)
    keep = LayerSpec(kind="conv", in_channels=rank, out_channels=rank, kernel=three, padding=one)
    back = LayerSpec(kind="conv", in_channels=rank, out_channels=_WIDE, kernel=one)
    return (
        Point.of(into, (1, _WIDE, *sides)),
        Point.of(keep, (1, rank, *sides)),
        Point.of(back, (1, rank, *sides)),
    )
