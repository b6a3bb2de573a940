"""Covariances of layer inputs, as matrices or as sketches of bounded memory, and the algebra on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self, TypeVar

import torch
from torch import Tensor

from tenfold.errors import WeightError
from tenfold.records import Shape

# Directions with less than this share of the largest eigenvalue carry no data, only rounding.
NEGLIGIBLE = 1e-10

# Of more outputs than this no matrix of their square is made, if it can be helped: the eigenvectors of one this wide
# take half a second, of one of 4,096 half a minute.
WIDE_OUTPUTS = 1024

_BLOCK = 1 << 22  # entries of a weight that are worked on at a time

# The covariance of one mode is kept this far from singular, as a share of its mean variance.
_MODE_RIDGE = 1e-4


@dataclass(frozen=True, eq=False)
class Sketch:
    """The matrix C ≈ RᵀR + diag(rest), n wide, of which R has few rows: a data set that was compressed to k rows.

    R = QᵀX/√N mixes the N rows of the data by orthonormal columns Q, whose span holds the vector of ones. So RᵀR is
    never above E[x xᵀ], and what it lacks on the diagonal is ``rest``. The same mix of ones is ``constant`` and that of
    the targets is ``targets``: means, and the regression of y on x, are those of the compressed data set. With y = W x
    in every row, Y = X Wᵀ holds for the compressed rows too.

    It stands where a matrix (groups, n, n) would: ``A @ sketch`` is A C, and no (n, n) is ever made.

    Attributes:
        rows: R (groups, k, n).
        rest: (groups, n), at least 0.
        constant: Qᵀ1/√N (groups, k), of norm 1; zero once the data are centred.
        targets: QᵀY/√N (groups, k, out/groups), or None.

    Example:
        >>> x = torch.randn(5, 100, dtype=torch.float64)
        >>> sketch = Sketch.of(x)
        >>> torch.allclose(torch.eye(100).double()[:2] @ sketch, (x.mT @ x / 5)[:2])
        True
    """

    rows: Tensor
    rest: Tensor
    constant: Tensor
    targets: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor | None = None) -> Self:
        """Return the sketch that keeps all rows (N, n), or (groups, N, n), and the targets beside them: exact."""
        x = rows.double() if rows.dim() == 3 else rows.double()[None]
        scale = x.shape[1] ** -0.5
        y = None if targets is None else (targets if targets.dim() == 3 else targets[None]).double() * scale
        return cls(x * scale, torch.zeros_like(x[:, 0]), torch.full_like(x[:, :, 0], scale), y)

    @classmethod
    def diagonal_of(cls, values: Tensor) -> Self:
        """Return the diagonal matrix of values (groups, n), at least 0, of which nothing else is stored."""
        return cls(values.new_zeros(len(values), 0, values.shape[1]), values, values.new_zeros(len(values), 0))

    @property
    def shape(self) -> torch.Size:
        """Shape (groups, n, n) of the matrix that it stands for."""
        groups, _, width = self.rows.shape
        return torch.Size((groups, width, width))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        return {k: v for k, v in vars(self).items() if v is not None}

    def to(self, like: Tensor | torch.device | str) -> Self:
        """Return it on another device, or in dtype and on the device of a tensor."""
        return dataclasses.replace(self, **{k: v.to(like) for k, v in self.tensors().items()})

    def __rmatmul__(self, left: Tensor) -> Tensor:
        """Return A C for A (..., m, n)."""
        scaled: Tensor = left * self.rest.unsqueeze(-2)
        return scaled + left @ self.rows.mT @ self.rows if self.rows.shape[-2] else scaled

    def sandwich(self, left: Tensor) -> Tensor:
        """Return A C Aᵀ (..., m, m) for A (..., m, n)."""
        seen = left @ self.rows.mT
        product: Tensor = seen @ seen.mT + (left * self.rest.unsqueeze(-2)) @ left.mT
        return product

    def quadratic(self, left: Tensor) -> Tensor:
        """Return the diagonal (..., m) of A C Aᵀ."""
        return (left @ self.rows.mT).square().sum(-1) + (left.square() @ self.rest.unsqueeze(-1)).squeeze(-1)

    def dense(self) -> Tensor:
        """Return the matrix (groups, n, n) itself, where there is memory for it."""
        return self.rows.mT @ self.rows + torch.diag_embed(self.rest)

    def diagonal(self) -> Tensor:
        """Return the diagonal (groups, n)."""
        return self.rows.square().sum(-2) + self.rest

    def centred(self, mean: Tensor, target_mean: Tensor | None = None) -> Self:
        """Return C − x̄ x̄ᵀ, and the targets about their mean, for the means of the data; or C itself for zeros."""
        rows = self.rows - self.constant.unsqueeze(-1) * mean.unsqueeze(-2)
        targets = self.targets
        if targets is not None and target_mean is not None:
            targets = targets - self.constant.unsqueeze(-1) * target_mean.unsqueeze(-2)
        return dataclasses.replace(self, rows=rows, targets=targets, constant=torch.zeros_like(self.constant))

    def scaled(self, factor: Tensor) -> Self:
        """Return C times positive factors (groups,); for a sketch whose targets no longer matter."""
        rows = self.rows * factor.sqrt()[:, None, None]
        return dataclasses.replace(self, rows=rows, rest=self.rest * factor[:, None], targets=None)

    def pooled(self, other: Sketch, share: float) -> Self:
        """Return ``share`` of this and the rest of the other, for sketches without targets: the rows of both."""
        own, rest = share**0.5, (1 - share) ** 0.5
        rows = torch.cat([self.rows * own, other.rows * rest], dim=1)
        constant = torch.cat([self.constant * own, other.constant * rest], dim=1)
        return dataclasses.replace(
            self, rows=rows, rest=share * self.rest + (1 - share) * other.rest, constant=constant, targets=None
        )

    def plus(self, level: Tensor) -> Self:
        """Return C + diag(level) for a level (groups,)."""
        return dataclasses.replace(self, rest=self.rest + level.unsqueeze(-1))

    def channels(self, taps: int) -> Tensor:
        """Return the blocks of n/taps channels on the diagonal, averaged over the taps: (groups, n/taps, n/taps)."""
        rows = self.rows.unflatten(-1, (-1, taps)).transpose(-1, -2).flatten(1, 2)  # (groups, k·taps, c)
        rest = self.rest.unflatten(-1, (-1, taps)).sum(-1)
        averaged: Tensor = (rows.mT @ rows + torch.diag_embed(rest)) / taps
        return averaged

    def through(self, v: Tensor) -> Tensor:
        """Return (V⊗I)ᵀ C (V⊗I) for V (groups, c, r) on the channels: (groups, r·taps, r·taps), taps = n/c."""
        rest = self.rest.unflatten(-1, (v.shape[1], -1))  # (groups, c, taps)
        taps = rest.shape[-1]
        rows = torch.einsum("bkcp,bcr->bkrp", self.rows.unflatten(-1, (-1, taps)), v).flatten(2)
        diagonal = torch.einsum("bcp,bcr,bcs->brsp", rest, v, v)  # the diagonal mixes no taps
        square = torch.diag_embed(diagonal).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        seen: Tensor = rows.mT @ rows + square
        return seen

    def regression(self, weight: Tensor, rest: Tensor) -> Tensor:
        """Return the minimiser T of ‖targets − R Tᵀ‖² + Σᵢ restᵢ ‖Tᵢ − weightᵢ‖² (groups, out/groups, n).

        By the identity of Woodbury, that is in a system of k equations. ``rest`` (groups, n) is above 0.
        """
        if self.targets is None:
            return weight
        scaled = self.rows / rest.unsqueeze(-2)
        inner = scaled @ self.rows.mT
        inner.diagonal(dim1=-2, dim2=-1).add_(1)
        solved: Tensor = torch.linalg.solve((inner + inner.mT) / 2, self.targets - self.rows @ weight.mT)
        return weight + solved.mT @ scaled

    def missed(self, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return E‖y − T x‖² per output (groups, out/groups); what the rows do not hold is as if y were W x there."""
        off = weight - approximation
        if self.targets is None:
            return self.quadratic(off)
        far = self.targets - self.rows @ approximation.mT
        return far.square().sum(-2) + (off.square() @ self.rest.unsqueeze(-1)).squeeze(-1)


