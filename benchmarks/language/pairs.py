"""Factor pairs by three metrics, and equal shares for all layers: plain SVD, SVD-LLM, KFAC-SVD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.language.protocol import Protocol
from benchmarks.language.statistics import Statistics

SHRUNK_INPUTS, SHRUNK_GRADIENTS = 0.1, 0.3  # towards a multiple of the identity, as LEMS has them
RIDGE = 1e-6  # of the mean variance, where SVD-LLM finds no Cholesky factor


@dataclass(frozen=True)
class Spectrum:
    """A weight as a product whose first columns and rows are the best of every rank.

    Attributes:
        left: (out, k).
        right: (k, in).
        energies: squared singular values (k,) in the metric of the fit.
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    @classmethod
    def of(cls, weight: Tensor, inputs: Tensor | None = None, gradients: Tensor | None = None) -> Spectrum:
        """Return the SVD of L_gᵀ W L_x with the metric undone; L Lᵀ is the second moment of inputs or gradients."""
        matrix = weight.double()
        right = None if inputs is None else torch.linalg.cholesky(inputs)
        left = None if gradients is None else torch.linalg.cholesky(gradients)
        matrix = matrix if right is None else matrix @ right
        matrix = matrix if left is None else left.mT @ matrix
        energies, u, v = _svd(matrix)
        u = u if left is None else torch.linalg.solve_triangular(left.mT, u, upper=True)
        v = v if right is None else torch.linalg.solve_triangular(right, v, upper=False, left=False)
        return cls(u.float(), v.float(), energies)

    def pair(self, rank: int, bias: Tensor | None = None) -> nn.Sequential:
        """Return two linear layers of a rank."""
        first = nn.Linear(self.right.shape[1], rank, bias=False)
        second = nn.Linear(rank, self.left.shape[0], bias=bias is not None)
        first.weight.data = self.right[:rank].clone()
        second.weight.data = self.left[:, :rank].clone()
        if bias is not None:
            second.bias.data = bias.clone()
        return nn.Sequential(first, second).eval()


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ² and two factors of a matrix in float64, one of them orthogonal, which multiply to it exactly.

    By the eigenvectors on its narrow side, a tenth of the time of an SVD: of directions that matter, as exact.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return (values, matrix @ vectors, vectors.mT) if tall else (values, vectors, vectors.mT @ matrix)


def shrunk(moment: Tensor, share: float) -> Tensor:
    """Return a second moment drawn to a multiple of the identity of the same trace, in float64."""
    own = moment.double()
    return (1 - share) * own + share * own.trace() / len(own) * torch.eye(len(own), dtype=own.dtype)


def spectra(protocol: Protocol, metric: str) -> dict[str, Spectrum]:
    """Return every layer's, in the metric ``plain``, ``whitened`` (SVD-LLM) or ``kfac`` (KFAC-SVD)."""
    if metric == "plain":
        return {path: Spectrum.of(layer.weight.detach()) for path, layer in protocol.layers.items()}
    known, found = Statistics.of(protocol), {}
    for path, layer in protocol.layers.items():
        weight, inputs = layer.weight.detach(), known.inputs[path]
        if metric == "whitened":
            found[path] = Spectrum.of(weight, shrunk(inputs, RIDGE))
        else:
            gradients = shrunk(known.gradients[path], SHRUNK_GRADIENTS)
            found[path] = Spectrum.of(weight, shrunk(inputs, SHRUNK_INPUTS), gradients)
    return found


def rank_of(layer: nn.Linear, share: float) -> int:
    """Return the largest rank at which a pair has at most a share of the numbers of the layer."""
    return max(1, int(share * layer.weight.numel() / sum(layer.weight.shape)))


def with_ranks(protocol: Protocol, found: Mapping[str, Spectrum], ranks: Mapping[str, int | None]) -> nn.Module:
    """Return a copy of the model in which layers are pairs of these ranks; None leaves one as it is."""
    model = protocol.copied()
    for path, rank in ranks.items():
        if rank is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, found[path].pair(rank, protocol.layers[path].bias))
    return model


def uniform(protocol: Protocol, metric: str) -> Callable[[float], nn.Module]:
    """Return what makes a model with the same share in every layer."""
    found = spectra(protocol, metric)

    def at(share: float) -> nn.Module:
        return with_ranks(protocol, found, {path: rank_of(layer, share) for path, layer in protocol.layers.items()})

    return at
