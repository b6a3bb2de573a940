"""The truncated singular value decomposition, for formats that are the product of two matrices."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors, FitProblem
from tenfold.formats import MatrixFormat
from tenfold.tensors import SVDMethod, truncated_svd


@DECOMPOSITIONS.register("svd")
@dataclass(frozen=True)
class SVD(Decomposition):
    """Truncated SVD: the optimum for low_rank and spatial (Eckart & Young 1936), both factors of equal norm.

    ``method`` is full, gram (eigenvectors of the smaller Gram matrix), randomized, or auto, which picks by size; the
    fit's note tells which one ran.
    """

    method: SVDMethod = "auto"

    formats = (MatrixFormat,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the two factors, each with half of every singular value."""
        format = problem.format_as(MatrixFormat)
        matrix = format.unfold(problem.weight, problem.spec)
        u, s, vh, method = truncated_svd(matrix, problem.rank["rank"], method=self.method, seed=self.seed)
        root = s.sqrt()
        left, right = u * root.unsqueeze(-2), root.unsqueeze(-1) * vh
        return Factors(format.from_matrices(left, right, problem.spec), note=method)
