"""What data say about a layer: moments of its inputs, and the measure of output errors that follows from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from tenfold.decompositions.sketch import Sketch
from tenfold.errors import WeightError
from tenfold.tensors import digest

# A positive semidefinite matrix (groups, n, n): as it is, or as a sketch where it would not fit into memory. Of both,
# ``A @ square`` is the product.
Square = Tensor | Sketch
SquareT = TypeVar("SquareT", Tensor, Sketch, Square)

# Directions with less than this share of the largest eigenvalue carry no data, only rounding.
NEGLIGIBLE = 1e-10


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of what enters one layer, and optionally of what should leave it.

    n = in/groups · prod(kernel) is the width of an input patch, its entries in the order (channel, tap), as in the
    flattened weight. All tensors are float64, with the groups first.

    Attributes:
        second: E[x xᵀ] (groups, n, n), not centred; of very wide layers a ``Sketch``, which holds the targets too.
        mean: E[x] (groups, n).
        count: rows (patches) that were averaged.
        cross: E[y xᵀ] (groups, out/groups, n) with the outputs y, bias not included, that the layer should produce.
            Given when x comes from an already compressed model and y from the dense one, as in the asymmetric
            reconstruction of Zhang et al. 2015; None where y is what the weight makes of x, and beside a sketch.
        target_mean: E[y] (groups, out/groups), with targets.
        target_power: E[y²] (groups, out/groups), with targets.
        output: (groups, out/groups, out/groups), positive semidefinite: how much the network minds an error e of the
            outputs, eᵀ·output·e (the second moment of the gradients there, for one); None for ‖e‖².

    Example:
        >>> x = torch.randn(500, 6, dtype=torch.float64)
        >>> Moments.of(x).second.shape
        torch.Size([1, 6, 6])
    """

    second: Square
    mean: Tensor
    count: int
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    target_power: Tensor | None = None
    output: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor | None = None) -> Self:
        """Return the moments of the rows of a matrix (count, n), or (groups, count, n), and of targets beside them."""
        x = rows.double() if rows.dim() == 3 else rows.double()[None]
        count = x.shape[1]
        own = cls(x.mT @ x / count, x.mean(1), count)
        if targets is None:
            return own
        y = targets.double() if targets.dim() == 3 else targets.double()[None]
        return own.replace(cross=y.mT @ x / count, target_mean=y.mean(1), target_power=y.square().mean(1))

    def replace(self, **changes: Square | int | None) -> Self:
        """Return a copy in which these fields are others."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Entries n of an input patch."""
        return self.mean.shape[-1]

    def to(self, device: torch.device | str) -> Self:
        """Return the moments on another device."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.replace(**{k: v.to(device) for k, v in own.items() if isinstance(v, Square)})

    def digest(self) -> str:
        """Return what tells these moments from all others."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        for name, value in held.items():
            if isinstance(value, Sketch):
                parts |= {f"{name}.{part}": tensor for part, tensor in value.tensors().items()}
        return digest(parts, str(self.count))

    def check(self, group_shape: tuple[int, ...]) -> None:
        """Refuse moments that do not belong to a weight (groups, out/groups, in/groups, *kernel).

        Raises:
            WeightError: the shapes differ, or a moment is not finite.
        """
        groups, out, *rest = group_shape
        width = torch.Size(rest).numel()
        wanted = {
            "second": (groups, width, width),
            "mean": (groups, width),
            "cross": (groups, out, width),
            "target_mean": (groups, out),
            "target_power": (groups, out),
            "output": (groups, out, out),
        }
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                msg = f"the moments have {name} of shape {tuple(value.shape)}, this layer needs {shape}"
                raise WeightError(msg)
            if value is not None and not is_finite(value):
                msg = f"{name} of the moments is not finite: check the calibration batches"
                raise WeightError(msg)

    def covariance(self, ridge: float = 0.0) -> Square:
        """Return E[(x−x̄)(x−x̄)ᵀ] + ridge·(mean variance)·I, (groups, n, n): the bias of the layer absorbs the mean.

        Without any variance at all (inputs that never change) it is the identity, if ``ridge`` > 0.
        """
        if isinstance(self.second, Sketch):
            return ridged(self.second.centred(self.mean, self.target_mean), ridge)
        centred = self.second - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)
        return ridged((centred + centred.mT) / 2, ridge)

    def channel_covariance(self, taps: int) -> Tensor:
        """Return the covariance of the input channels alone (groups, n/taps, n/taps), averaged over the taps."""
        return channel_blocks(self.covariance(), taps)

    def about_zero(self) -> Self:
        """Return moments about zero instead of the mean, for a layer without a bias to take the shift of the mean."""
        none = None if self.target_mean is None else torch.zeros_like(self.target_mean)
        return self.replace(mean=torch.zeros_like(self.mean), target_mean=none)

    def goal(self, weight: Tensor, ridge: float = 0.0) -> Tensor:
        """Return the best unconstrained weights (groups, out/groups, n): the given ones, unless there are targets.

        With targets it is the regression of y on x, drawn to ``weight`` where the data say nothing: the minimiser of
        E‖y − T x‖² + ridge·(mean variance)·‖T − weight‖².
        """
        if self.target_mean is None:
            return weight
        plain = self.covariance()
        if isinstance(plain, Sketch):
            return plain.regression(weight, ridged(plain, max(ridge, NEGLIGIBLE)).rest)
        if self.cross is None:
            return weight
        centred = self.cross - self.target_mean.unsqueeze(-1) * self.mean.unsqueeze(-2)
        return weight + solve_spd(ridged(plain, ridge), (centred - weight @ plain).mT).mT

    def errors(self, weight: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error E‖y−ŷ‖² and the power E‖y−ȳ‖² of the outputs, per output (groups, out/groups).

        The means of y and ŷ agree, because the bias absorbs their difference. Both weights are (groups, out/groups, n).
        """
        covariance = self.covariance()
        if self.target_mean is None or self.target_power is None:
            return quadratic(weight - approximation, covariance), quadratic(weight, covariance)
        power = self.target_power - self.target_mean.square()
        if isinstance(covariance, Sketch):
            return covariance.missed(weight, approximation), power
        if self.cross is None:
            msg = "moments with the means of targets need cross as well"
            raise WeightError(msg)
        centred = self.cross - self.target_mean.unsqueeze(-1) * self.mean.unsqueeze(-2)
        mixed = (centred * approximation).sum(-1)
        return (power - 2 * mixed + quadratic(approximation, covariance)).clamp_min(0), power

    def damage(self, weight: Tensor, approximation: Tensor) -> float:
        """Return tr(output · Δ · covariance · Δᵀ) over all groups, Δ the error against the goal; output I if None."""
        delta = self.goal(weight, NEGLIGIBLE) - approximation
        square = sandwich(delta, self.covariance())
        return float((square.diagonal(dim1=-2, dim2=-1) if self.output is None else square * self.output).sum())

    def bias_shift(self, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return what to add to the bias so that the mean output is as it should be (groups, out/groups)."""
        wanted = self.target_mean if self.target_mean is not None else (weight @ self.mean.unsqueeze(-1)).squeeze(-1)
        return wanted - (approximation @ self.mean.unsqueeze(-1)).squeeze(-1)


def ridged(square: SquareT, ridge: float) -> SquareT:
    """Return the symmetric matrices (..., n, n) plus ridge·(mean of the diagonal)·I; I itself for a zero matrix."""
    if ridge <= 0:
        return square
    level = mean_variance(square)
    level = torch.where(level > 0, level * ridge, torch.ones_like(level))
    if isinstance(square, Sketch):
        return square.plus(level)
    return square + torch.diag_embed(level.unsqueeze(-1).expand(square.shape[:-1]))


def sandwich(matrix: Tensor, square: Square) -> Tensor:
    """Return A C Aᵀ (groups, m, m) for A (groups, m, n)."""
    return square.sandwich(matrix) if isinstance(square, Sketch) else matrix @ square @ matrix.mT


def mean_variance(square: Square) -> Tensor:
    """Return the mean of the diagonal (...,) of matrices (..., n, n)."""
    return (square.diagonal() if isinstance(square, Sketch) else square.diagonal(dim1=-2, dim2=-1)).mean(-1)


def channel_blocks(square: Square, taps: int) -> Tensor:
    """Return the mean (groups, n/taps, n/taps) over the taps of the blocks of channels that belong to one tap."""
    if isinstance(square, Sketch):
        return square.channels(taps)
    blocks = square.unflatten(-1, (-1, taps)).unflatten(-3, (-1, taps))  # (groups, c, k, c, k)
    averaged: Tensor = blocks.diagonal(dim1=-3, dim2=-1).mean(-1)
    return averaged


def is_finite(square: Square) -> bool:
    """Whether no entry is NaN or infinite."""
    if isinstance(square, Sketch):
        return all(bool(torch.isfinite(t.sum(-1)).all()) for t in square.tensors().values())
    return bool(torch.isfinite(square).all())


def quadratic(rows: Tensor, square: Square) -> Tensor:
    """Return wᵀ A w for each row w of (..., m, n), clamped at 0: (..., m)."""
    found = square.quadratic(rows) if isinstance(square, Sketch) else (rows @ square * rows).sum(-1)
    return found.clamp_min(0)


def roots(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of a positive semidefinite matrix (..., n, n) and the pseudo-inverse of that root.

    By eigenvectors, not by Cholesky, which fails on the singular matrices that ReLU and few data make. Eigenvalues
    below 1e-10 of the largest count as zero.

    Example:
        >>> root, inverse = roots(torch.diag(torch.tensor([4.0, 0.0])).double())
        >>> root.diagonal().tolist(), inverse.diagonal().tolist()
        ([2.0, 0.0], [0.5, 0.0])
    """
    values, vectors = torch.linalg.eigh(square)
    kept = values > NEGLIGIBLE * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = torch.where(kept, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(kept, 1 / root, torch.zeros_like(values))
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def solve_spd(square: Tensor, right: Tensor) -> Tensor:
    """Return A⁻¹ B for positive semidefinite A (..., n, n) and B (..., n, m), by eigenvectors where Cholesky fails."""
    lower, failed = torch.linalg.cholesky_ex(square)
    if not bool(failed.any()) and bool(_well_posed(lower)):
        return torch.cholesky_solve(right, lower)
    _, inverse = roots(square)
    return inverse @ (inverse @ right)


def _well_posed(lower: Tensor) -> Tensor:
    diagonal = lower.diagonal(dim1=-2, dim2=-1).square()
    return (diagonal.amin(-1) > NEGLIGIBLE * diagonal.amax(-1)).all()
