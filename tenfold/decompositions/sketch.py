"""Second moments of very wide inputs, in memory that grows with the width and not with its square."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


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
        product: Tensor = left @ self.rows.mT @ self.rows + left * self.rest.unsqueeze(-2)
        return product

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
        own = torch.einsum("bcp,bcr,bcs->brsp", rest, v, v)  # the diagonal mixes no taps
        square = torch.diag_embed(own).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
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
        found: Tensor = torch.linalg.solve((inner + inner.mT) / 2, self.targets - self.rows @ weight.mT)
        return weight + found.mT @ scaled

    def missed(self, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return E‖y − T x‖² per output (groups, out/groups); what the rows do not hold is as if y were W x there."""
        off = weight - approximation
        if self.targets is None:
            return self.quadratic(off)
        far = self.targets - self.rows @ approximation.mT
        return far.square().sum(-2) + (off.square() @ self.rest.unsqueeze(-1)).squeeze(-1)
