"""Tensor rings by alternating least squares, from the weight alone or under the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Factors
from tenfold.decompositions.metric import Square
from tenfold.decompositions.parts import Found, descend_from
from tenfold.decompositions.parts_als import PartsALS
from tenfold.decompositions.tr_svd import dense_core, named, nearest, ways_around
from tenfold.decompositions.tr_sweeps import RingLayout, Rings
from tenfold.formats import Factorization, Rank
from tenfold.formats.tensor_ring import TensorRing
from tenfold.records import LayerSpec, Shape
from tenfold.tensors import rings
from tenfold.tensors.rings import Cores

# Zeros of a TR-SVD are a saddle, which sweeps do not leave: so much noise does, as a share of the mean square.
_NOISE = 0.05

# A TR-SVD that misses less than this share of the squares is exact.
_EXACT = 1e-20


@DECOMPOSITIONS.register("tr_als")
@dataclass(frozen=True)
class TRALS(PartsALS):
    """Alternating least squares for tensor rings, on the weight or on the output error; the error never grows.

    Core after core is the best one between its neighbours: one system of r·r' unknowns for all its slices (TR-ALS:
    Zhao et al. 2016, arXiv 1606.05535, algorithm 2). Sweeps are extrapolated. The start is the TR-SVD, of small weights
    random ones too. With a covariance the inputs are whitened mode by mode, which keeps a ring a ring; from the best
    ring in that metric on, sweeps under the real one follow, a few conjugate gradients for each core.

    Attributes:
        n_iter: sweeps on the weight at most.
        tol: stop when twice in turn a sweep lowers the root of the objective by less than this share of it.
        penalty: weight of the squares of the terms, times the relative squared error so far.
        starts: of small weights, the TR-SVD among them.
        data_iter: sweeps under the covariance at most; these stop at ten times ``tol``.
        cg_steps: steps of conjugate gradients for each core in each of these.
        ridge: added to the covariance, as a share of the mean variance.
    """

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is a tensor ring."""
        return format is TensorRing

    def fit(
        self,
        weight: Tensor,
        spec: LayerSpec,
        format: type[Factorization],
        rank: Rank,
        covariance: Square | None = None,
    ) -> Factors:
        """Return the cores, of equal norms."""
        del format
        if TensorRing.is_dense(spec, rank):
            return Factors(named(dense_core(TensorRing.to_tensor(weight, spec))))
        ranks = TensorRing.bonds(spec, rank)

        def ring(kernel: Tensor) -> Found:
            return self.ring(TensorRing.to_tensor(kernel, spec), ranks)

        found = self.meet(weight, covariance, TensorRing.input_modes(spec), RingLayout(len(ranks)), ring)
        return Factors(named(rings.tr_balance(found.parts)), found.sweeps, found.converged)

    def ring(self, tensor: Tensor, ranks: Shape) -> Found:
        """Return the cores near tensors (batch, *modes)."""
        start = _unstuck(tensor, nearest(ways_around(tensor, ranks), tensor), self.seed)
        shapes = [tuple(core.shape[1:]) for core in start]
        return descend_from(Rings, tensor, start, shapes, self)


def _unstuck(tensor: Tensor, cores: Cores, seed: int) -> Cores:
    """Return the rings with some noise, but for those that are exact."""
    power = tensor.flatten(1).square().sum(-1)
    missed = (tensor - rings.tr_to_dense(cores)).flatten(1).square().sum(-1)
    share = torch.where(missed > _EXACT * power, _NOISE, 0.0).to(tensor)[:, None, None, None]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for core in cores:
        noise = torch.randn(core.shape[1:], generator=generator, dtype=torch.float64).to(core)
        found.append(core + share * core.square().mean((1, 2, 3), keepdim=True).sqrt() * noise)
    return tuple(found)
