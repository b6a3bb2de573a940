"""Covariances of layer inputs, as matrices or as sketches of bounded memory, and the algebra on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Self, TypeVar

import torch
from torch import Tensor

from tenfold.records import Shape
from tenfold.tensors import symmetrize_

# Directions with less than this share of the largest eigenvalue carry no data, only rounding.
NEGLIGIBLE = 1e-10

# Of more outputs than this no matrix of their square is made, if it can be helped: the eigenvectors of one this wide
# take half a second, of one of 4,096 half a minute.
WIDE_OUTPUTS = 1024

_BLOCK = 1 << 22  # entries of a weight that are worked on at a time


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

    def regression(self, weight: Tensor, rest: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the minimiser T of ‖targets − R Tᵀ‖² + Σᵢ restᵢ ‖Tᵢ − weightᵢ‖² (groups, out/groups, n).

        By the identity of Woodbury, that is in a system of k equations, some outputs at a time. ``rest`` (groups, n) is
        above 0. It may be written to ``out``, such as the weight itself.
        """
        if self.targets is None:
            return weight
        scaled = self.rows / rest.unsqueeze(-2)
        inner = scaled @ self.rows.mT
        inner.diagonal(dim1=-2, dim2=-1).add_(1)
        factors, pivots = torch.linalg.lu_factor(symmetrize_(inner))
        found = torch.empty_like(weight) if out is None else out
        for part in blocks(weight):
            own = weight[:, part].double()
            missed = self.targets[:, :, part] - self.rows @ own.mT
            found[:, part] = own.baddbmm(torch.linalg.lu_solve(factors, pivots, missed).mT, scaled)
        return found

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
    raised = square.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(level.unsqueeze(-1))
    return raised


def centred_square(square: Tensor, mean: Tensor) -> Tensor:
    """Return E[x xᵀ] − x̄ x̄ᵀ (groups, n, n), exactly symmetric; of wide inputs every copy counts."""
    return symmetrize_(torch.addcmul(square, mean.unsqueeze(-1), mean.unsqueeze(-2), value=-1))


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
    return bool(torch.isfinite(square.sum(-1)).all())  # of the sums, which are small


def quadratic(rows: Tensor, square: Covariance) -> Tensor:
    """Return wᵀ A w for each row w of (..., m, n), clamped at 0: (..., m)."""
    values = square.quadratic(rows) if isinstance(square, Sketch) else (rows @ square * rows).sum(-1)
    return values.clamp_min(0)


def is_tall(matrix: Tensor) -> bool:
    """Whether a matrix (batch, m, n) has so many rows that nothing (m, m) is to be made of it, and fewer columns."""
    return matrix.shape[1] > max(matrix.shape[2], WIDE_OUTPUTS)


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Iterate over slices of the rows of a matrix (groups, m, n), so that a copy of some takes little memory."""
    step = max(1, _BLOCK // (len(matrix) * matrix.shape[2] or 1))
    for start in range(0, matrix.shape[1], step):
        yield slice(start, start + step)


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
