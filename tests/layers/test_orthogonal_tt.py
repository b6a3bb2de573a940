"""Orthonormal cores: after a sweep, and through steps of an optimizer that knows nothing of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tenfold.errors import WeightError
from tenfold.layers import TTEmbedding, TTLinear, orthogonal_init_, orthogonalize_, stiefel_params


def _linear() -> TTLinear:
    torch.manual_seed(0)
    return TTLinear(24, 24, (3, 4), in_modes=(2, 3, 4), out_modes=(3, 4, 2), dtype=torch.float64)


def _embedding() -> TTEmbedding:
    torch.manual_seed(0)
    return TTEmbedding(60, 12, (3, 4), row_modes=(3, 4, 5), col_modes=(2, 3, 2), dtype=torch.float64)


def _matrices(layer: Any) -> list[Tensor]:
    cores = layer.train_cores() if isinstance(layer, TTLinear) else layer.cores_ttm()
    return [core.detach().flatten(0, 2) for core in cores[:-1]]


def _expect_orthonormal(layer: Any) -> None:
    for matrix in _matrices(layer):
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype))


@pytest.mark.parametrize("make", [_linear, _embedding])
def test_the_sweep_keeps_the_weight(make: Any) -> None:
    layer = make()
    before = layer.weight.detach().clone()
    orthogonal_init_(layer)
    _expect_orthonormal(layer)
    torch.testing.assert_close(layer.weight, before)


def test_a_rank_that_a_bond_cannot_carry_is_filled_with_zeros() -> None:
    layer = TTLinear(6, 6, 99, in_modes=(2, 3), out_modes=(2, 3), dtype=torch.float64)
    before = layer.weight.detach().clone()
    orthogonal_init_(layer)
    torch.testing.assert_close(layer.weight, before)
    assert layer.cores[0].shape[-1] == 99
    with pytest.raises(WeightError, match="core 0 is a matrix 4×99"):
        orthogonalize_(layer)


@pytest.mark.parametrize("make", [_linear, _embedding])
@pytest.mark.parametrize("way", ["householder", "matrix_exp", "cayley"])
def test_cores_stay_orthonormal_while_training(make: Any, way: Any) -> None:
    layer = make()
    before = layer.weight.detach().clone()
    orthogonalize_(layer, way)
    torch.testing.assert_close(layer.weight, before)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    x = torch.arange(60) if isinstance(layer, TTEmbedding) else torch.randn(20, 24, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    _expect_orthonormal(layer)
    assert not torch.allclose(layer.weight, before)
    again = make()
    orthogonalize_(again, way)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.weight, layer.weight)
    with pytest.raises(WeightError, match="already"):
        orthogonal_init_(layer)
    parametrize.remove_parametrizations(layer.cores, "0")
    _expect_orthonormal(layer)


def test_free_parameters() -> None:
    """As many as the tangent space of the cores has dimensions, found here as the rank of a Jacobian."""
    layer = _linear()
    orthogonalize_(layer)
    assert stiefel_params(layer) == sum(c.numel() for c in layer.cores) - (3 * 4 // 2 + 4 * 5 // 2)
    plists: Any = layer.cores
    for k, r in ((0, 3), (1, 4)):
        chain = plists.parametrizations[str(k)]
        original = chain.original.detach()
        rows, columns = original.shape
        matrix = original.reshape(-1)

        def core(flat: Tensor, chain: Any = chain, shape: Any = original.shape) -> Tensor:
            found: Any = flat.view(shape)
            for step in (chain[i] for i in range(len(chain))):
                found = step(found)
            return found.flatten()

        jacobian = torch.autograd.functional.jacobian(core, matrix)
        assert int(torch.linalg.matrix_rank(jacobian)) == rows * columns - r * (r + 1) // 2
