"""Ranks that training found, as a rule: what makes a plan of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.ranks import Choice, Keep, Limits, RankProblem, RankRule


@dataclass(frozen=True)
class FoundRanks(RankRule):
    """Choices that were made already, by path; all other layers are kept for a reason.

    Attributes:
        source: what found them, the name of the rule in the plan.
        choices: by path of the layer.
        otherwise: why all others stay.
    """

    source: str
    choices: Mapping[str, Choice]
    otherwise: str

    def to_dict(self) -> dict[str, Any]:
        """Return the name of what found the ranks."""
        return {"name": self.source}

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the choices; limits were respected by whoever made them."""
        del limits
        return tuple(self.choices.get(p.path, Keep(self.otherwise)) for p in problems)
