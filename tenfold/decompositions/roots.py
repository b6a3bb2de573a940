"""Roots and inverses of positive semidefinite matrices, dense or sketched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tenfold.decompositions.covariance import NEGLIGIBLE, Covariance, Sketch, add_ridge, marginal
from tenfold.records import Shape

# The covariance of one mode is kept this far from singular, as a share of its mean variance.
_MODE_RIDGE = 1e-4


def sqrt_and_inverse_sqrt(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a positive semidefinite matrix (..., n, n), and its pseudo-inverse.

    By eigenvectors, not by Cholesky, which fails on the singular matrices that ReLU and few data make. Eigenvalues
    below 1e-10 of the largest count as zero.

    Example:
        >>> root, inverse = sqrt_and_inverse_sqrt(torch.diag(torch.tensor([4.0, 0.0])).double())
        >>> root.diagonal().tolist(), inverse.diagonal().tolist()
        ([2.0, 0.0], [0.5, 0.0])
    """
    values, vectors = torch.linalg.eigh(square)
    kept = values > NEGLIGIBLE * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = torch.where(kept, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(kept, 1 / root, torch.zeros_like(values))
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT


@dataclass(frozen=True, eq=False)
class Root:
    """A square root S of a matrix A (groups, n, n): SᵀS = A, so that ‖S x‖² = xᵀA x. ``root @ x`` is S x.

    Of a dense matrix it is the transposed Cholesky factor, or where the matrix is near to singular the symmetric root,
    whose eigenvectors take ten times as long. Of a sketch D + RᵀR it is (I + V diag(stretch) Vᵀ)·√D with
    V the right singular vectors of R·D^-½, and is never formed: it takes k·n numbers and k equations.

    Attributes:
        scale: √D (groups, n, 1), or None of a dense matrix.
        vectors: V (groups, n, k), or S itself of a dense matrix.
        stretch: by how much S lengthens what lies along V (groups, k, 1).
        inverse: pseudo-inverse of S of a dense matrix; None of a Cholesky factor.
    """

    vectors: Tensor
    scale: Tensor | None = None
    stretch: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, square: Covariance) -> Root:
        """Return a root of a positive semidefinite matrix; the diagonal of a sketch must be positive."""
        if not isinstance(square, Sketch):
            lower, failed = torch.linalg.cholesky_ex(square)
            if not bool(failed.any()) and bool(_well_posed(lower)):
                return cls(lower.mT)
            root, inverse = sqrt_and_inverse_sqrt(square)
            return cls(root, inverse=inverse)
        scale = square.rest.sqrt().unsqueeze(-1)
        white = square.rows.mT / scale  # (groups, n, k)
        values, turn = torch.linalg.eigh(white.mT @ white)
        kept = values > NEGLIGIBLE  # the others lengthen nothing
        safe = torch.where(kept, values, torch.ones_like(values))
        vectors = (white @ turn) * (kept / safe.sqrt()).unsqueeze(-2)
        return cls(vectors, scale, ((1 + values * kept).sqrt() - 1).unsqueeze(-1))

    def __matmul__(self, right: Tensor) -> Tensor:
        """Return S x for columns x (groups, n, m)."""
        return self.times_(right.clone())

    def times_(self, right: Tensor) -> Tensor:
        """Return S x, and use the memory of x for it where that goes."""
        if self.scale is None or self.stretch is None:
            return self.vectors.to(right.dtype) @ right
        return _stretched(right.mul_(self.scale.to(right.dtype)), self.vectors, self.stretch)

    def transposed(self, right: Tensor) -> Tensor:
        """Return Sᵀ x for columns x (groups, n, m)."""
        if self.scale is None or self.stretch is None:
            transposed: Tensor = self.vectors.mT.to(right.dtype) @ right
            return transposed
        return _stretched(right.clone(), self.vectors, self.stretch).mul_(self.scale.to(right.dtype))

    def solve(self, right: Tensor) -> Tensor:
        """Return S⁻¹ x for columns x (groups, n, m); by the pseudo-inverse where S has none."""
        if self.inverse is not None:
            return self.inverse.to(right.dtype) @ right
        if self.scale is None or self.stretch is None:
            solved: Tensor = torch.linalg.solve_triangular(self.vectors.to(right.dtype), right, upper=True)
            return solved
        return _stretched(right.clone(), self.vectors, 1 / (1 + self.stretch) - 1).div_(self.scale.to(right.dtype))


