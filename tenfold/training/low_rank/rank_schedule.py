"""Schedule for dropping indices of tensor trains: parameters allowed over time, and the next index to drop."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor


def allowed_params(initial: int, final: int, elapsed: float) -> int:
    """Return the number of parameters allowed after a share of the time, a cubic from ``initial`` to ``final``.

    It falls fast while there is much redundancy (Zhu and Gupta 2017, arXiv 1710.01878).

    Example:
        >>> [allowed_params(1000, 200, t) for t in (0.0, 0.5, 1.0)]
        [1000, 300, 200]
    """
    left = (1 - min(max(elapsed, 0.0), 1.0)) ** 3
    return round(final + (initial - final) * left)


def least_worth(cores: Sequence[Tensor], variances: Sequence[Tensor]) -> tuple[float, int, int] | None:
    """Return worth, bond and index of the least valuable index of a train; None if no bond has two indices.

    Worth is the energy lost with the index, (λ over the largest of its bond)², per parameter saved.

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
