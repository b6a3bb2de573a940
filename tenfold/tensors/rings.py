"""Tensor rings: a train whose two ends are joined by a bond, so that an entry is the trace of a product of slices.

A ring is a tuple of cores (..., r, n, r'): the right rank of the last is the left rank of the first. The ranks are
those of the bond on the left of each core, so that the first is that of the bond which closes the ring. With a first
rank of 1 a ring is a train. Leading axes are a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import RankError
from tenfold.tensors.algebra import truncated_svd
from tenfold.tensors.trains import tt_balance

Cores = tuple[Tensor, ...]


def tr_ranks(cores: Cores) -> tuple[int, ...]:
    """Return the rank of the bond on the left of each core."""
    return tuple(core.shape[-3] for core in cores)


def fit_ring_ranks(modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the largest ranks ≤ ``ranks`` that a ring can use: r ≤ r'·n on both sides of every core.

    A core is a matrix (r, n·r') as well: of rank r'·n at most, so that a larger r only repeats itself.

    Raises:
        RankError: not one positive rank for each mode.

    Example:
        >>> fit_ring_ranks((8, 9, 6), (2, 8, 4)), fit_ring_ranks((2, 3, 9), (1, 8, 5))
        ((2, 8, 4), (1, 2, 5))
    """
    found = list(ranks)
    if len(found) != len(modes) or min(found) < 1:
        msg = f"a ring of {len(modes)} modes has {len(modes)} ranks ≥ 1, not {tuple(ranks)}"
        raise RankError(msg)
    last: list[int] = []
    while found != last:
        last = list(found)
        for k, n in enumerate(modes):
            after = (k + 1) % len(found)
            found[k] = min(found[k], n * found[after])
            found[after] = min(found[after], n * found[k])
    return tuple(found)


def tr_to_dense(cores: Cores) -> Tensor:
    """Return the tensor (*batch, n₁, ..., n_d) that the cores stand for.

    Example:
        >>> core = torch.eye(2)[:, None, :].double()  # (2, 1, 2): the trace of a product of identities
        >>> tr_to_dense((core, core, core)).item()
        2.0
    """
    *first, last = cores
    modes = [core.shape[-2] for core in cores]
    batch = last.shape[:-3]
    if not first:
        dense: Tensor = last.diagonal(dim1=-3, dim2=-1).sum(-1)
        return dense
    chain = tr_chain(tuple(first))  # (..., r₁, ∏n, r_d)
    flat = chain.transpose(-3, -2).flatten(-2) @ last.permute(*range(len(batch)), -1, -3, -2).flatten(-3, -2)
    return flat.reshape(*batch, *modes)


def tr_chain(cores: Cores) -> Tensor:
    """Return what neighbouring cores multiply to: one core (..., r, ∏n, r')."""
    found, *others = cores
    for core in others:
        found = (found.flatten(-3, -2) @ core.flatten(-2)).unflatten(-2, found.shape[-3:-1])
        found = found.unflatten(-1, (core.shape[-2], core.shape[-1])).flatten(-3, -2)
    return found


def tr_svd(tensor: Tensor, ranks: Sequence[int], *, batch_dims: int = 0) -> Cores:
    """Return a ring near ``tensor`` by one truncated SVD for each bond: TR-SVD.

    The first SVD keeps r₁·r₂ values, whose vectors are split between the two bonds of the first core; from there on it
    is TT-SVD with the closing bond carried along. Unlike with trains this is not quasi-optimal: the basis in which the
    first SVD is split is not the one that the other cores would like, so that a tensor that is such a ring is not found
    again, unless r₁ is 1. Zhao, Zhou, Xie, Zhang & Cichocki 2016, arXiv 1606.05535, algorithm 1 at given ranks.

    Args:
        tensor: (*batch, n₁, ..., n_d), d ≥ 2, float32 or float64.
        ranks: r₁ to r_d, of the bond on the left of each core. What the tensor cannot use is zeros.
        batch_dims: how many leading axes are the batch.

    Raises:
        RankError: not one positive rank for each mode.

    Example:
        >>> line = torch.arange(60.0, dtype=torch.float64).reshape(3, 4, 5)
        >>> cores = tr_svd(line, (1, 2, 2))
        >>> torch.allclose(tr_to_dense(cores), line)
        True
    """
    batch, modes = tensor.shape[:batch_dims], tensor.shape[batch_dims:]
    if len(ranks) != len(modes) or min(ranks) < 1 or len(modes) < 2:
        msg = f"a ring of {len(modes)} modes has {len(modes)} ranks ≥ 1 and at least two modes, not {tuple(ranks)}"
        raise RankError(msg)
    closing, second = ranks[0], ranks[1]
    frame, rest = _cut(tensor.reshape(*batch, modes[0], -1), closing * second)
    cores = [frame.unflatten(-1, (closing, second)).transpose(-3, -2)]
    rest = rest.unflatten(-2, (closing, second)).movedim(-3, -1)  # (..., r₂, n₂⋯n_d, r₁)
    for k in range(1, len(modes) - 1):
        frame, rest = _cut(rest.reshape(*batch, ranks[k] * modes[k], -1), ranks[k + 1])
        cores.append(frame.reshape(*batch, ranks[k], modes[k], ranks[k + 1]))
    cores.append(rest.reshape(*batch, ranks[-1], modes[-1], closing))
    return tuple(cores)


def tr_rotate(cores: Cores, by: int) -> Cores:
    """Return the ring that starts with core ``by``: of a tensor whose modes are rotated likewise."""
    by %= len(cores)
    return (*cores[by:], *cores[:by])


def tr_balance(cores: Cores) -> Cores:
    """Return the same ring with cores of equal norms, which gradients and weight decay then treat alike."""
    return tt_balance(cores)


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns (..., m, rank) and the rest (..., rank, n), zeros where the matrix has less."""
    found = truncated_svd(matrix, min(rank, *matrix.shape[-2:]))
    missing = rank - found.s.shape[-1]
    rest = found.s[..., None] * found.vh
    return torch.nn.functional.pad(found.u, (0, missing)), torch.nn.functional.pad(rest, (0, 0, 0, missing))
