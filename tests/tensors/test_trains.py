"""Tensor trains against NumPy, TensorLy and hand-made tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.errors import RankError, TenfoldError, WeightError
from tenfold.tensors import mode_factors, trains

F64 = torch.float64
MODES = (3, 4, 2, 5)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def random_train(modes, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(c.double() for c in trains.tt_randn(modes, ranks, generator=generator))


def numpy_svd(tensor: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """TT-SVD in NumPy, word for word after Oseledets 2011, multiplied out again."""
    shape, cores, left = tensor.shape, [], 1
    rest = tensor
    for n, r in zip(shape[:-1], ranks, strict=True):
        u, s, vh = np.linalg.svd(rest.reshape(left * n, -1), full_matrices=False)
        cores.append(u[:, :r].reshape(left, n, r))
        rest, left = s[:r, None] * vh[:r], r
    dense = rest
    for core in reversed(cores):
        dense = np.tensordot(core, dense, axes=(-1, 0))
        dense = dense.reshape(core.shape[0], -1) if core.shape[0] > 1 else dense
        dense = dense.reshape(core.shape[0], *core.shape[1:-1], -1)
    return dense.reshape(shape)


def test_full_ranks_are_exact_and_batched():
    tensor = random_tensor(2, *MODES)
    cores = trains.tt_svd(tensor, batch_dims=1)
    assert trains.tt_ranks(cores) == trains.max_ranks(MODES) == (3, 10, 5)
    assert (trains.tt_to_dense(cores) - tensor).abs().max() <= 1e-14
    for i in range(2):
        alone = trains.tt_svd(tensor[i])
        torch.testing.assert_close(trains.tt_to_dense(alone), tensor[i], rtol=0, atol=1e-14)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 3, 2), (3, 6, 4)])
def test_svd_is_numpys_and_tensorlys(ranks):
    tensor = random_tensor(*MODES)
    cores = trains.tt_svd(tensor, ranks)
    assert trains.tt_ranks(cores) == ranks
    dense = trains.tt_to_dense(cores)
    np.testing.assert_allclose(dense, numpy_svd(tensor.numpy(), ranks), atol=1e-12)
    tl = pytest.importorskip("tensorly")
    theirs = tl.decomposition.tensor_train(tensor.numpy(), rank=[1, *ranks, 1])
    np.testing.assert_allclose(dense, tl.tt_to_tensor(theirs), atol=1e-12)
    shared = [torch.tensor(np.array(f)) for f in theirs]
    np.testing.assert_allclose(trains.tt_to_dense(tuple(shared)), tl.tt_to_tensor(theirs), atol=1e-13)


@pytest.mark.parametrize("eps", [0.6, 0.3, 0.05, 1e-12])
def test_eps_is_kept_by_all_of_a_batch(eps):
    tensor = random_tensor(3, *MODES) * torch.tensor([1.0, 1e-6, 1e6], dtype=F64).view(3, 1, 1, 1, 1)
    cores = trains.tt_svd(tensor, eps=eps, batch_dims=1)
    missed = (trains.tt_to_dense(cores) - tensor).flatten(1).norm(dim=1) / tensor.flatten(1).norm(dim=1)
    assert bool((missed <= eps + 1e-14).all())
    rounded = trains.tt_round(trains.tt_svd(tensor, batch_dims=1), eps=eps)
    missed = (trains.tt_to_dense(rounded) - tensor).flatten(1).norm(dim=1) / tensor.flatten(1).norm(dim=1)
    assert bool((missed <= eps + 1e-13).all())


def test_eps_finds_the_ranks_of_a_tensor_that_has_some():
    dense = trains.tt_to_dense(random_train((4, 4, 4, 4), (2, 5, 3)))
    assert trains.tt_ranks(trains.tt_svd(dense, eps=1e-10)) == (2, 5, 3)
    assert trains.tt_ranks(trains.tt_svd(dense, ranks=4, eps=1e-10)) == (2, 4, 3)


def test_ranks_that_a_tensor_cannot_use_are_zeros():
    tensor = random_tensor(2, 3, 4)
    for cores in (trains.tt_svd(tensor, (2, 9)), trains.tt_round(trains.tt_svd(tensor), (5, 4))):
        torch.testing.assert_close(trains.tt_to_dense(cores), tensor, rtol=0, atol=5e-14)
    assert trains.tt_ranks(trains.tt_svd(tensor, (2, 9))) == (2, 9)


def test_orthogonalize():
    cores = random_train(MODES, (3, 7, 4))
    dense = trains.tt_to_dense(cores)
    left, right = trains.left_orthogonalize(cores), trains.right_orthogonalize(cores)
    for core in left[:-1]:
        matrix = core.flatten(0, 1)
        torch.testing.assert_close(matrix.mT @ matrix, torch.eye(matrix.shape[1], dtype=F64))
    for core in right[1:]:
        matrix = core.flatten(1)
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(matrix.shape[0], dtype=F64))
    torch.testing.assert_close(trains.tt_to_dense(left), dense)
    torch.testing.assert_close(trains.tt_to_dense(right), dense)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (3, 5, 3)])
def test_round_is_the_svd_of_the_dense_tensor(ranks):
    cores = random_train(MODES, (3, 10, 5), seed=3)
    rounded = trains.tt_round(cores, ranks)
    wanted = trains.tt_svd(trains.tt_to_dense(cores), ranks)
    torch.testing.assert_close(trains.tt_to_dense(rounded), trains.tt_to_dense(wanted))
    assert trains.tt_ranks(rounded) == ranks


def test_dot_and_norm_batched():
    a = tuple(torch.stack(pair) for pair in zip(*(random_train(MODES, 3, seed) for seed in (1, 2)), strict=True))
    b = tuple(torch.stack(pair) for pair in zip(*(random_train(MODES, 2, seed) for seed in (3, 4)), strict=True))
    dense_a, dense_b = trains.tt_to_dense(a), trains.tt_to_dense(b)
    torch.testing.assert_close(trains.tt_dot(a, b), (dense_a * dense_b).flatten(1).sum(1))
    torch.testing.assert_close(trains.tt_norm(a), dense_a.flatten(1).norm(dim=1))


def test_balanced_cores_have_equal_norms():
    cores = random_train(MODES, 3)
    uneven = (cores[0] * 1e3, cores[1], cores[2] * 1e-5, cores[3])
    even = trains.tt_balance(uneven)
    torch.testing.assert_close(trains.tt_to_dense(even), trains.tt_to_dense(uneven))
    norms = torch.stack([c.norm() for c in even])
    torch.testing.assert_close(norms, norms.mean().expand(4))


def test_matrix_is_tensorlys():
    tl = pytest.importorskip("tensorly")
    matrix = random_tensor(24, 30)
    exact = trains.ttm_svd(matrix, (2, 3, 4), (5, 3, 2))
    assert [tuple(c.shape) for c in exact] == [(1, 2, 5, 10), (10, 3, 3, 8), (8, 4, 2, 1)]
    torch.testing.assert_close(trains.ttm_to_dense(exact), matrix)
    cut = trains.ttm_svd(matrix, (2, 3, 4), (5, 3, 2), ranks=(4, 3))
    wanted = tl.tt_matrix.tt_matrix_to_matrix([c.numpy() for c in cut])
    np.testing.assert_allclose(trains.ttm_to_dense(cut), wanted, atol=1e-13)
    batched = trains.ttm_svd(matrix[None].expand(2, 24, 30), (2, 3, 4), (5, 3, 2), ranks=(4, 3))
    torch.testing.assert_close(trains.ttm_to_dense(batched)[1], trains.ttm_to_dense(cut))


def test_pairs_of_modes_go_there_and_back():
    matrix = random_tensor(2, 24, 30)
    tensor = trains.paired(matrix, (2, 3, 4), (5, 3, 2))
    assert tensor[1, 1 * 5 + 3, 2 * 3 + 1, 3 * 2 + 1] == matrix[1, (1 * 3 + 2) * 4 + 3, (3 * 3 + 1) * 2 + 1]
    assert torch.equal(trains.unpaired(tensor, (2, 3, 4), (5, 3, 2)), matrix)
    with pytest.raises(WeightError, match="do not make a matrix of 24×30"):
        trains.paired(matrix, (2, 3, 5), (5, 3, 2))


def test_fit_ranks_is_the_largest_usable_train():
    assert trains.fit_ranks((4, 4, 4), 99) == trains.max_ranks((4, 4, 4)) == (4, 4)
    assert trains.fit_ranks((2, 2, 2, 9), (2, 4, 9)) == (2, 4, 8)
    assert trains.fit_ranks((9, 2, 2, 2), (9, 1, 9)) == (2, 1, 2)
    assert trains.fit_ranks((7,), 3) == trains.max_ranks((7,)) == ()
    with pytest.raises(RankError, match="3 modes has 2 ranks"):
        trains.fit_ranks((4, 4, 4), (2, 2, 2))


@pytest.mark.parametrize(("modes", "rank"), [((8, 9, 10), 4), ((4, 4, 4, 4, 6), 3)])
def test_random_trains_have_the_standard_deviation_that_was_asked_for(modes, rank):
    found = [trains.tt_to_dense(random_train(modes, (rank,) * (len(modes) - 1), seed)) for seed in range(200)]
    std = trains.tt_to_dense(trains.tt_randn(modes, rank, 0.05)).std()
    assert 0.01 < float(std) < 0.2
    assert float(torch.stack(found).square().mean().sqrt()) == pytest.approx(1.0, rel=0.05)


def test_modes_are_balanced_and_padded_where_that_pays():
    assert mode_factors(64, 3).modes == (4, 4, 4)
    assert mode_factors(96, 2, pad=False).modes == (8, 12)
    assert mode_factors(14, 3, pad=False).modes == (1, 2, 7)
    assert mode_factors(1, 2).modes == (1, 1)
    for n, order in ((25_000, 3), (17_200, 3), (50_257, 4), (1_000_003, 6), (30_522, 2), (11_000_000, 3)):
        modes, reason = mode_factors(n, order)
        exact = mode_factors(n, order, pad=False).modes
        assert np.prod(modes) >= n
        assert np.prod(exact) == n
        assert modes == exact or sum(modes) <= 0.95 * sum(exact)
        assert np.prod(modes) <= 1.25 * n, reason
    with pytest.raises(TenfoldError, match="at least 1"):
        mode_factors(0, 2)
