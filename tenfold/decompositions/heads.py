"""Low-rank fits of the projections of attention of which one factor acts head by head, so that a neighbour can take it.

The outputs of a product are the sum over heads of A_h B_h x_h, or its outputs are the heads L_h R x. What acts within
heads is the choice of a subspace of each head, and the projection on the other side (values, queries) absorbs it
exactly: the head becomes narrower, and no product is added (SVD of value and output: MoDeGPT, Lin et al. 2025, arXiv
2408.09632; CLOVER, Meng et al. 2025, arXiv 2411.17426).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, CovarianceDecomposition, Factors, FitProblem
from tenfold.decompositions.covariance import Covariance, Sketch, quadratic, sandwich
from tenfold.decompositions.curves import CurveProblem, ErrorCurve
from tenfold.decompositions.roots import solve_spd, sqrt_and_inverse_sqrt
from tenfold.errors import RankError
from tenfold.formats.low_rank import LowRank
from tenfold.tensors import symmetrize_

# Moments that were summed in single precision know no smaller eigenvalues than this share of the largest.
_LEAST = 1e-6


@dataclass(frozen=True)
class _ByHead(CovarianceDecomposition):
    """Fits of which one factor is block diagonal over heads of equal size.

    Attributes:
        heads: into how many blocks of equal size that side is cut; they divide it, and the rank.
        shared: so many consecutive heads have one and the same block, as query heads that share keys and values.
    """

    heads: int = 1
    shared: int = 1

    formats = (LowRank,)
    weighs_outputs = True

    def _split(self, matrix: Tensor, inner: Covariance, outer: Covariance, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (batch, m, rank) and a block diagonal B (batch, rank, n) with a small tr(outer Δ inner Δᵀ).

        Δ = W − AB. B has orthonormal rows; given B, A is the minimiser.
        """
        size = self._head_size(matrix.shape[2])
        if rank % self.heads or rank > size * self.heads:
            msg = f"{self.heads} heads of {size} need a rank that is a multiple of {self.heads}, not {rank}"
            raise RankError(msg)
        blocks = self._directions(matrix, inner, outer)[..., : rank // self.heads]
        chosen = _block_diagonal(blocks).mT
        seen, wanted = symmetrize_(sandwich(chosen, inner)), (matrix @ inner) @ chosen.mT
        return solve_spd(seen, wanted.mT).mT, chosen

    def _missed(self, matrix: Tensor, inner: Covariance, outer: Covariance) -> Tensor:
        """Return the error (d + 1,) of ``_split`` at every size of the heads, from 0 to d.

        The sizes are nested: with the components in the order of their place within their heads, what size r explains
        is what the first heads·r columns of one triangular solve do.
        """
        blocks = self._directions(matrix, inner, outer)
        order = torch.arange(matrix.shape[2]).view(self.heads, -1).T.flatten()
        basis = _block_diagonal(blocks).mT[:, order]
        lower = _cholesky(symmetrize_(sandwich(basis, inner)))
        solved = torch.linalg.solve_triangular(lower, basis @ (matrix @ inner).mT, upper=False)
        explained = quadratic(solved, outer).sum(0).view(-1, self.heads).sum(-1)
        power = ((matrix @ inner) * (matrix.mT @ outer).mT).sum()
        return torch.cat([power[None], power - explained.cumsum(0)]).clamp_min(0)

    def _directions(self, matrix: Tensor, inner: Covariance, outer: Covariance) -> Tensor:
        """Return an orthonormal basis (batch, heads, d, d) of each head, those that matter most first."""
        size = self._head_size(matrix.shape[2])
        own = _blocks(inner, self.heads, size).unflatten(1, (-1, self.shared)).mean(2)
        seen = _blocks(sandwich(matrix.mT, outer), self.heads, size).unflatten(1, (-1, self.shared)).mean(2)
        root, inverse = sqrt_and_inverse_sqrt(own)
        vectors = torch.linalg.eigh(symmetrize_(root @ seen @ root)).eigenvectors.flip(-1)
        basis: Tensor = torch.linalg.qr(inverse @ vectors).Q
        return basis.repeat_interleave(self.shared, dim=1)

    def _head_size(self, width: int) -> int:
        if width % self.heads or self.heads % self.shared:
            msg = f"{self.heads} heads, {self.shared} sharing a block, do not divide a side of {width}"
            raise RankError(msg)
        return width // self.heads


@DECOMPOSITIONS.register("head_inputs")
@dataclass(frozen=True)
class HeadInputs(_ByHead):
    """A low-rank fit W ≈ A·B of the output error whose B acts within heads of the inputs: narrower values of attention.

    B = diag(B_1 … B_heads), (r, d) each; the projection that makes the inputs of head h is multiplied by B_h, which is
    exact. B_h is the optimum of its head alone, A of all heads together: A = W C Bᵀ (B C Bᵀ)⁻¹. For the output
    projection of attention, as of ``UNITS`` ``value_output``; with one head it is ``whitened_svd``.
    """

    def fit(self, problem: FitProblem) -> Factors:
        """Return ``left`` A (batch, out, rank) and ``right`` B (batch, rank, in)."""
        matrix = problem.weight.flatten(2).double()
        outer = _identity(matrix.mT) if problem.output_gram is None else problem.output_gram
        left, right = self._split(matrix, self.regularized(problem), outer, problem.rank["rank"])
        return _factors(problem, left, right)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the errors at all sizes of the heads, in closed form; ranks between them count as the next below."""
        matrix, gram = _curve_terms(problem)
        lost = self._missed(matrix, problem.covariance, gram).cpu().numpy()
        return lambda ranks: lost[ranks[:, 0] // self.heads]


@DECOMPOSITIONS.register("head_outputs")
@dataclass(frozen=True)
class HeadOutputs(_ByHead):
    """A low-rank fit W ≈ L·R of the output error whose L acts within heads of the outputs: narrower keys of attention.

    L = diag(L_1 … L_heads), (d, r) each; what the outputs of head h are multiplied with, as the queries are with the
    keys, takes L_hᵀ, which is exact. L_h is the optimum of its head alone under the output Gram matrix G, R of all
    heads together: R = (Lᵀ G L)⁻¹ Lᵀ G W. For the key projection of attention, as of ``UNITS`` ``query_key``; it needs
    G, which holds all that queries and softmax say. With one head it is ``whitened_svd``.
    """

    def fit(self, problem: FitProblem) -> Factors:
        """Return ``left`` L (batch, out, rank) and ``right`` R (batch, rank, in)."""
        matrix = problem.weight.flatten(2).double()
        gram = _identity(matrix.mT) if problem.output_gram is None else problem.output_gram
        right, left = self._split(matrix.mT, gram, self.regularized(problem), problem.rank["rank"])
        return _factors(problem, left.mT, right.mT)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the errors at all sizes of the heads, in closed form; ranks between them count as the next below."""
        matrix, gram = _curve_terms(problem)
        lost = self._missed(matrix.mT, gram, problem.covariance).cpu().numpy()
        return lambda ranks: lost[ranks[:, 0] // self.heads]


def _factors(problem: FitProblem, left: Tensor, right: Tensor) -> Factors:
    value = LowRank(problem.spec, **LowRank.from_matrices(left, right, problem.spec))
    return Factors(value.balanced().tensors())


def _curve_terms(problem: CurveProblem) -> tuple[Tensor, Covariance]:
    """Return the weight (batch, m, n), of norm 1 without moments, and the Gram matrix of its outputs."""
    moments = problem.moments
    if moments is None or moments.output_gram is None:
        return problem.kernel.flatten(2), _identity(problem.kernel.flatten(2).mT)
    return problem.weight.flatten(2).double(), moments.to(problem.weight.device).ridged_gram()


def _cholesky(square: Tensor) -> Tensor:
    """Return the Cholesky factor of a matrix (batch, n, n); of one that rounding has made indefinite of the nearest."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(square)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(square)
        values = values.maximum(_LEAST * values[:, -1:])
        lower = torch.linalg.cholesky((vectors * values.unsqueeze(-2)) @ vectors.mT)
    return lower


def _identity(rows: Tensor) -> Tensor:
    """Return the identity (batch, n, n) for rows (batch, m, n)."""
    return torch.eye(rows.shape[2]).to(rows).expand(len(rows), -1, -1)


def _blocks(square: Covariance, heads: int, size: int) -> Tensor:
    """Return the blocks (batch, heads, d, d) on the diagonal of a matrix (batch, heads·d, heads·d)."""
    if isinstance(square, Sketch):
        rows = square.rows.unflatten(-1, (heads, size)).transpose(1, 2)
        sketched: Tensor = rows.mT @ rows + torch.diag_embed(square.rest.unflatten(-1, (heads, size)))
        return sketched
    apart: Tensor = square.unflatten(-1, (heads, size)).unflatten(1, (heads, size)).diagonal(dim1=1, dim2=3)
    return apart.permute(0, 3, 1, 2)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return (batch, heads·d, heads·r) with blocks (batch, heads, d, r) on its diagonal."""
    heads = blocks.shape[1]
    apart = torch.eye(heads).to(blocks)
    return torch.einsum("bhdr,hk->bhdkr", blocks, apart).flatten(3).flatten(1, 2)
