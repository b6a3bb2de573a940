"""The truncated singular value decomposition, for formats that are the product of two matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors
from tenfold.formats import Factorization, MatrixFormat, Rank
from tenfold.records import LayerSpec
from tenfold.tensors import SVDMethod, truncated_svd


@DECOMPOSITIONS.register("svd")
@dataclass(frozen=True)
class SVD(Decomposition):
    """Truncated SVD: the optimum for low_rank and spatial (Eckart & Young 1936), both factors of equal norm.

    ``method`` is full, gram (eigenvectors of the smaller Gram matrix), randomized, or auto, which picks by size; the
    fit's note tells which one ran.
    """

    method: SVDMethod = "auto"

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is the product of two matrices."""
        return issubclass(format, MatrixFormat)

    def fit(self, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank) -> Factors:
        """Return the two factors, each with half of every singular value."""
        if not issubclass(format, MatrixFormat):
            msg = f"svd finds factors of matrix formats, not of {format.name()}"
            raise TypeError(msg)
        matrix = format.unfold(weight, spec)
        u, s, vh, method = truncated_svd(matrix, rank["rank"], method=self.method, seed=self.seed)
        root = s.sqrt()
        left, right = u * root.unsqueeze(-2), root.unsqueeze(-1) * vh
        return Factors(dict(format.from_matrices(left, right, spec)), note=method)
