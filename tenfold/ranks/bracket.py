"""The first index at which a costly, roughly falling function comes within a bound."""

from __future__ import annotations

from collections.abc import Callable

# Look first at one in so many of all.
_FIRST = 8

# Beyond where a straight line crosses the bound, since errors fall ever more slowly.
_MARGIN = 1.3


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
