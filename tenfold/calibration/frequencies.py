"""Frequencies of embedding rows: the second moment of one-hot inputs, which is diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.decompositions import Moments, Sketch


def id_counts(ids: Tensor, rows: int, counts: Tensor | None = None) -> Tensor:
    """Count how often each id below ``rows`` occurs (rows,), in float64, on top of earlier ``counts``.

    Example:
        >>> id_counts(torch.tensor([[0, 2], [2, 2]]), 4).tolist()
        [1.0, 0.0, 3.0, 0.0]
    """
    own = torch.bincount(ids.flatten().long(), minlength=rows).double()
    return own if counts is None else counts + own


def frequencies(counts: Tensor) -> Tensor:
    """Return the probabilities (n,) of ids with these counts (n,), smoothed for ids that were never seen.

    All unseen ids together get the weight of all ids seen once (Good 1953, Biometrika 40: the probability that the next
    id is a new one), or of one such id if there is none; it is spread evenly, each at most half an id seen once.

    Example:
        >>> (18 * frequencies(torch.tensor([6.0, 1.0, 1.0, 0.0, 0.0]))).tolist()
        [12.0, 2.0, 2.0, 1.0, 1.0]
    """
    unseen = counts == 0
    once = (counts == 1).sum().clamp_min(1).to(counts)
    each = (once / unseen.sum().clamp_min(1)).clamp_max(0.5)
    smooth = torch.where(unseen, each, counts)
    return smooth / smooth.sum()


def moments_of_ids(counts: Tensor) -> Moments:
    """Return the moments of the one-hot inputs of an embedding: a diagonal (1, n, n), of which only n are stored.

    They are uncentered, because an embedding has no bias to absorb a shift of the mean.

    Args:
        counts: how often each id was seen (n,), as ``id_counts`` returns it.

    Example:
        >>> moments_of_ids(torch.tensor([2.0, 1.0, 1.0])).covariance().diagonal().tolist()
        [[0.5, 0.25, 0.25]]
    """
    rest = frequencies(counts)[None]
    empty = rest.new_zeros(1, 0, rest.shape[1])
    return Moments(Sketch(empty, rest, rest.new_zeros(1, 0)), torch.zeros_like(rest), int(counts.sum()))
