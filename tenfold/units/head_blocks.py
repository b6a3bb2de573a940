"""The factor of a projection that acts within heads: random ones, what a fit has found, and its product with others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.formats.matrix import MatrixFormat
from tenfold.layers import FactorizedLayer, dense_weight, spec_of
from tenfold.records import LayerSpec, Unit
from tenfold.units.narrow_layers import narrowed_layer


def random_blocks(heads: int, size: int, full: int, shared: int = 1) -> Tensor:
    """Return orthonormal columns (heads, full, size) of each head, the same for ``shared`` heads in a row; seeded."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(heads // shared, full, full, generator=generator, dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(draw).Q[..., :size]
    return columns.repeat_interleave(shared, dim=0)


def spread(blocks: Tensor) -> Tensor:
    """Return the matrix (heads·full, heads·size) with blocks (heads, full, size) on its diagonal."""
    matrix: Tensor = torch.block_diag(*blocks)
    return matrix


def factors(unit: Unit, pivot: FactorizedLayer) -> tuple[Tensor, Tensor]:
    """Return the factors (out, rank) and (rank, in) of a pivot, in float64.

    Raises:
        PlanError: it is factorized otherwise.
    """
    value = pivot.factorization()
    if not isinstance(value, MatrixFormat):
        msg = f"the pivot {unit.pivot!r} of {unit.kind} is to be factorized as low_rank, not as {value.name()}"
        raise PlanError(msg)
    left, right = (t[0].detach().double() for t in value.matrices())
    return left, right


def split_blocks(unit: Unit, inner: Tensor, other: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the blocks (heads, full, size) of a factor (heads·full, rank), their columns of norm 1, and the other one.

    The other factor (n, rank) takes the norms over, so that the product stays the same, and heads that share their
    block have the same one whatever the scales of their components.

    Raises:
        PlanError: the factor mixes heads.
    """
    apart = inner.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).transpose(1, 2)  # (heads, heads, full, size)
    inside = torch.eye(heads, dtype=torch.bool, device=inner.device)
    if bool(apart[~inside].any()):
        msg = f"the pivot {unit.pivot!r} of {unit.kind} mixes heads where it should act within each: fit it again"
        raise PlanError(msg)
    norms = torch.linalg.vector_norm(apart[inside], dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return apart[inside] / norms.unsqueeze(1), other * norms.flatten()


def within_heads(layer: nn.Module, blocks: Tensor) -> nn.Module:
    """Return a projection to heads whose outputs are multiplied by the transposes of blocks (heads, full, size)."""
    weight = dense_weight(layer).detach().double()
    mixed = (blocks.to(weight).mT @ weight.unflatten(0, (len(blocks), -1))).flatten(0, 1)
    return narrowed_layer(layer, mixed, turned_bias(getattr(layer, "bias", None), blocks))


def turned_bias(bias: Tensor | None, blocks: Tensor) -> Tensor | None:
    """Return a bias (heads·full,) multiplied by the transposes of blocks (heads, full, size): (heads·size,)."""
    if bias is None:
        return None
    apart = bias.detach().double().unflatten(0, (len(blocks), -1))
    turned: Tensor = (blocks.to(apart).mT @ apart.unsqueeze(-1)).flatten()
    return turned


def geometry_of(layer: nn.Module) -> tuple[LayerSpec, Tensor]:
    """Return the geometry and the weight of a dense layer.

    Raises:
        PlanError: it is none that can be factorized.
    """
    spec, reason = spec_of(layer)
    if spec is None:
        raise PlanError(reason)
    return spec, dense_weight(layer).detach()
