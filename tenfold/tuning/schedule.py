"""The learning rate as a function of the step: nothing to store, nothing to restore."""

from __future__ import annotations

from math import cos, pi


def learning_rate(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """Return the learning rate of a step: a straight line up to ``peak``, then a cosine down to almost zero.

    Args:
        step: counted from 0 over all epochs; beyond the last it stays at the end of the cosine.
        steps: of the whole run.
        peak: the highest rate.
        warmup: share of the steps on the straight line.

    Example:
        >>> [round(learning_rate(s, 5, peak=1.0, warmup=0.4), 2) for s in range(5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    falling = max(steps - rising, 1)
    return peak * (1 + cos(pi * min(step - rising, falling - 1) / falling)) / 2
