"""The same relative error for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from tenfold.errors import TenfoldError
from tenfold.formats import FORMATS, Rank
from tenfold.ranks.base import RULES, Choice, OneKnobRule, RankProblem, first_saving


@RULES.register("energy")
@dataclass(frozen=True)
class Energy(OneKnobRule):
    """Smallest ranks whose relative error stays below a bound, the same for all layers.

    Each unfolding may drop singular values worth rel_error²/n of ‖W‖², n the number of ranks; by the HOSVD bound the
    factorization then has ‖W − Ŵ‖ ≤ rel_error·‖W‖. Of sums of rank-one terms (CP), whose error no spectrum bounds,
    quick fits tell the smallest rank. With a budget and no bound, the bound is found that meets the budget (a uniform
    tolerance, as in PGSVD).

    Attributes:
        rel_error: bound in (0, 1); None to let a budget set it.
        energy: the same bound as the share of ‖W‖² to keep, 1 − rel_error²; give one of the two.
    """

    rel_error: float | None = None
    energy: float | None = None

    numbers: ClassVar[tuple[str, ...]] = ("rel_error", "energy")

    def __post_init__(self) -> None:
        if self.rel_error is not None and self.energy is not None:
            msg = "give rel_error or energy, not both"
            raise TenfoldError(msg)
        for name in ("rel_error", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                msg = f"{name}={value} must lie between 0 and 1"
                raise TenfoldError(msg)

    def knob(self) -> float | None:
        """Return the share of ‖W‖² to keep."""
        if self.energy is not None:
            return self.energy
        return None if self.rel_error is None else 1 - self.rel_error**2

    def choose(self, problem: RankProblem, knob: float) -> Choice:
        """Return the smallest ranks that keep the share ``knob`` of ‖W‖²."""

        def smallest(format: str) -> Rank:
            if not FORMATS.get(format).svd_bounds_error:
                return _smallest_fitted(problem, format, 1 - knob)
            spectra = problem.spectra(format)
            allowed = (1 - knob) / len(spectra)
            return {name: _rank_for_tail(values, allowed) for name, values in spectra.items()}

        return first_saving(problem, smallest, f"relative error at most {(1 - knob) ** 0.5:.3f}")


def _smallest_fitted(problem: RankProblem, format: str, allowed: float) -> Rank:
    """Return the first ranks of the family that quick fits find close enough; full rank where none are."""
    kind = FORMATS.get(format)
    family = kind.rank_family(problem.spec)
    errors = problem.fitted(format)(np.array([[rank[name] for name in kind.rank_names] for rank in family]))
    (enough,) = np.nonzero(errors <= allowed + 1e-13)
    return family[int(enough[0])] if len(enough) else family[-1]


def _rank_for_tail(values: Tensor, allowed: float) -> int:
    """Return the smallest rank ≥ 1 whose dropped squares are at most the share ``allowed`` of all squares."""
    squares = values.square()
    tails = squares.sum() - squares.cumsum(0)  # tails[r-1] is dropped at rank r
    # Rounding leaves about 1e-16 of the sum where nothing is dropped.
    enough = tails <= (allowed + 1e-13) * squares.sum()
    return int(enough.int().argmax()) + 1
