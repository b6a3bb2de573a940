"""Sums of Tucker-2 blocks by alternating least squares, from the weight alone or under the data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Factors
from tenfold.decompositions.btd_sweeps import BlockLayout, Blocks, balanced, deflated
from tenfold.decompositions.metric import Square
from tenfold.decompositions.parts import Found, descend_from
from tenfold.decompositions.parts_als import PartsALS
from tenfold.formats import Factorization, Rank
from tenfold.formats.block_term import BlockTerm
from tenfold.records import LayerSpec


@DECOMPOSITIONS.register("btd_als")
@dataclass(frozen=True)
class BTDALS(PartsALS):
    """Alternating least squares for sums of Tucker-2 blocks, on the weight or on the output error, which never grows.

    The factors of the outputs of all blocks together, those of the inputs, and all cores: each is one least-squares
    problem (block term decomposition in rank-(L, M, ·) terms: De Lathauwer & Nion 2008, SIAM J. Matrix Anal. Appl. 30).
    Sweeps are extrapolated. The start takes one block after the other from what those before have left, each by HOSVD;
    small weights have random starts too. With a covariance, inputs and taps are whitened, each by their own; from the
    best blocks in that metric on, sweeps under the real one follow, a few conjugate gradients for each part.

    Attributes:
        n_iter: sweeps on the weight at most.
        tol: stop when twice in turn a sweep lowers the root of the objective by less than this share of it.
        penalty: weight of the squares of the terms, times the relative squared error so far.
        starts: of small weights, the one block after the other among them.
        data_iter: sweeps under the covariance at most; these stop at ten times ``tol``.
        cg_steps: steps of conjugate gradients for cores and inputs in each of these.
        ridge: added to the covariance, as a share of the mean variance.
    """

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is a sum of blocks."""
        return format is BlockTerm

    def fit(
        self,
        weight: Tensor,
        spec: LayerSpec,
        format: type[Factorization],
        rank: Rank,
        covariance: Square | None = None,
    ) -> Factors:
        """Return factors with orthogonal columns, and cores, of equal norms."""
        del format
        if BlockTerm.is_dense(spec, rank):
            return Factors({"core": weight[:, None]})

        def blocks(kernel: Tensor) -> Found:
            return self.blocks(kernel.flatten(3), rank)

        modes = weight.shape[2], weight[0, 0, 0].numel()
        found = self.meet(weight, covariance, modes, BlockLayout(), blocks)
        outer, core, inner = balanced(found.parts)
        core = core.reshape(*core.shape[:4], *spec.kernel)
        return Factors({"core": core, "out_factor": outer, "in_factor": inner}, found.sweeps, found.converged)

    def blocks(self, tensor: Tensor, rank: Rank) -> Found:
        """Return the blocks near kernels (batch, out, in, K)."""
        start = deflated(tensor, rank["blocks"], rank["out"], rank["in"])
        shapes = [tuple(part.shape[1:]) for part in start]
        return descend_from(Blocks, tensor, start, shapes, self)
