"""Norms of gradients within bounds, so that a few odd positions do not say alone what matters."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(rows: Tensor, samples: int, most: float) -> Tensor:
    """Return gradients whose norms at the positions of a sample lie within mean/most and mean·most.

    Of language models a few tokens (the first of a sequence, separators) have gradients that are orders of magnitude
    larger than those of all others, and then the sum of squares is theirs alone (LEMS 2026 bounds by 10). Positions
    without any gradient, such as padding, stay so and count for no mean.

    Args:
        rows: (groups, out/groups, first axis, other positions), as of ``channels_first``.
        samples: in the first axis, which other positions may be folded into.
        most: at least 1.

    Example:
        >>> rows = torch.tensor([1.0, 1.0, 1.0, 97.0], dtype=torch.float64)[None, None, None]
        >>> clipped(rows, 1, 2.0).flatten().round(decimals=4).tolist()
        [12.5, 12.5, 12.5, 50.0]
    """
    groups, width, first, _ = rows.shape
    each = samples if first % samples == 0 else first
    apart = rows.reshape(groups, width, each, -1)
    norms = torch.linalg.vector_norm(apart, dim=(0, 1), keepdim=True)
    there = (norms > 0).sum(-1, keepdim=True).clamp_min(1)
    mean = norms.sum(-1, keepdim=True) / there
    scale = torch.where(norms > 0, norms.clamp(min=mean / most, max=mean * most) / norms, 1.0)
    return (apart * scale).view_as(rows)
