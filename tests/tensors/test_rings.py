"""Tensor rings against NumPy and TensorLy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_ring
from tensorly.tr_tensor import tr_to_tensor

from tenfold.errors import RankError
from tenfold.tensors import rings, trains

F64 = torch.float64
MODES = (6, 5, 4, 3)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def random_ring(modes, ranks, *batch):
    sides = (*ranks, ranks[0])
    return tuple(random_tensor(*batch, sides[k], n, sides[k + 1], seed=k) for k, n in enumerate(modes))


def test_an_entry_is_the_trace_of_the_product_of_its_slices():
    cores = random_ring(MODES, (2, 3, 4, 2))
    found = rings.tr_to_dense(cores)
    place = (5, 0, 3, 2)
    product = np.linalg.multi_dot([core.numpy()[:, n] for core, n in zip(cores, place, strict=True)])
    assert float(found[place]) == pytest.approx(np.trace(product))
    wanted = np.einsum("aib,bjc,ckd,dla->ijkl", *(core.numpy() for core in cores))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)
    batch = random_ring(MODES, (2, 3, 4, 2), 3)
    alone = rings.tr_to_dense(tuple(core[1] for core in batch))
    torch.testing.assert_close(rings.tr_to_dense(batch)[1], alone)


def test_a_ring_may_begin_at_any_core_and_neighbours_may_be_one():
    cores = random_ring(MODES, (2, 3, 4, 2))
    turned = rings.tr_to_dense(rings.tr_rotate(cores, 1))
    torch.testing.assert_close(turned, rings.tr_to_dense(cores).permute(1, 2, 3, 0))
    joined = (rings.tr_chain(cores[:2]), *cores[2:])
    torch.testing.assert_close(rings.tr_to_dense(joined).flatten(), rings.tr_to_dense(cores).flatten())
    torch.testing.assert_close(rings.tr_to_dense(rings.tr_balance(cores)), rings.tr_to_dense(cores))


@pytest.mark.parametrize("ranks", [(2, 3, 4, 3), (3, 2, 2, 2), (1, 6, 5, 3), (2, 2, 3, 2)])
def test_tr_svd_is_that_of_tensorly_but_for_signs(ranks):
    tensor = random_tensor(*MODES)
    mine = float((rings.tr_to_dense(rings.tr_svd(tensor, ranks)) - tensor).norm())
    with tensorly.backend_context("numpy"):
        theirs = np.linalg.norm(tr_to_tensor(tensor_ring(tensor.numpy(), [*ranks, ranks[0]])) - tensor.numpy())
    # The signs of singular vectors are arbitrary, and matter once the vectors are split between two bonds.
    assert mine == pytest.approx(theirs, rel=1e-9 if ranks[0] == 1 else 0.02)


def test_where_only_the_first_svd_drops_anything_the_error_is_its_tail():
    tensor = random_tensor(*MODES)
    values = np.linalg.svd(tensor.numpy().reshape(6, -1), compute_uv=False)
    found = rings.tr_to_dense(rings.tr_svd(tensor, (2, 2, 10, 6)))
    assert float((found - tensor).square().sum()) == pytest.approx((values[4:] ** 2).sum())


def test_a_train_is_a_ring_closed_by_a_bond_of_one():
    tensor = random_tensor(2, *MODES)
    ring = rings.tr_to_dense(rings.tr_svd(tensor, (1, 4, 6, 2), batch_dims=1))
    train = trains.tt_to_dense(trains.tt_svd(tensor, (4, 6, 2), batch_dims=1))
    torch.testing.assert_close(ring, train)
    exact = rings.tr_svd(tensor, (2, 3, 15, 6), batch_dims=1)  # nothing is dropped
    torch.testing.assert_close(rings.tr_to_dense(exact), tensor)


def test_what_a_tensor_cannot_use_is_zeros():
    tensor = random_tensor(2, 3, 4)
    cores = rings.tr_svd(tensor, (3, 4, 5))
    assert [tuple(core.shape) for core in cores] == [(3, 2, 4), (4, 3, 5), (5, 4, 3)]
    assert bool(torch.isfinite(rings.tr_to_dense(cores)).all())


def test_ranks_that_no_core_can_use_are_lowered():
    ranks = rings.fit_ring_ranks((4, 3, 5), (2, 50, 50))
    assert ranks == (2, 8, 10)  # at most 4·2 beside the first core, 5·2 beside the last
    full = rings.tr_to_dense(random_ring((4, 3, 5), (2, 50, 50)))
    left = full.reshape(4, 15)
    assert torch.linalg.matrix_rank(left) <= 4
    for wrong in ((2, 2), (0, 1, 1)):
        with pytest.raises(RankError, match="a ring of 3 modes has 3 ranks"):
            rings.fit_ring_ranks((4, 3, 5), wrong)
    with pytest.raises(RankError, match="at least two modes"):
        rings.tr_svd(random_tensor(4), (1,))
