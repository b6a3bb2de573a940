"""Tensor rings: TR-SVD, and alternating least squares from there on, from the weight alone or under the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors, FitProblem
from tenfold.decompositions.block_als.base import BlockALS
from tenfold.decompositions.block_als.descent import Descent
from tenfold.decompositions.block_als.tr_updates import RingLayout, RingLeastSquares
from tenfold.formats.tensor_ring import TensorRing
from tenfold.records import Shape
from tenfold.tensors import rings
from tenfold.tensors.rings import Cores

# Zeros of a TR-SVD are a saddle, which sweeps do not leave: so much noise does, as a share of the mean square.
_NOISE = 0.05

# A TR-SVD that misses less than this share of the squares is exact.
_EXACT = 1e-20


@DECOMPOSITIONS.register("tr_svd")
@dataclass(frozen=True)
class TRSVD(Decomposition):
    """Truncated SVDs around the ring, from each core that can be the first, the best kept; fast, and no optimum.

    Zhao et al. 2016 (arXiv 1606.05535), algorithm 1 at given ranks: the first SVD keeps r·r' values, split between the
    bonds on both sides of its core, and the others one bond each. How the values are split is arbitrary, so that not
    even a weight that is such a ring is recovered; ``tr_als`` starts from here. The cores get equal norms.
    """

    initializer_only = True

    formats = (TensorRing,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the cores."""
        spec, rank = problem.spec, problem.rank
        tensor = TensorRing.to_tensor(problem.weight, spec)
        if TensorRing.is_dense(spec, rank):
            return Factors(named(dense_core(tensor)))
        candidates = ways_around(tensor, TensorRing.bonds(spec, rank))
        return Factors(named(rings.tr_balance(nearest(candidates, tensor))))


@DECOMPOSITIONS.register("tr_als")
@dataclass(frozen=True)
class TRALS(BlockALS):
    """Alternating least squares for tensor rings, on the weight or on the output error; the error never grows.

    Core after core is the best one between its neighbours: one system of r·r' unknowns for all its slices (TR-ALS:
    Zhao et al. 2016, arXiv 1606.05535, algorithm 2). Sweeps are extrapolated. The start is the TR-SVD, of small weights
    random ones too. With a covariance the inputs are whitened mode by mode, which keeps a ring a ring; from the best
    ring in that metric on, sweeps under the real one follow, a few conjugate gradients for each core.

    Settings as of ``BlockALS``; the TR-SVD is one of the ``starts``.
    """

    formats = (TensorRing,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the cores, of equal norms."""
        spec, rank = problem.spec, problem.rank
        if TensorRing.is_dense(spec, rank):
            return Factors(named(dense_core(TensorRing.to_tensor(problem.weight, spec))))
        ranks = TensorRing.bonds(spec, rank)

        def ring(kernel: Tensor) -> Descent:
            return self.ring(TensorRing.to_tensor(kernel, spec), ranks)

        result = self.fit_blocks(problem, TensorRing.input_modes(spec), RingLayout(len(ranks)), ring)
        return Factors(named(rings.tr_balance(result.blocks)), result.sweeps, result.converged)

    def ring(self, tensor: Tensor, ranks: Shape) -> Descent:
        """Return the cores near tensors (batch, *modes)."""
        start = _perturbed(tensor, nearest(ways_around(tensor, ranks), tensor), self.seed)
        return self.descend_from(RingLeastSquares, tensor, start)


def ways_around(tensor: Tensor, ranks: Sequence[int]) -> list[Cores]:
    """Return the TR-SVDs of tensors (batch, *modes) that begin at the cores whose mode is no less than r·r'.

    Others would be filled up with zeros. Where there are none, the one that lacks the least is the first.
    """
    needed = [r * ranks[(k + 1) % len(ranks)] / n for k, (r, n) in enumerate(zip(ranks, tensor.shape[1:], strict=True))]
    candidates = []
    for first in [k for k, share in enumerate(needed) if share <= max(1.0, min(needed))]:
        order = [*range(first, len(ranks)), *range(first)]
        turned = rings.tr_svd(tensor.permute(0, *(k + 1 for k in order)), [ranks[k] for k in order], batch_dims=1)
        candidates.append(rings.tr_rotate(turned, -first))
    return candidates


def nearest(candidates: Sequence[Cores], tensor: Tensor) -> Cores:
    """Return for each tensor of a batch the nearest one of some rings."""
    errors = torch.stack([(tensor - rings.tr_to_dense(cores)).flatten(1).square().sum(-1) for cores in candidates])
    least = errors.argmin(0)
    rows = torch.arange(len(least), device=least.device)
    return tuple(torch.stack(same)[least, rows] for same in zip(*candidates, strict=True))


def dense_core(tensor: Tensor) -> Cores:
    """Return the one core that is the whole tensor."""
    return (tensor.reshape(len(tensor), 1, -1, 1),)


def named(cores: Cores) -> dict[str, Tensor | None]:
    """Return the cores by the names of the format's fields."""
    return {f"core{k}": core for k, core in enumerate(cores, start=1)}


def _perturbed(tensor: Tensor, cores: Cores, seed: int) -> Cores:
    """Add some noise to the rings that are not exact."""
    power = tensor.flatten(1).square().sum(-1)
    missed = (tensor - rings.tr_to_dense(cores)).flatten(1).square().sum(-1)
    share = torch.where(missed > _EXACT * power, _NOISE, 0.0).to(tensor)[:, None, None, None]
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for core in cores:
        noise = torch.randn(core.shape[1:], generator=generator, dtype=torch.float64).to(core)
        noisy.append(core + share * core.square().mean((1, 2, 3), keepdim=True).sqrt() * noise)
    return tuple(noisy)
