"""Ranks given by hand, by layer name, glob or regular expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tenfold.errors import BudgetError
from tenfold.formats import FORMATS, Rank
from tenfold.ranks.base import RULES, Choice, Choose, Keep, Limits, RankProblem, RankRule, total_cost, within
from tenfold.ranks.patterns import check_patterns, first_match


@RULES.register("fixed")
@dataclass(frozen=True)
class Fixed(RankRule):
    """Ranks by layer: {pattern: rank}, where a rank is a number or {name: number}; the first matching pattern wins.

    A pattern is a path, a glob or ``re:`` and a regular expression. A plain number stands for all ranks of the format.
    Layers without a rank are kept. A budget is checked, not aimed at.
    """

    ranks: dict[str, int | dict[str, int]] = field(default_factory=dict)

    by_name: ClassVar[bool] = True

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the given ranks, each checked against its layer."""
        check_patterns(self.ranks, [p.path for p in problems])
        choices = tuple(self._choose(p) for p in problems)
        cost = total_cost(problems, choices)
        if limits and not within(cost, limits):
            msg = f"the fixed ranks cost {cost.params:,} parameters and {cost.macs:,} MACs, over the budget: lower them"
            raise BudgetError(msg)
        return choices

    def _choose(self, problem: RankProblem) -> Choice:
        pattern = first_match(self.ranks, problem.path)
        if pattern is None:
            return Keep("no rank was given for this layer")
        format = problem.formats[0]
        kind = FORMATS.get(format)
        given = self.ranks[pattern]
        rank: Rank = dict.fromkeys(kind.rank_names, given) if isinstance(given, int) else given
        rank = kind.check_rank(problem.spec, rank)
        if not problem.cost_at(format, rank).below(problem.cost):
            return Keep(f"{format} at the given rank would not make the layer cheaper")
        return Choose(format, rank, f"rank given for {pattern!r}")
