"""Trains with orthonormal cores: to begin with, or all the way through training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tenfold.errors import WeightError
from tenfold.layers.tt_embedding import TTEmbedding, TTEmbeddingBag
from tenfold.layers.tt_linear import TTLinear
from tenfold.tensors.trains import left_orthogonalize, merge_modes

TTLayer = TTLinear | TTEmbedding | TTEmbeddingBag
Map = Literal["householder", "matrix_exp", "cayley"]


def orthogonal_init_(layer: TTLayer) -> None:
    """Make all cores but the last left-orthogonal by a sweep of QR decompositions; the weight stays what it is.

    The scale goes to the last core: a change of any core then changes the weight by as much. A rank larger than its
    bond can carry is filled up with zeros.

    Example:
        >>> layer = TTLinear(24, 24, 3, in_modes=(2, 3, 4), out_modes=(2, 3, 4))
        >>> orthogonal_init_(layer)
        >>> flat = layer.cores[1].detach().flatten(0, 2)
        >>> torch.allclose(flat.T @ flat, torch.eye(3), atol=1e-5)
        True
    """
    if any(parametrize.is_parametrized(layer.cores, str(k)) for k in range(len(layer.cores))):
        msg = "the cores are kept orthogonal already: there is nothing to begin with"
        raise WeightError(msg)
    with torch.no_grad():
        cores = [core.detach().double() for core in layer.cores]
        if not isinstance(layer, TTLinear):
            cores = [core.transpose(0, 1) for core in cores]
        found = left_orthogonalize(merge_modes(tuple(cores)))
        for own, core, new in zip(layer.cores, cores, found, strict=True):
            whole = torch.zeros_like(core)
            whole[: new.shape[0], ..., : new.shape[-1]] = new.view(new.shape[0], *core.shape[1:3], new.shape[-1])
            own.copy_(whole if isinstance(layer, TTLinear) else whole.transpose(0, 1))


def orthogonalize_(layer: TTLayer, orthogonal_map: Map = "householder") -> None:
    """Keep all cores but the last on the Stiefel manifold from here on, through torch's own parametrization.

    Each core, as a matrix (r · modes, r'), has orthonormal columns whatever an optimizer does; the last core is free
    and carries the scale, so gradients stay bounded. The weight is the one the layer had. ``layer.cores`` are read as
    before; ``torch.nn.utils.parametrize.remove_parametrizations(layer.cores, "0")`` lets a core go again.

    Args:
        layer: whose cores it is about, changed in place.
        orthogonal_map: of ``torch.nn.utils.parametrizations.orthogonal``.

    Raises:
        WeightError: a rank that its bond cannot carry, for which there are no orthonormal columns.

    Example:
        >>> layer = TTLinear(24, 24, 3, in_modes=(2, 3, 4), out_modes=(2, 3, 4), bias=False)
        >>> orthogonalize_(layer)
        >>> sum(core.numel() for core in layer.cores), stiefel_params(layer)
        (141, 129)
    """
    rows_first = not isinstance(layer, TTLinear)
    for k, core in enumerate(list(layer.cores)[:-1]):
        rows, columns = core.shape[:-1].numel(), core.shape[-1]
        if rows < columns:
            msg = f"core {k} is a matrix {rows}×{columns}, and none such has orthonormal columns: lower the ranks"
            raise WeightError(msg)
    orthogonal_init_(layer)
    for k, core in enumerate(list(layer.cores)[:-1]):
        name, fold = str(k), _Fold(core.shape, rows_first=rows_first)
        layer.cores[k] = nn.Parameter(fold.right_inverse(core.detach()).clone(), core.requires_grad)
        parametrizations.orthogonal(layer.cores, name, orthogonal_map)
        parametrize.register_parametrization(layer.cores, name, fold, unsafe=True)


def stiefel_params(layer: TTLayer) -> int:
    """Return how many numbers the cores are free in when all but the last are orthogonal: r(r+1)/2 fewer for each."""
    cores: list[Tensor] = list(layer.cores)
    bonds = [core.shape[-1] for core in cores[:-1]]
    fixed: int = sum(r * (r + 1) // 2 for r in bonds)
    return sum(core.numel() for core in cores) - fixed


class _Fold(nn.Module):
    """From a matrix (r · modes, r') to a core, and back."""

    def __init__(self, shape: Sequence[int], *, rows_first: bool) -> None:
        super().__init__()
        self.shape, self.rows_first = tuple(shape), rows_first

    def forward(self, matrix: Tensor) -> Tensor:
        a, b, *rest = self.shape
        return matrix.view(b, a, *rest).transpose(0, 1) if self.rows_first else matrix.view(self.shape)

    def right_inverse(self, core: Tensor) -> Tensor:
        return (core.transpose(0, 1) if self.rows_first else core).flatten(0, 2)
