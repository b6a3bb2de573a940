"""The same compression for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tenfold.errors import TenfoldError
from tenfold.formats import Rank
from tenfold.ranks.base import RULES, Choice, Keep, OneKnobRule, RankProblem, first_saving


@RULES.register("ratio")
@dataclass(frozen=True)
class Ratio(OneKnobRule):
    """Constant rate: every layer keeps the same share of its parameters or MACs (MUSCO's rule "nx").

    The rank is the largest of the format's family that costs at most ``share`` of what the layer costs now. With a
    budget and no share, the share is found that meets the budget of the whole model.

    Attributes:
        share: in (0, 1); None to let a budget set it.
        of: what is shared, ``params`` or ``macs``.
    """

    share: float | None = None
    of: Literal["params", "macs"] = "macs"

    numbers: ClassVar[tuple[str, ...]] = ("share",)

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            msg = f"share={self.share} must be in (0, 1]: the part of each layer's {self.of} that stays"
            raise TenfoldError(msg)
        if self.of not in ("params", "macs"):
            msg = f"of={self.of!r} must be params or macs"
            raise TenfoldError(msg)

    def knob(self) -> float | None:
        """Return the share."""
        return self.share

    def choose(self, problem: RankProblem, knob: float) -> Choice:
        """Return the largest rank within the share; the smallest there is when even that costs more."""
        if knob >= 1:
            return Keep("all of the layer was asked for")
        if not getattr(problem.cost, self.of):
            return Keep(f"the layer has no {self.of} to save")
        allowed = knob * getattr(problem.cost, self.of)

        def largest(format: str) -> Rank | None:
            family = problem.family(format)
            fitting = [rank for rank, cost in family if getattr(cost, self.of) <= allowed and cost.below(problem.cost)]
            return fitting[-1] if fitting else family[0][0]

        return first_saving(problem, largest, f"at most {knob:.1%} of the layer's {self.of}")
