"""The best ranks for a budget of the whole model: the exact optimum over all layers, formats and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import BudgetError
from tenfold.knapsack import Allocation, solve
from tenfold.ranks.base import RULES, Choice, Choose, Keep, Limits, RankProblem, RankRule, Total, unreachable
from tenfold.ranks.candidates import Grid, grids, tail_damage

Array = NDArray[np.float64]


@RULES.register("global")
@dataclass(frozen=True)
class Global(RankRule):
    """Least damage to the whole network within its budgets: a multiple-choice knapsack, solved with a certificate.

    Every layer may stay as it is or take any of its formats at any rank of a grid. The damages of the layers add up:
    they are what the problem says of the data (see ``RankProblem.damage_at``), or without data the relative squared
    error of the weight, by the tails of its spectra.

    Attributes:
        step: of the grid of ranks; None for 8, which suits the hardware, and finer in small layers.
        gap: relative gap to the optimum that is good enough.
        time_limit: seconds that branch and bound may take.
    """

    step: int | None = None
    gap: float = 1e-3
    time_limit: float = 20.0

    by_damage: ClassVar[bool] = True

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the optimum within the limits."""
        if not limits:
            msg = "the rule global spends a budget: give one, such as macs=0.5"
            raise BudgetError(msg)
        names = list(limits)
        options = [_Options.of(p, self.step, names) for p in problems]
        least = [sum(float(o.costs[:, k].min()) for o in options) for k in range(len(names))]
        if any(low > limits[name] * (1 + 1e-9) for name, low in zip(names, least, strict=True)):
            total = Total.model_validate(dict(zip(names, least, strict=True)))
            raise BudgetError(unreachable(total, limits))
        best = solve(
            [o.damages for o in options],
            [o.costs for o in options],
            [limits[n] for n in names],
            gap=self.gap,
            time_limit=self.time_limit,
            names=names,
        )
        return tuple(o.choice(p, i, best) for p, o, i in zip(problems, options, best.choice, strict=True))


@dataclass(frozen=True, eq=False)
class _Options:
    """All that may happen to one layer, as rows: first to stay, then the grids of its formats."""

    grids: tuple[Grid, ...]
    damages: Array  # (n,)
    costs: Array  # (n, budgets)

    @classmethod
    def of(cls, problem: RankProblem, step: int | None, names: Sequence[str]) -> _Options:
        found = grids(problem, step=step)
        now = [problem.latency_ms or 0.0 if n == "latency" else getattr(problem.cost, n) for n in names]
        costs = np.concatenate([np.array([now], dtype=np.float64), *(_costs(problem, g, names) for g in found)])
        damages = np.concatenate([np.zeros(1), *(damages_of(problem, g) for g in found if len(g))])
        return cls(found, damages, costs)

    def choice(self, problem: RankProblem, index: int, best: Allocation) -> Choice:
        if index == 0:
            return Keep(best.stays)
        index -= 1
        for grid in self.grids:
            if index < len(grid):
                candidate = grid.candidate(index)
                damage = float(self.damages[1 + index + self._before(grid)])
                return Choose(candidate.format, candidate.rank, best.proof, damage)
            index -= len(grid)
        msg = f"option {index} of layer {problem.path!r} does not exist"
        raise IndexError(msg)

    def _before(self, grid: Grid) -> int:
        """Return how many options come before those of a grid."""
        return sum(len(g) for g in self.grids[: self.grids.index(grid)])


def _costs(problem: RankProblem, grid: Grid, names: Sequence[str]) -> Array:
    columns = [latencies_of(problem, grid) if name == "latency" else getattr(grid, name) for name in names]
    return np.stack(columns, axis=1).astype(np.float64)


def latencies_of(problem: RankProblem, grid: Grid) -> Array:
    """Return the milliseconds (n,) of a layer at each rank of a grid.

    Raises:
        BudgetError: there is no clock.
    """
    if problem.latency_at is None:
        msg = "a latency budget needs measured latencies: pass a clock to plan"
        raise BudgetError(msg)
    ranks = [dict(zip(grid.names, row, strict=True)) for row in grid.ranks.tolist()]
    return np.asarray(problem.latency_at(grid.format, ranks), dtype=np.float64)


def damages_of(problem: RankProblem, grid: Grid) -> Array:
    """Return the damage (n,) that each rank of a grid does: by the data where anything is known of them."""
    damage = tail_damage(problem, grid.format) if problem.damage_at is None else problem.damage_at(grid.format)
    return np.asarray(damage(grid.ranks), dtype=np.float64)
