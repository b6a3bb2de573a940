"""Dominant rows: a bound that elimination alone misses, and an exact account of all other rows."""

from __future__ import annotations

import torch

from tenfold.tensors import dominant_rows


def growing(rank: int) -> torch.Tensor:
    """Return a matrix (rank + 1, rank) of which elimination with row pivoting takes the first rows.

    Below ones on the diagonal all entries are −1 (Wilkinson's example), so that the last row is a mix of the others
    with numbers up to 2^(rank − 1).
    """
    lower = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    return torch.cat([lower, -torch.ones(1, rank, dtype=torch.float64)])


def test_rows_are_exchanged_where_elimination_chooses_badly() -> None:
    matrix = growing(12)
    first = torch.linalg.solve(matrix[:12], matrix[12:], left=False)
    assert float(first.abs().max()) == 2**11
    order, mixes = dominant_rows(matrix[None])
    assert float(mixes.abs().max()) <= 2
    torch.testing.assert_close(mixes[0] @ matrix[order[0, :12]], matrix[order[0, 12:]])


def test_each_matrix_of_a_batch_has_its_own_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 40, 15, generator=generator, dtype=torch.float64)).Q
    order, mixes = dominant_rows(basis)
    for matrix, places, mix in zip(basis, order, mixes, strict=True):
        assert sorted(places.tolist()) == list(range(40))
        assert places[:15].tolist() == sorted(places[:15].tolist())
        torch.testing.assert_close(mix @ matrix[places[:15]], matrix[places[15:]])
    assert float(mixes.abs().max()) <= 2
    assert len({tuple(places[:15].tolist()) for places in order}) == 3


def test_a_row_of_zeros_is_never_chosen() -> None:
    basis = torch.zeros(1, 6, 2)
    basis[0, 2, 0] = basis[0, 4, 1] = 1.0
    order, mixes = dominant_rows(basis)
    assert order[0, :2].tolist() == [2, 4]
    assert not mixes.any()
