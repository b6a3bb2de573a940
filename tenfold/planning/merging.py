"""Ranks at which a layer would run one stage more than it need: two of its stages, multiplied out, cost less."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from tenfold.formats import FORMATS, Rank
from tenfold.ranks import Choice, Choose, RankProblem

MOST_NAMES = 4  # beyond, there are too many combinations to try


def without_idle_stages(problem: RankProblem, choice: Choice) -> Choice:
    """Return the choice with some ranks made full, where the layer then costs less and holds as much or more.

    A rank near full leaves a factor that costs more than it saves: 64 → 62 → 20 channels, 1×1 and then 3×3, take more
    multiplications than 64 → 20 at once. At full rank the format leaves that factor out, which is the two stages
    multiplied out, exactly, and what the factor had dropped comes back for nothing. Neither parameters, multiply-
    accumulates nor, where there is a clock, milliseconds grow.
    """
    if not isinstance(choice, Choose) or len(FORMATS.get(choice.format).rank_names) > MOST_NAMES:
        return choice
    best, cost = choice, problem.cost_at(choice.format, choice.rank)
    for rank in _fuller(problem, choice):
        found, now = Choose(choice.format, rank, choice.note, choice.damage), problem.cost_at(choice.format, rank)
        if now.below(cost) and problem.latency(found) <= problem.latency(best):
            best, cost = found, now
    return best if best is choice else _told(problem, best, choice.rank)


def _fuller(problem: RankProblem, choice: Choose) -> Iterator[Rank]:
    """Iterate over the ranks of which one or more that are not full are made so."""
    most = FORMATS.get(choice.format).max_rank(problem.spec)
    rank = most | choice.rank
    partial = [name for name in most if rank[name] < most[name]]
    for size in range(1, len(partial) + 1):
        for names in combinations(partial, size):
            yield rank | {name: most[name] for name in names}


def _told(problem: RankProblem, found: Choose, before: Rank) -> Choose:
    """Return the choice with its own damage, and what was done as a part of its reason."""
    damage = found.damage
    if damage is not None and problem.damage_at is not None:
        names = FORMATS.get(found.format).rank_names
        damage = float(problem.damage_at(found.format)(np.array([[found.rank[name] for name in names]]))[0])
    changed = ", ".join(f"{name} {before[name]}" for name in before if before[name] != found.rank[name])
    return Choose(found.format, found.rank, f"{found.note}; {changed} made full: cheaper without that factor", damage)