def _stretched(columns: Tensor, vectors: Tensor, by: Tensor) -> Tensor:
    """Return (I + V diag(by) Vᵀ) x, in place of x (groups, n, m)."""
    vectors = vectors.to(columns.dtype)
    return columns.baddbmm_(vectors, (vectors.mT @ columns) * by.to(columns.dtype))


def solve_spd(square: Tensor, right: Tensor) -> Tensor:
    """Return A⁻¹ B for positive semidefinite A (..., n, n) and B (..., n, m), by eigenvectors where Cholesky fails."""
    return spd_solver(square)(right)


def spd_solver(square: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function B ↦ A⁻¹ B of ``solve_spd``, to be used for many B."""
    lower, failed = torch.linalg.cholesky_ex(square)
    if not bool(failed.any()) and bool(_well_posed(lower)):
        return lambda right: torch.cholesky_solve(right, lower)
    _, inverse = sqrt_and_inverse_sqrt(square)
    return lambda right: inverse @ (inverse @ right)


def preconditioner(square: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of A + ridge·(mean of the diagonal)·I for positive semidefinite A (..., n, n).

    Where rounding has made A indefinite, as of inputs that hardly vary, it is that of the diagonal of A alone: enough
    to speed up conjugate gradients, and never missing.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(add_ridge(square, ridge))
    if bool(failed.any()):
        diagonal = square.diagonal(dim1=-2, dim2=-1)
        largest = diagonal.amax(-1, keepdim=True)
        least = torch.where(largest > 0, max(ridge, 1e-12) * largest, torch.ones_like(largest))
        lower = torch.where(failed[..., None, None] > 0, torch.diag_embed(diagonal.maximum(least).sqrt()), lower)
    return lower


def _well_posed(lower: Tensor) -> Tensor:
    diagonal = lower.diagonal(dim1=-2, dim2=-1).square()
    return (diagonal.amin(-1) > NEGLIGIBLE * diagonal.amax(-1)).all()


@dataclass(frozen=True, eq=False)
class Whitening:
    """Whitening of the inputs mode by mode: nearly white, without mixing the modes that they are split into.

    Attributes:
        modes: of the inputs, in the order of the flattened weight.
        roots: for each mode the square root (batch, n, n) of its own covariance.
        inverses: the inverses of these.
    """

    modes: Shape
    roots: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    @classmethod
    def of(cls, square: Covariance, modes: Shape) -> Whitening:
        """Return the whitening for a covariance (batch, n, n) with a mean variance of 1, n the product of the modes."""
        pairs = [sqrt_and_inverse_sqrt(add_ridge(marginal(square, modes, k), _MODE_RIDGE)) for k in range(len(modes))]
        return cls(modes, tuple(root for root, _ in pairs), tuple(inverse for _, inverse in pairs))

    def whiten(self, weight: Tensor) -> Tensor:
        """Return the weights (batch, out, ...) that act on white inputs as these do on the real ones."""
        return self._along(weight, self.roots)

    def unwhiten(self, weight: Tensor) -> Tensor:
        """Return the weights for the real inputs; the inverse of ``whiten``, and its own transpose."""
        return self._along(weight, self.inverses)

    def _along(self, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        batch, out = weight.shape[:2]
        result = weight.reshape(batch, -1, prod(self.modes))
        before, after = out, prod(self.modes)
        for n, matrix in zip(self.modes, matrices, strict=True):
            after //= n
            result = matrix.unsqueeze(1) @ result.reshape(batch, before, n, after)
            before *= n
        return result.reshape(weight.shape)
