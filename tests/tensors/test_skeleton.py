"""Dominant rows: a bound that elimination alone misses, and an exact account of all other rows."""

from __future__ import annotations

import torch

from tenfold.tensors import dominant_rows


def kahan(rank: int, sine: float = 0.3) -> torch.Tensor:
    """Return a badly conditioned matrix whose columns QR with pivoting leaves as they are (Kahan 1966)."""
    cosine = (1 - sine**2) ** 0.5
    upper = torch.eye(rank, dtype=torch.float64) - cosine * torch.ones(rank, rank, dtype=torch.float64).triu(1)
    return sine ** torch.arange(rank, dtype=torch.float64)[:, None] * upper


def test_rows_are_exchanged_where_pivoting_chooses_badly() -> None:
    matrix = kahan(14)[:13].mT.contiguous()  # (14, 13): pivoting takes the first 13 rows
    first = torch.linalg.solve(matrix[:13], matrix[13:], left=False)
    assert float(first.abs().max()) > 100
    order, mixes = dominant_rows(matrix[None])
    assert float(mixes.abs().max()) <= 2
    torch.testing.assert_close(mixes[0] @ matrix[order[0, :13]], matrix[order[0, 13:]])


def test_blocks_stay_together_and_their_mixes_are_moderate() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 96, 40, generator=generator, dtype=torch.float64)).Q
    order, mixes = dominant_rows(basis, 8)
    assert order.shape == (2, 12)
    for matrix, places, mix in zip(basis, order, mixes, strict=True):
        blocks = matrix.view(12, 8, 40)
        torch.testing.assert_close(mix @ blocks[places[:5]].flatten(0, 1), blocks[places[5:]].flatten(0, 1))
        cells = mix.view(7, 8, 5, 8).transpose(1, 2)
        assert float(torch.linalg.det(cells).abs().max()) <= 2
    assert float(mixes.abs().max()) < 10


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
