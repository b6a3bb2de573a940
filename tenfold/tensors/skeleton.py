"""Rows of a matrix that all others are moderate mixes of: the choice behind interpolative decompositions."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 2.0  # entry of the mixes: larger bounds take fewer exchanges, smaller ones are better conditioned


def dominant_rows(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return an order of the rows of matrices of full column rank, and the others as mixes of the first ones.

    Elimination with row pivoting makes a first choice, and rows are exchanged while the submatrix gains a factor of two
    in volume (maxvol: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov & Zamarashkin 2010). So no entry of the mixes is
    larger than 2: the mixes are well conditioned, and what they add up to has a norm of at most √(1 + 4·r·(n−r)) of it.

    Args:
        basis: (batch, n, r) with r < n, best with orthonormal columns.

    Returns:
        The order (batch, n) of the rows, the r chosen ones first, both parts ascending; and the mixes T (batch, n−r, r)
        with ``others = T @ chosen``.

    Example:
        >>> basis = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]])
        >>> order, mixes = dominant_rows(basis)
        >>> bool((basis[0, order[0, 2:]] == mixes[0] @ basis[0, order[0, :2]]).all())
        True
    """
    found = [_dominant(matrix) for matrix in basis]
    return torch.stack([order for order, _ in found]), torch.stack([mixes for _, mixes in found])


def _dominant(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rank = matrix.shape[1]
    order = list(range(len(matrix)))
    for row, pivot in enumerate(torch.linalg.lu_factor(matrix).pivots.tolist()):
        order[row], order[pivot - 1] = order[pivot - 1], order[row]
    while True:
        order = sorted(order[:rank]) + sorted(order[rank:])
        places = torch.tensor(order, device=matrix.device)
        mixes = torch.linalg.solve(matrix[places[:rank]], matrix[places[rank:]], left=False)
        if not _exchange(order, mixes.clone(), rank):
            return places, mixes


def _exchange(order: list[int], mixes: Tensor, rank: int) -> bool:
    """Exchange rows while a mix has a large entry, in place; return whether any were.

    Each exchange changes the mixes by a matrix of rank one. Its rounding errors add up, so that after some the mixes
    are to be solved for again.
    """
    for count in range(rank):
        largest = int(mixes.abs().argmax())
        row, column = divmod(largest, rank)
        pivot = mixes[row, column].clone()
        if not float(pivot.abs()) > _LARGEST:
            return count > 0
        order[column], order[rank + row] = order[rank + row], order[column]
        step = mixes[row].clone()
        step[column] -= 1
        ratio = mixes[:, column] / pivot
        ratio[row] = 0
        mixes.addr_(ratio, step, alpha=-1)
        mixes[row] = -step / pivot
        mixes[row, column] += 1
    return True
