"""Dropping indices of tensor trains by a timetable: how many parameters may be left when, and what goes next."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor


def allowed(begun: int, enough: int, elapsed: float) -> int:
    """Return how many parameters may be left after a share of the time, from ``begun`` down to ``enough``.

    Falls as a cubic, fast as long as there is much to spare (Zhu and Gupta 2017, arXiv 1710.01878).

    Example:
        >>> [allowed(1000, 200, t) for t in (0.0, 0.5, 1.0)]
        [1000, 300, 200]
    """
    left = (1 - min(max(elapsed, 0.0), 1.0)) ** 3
    return round(enough + (begun - enough) * left)


def least_worth(cores: Sequence[Tensor], variances: Sequence[Tensor]) -> tuple[float, int, int] | None:
    """Return the worth, the bond and the index of what a train is best without; None where no bond has two indices.

    Worth is (λ over the largest of its bond)², the energy that goes with the index, by the parameters that go.

    Args:
        cores: (r, n, r').
        variances: λ (r,) of each bond.

    Example:
        >>> import torch
        >>> cores = [torch.ones(1, 4, 2), torch.ones(2, 6, 1)]
        >>> least_worth(cores, [torch.tensor([1.0, 0.5])])
        (0.025, 0, 1)
    """
    best: tuple[float, int, int] | None = None
    for bond, own in enumerate(variances):
        if len(own) > 1:
            size = (cores[bond].numel() + cores[bond + 1].numel()) / len(own)
            index = int(own.argmin())
            worth = float((own[index] / own.max()) ** 2) / size
            if worth < (best[0] if best else inf):
                best = worth, bond, index
    return best
