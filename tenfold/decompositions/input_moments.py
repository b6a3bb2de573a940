"""Second moments of a layer's inputs, from which the error of its output follows without running it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tenfold.decompositions.covariance import (
    NEGLIGIBLE,
    Covariance,
    Sketch,
    add_ridge,
    blocks,
    centred_square,
    channel_blocks,
    is_finite,
    pooled,
    quadratic,
    sandwich,
)
from tenfold.decompositions.dense_inputs import DenseInputs
from tenfold.decompositions.held_out import HeldOutCurve
from tenfold.decompositions.roots import Root, spd_solver
from tenfold.errors import WeightError
from tenfold.tensors import digest

# Keeps the weights of outputs that do not matter determined, as a share of the mean diagonal of ``output_gram``.
_OUTPUT_RIDGE = 1e-3

_BY_OUTPUT = ("cross", "target_mean", "target_power")


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of the inputs of one layer, and optionally of the outputs that it should produce.

    n = in/groups · prod(kernel) is the width of an input patch, its entries in the order (channel, tap), as in the
    flattened weight. All tensors are float64, with the groups first.

    Attributes:
        input_second_moment: E[x xᵀ] (groups, n, n), not centred; of very wide layers a ``Sketch``, which holds the
            targets too.
        mean: E[x] (groups, n).
        count: rows (patches) that were averaged.
        cross: E[y xᵀ] (groups, out/groups, n) with the outputs y, bias not included, that the layer should produce.
            Given when x comes from an already compressed model and y from the dense one, as in the asymmetric
            reconstruction of Zhang et al. 2015; None where y is what the weight makes of x, and beside a sketch.
        target_mean: E[y] (groups, out/groups), with targets.
        target_power: E[y²] (groups, out/groups), with targets.
        before: what entered the layer in the dense model, if y is what the weight makes of it: in place of the targets.
        output_gram: (groups, out/groups, out/groups), positive semidefinite: an error e of the outputs counts as
            eᵀ·output_gram·e (for one, the second moment of the gradients there: G of K-FAC); None for ‖e‖². Of very
            many outputs a ``Sketch``.
        held_out: what a distortion by these moments is on samples that were not fitted; None where nobody measured.

    Example:
        >>> x = torch.randn(500, 6, dtype=torch.float64)
        >>> Moments.of(x).input_second_moment.shape
        torch.Size([1, 6, 6])
    """

    input_second_moment: Covariance
    mean: Tensor
    count: int
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    target_power: Tensor | None = None
    before: DenseInputs | None = None
    output_gram: Covariance | None = None
    held_out: HeldOutCurve | None = None

    def __repr__(self) -> str:
        groups, width = self.mean.shape
        return f"<Moments of {self.count:,} rows of {f'{groups} × ' if groups > 1 else ''}{width}>"

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor | None = None) -> Self:
        """Return the moments of the rows of a matrix (count, n), or (groups, count, n), and of targets beside them."""
        x = rows.double() if rows.dim() == 3 else rows.double()[None]
        count = x.shape[1]
        moments = cls(x.mT @ x / count, x.mean(1), count)
        if targets is None:
            return moments
        y = targets.double() if targets.dim() == 3 else targets.double()[None]
        return moments.replace(cross=y.mT @ x / count, target_mean=y.mean(1), target_power=y.square().mean(1))

    def replace(self, **changes: Covariance | DenseInputs | HeldOutCurve | int | None) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def pooled(self, other: Moments, square: Covariance | None = None) -> Self:
        """Return the moments of the rows of both, which are of one layer and without targets.

        ``square`` is the second moment of both, where it is known from another layer with these inputs.
        """
        own, gram = self.count / (self.count + other.count), self.output_gram
        if square is None:
            square = pooled(self.input_second_moment, other.input_second_moment, own)
        if gram is not None and other.output_gram is not None:
            gram = pooled(gram, other.output_gram, own)
        mean = own * self.mean + (1 - own) * other.mean
        return self.replace(input_second_moment=square, mean=mean, count=self.count + other.count, output_gram=gram)

    @property
    def judged(self) -> bool:
        """Whether distortions by these moments mean anything for the outputs, as far as anybody has tried."""
        return self.held_out is None or self.held_out.known

    @property
    def width(self) -> int:
        """Entries n of an input patch."""
        return self.mean.shape[-1]

    def to(self, device: torch.device | str) -> Self:
        """Return the moments on another device."""
        parts = (Covariance, DenseInputs)
        return self.replace(**{k: v.to(device) for k, v in vars(self).items() if isinstance(v, parts)})

    def digest(self) -> str:
        """Return a hash of all values, as a cache key."""
        parts = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name, value in vars(self).items():
            if isinstance(value, Sketch | DenseInputs):
                parts |= {f"{name}.{part}": tensor for part, tensor in value.tensors().items()}
        return digest(parts, str(self.count))

    def check(self, group_shape: tuple[int, ...]) -> None:
        """Check that the moments belong to a weight (groups, out/groups, in/groups, *kernel).

        Raises:
            WeightError: the shapes differ, or a moment is not finite.
        """
        groups, out, *rest = group_shape
        width = torch.Size(rest).numel()
        shapes = {
            "input_second_moment": (groups, width, width),
            "mean": (groups, width),
            "cross": (groups, out, width),
            "target_mean": (groups, out),
            "target_power": (groups, out),
            "output_gram": (groups, out, out),
        }
        values = {name: getattr(self, name) for name in shapes}
        for name, value in () if self.before is None else self.before.tensors().items():
            values[f"{name} of the dense inputs"] = value
            shapes[f"{name} of the dense inputs"] = (groups, width) if name == "mean" else (groups, width, width)
        for name, shape in shapes.items():
            value = values[name]
            if value is not None and tuple(value.shape) != shape:
                msg = f"the moments have {name} of shape {tuple(value.shape)}, this layer needs {shape}"
                raise WeightError(msg)
            if value is not None and not is_finite(value):
                msg = f"{name} of the moments is not finite: check the calibration batches"
                raise WeightError(msg)

    def covariance(self, ridge: float = 0.0) -> Covariance:
        """Return E[(x−x̄)(x−x̄)ᵀ] + ridge·(mean variance)·I, (groups, n, n): the bias of the layer absorbs the mean.

        Without any variance at all (inputs that never change) it is the identity, if ``ridge`` > 0.
        """
        if isinstance(self.input_second_moment, Sketch):
            return add_ridge(self.input_second_moment.centred(self.mean, self.target_mean), ridge)
        return add_ridge(centred_square(self.input_second_moment, self.mean), ridge)

    def channel_covariance(self, taps: int) -> Tensor:
        """Return the covariance of the input channels alone (groups, n/taps, n/taps), averaged over the taps."""
        return channel_blocks(self.covariance(), taps)

    def uncentered(self) -> Self:
        """Return moments about zero instead of the mean, for layers without a bias to absorb the shift of the mean."""
        none = None if self.target_mean is None else torch.zeros_like(self.target_mean)
        before = None if self.before is None else self.before.uncentered()
        return self.replace(mean=torch.zeros_like(self.mean), target_mean=none, before=before)

    def regression_target(self, weight: Tensor, ridge: float = 0.0, *, out: Tensor | None = None) -> Tensor:
        """Return the best unconstrained weights (groups, out/groups, n): the given ones, unless there are targets.

        With targets it is the regression of y on x, drawn to ``weight`` where the data say nothing: the minimiser of
        E‖y − T x‖² + ridge·(mean variance)·‖T − weight‖². It may be written to ``out``, such as the weight itself.
        """
        if self.target_mean is None and self.before is None:
            return weight
        plain = self.covariance()
        if isinstance(plain, Sketch):
            return plain.regression(weight, add_ridge(plain, max(ridge, NEGLIGIBLE)).rest, out=out)
        found = torch.empty_like(weight) if out is None else out
        solve = spd_solver(add_ridge(plain, ridge))
        if self.before is not None:
            turn = solve((self.before.centred_cross(self.mean) - plain).mT).mT.to(weight.dtype)
            for rows in blocks(weight):
                found[:, rows] = weight[:, rows].baddbmm(weight[:, rows], turn)
            return found
        for rows in blocks(weight):
            own = weight[:, rows].double()
            missed = self._centred_cross(rows).baddbmm_(own, plain, alpha=-1)
            found[:, rows] = own + solve(missed.mT).mT
        return found

    def _centred_cross(self, rows: slice) -> Tensor:
        """Return E[(y−ȳ)(x−x̄)ᵀ] (groups, rows, n) of some of the outputs."""
        if self.cross is None or self.target_mean is None:
            msg = "moments with the means of targets need cross as well"
            raise WeightError(msg)
        return torch.baddbmm(
            self.cross[:, rows], self.target_mean[:, rows].unsqueeze(-1), self.mean.unsqueeze(-2), alpha=-1
        )

    def errors(self, weight: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error E‖y−ŷ‖² and the power E‖y−ȳ‖² of the outputs, per output (groups, out/groups).

        The means of y and ŷ agree, because the bias absorbs their difference. Both weights are (groups, out/groups, n).
        """
        covariance = self.covariance()
        if self.before is not None:
            power = quadratic(weight, self.before.covariance())
            mixed = (weight @ self.before.centred_cross(self.mean) * approximation).sum(-1)
            return (power - 2 * mixed + quadratic(approximation, covariance)).clamp_min(0), power
        if self.target_mean is None or self.target_power is None:
            return quadratic(weight - approximation, covariance), quadratic(weight, covariance)
        power = self.target_power - self.target_mean.square()
        if isinstance(covariance, Sketch):
            return covariance.missed(weight, approximation), power
        mixed = (self._centred_cross(slice(None)) * approximation).sum(-1)
        return (power - 2 * mixed + quadratic(approximation, covariance)).clamp_min(0), power

    def of_outputs(self, rows: slice) -> Self:
        """Return the moments of some of the outputs of each group, without ``output_gram``."""
        own = {name: value[:, rows] for name in _BY_OUTPUT if (value := getattr(self, name)) is not None}
        second = self.input_second_moment
        if isinstance(second, Sketch) and second.targets is not None:
            second = dataclasses.replace(second, targets=second.targets[:, :, rows])
        return self.replace(input_second_moment=second, output_gram=None, **own)

    def distortion(self, weight: Tensor, approximation: Tensor) -> float:
        """Return tr(G Δ C Δᵀ) over all groups: Δ the error against the regression target, G ``output_gram`` or I."""
        target, covariance = self.regression_target(weight, NEGLIGIBLE), self.covariance()
        if isinstance(self.output_gram, Tensor):
            weighed = (sandwich(target - approximation, covariance) * self.output_gram).sum()
            return max(float(weighed), 0.0)  # below 0 by rounding, where inputs hardly vary
        gram, total, seen = self.output_gram, target.new_zeros(()), None
        for rows in blocks(target):
            delta = target[:, rows] - approximation[:, rows]
            each = quadratic(delta, covariance)
            if gram is None:
                total = total + each.sum()
                continue
            total = total + (each * gram.rest[:, rows]).sum()
            part = gram.rows[:, :, rows] @ delta
            seen = part if seen is None else seen + part
        return max(float(total if seen is None else total + quadratic(seen, covariance).sum()), 0.0)

    def output_root(self) -> Root | None:
        """Return a root of ``output_gram``: times that all output errors count alike. None without one.

        Outputs that do not matter at all still count a little: see ``_OUTPUT_RIDGE``.
        """
        return None if self.output_gram is None else Root.of(self.ridged_gram())

    def ridged_gram(self) -> Covariance:
        """Return ``output_gram`` with what keeps outputs that do not matter from being free.

        Raises:
            WeightError: there is none.
        """
        if self.output_gram is None:
            msg = "these moments have no output_gram: errors of the outputs were not weighed"
            raise WeightError(msg)
        return add_ridge(self.output_gram, _OUTPUT_RIDGE)

    def bias_shift(self, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return what to add to the bias so that the mean output is as it should be (groups, out/groups)."""
        known = self.mean if self.before is None else self.before.mean
        mean = self.target_mean if self.target_mean is not None else (weight @ known.unsqueeze(-1)).squeeze(-1)
        return mean - (approximation @ self.mean.unsqueeze(-1)).squeeze(-1)