# A positive semidefinite matrix (groups, n, n): dense, or a sketch where that would not fit into memory. Of both,
# ``A @ covariance`` is the product.
Covariance = Tensor | Sketch
CovarianceT = TypeVar("CovarianceT", Tensor, Sketch, Covariance)


def pooled(square: Covariance, other: Covariance, share: float) -> Covariance:
    """Return ``share`` of one second moment and the rest of another: that of the rows of both."""
    if isinstance(square, Sketch) or isinstance(other, Sketch):
        if not (isinstance(square, Sketch) and isinstance(other, Sketch)):
            msg = "a sketch and a matrix are moments of different layers"
            raise TypeError(msg)
        return square.pooled(other, share)
    return share * square + (1 - share) * other


def add_ridge(square: CovarianceT, ridge: float) -> CovarianceT:
    """Return the symmetric matrices (..., n, n) plus ridge·(mean of the diagonal)·I; I itself for a zero matrix."""
    if ridge <= 0:
        return square
    level = mean_variance(square)
    level = torch.where(level > 0, level * ridge, torch.ones_like(level))
    if isinstance(square, Sketch):
        return square.plus(level)
    return square + torch.diag_embed(level.unsqueeze(-1).expand(square.shape[:-1]))


def sandwich(matrix: Tensor, square: Covariance) -> Tensor:
    """Return A C Aᵀ (groups, m, m) for A (groups, m, n)."""
    return square.sandwich(matrix) if isinstance(square, Sketch) else matrix @ square @ matrix.mT


