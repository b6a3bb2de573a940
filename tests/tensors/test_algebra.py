"""Primitives against NumPy and TensorLy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold import tensors
from tenfold.tensors import algebra

F64 = torch.float64


@pytest.mark.parametrize("mode", range(4))
def test_unfold_fold_and_mode_product_are_tensorlys(mode):
    tl = pytest.importorskip("tensorly")
    x = torch.randn(3, 4, 5, 2, dtype=F64)
    matrix = torch.randn(6, x.shape[mode], dtype=F64)
    assert np.array_equal(tensors.unfold(x, mode).numpy(), tl.base.unfold(x.numpy(), mode))
    assert torch.equal(tensors.fold(tensors.unfold(x, mode), mode, tuple(x.shape)), x)
    wanted = tl.tenalg.mode_dot(x.numpy(), matrix.numpy(), mode)
    np.testing.assert_allclose(tensors.mode_product(x, matrix, mode).numpy(), wanted, rtol=1e-12)


def test_khatri_rao_is_tensorlys_and_batched():
    tl = pytest.importorskip("tensorly")
    a, b = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 5, 4, dtype=F64)
    for i in range(2):
        wanted = tl.tenalg.khatri_rao([a[i].numpy(), b[i].numpy()])
        np.testing.assert_allclose(tensors.khatri_rao(a, b)[i].numpy(), wanted)


def test_rel_error():
    target = torch.tensor([3.0, 4.0])
    assert tensors.rel_error(torch.zeros(2), target) == 1.0
    assert tensors.rel_error(target, target) == 0.0
    assert tensors.rel_error(target, torch.zeros(2)) == 5.0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (2, 5, 9), (2, 3, 9, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_singular_values_are_numpys(shape, scale):
    a = torch.randn(shape, dtype=F64)
    found = tensors.singular_values(a * scale) / scale
    np.testing.assert_allclose(found.numpy(), np.linalg.svd(a.numpy(), compute_uv=False), rtol=1e-10)


def test_singular_values_of_zero_and_of_low_rank():
    assert torch.equal(tensors.singular_values(torch.zeros(3, 4)), torch.zeros(3, dtype=F64))
    low = torch.randn(8, 2, dtype=F64) @ torch.randn(2, 9, dtype=F64)
    assert float(tensors.singular_values(low)[2:].max()) < 1e-6 * float(tensors.singular_values(low)[0])


@pytest.mark.parametrize("method", ["auto", "full", "gram", "randomized"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 12, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_truncated_svd_attains_the_eckart_young_optimum(method, shape, dtype):
    a = (torch.randn(shape, dtype=F64) * 0.8 ** torch.arange(shape[-1])).to(dtype)
    rank = 5
    u, s, vh, named = tensors.truncated_svd(a, rank, method=method)
    assert method in (named, "auto")
    assert u.dtype == s.dtype == vh.dtype == dtype
    assert (u.shape[-1], s.shape[-1], vh.shape[-2]) == (rank, rank, rank)
    values = np.linalg.svd(a.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(s.double().numpy(), values[..., :rank], rtol=1e-4)
    missed = ((u * s.unsqueeze(-2)) @ vh - a).double().square().sum((-2, -1)).numpy()
    np.testing.assert_allclose(missed, (values[..., rank:] ** 2).sum(-1), rtol=1e-3)
    eye = torch.eye(rank, dtype=dtype).expand(*shape[:-2], rank, rank)
    torch.testing.assert_close(u.mT @ u, eye, atol=1e-5, rtol=0)


def test_randomized_svd_is_seeded_and_leaves_torchs_generator_alone():
    a = torch.randn(40, 60)
    state = torch.get_rng_state()
    one, two = (tensors.truncated_svd(a, 4, method="randomized", seed=3) for _ in range(2))
    assert torch.equal(one.u, two.u)
    assert torch.equal(torch.get_rng_state(), state)
    other = tensors.truncated_svd(a, 4, method="randomized", seed=4)
    assert not torch.equal(one.u, other.u)


def test_auto_takes_the_randomized_method_for_few_triplets_of_large_matrices():
    assert algebra._choose(4096, 100, torch.float32) == "randomized"
    assert algebra._choose(4096, 2000, torch.float32) == "gram"
    assert algebra._choose(64, 8, torch.float32) == "gram"
    assert algebra._choose(64, 8, torch.float64) == "full"


def test_svd_of_zero_is_zero_and_finite():
    for method in ("full", "gram", "randomized"):
        u, s, vh, _ = tensors.truncated_svd(torch.zeros(6, 9), 3, method=method)
        assert torch.isfinite(u).all()
        assert torch.isfinite(vh).all()
        assert not s.any()


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (2, 128, 128), (3, 129, 129), (2, 2, 300, 300)])
def test_symmetrize_is_the_mean_with_the_transpose_to_the_last_bit(shape: tuple[int, ...]) -> None:
    square = torch.randn(shape, dtype=torch.float64)
    expected = (square + square.mT) / 2
    assert tensors.symmetrize_(square) is square
    assert torch.equal(square, expected)
    assert torch.equal(square, square.mT)
