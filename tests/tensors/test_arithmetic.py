"""Tenfold's own numbers do not depend on what surrounds the caller."""

from __future__ import annotations

import pytest
import torch

from tenfold.tensors import normal_tensors, plain_arithmetic, squarable, untransformed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_exact_under_autocast_and_autocast_goes_on_afterwards(dtype):
    x = torch.full((2, 2), 1.001)
    with torch.autocast("cpu", dtype):
        with plain_arithmetic():
            own = x @ x
        after = x @ x
    assert torch.equal(own, x @ x)
    assert after.dtype == dtype


def test_results_are_normal_tensors_without_graphs():
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.inference_mode(), plain_arithmetic():
        inside = weight @ weight
    with torch.enable_grad(), plain_arithmetic():
        graph = weight @ weight
    assert not inside.is_inference()
    assert not inside.requires_grad
    assert not graph.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_leaving_inference_mode_turns_no_gradients_on(grad):
    with torch.set_grad_enabled(grad), normal_tensors():
        assert torch.is_grad_enabled() is grad
    with torch.inference_mode(), normal_tensors():
        assert not torch.is_grad_enabled()
        assert not torch.ones(1).is_inference()


def test_numbers_within_transforms_are_those_of_all_samples():
    x, seen = torch.randn(5, 3), []

    @plain_arithmetic()
    def note(v):
        rows = untransformed(v)
        seen.append(float((rows @ rows.mT).sum()))

    def inner(v):
        note(v)
        return v.sum()

    torch.func.vmap(inner)(x)
    torch.func.vmap(inner, in_dims=1)(x.t().contiguous())
    torch.func.vmap(torch.func.grad(inner))(x)
    torch.func.grad(lambda v: torch.func.vmap(inner)(v).sum())(x)
    assert seen == pytest.approx([float((x @ x.mT).sum())] * 4)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10, 1e25])
def test_squares_stay_finite_and_positive(scale):
    squares = squarable(torch.full((1000,), scale)).square().sum()
    assert float(squares) == pytest.approx(1000 * scale**2, rel=1e-5)


def test_sixteen_bits_are_widened_and_infinity_stays():
    assert squarable(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert squarable(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert squarable(torch.tensor([1.0, torch.inf])).isinf().any()
    assert squarable(torch.empty(0)).numel() == 0
