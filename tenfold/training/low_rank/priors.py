"""Sparsifying priors on the bonds of a tensor train: a variance λ for every index of every bond, in closed form.

Hawkins and Zhang 2019 (arXiv 1905.10478) share λ between both cores of a bond and give it a Gamma prior; Hawkins, Liu
and Zhang 2020 (arXiv 2010.08689) give each λ the slices of one core, and √λ a log-uniform or half-Cauchy prior.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from tenfold.records import Record

Cores = Sequence[Tensor]
Variances = Sequence[Tensor]
SMALLEST = 1e-12  # λ of zero slices, so that logarithms and quotients stay finite


class RankPrior(abc.ABC):
    """p(cores, λ) of a train with cores (r, n, r') and a vector λ (r,) for each bond, up to a constant factor."""

    @abc.abstractmethod
    def negative_log(self, cores: Cores, variances: Variances) -> Tensor:
        """Return −log p(cores, λ), a scalar."""

    @abc.abstractmethod
    def optimum(self, cores: Cores, variances: Variances) -> tuple[Tensor, ...]:
        """Return the λ of least −log p by one sweep of coordinate descent over the bonds."""

    def scales(self, cores: Cores, variances: Variances) -> tuple[Tensor, ...] | None:
        """Return for each bond the factors c (r,) of least −log p: slices before it times c, slices after it over c.

        The dense tensor is unchanged. None if the prior depends on only one core of a bond.
        """
        del cores, variances
        return None


@dataclass(frozen=True)
class GammaPrior(RankPrior):
    """G_k(p, n, r) ~ N(0, λ_p λ'_r) and λ ~ Gamma(shape, rate); the outer cores have the λ of their only bond.

    Hawkins and Zhang 2019. λ of a bond is the positive root of rate·λ² + c·λ = S/2, with c = N/2 − shape + 1, N the
    number of entries in the two slices of the index, and S the sum of their squares, each over the λ of its other bond.

    Args:
        shape: a of the Gamma prior.
        rate: b of it; 0 for none, then λ = S/2c.

    Example:
        >>> cores = [torch.ones(1, 4, 2), torch.ones(2, 6, 1)]
        >>> GammaPrior(rate=0.0).optimum(cores, [torch.ones(2)])[0]  # the mean of the squares
        tensor([1., 1.])
    """

    shape: float = 1.0
    rate: float = 5.0

    def negative_log(self, cores: Cores, variances: Variances) -> Tensor:
        """Return Σ [G²/2λλ' + log(λλ')/2] − Σ [(shape − 1) log λ − rate·λ]."""
        total = cores[0].new_zeros(())
        ones = cores[0].new_ones(1)
        for core, left, right in zip(cores, [ones, *variances], [*variances, ones], strict=True):
            variance = left[:, None, None] * right
            total = total + (core.square() / variance).sum() / 2 + core.shape[1] * variance.log().sum() / 2
        for variance in variances:
            total = total - (self.shape - 1) * variance.log().sum() + self.rate * variance.sum()
        return total

    def optimum(self, cores: Cores, variances: Variances) -> tuple[Tensor, ...]:
        """Return the positive roots."""
        optimal = list(variances)
        for k in range(len(optimal)):
            before, after = self._sums(cores, optimal, k)
            entries = cores[k].shape[0] * cores[k].shape[1] + cores[k + 1].shape[1] * cores[k + 1].shape[2]
            c, s = entries / 2 - self.shape + 1, before + after
            # The same root without cancellation where the rate is small.
            optimal[k] = (s / (c + (c * c + 2 * self.rate * s).sqrt())).clamp(min=SMALLEST)
        return tuple(optimal)

    def scales(self, cores: Cores, variances: Variances) -> tuple[Tensor, ...]:
        """Return (B/A)^¼: both slices of an index then weigh the same, which is optimal by the AM–GM inequality."""
        balanced = list(cores)
        factors = []
        for k in range(len(variances)):
            before, after = self._sums(balanced, variances, k)
            fits = (before > SMALLEST) & (after > SMALLEST)
            c = torch.where(fits, after / before.clamp(min=SMALLEST), 1.0) ** 0.25
            balanced[k], balanced[k + 1] = balanced[k] * c, balanced[k + 1] / c[:, None, None]
            factors.append(c)
        return tuple(factors)

    def _sums(self, cores: Cores, variances: Variances, k: int) -> tuple[Tensor, Tensor]:
        """Return Σ G²/λ of the slices before and after bond k (r,), with the λ of their other bonds."""
        ones = cores[0].new_ones(1)
        left = variances[k - 1] if k else ones
        right = variances[k + 1] if k + 1 < len(variances) else ones
        return (cores[k].square() / left[:, None, None]).sum((0, 1)), (cores[k + 1].square() / right).sum((1, 2))


class _OneSided(RankPrior):
    """G_k(·, ·, r) ~ N(0, λ_r) for the slices before a bond; at the last bond also for those of the last core."""

    def negative_log(self, cores: Cores, variances: Variances) -> Tensor:
        """Return Σ [M/2λ + D log λ / 2] plus the prior of √λ; D entries with the sum of squares M."""
        total = cores[0].new_zeros(())
        for (squares, entries), variance in zip(_slices(cores), variances, strict=True):
            total = total + (squares / variance).sum() / 2 + entries * variance.log().sum() / 2 + self._hyper(variance)
        return total

    def optimum(self, cores: Cores, variances: Variances) -> tuple[Tensor, ...]:
        """Return the λ of least −log p, independent for each bond."""
        del variances
        return tuple(self._best(squares, entries).clamp(min=SMALLEST) for squares, entries in _slices(cores))

    @abc.abstractmethod
    def _hyper(self, variance: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _best(self, squares: Tensor, entries: int) -> Tensor: ...


@dataclass(frozen=True)
class LogUniformPrior(_OneSided):
    """Slices of variance λ with p(√λ) ∝ 1/√λ, which prefers no scale: λ = M/(D + 1). Hawkins, Liu and Zhang 2020.

    Example:
        >>> LogUniformPrior().optimum([torch.ones(1, 4, 2), torch.ones(2, 5, 1)], [torch.ones(2)])[0]
        tensor([0.9000, 0.9000])
    """

    def _hyper(self, variance: Tensor) -> Tensor:
        return variance.log().sum() / 2

    def _best(self, squares: Tensor, entries: int) -> Tensor:
        return squares / (entries + 1)


@dataclass(frozen=True)
class HalfCauchyPrior(_OneSided):
    """Slices of variance λ with √λ half-Cauchy of scale η. Hawkins, Liu and Zhang 2020.

    λ = [M − η²D + √(M² + (2D + 8)η²M + η⁴D²)]/(2D + 4).

    Args:
        eta: η; the smaller, the fewer indices stay.
    """

    eta: float = 0.01

    def _hyper(self, variance: Tensor) -> Tensor:
        return (self.eta**2 + variance).log().sum()

    def _best(self, squares: Tensor, entries: int) -> Tensor:
        m, d, e = squares, entries, self.eta**2
        return (m - e * d + (m * m + (2 * d + 8) * e * m + e * e * d * d).sqrt()) / (2 * d + 4)


def _slices(cores: Cores) -> list[tuple[Tensor, int]]:
    """Return for each bond the sums of squares M (r,) and the number of entries D of the slices under λ."""
    sums = [(core.square().sum((0, 1)), core.shape[0] * core.shape[1]) for core in cores[:-1]]
    last = cores[-1]
    squares, entries = sums[-1]
    sums[-1] = (squares + last.square().sum((1, 2)), entries + last.shape[1] * last.shape[2])
    return sums


class BayesianConfig(Record):
    """Low-rank prior on tensor trains, and its schedule.

    Attributes:
        samples: N, size of the training set: −log p of the cores is divided by it, as the loss is a mean.
        prior: "gamma" (2019: λ shared by both cores of a bond), "log_uniform" or "half_cauchy" (2020: λ of one core).
        shape: of the Gamma prior.
        rate: of the Gamma prior.
        eta: scale of the half-Cauchy prior.
        weight: power of the prior; 1 is the posterior itself, higher values drop more.
        warmup: steps without the prior: dropped indices never come back.
        ramp: steps over which it then grows linearly.
        enough: number of parameters of all trains together at which dropping and the prior stop; None for never. The
            indices of least λ go first.
        paced: drop by a schedule instead of the threshold: over the ramp the number of parameters falls to ``enough``,
            fast at first, the indices of least worth per parameter first.
        every: steps between updates of λ.
        damping: step of one update to the closed form, 1 for all the way.
        rotate: steps between changes to the basis in which the slices of every bond are orthogonal (``tt_canonical``);
            0 for never. The network is unchanged, and redundancy, which training spreads over all indices, shows up
            as indices of small weight.
        threshold: an index is dropped once its λ is below this share of the largest of its bond.

    Example:
        >>> BayesianConfig(samples=60_000).replace(prior="half_cauchy").eta
        0.01
    """

    samples: PositiveInt
    prior: Literal["gamma", "log_uniform", "half_cauchy"] = "log_uniform"
    shape: PositiveFloat = 1.0
    rate: NonNegativeFloat = 5.0
    eta: PositiveFloat = 0.01
    weight: PositiveFloat = 1.0
    warmup: NonNegativeInt = 0
    ramp: NonNegativeInt = 0
    enough: PositiveInt | None = None
    paced: bool = False
    every: PositiveInt = 10
    rotate: NonNegativeInt = 100
    damping: Annotated[float, Field(gt=0, le=1)] = 0.5
    threshold: Annotated[float, Field(ge=0, lt=1)] = 1e-3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.paced and (self.enough is None or not self.ramp):
            msg = "paced=True needs the number of parameters to end with, enough, and the steps to get there, ramp"
            raise ValueError(msg)
        return self

    def build(self) -> RankPrior:
        """Return the prior."""
        match self.prior:
            case "gamma":
                return GammaPrior(self.shape, self.rate)
            case "half_cauchy":
                return HalfCauchyPrior(self.eta)
        return LogUniformPrior()
