"""What is believed of the ranks of tensor trains before the data is seen."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tenfold.records import Record
from tenfold.tuning.rank_priors import GammaPrior, HalfCauchyPrior, LogUniformPrior, RankPrior


class BayesianConfig(Record):
    """What is believed of the ranks, and when it counts.

    Attributes:
        samples: N, size of the training set: −log p of the cores is divided by it, as the loss is a mean.
        prior: "gamma" (2019: λ shared by both cores of a bond), "log_uniform" or "half_cauchy" (2020: of one core).
        shape: of the Gamma prior.
        rate: of the Gamma prior.
        eta: scale of the half-Cauchy prior.
        weight: power of the prior; 1 is the posterior itself, more drops more.
        warmup: steps without the prior: what is dropped too early never comes back.
        ramp: steps over which it then grows in a straight line.
        enough: number of parameters of all trains together at which dropping stops and the prior with it; None for
            never. What the prior likes least goes first.
        paced: drop by a timetable instead of the threshold: over the ramp the number of parameters falls to ``enough``,
            fast at first, by what is worth least for its parameters.
        every: steps from one update of λ to the next.
        damping: share of the way to the closed form that one update goes.
        rotate: steps from one change of basis to the next, into that in which the slices of every bond are orthogonal
            (``tt_canonical``); 0 for never. The network stays the same, and what is not needed, which training alone
            spreads over all indices for long, shows as indices of little weight.
        threshold: an index is dropped whose λ falls below this share of the largest one in its bond.

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