def mean_variance(square: Covariance) -> Tensor:
    """Return the mean of the diagonal (...,) of matrices (..., n, n)."""
    return (square.diagonal() if isinstance(square, Sketch) else square.diagonal(dim1=-2, dim2=-1)).mean(-1)


def channel_blocks(square: Covariance, taps: int) -> Tensor:
    """Return the mean (groups, n/taps, n/taps) over the taps of the blocks of channels that belong to one tap."""
    if isinstance(square, Sketch):
        return square.channels(taps)
    blocks = square.unflatten(-1, (-1, taps)).unflatten(-3, (-1, taps))  # (groups, c, k, c, k)
    averaged: Tensor = blocks.diagonal(dim1=-3, dim2=-1).mean(-1)
    return averaged


def shrunk(square: Covariance, samples: int) -> Covariance:
    """Return a second moment (groups, n, n) of few samples drawn towards the multiple of I with its trace.

    A sketch stays as it is: all directions count in its diagonal.

    By how much, so that the expected error is least, is estimated as for Gaussian samples (OAS: Chen, Wiesel, Eldar &
    Hero 2010, arXiv 0907.4698). A matrix of fewer samples than it is wide has directions that none has seen, and
    without this errors there would be free.

    Example:
        >>> shrunk(torch.diag(torch.tensor([4.0, 0.0]))[None], 1)[0].diagonal().tolist()
        [2.0, 2.0]
    """
    if isinstance(square, Sketch):
        return square
    width = square.shape[-1]
    trace = square.diagonal(dim1=-2, dim2=-1).sum(-1)
    power, even = square.square().sum((-2, -1)), trace.square() / width
    wanted = (1 - 2 / width) * power + trace.square()
    share = wanted / ((samples + 1 - 2 / width) * (power - even)).clamp_min(torch.finfo(square.dtype).tiny)
    share = share.clamp(0, 1)[:, None, None]
    shrunken: Tensor = (1 - share) * square + share * torch.diag_embed((trace / width)[:, None].expand(-1, width))
    return shrunken


def is_finite(square: Covariance) -> bool:
    """Whether no entry is NaN or infinite."""
    if isinstance(square, Sketch):
        return all(bool(torch.isfinite(t.sum(-1)).all()) for t in square.tensors().values())
    return bool(torch.isfinite(square).all())


def quadratic(rows: Tensor, square: Covariance) -> Tensor:
    """Return wᵀ A w for each row w of (..., m, n), clamped at 0: (..., m)."""
    values = square.quadratic(rows) if isinstance(square, Sketch) else (rows @ square * rows).sum(-1)
    return values.clamp_min(0)


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

    Of a dense matrix it is the symmetric one, as a matrix. Of a sketch D + RᵀR it is (I + V diag(stretch) Vᵀ)·√D with
    V the right singular vectors of R·D^-½, and is never formed: it takes k·n numbers and k equations.

    Attributes:
        scale: √D (groups, n, 1), or None of a dense matrix.
        vectors: V (groups, n, k), or S itself of a dense matrix.
        stretch: by how much S lengthens what lies along V (groups, k, 1).
        inverse: pseudo-inverse of S of a dense matrix.
    """

    vectors: Tensor
    scale: Tensor | None = None
    stretch: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, square: Covariance) -> Root:
        """Return a root of a positive semidefinite matrix; the diagonal of a sketch must be positive."""
        if not isinstance(square, Sketch):
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

    def solve(self, right: Tensor) -> Tensor:
        """Return S⁻¹ x for columns x (groups, n, m); by the pseudo-inverse where S has none."""
        if self.inverse is not None:
            return self.inverse.to(right.dtype) @ right
        if self.scale is None or self.stretch is None:
            msg = "a root of a sketch needs its scale and stretch"
            raise WeightError(msg)
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


def is_tall(matrix: Tensor) -> bool:
    """Whether a matrix (batch, m, n) has so many rows that nothing (m, m) is to be made of it, and fewer columns."""
    return matrix.shape[1] > max(matrix.shape[2], WIDE_OUTPUTS)


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Iterate over slices of the rows of a matrix (groups, m, n), so that a copy of some takes little memory."""
    step = max(1, _BLOCK // (len(matrix) * matrix.shape[2] or 1))
    for start in range(0, matrix.shape[1], step):
        yield slice(start, start + step)


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


def marginal(square: Covariance, modes: Shape, k: int) -> Tensor:
    """Return the mean (batch, n, n) over all other modes of the covariance of mode ``k``."""
    before, n, after = prod(modes[:k]), modes[k], prod(modes[k + 1 :])
    if isinstance(square, Sketch):
        rows = square.rows.unflatten(-1, (before, n, after)).movedim(-2, 1).flatten(2)
        rest = square.rest.unflatten(-1, (before, n, after)).sum((1, 3))
        sums: Tensor = rows @ rows.mT + torch.diag_embed(rest)
        return sums / (before * after)
    blocks = square.unflatten(-1, (before, n, after)).unflatten(1, (before, n, after))
    return torch.einsum("zaibajb->zij", blocks) / (before * after)
