"""Rows of a matrix that all others are moderate mixes of: the choice behind interpolative decompositions."""

from __future__ import annotations

import torch
from torch import Tensor

_GAIN = 2.0  # of volume, below which rows are not exchanged: every exchange solves for the mixes again


def dominant_rows(basis: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """Return an order of the rows of matrices of full column rank, and the others as mixes of the first ones.

    The rows that span the most volume are chosen one after the other, as in QR with pivoting; then rows are exchanged
    while the volume of the chosen ones doubles (maxvol: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov & Zamarashkin
    2010). So no entry of the mixes is larger than 2, and their norm at most 2·√(r·(n−r)). Blocks of rows that stay
    together are chosen likewise, by the volume of each block; that bounds the determinants of their mixes by 2, and
    entries are a few units in practice.

    Args:
        basis: (batch, n, r) with r < n, best with orthonormal columns.
        block: how many rows stay together; divides n and r.

    Returns:
        The order (batch, n/block) of the blocks, the chosen ones first, both parts ascending; and the mixes T
        (batch, n−r, r) with ``others = T @ chosen``.

    Example:
        >>> basis = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]])
        >>> order, mixes = dominant_rows(basis)
        >>> bool((basis[0, order[0, 2:]] == mixes[0] @ basis[0, order[0, :2]]).all())
        True
    """
    found = [_dominant(matrix, block) for matrix in basis]
    return torch.stack([order for order, _ in found]), torch.stack([mixes for _, mixes in found])


def _dominant(matrix: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = matrix.unflatten(0, (-1, block))
    chosen = _of_most_volume(blocks)
    while True:
        chosen.sort()
        others = sorted({*range(len(blocks))}.difference(chosen))
        mixes = torch.linalg.solve(blocks[chosen].flatten(0, 1), blocks[others].flatten(0, 1), left=False)
        gains = _volumes(mixes.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2))
        place = int(gains.argmax())
        if not float(gains.flatten()[place]) > _GAIN:
            return torch.tensor(chosen + others, device=matrix.device), mixes
        row, column = divmod(place, len(chosen))
        chosen[column] = others[row]


def _of_most_volume(blocks: Tensor) -> list[int]:
    """Return which blocks (count, b, r), r/b of them, have the most volume beside those that were chosen before."""
    matrix = blocks.flatten(0, 1)
    rank = matrix.shape[1]
    left = blocks @ blocks.mT
    basis = matrix.new_zeros(0, rank)
    chosen: list[int] = []
    for _ in range(rank // blocks.shape[1]):
        volumes = _volumes(left)
        volumes[chosen] = -1.0
        chosen.append(int(volumes.argmax()))
        own = blocks[chosen[-1]]
        for _ in range(2):  # once more, for what rounding has left
            own = torch.linalg.qr((own - own @ basis.mT @ basis).mT).Q.mT
        basis = torch.cat([basis, own])
        seen = (matrix @ own.mT).view_as(left)
        left = left - seen @ seen.mT
    return chosen


def _volumes(squares: Tensor) -> Tensor:
    """Return the absolute determinants of matrices (..., b, b)."""
    return (squares[..., 0, 0] if squares.shape[-1] == 1 else torch.linalg.det(squares)).abs()
