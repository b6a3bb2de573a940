"""Into which modes to split a number of channels, features or words: balanced, and padded where that pays."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

from tenfold.errors import TenfoldError

# Padded modes must save this share of the sum of modes, which is what the parameters of a train are proportional to.
_PAYS = 0.05


class Modes(NamedTuple):
    """Modes in ascending order, their product ≥ the number that was asked for, and why these."""

    modes: tuple[int, ...]
    reason: str


@lru_cache(maxsize=4096)
def mode_factors(n: int, order: int, *, pad: bool = True) -> Modes:
    """Return ``order`` modes whose product is ``n``, or a little more where that makes them smaller by 5 %.

    Of all factorizations the one with the smallest sum is taken: a train of rank r has about r²·Σ modes parameters.
    The most balanced modes have the smallest sum (and the largest entropy, as in Hrinchuk et al. 2020,
    arXiv 1901.10787), so a number with large prime factors is rounded up to one without where rows may stay unused.

    Args:
        n: at least 1.
        order: how many modes, at least 1. Some are 1 where ``n`` has fewer prime factors and is not padded.
        pad: whether the product may be larger than ``n``: yes for the rows of an embedding, no for channels.

    Raises:
        TenfoldError: ``n`` or ``order`` below 1.

    Example:
        >>> mode_factors(256, 3, pad=False)
        Modes(modes=(4, 8, 8), reason='4×8×8 = 256, the most balanced factors')
        >>> mode_factors(17_201, 3)  # = 103·167
        Modes(modes=(22, 27, 29), reason='22×27×29 = 17226 for 17201 (0.1 % padding): 78 slices, exact factors 271')
    """
    if n < 1 or order < 1:
        msg = f"cannot split {n} into {order} modes: both must be at least 1"
        raise TenfoldError(msg)
    exact = min(_factorizations(n, order, 1), key=lambda modes: (sum(modes), modes[-1]))
    text = "×".join(map(str, exact))
    if pad:
        wide = _padded(n, order)
        if sum(wide) <= (1 - _PAYS) * sum(exact):
            size = prod(wide)
            reason = (
                f"{'×'.join(map(str, wide))} = {size} for {n} ({(size / n - 1) * 100:.1f} % padding): "
                f"{sum(wide)} slices, exact factors {sum(exact)}"
            )
            return Modes(wide, reason)
    return Modes(exact, f"{text} = {n}, the most balanced factors" if order > 1 else f"{n}, in one piece")


@lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def _factorizations(n: int, order: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield all ascending factorizations of ``n`` into ``order`` factors of at least ``least``."""
    if order == 1:
        if n >= least:
            yield (n,)
        return
    for d in _divisors(n):
        if d**order > n:
            return
        if d >= least:
            for rest in _factorizations(n // d, order - 1, d):
                yield (d, *rest)


def _padded(n: int, order: int) -> tuple[int, ...]:
    """Return the modes of smallest sum whose product is at least ``n``, and of those the smallest product."""
    top = 1
    while top**order < n:
        top += 1
    level = next(k for k in range(order + 1) if (top - 1) ** (order - k) * top**k >= n)
    total = (top - 1) * (order - level) + top * level
    best = tuple([top - 1] * (order - level) + [top] * level)
    for modes in _ascending(total, order, max(top - 4, 1)):
        if n <= prod(modes) < prod(best):
            best = modes
    return best


def _ascending(total: int, order: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield all ascending tuples of ``order`` numbers of at least ``least`` with this sum."""
    if order == 1:
        if total >= least:
            yield (total,)
        return
    for first in range(least, total // order + 1):
        for rest in _ascending(total - first, order - 1, first):
            yield (first, *rest)
