"""Kruskal tensors against TensorLy, Monte Carlo and the closed forms of their papers."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from tenfold.tensors import kruskal

F64 = torch.float64
SHAPES = [(6, 5), (6, 5, 4), (3, 4, 2, 5)]


def _factors(shape, rank=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, rank, generator=generator, dtype=F64) for n in shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_gram_and_mttkrp_are_tensorlys(shape):
    tl = pytest.importorskip("tensorly")
    from tensorly.tenalg import unfolding_dot_khatri_rao

    factors = _factors(shape)
    dense = kruskal.to_tensor(factors)
    other = torch.randn(2, *shape, dtype=F64)
    for i in range(2):
        own = (None, [f[i].numpy() for f in factors])
        np.testing.assert_allclose(dense[i].numpy(), tl.cp_to_tensor(own), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(float(kruskal.norm(factors)[i]), tl.cp_tensor.cp_norm(own), rtol=1e-10)
        for mode in range(len(shape)):
            wanted = unfolding_dot_khatri_rao(other[i].numpy(), own, mode)
            np.testing.assert_allclose(kruskal.mttkrp(other, factors, mode)[i].numpy(), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_component_norms_are_those_of_the_terms(shape):
    factors = _factors(shape)
    terms = [kruskal.to_tensor([f[..., r : r + 1] for f in factors]).flatten(1).norm(dim=1) for r in range(3)]
    torch.testing.assert_close(kruskal.component_norms(factors), torch.stack(terms, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_product_holds_the_inner_products_of_the_terms(shape):
    factors = _factors(shape)
    terms = torch.stack([kruskal.to_tensor([f[..., r : r + 1] for f in factors]).flatten(1) for r in range(3)], 1)
    torch.testing.assert_close(kruskal.gram_product(factors), terms @ terms.mT)
    without = kruskal.gram_product(factors, skip=1) * (factors[1].mT @ factors[1])
    torch.testing.assert_close(without, kruskal.gram_product(factors))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sensitivity_is_what_noise_does(shape):
    factors = _factors(shape, rank=4, batch=1)
    noise, draws = 1e-4, 4000
    generator = torch.Generator().manual_seed(1)
    moved = [f + noise * torch.randn(draws, *f.shape[1:], generator=generator, dtype=F64) for f in factors]
    change = (kruskal.to_tensor(moved) - kruskal.to_tensor(factors)).flatten(1).square().sum(1).mean() / noise**2
    assert abs(float(change / kruskal.sensitivity(factors)) - 1) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_balance_changes_no_tensor_and_attains_the_least_sensitivity(shape):
    factors = _factors(shape)
    found = kruskal.balance(factors)
    torch.testing.assert_close(kruskal.to_tensor(found), kruskal.to_tensor(factors))
    order, volume = len(shape), prod(shape)
    norms = kruskal.component_norms(factors)
    wanted = order * volume ** (1 / order) * norms.pow(2 * (order - 1) / order).sum(-1)
    torch.testing.assert_close(kruskal.sensitivity(found), wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(kruskal.least_sensitivity(factors), wanted, rtol=1e-13, atol=0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):  # no other scaling of the columns is less sensitive
        tilt = torch.randn(order, 2, 1, 3, generator=generator, dtype=F64) * 0.3
        tilted = [f * t.exp() for f, t in zip(found, tilt - tilt.mean(0), strict=True)]
        assert bool((kruskal.sensitivity(tilted) >= kruskal.sensitivity(found)).all())


def test_equalize_changes_no_tensor_and_levels_the_norms():
    factors = _factors((6, 5, 4))
    found = kruskal.equalize(factors)
    torch.testing.assert_close(kruskal.to_tensor(found), kruskal.to_tensor(factors))
    norms = kruskal.column_norms(found)
    torch.testing.assert_close(norms, norms[:, :1].expand_as(norms))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_survives_extreme_columns_and_zero_terms(scale):
    factors = [f.float() for f in _factors((6, 5, 4))]
    factors[0] *= scale
    factors[1][..., 0] = 0.0
    for found in (kruskal.balance(factors), kruskal.equalize(factors)):
        assert all(bool(torch.isfinite(f).all()) for f in found)
        assert not any(f[..., 0].any() for f in found)
        wanted, seen = kruskal.to_tensor(factors).double(), kruskal.to_tensor([f.double() for f in found])
        torch.testing.assert_close(seen / scale, wanted / scale, rtol=1e-4, atol=1e-5)


def test_cancelling_terms_show():
    """x∘x∘y + … as a difference of two near rank-1 terms (border rank 2): the closer, the larger both."""
    x, y = torch.eye(4, dtype=F64)[:2]
    for n in (1.0, 10.0, 100.0):
        factor = torch.stack([x + y / n, x], 1)[None]
        factors = [factor, factor, factor * torch.tensor([n, -n], dtype=F64)]
        lam = kruskal.component_norms(factors)
        torch.testing.assert_close(
            kruskal.cancellation(factors), lam.norm(dim=1) / kruskal.to_tensor(factors).flatten(1).norm(dim=1)
        )
        angle = (1 + 1 / n**2) ** -1.5  # the cosine between both terms
        wanted = ((1 + angle) / (1 - angle)) ** 0.5
        assert float(kruskal.condition(factors)) == pytest.approx(wanted, rel=1e-6)
    assert float(kruskal.cancellation(factors)) > 50


def test_orthogonal_dependent_and_zero_terms():
    eye = torch.eye(3, dtype=F64)[None]
    assert float(kruskal.condition([eye, eye, eye])) == 1.0
    assert float(kruskal.cancellation([eye, eye, eye])) == pytest.approx(1.0)
    twice = eye[..., [0, 0, 1]]
    assert float(kruskal.condition([twice, twice])) == float("inf")
    zero = torch.zeros_like(eye)
    assert float(kruskal.cancellation([zero, eye])) == 0.0
    assert float(kruskal.condition([zero, eye])) == 1.0


def test_stability_is_free_of_scale_and_takes_a_batch_as_one():
    factors = _factors((6, 5, 4))
    found, scaled = kruskal.stability(factors), kruskal.stability([f * 10 for f in factors[:1]] + factors[1:])
    assert found.largest_term == pytest.approx(scaled.largest_term)
    assert found.cancellation == pytest.approx(scaled.cancellation)
    whole = kruskal.to_tensor(factors).square().sum()
    assert found.sensitivity == pytest.approx(float(kruskal.sensitivity(factors).sum() / whole))
    assert "sensitivity" in str(found)
    zero = kruskal.stability([torch.zeros(1, 3, 2)] * 3)
    assert zero == kruskal.Stability(0.0, 0.0, 0.0, 1.0)
