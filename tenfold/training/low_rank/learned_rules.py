"""Planning rules behind learned ranks: the C-step of the LC algorithm, and ranks that training has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import BudgetError
from tenfold.knapsack import solve
from tenfold.ranks import Choice, Choose, Keep, Limits, RankProblem, RankRule
from tenfold.ranks.base import unreachable
from tenfold.ranks.candidates import grids
from tenfold.records import Cost

CostName = Literal["params", "macs"]
NOT_WORTH_IT = "learned: what it would save is worth less than what it would lose"


@dataclass(frozen=True)
class PenalizedRank(RankRule):
    """The C-step of the LC algorithm: r* = argmin λ·C(r) + ρ/2 · Σ_{i>r} σ_i², exact, each layer alone.

    σ are the singular values of the weight in one of its formats, all of whose ranks are tried (Idelbayev and
    Carreira-Perpiñán, CVPR 2020, theorem 1); C is the layer's share of the model's cost, or its dense cost where the
    layer stays dense. Under limits the knapsack chooses instead: least Σ ρ/2 · Σ_{i>r} σ_i² within them.

    Attributes:
        cost_weight: λ, in units of the loss for the whole model; required without limits.
        cost: the cost that C counts, without limits.
        strengths: ρ by path; 1 by default.
        whole: cost of the model by name, of which C is a share; that of the eligible layers by default.
    """

    cost_weight: float | None = None
    cost: CostName = "macs"
    strengths: Mapping[str, float] = field(default_factory=dict)
    whole: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def name(cls) -> str:
        """Return ``lc``, its name in plans."""
        return "lc"

    def to_dict(self) -> dict[str, Any]:
        """Return the entries for the plan: name, λ and cost."""
        return {"name": self.name(), "cost_weight": self.cost_weight, "cost": self.cost}

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the best rank of each layer at the price λ, or within the limits."""
        names = list(limits) if limits else [self.cost]
        rows = [_Rows.of(p, names, self.strengths.get(p.path, 1.0)) for p in problems]
        if limits:
            picks = _within(rows, limits)
        elif self.cost_weight is None:
            msg = "learned ranks need a price of cost or a budget: give cost_weight, or a budget such as macs=0.5"
            raise BudgetError(msg)
        else:
            whole = self.whole.get(self.cost) or sum(getattr(p.cost, self.cost) for p in problems)
            price = self.cost_weight / max(whole, 1)
            picks = tuple(int((own.losses + price * own.costs[:, 0]).argmin()) for own in rows)
        return tuple(own.choices[pick] for own, pick in zip(rows, picks, strict=True))


@dataclass(frozen=True, eq=False)
class _Rows:
    """The options of one layer as rows: staying dense, then every rank of every format."""

    choices: tuple[Choice, ...]
    losses: NDArray[np.float64]  # (n,) ρ/2 · dropped energy
    costs: NDArray[np.float64]  # (n, names)

    @classmethod
    def of(cls, problem: RankProblem, names: Sequence[str], strength: float) -> _Rows:
        choices: list[Choice] = [Keep(NOT_WORTH_IT)]
        losses, costs = [np.zeros(1)], [np.array([[float(getattr(problem.cost, n)) for n in names]])]
        for grid in grids(problem, step=1):
            energy = problem.spectra(grid.format)["rank"].square().numpy()
            tails = np.append(energy[::-1].cumsum()[::-1], 0.0)  # the energy that ranks 0, 1, ... drop
            ranks = grid.ranks[:, 0]
            losses.append(0.5 * strength * tails[ranks])
            costs.append(np.stack([getattr(grid, n) for n in names], axis=1).astype(np.float64))
            shares = tails[ranks] / max(tails[0], 1e-30)
            choices += [
                Choose(grid.format, {"rank": int(r)}, f"learned: drops {100 * s:.2g} % of the energy", float(s))
                for r, s in zip(ranks, shares, strict=True)
            ]
        return cls(tuple(choices), np.concatenate(losses), np.concatenate(costs))


def _within(rows: Sequence[_Rows], limits: Limits) -> tuple[int, ...]:
    least = {name: sum(float(own.costs[:, k].min()) for own in rows) for k, name in enumerate(limits)}
    if any(least[name] > limit for name, limit in limits.items()):
        raise BudgetError(unreachable(Cost(**{name: round(value) for name, value in least.items()}), limits))
    return solve(
        [own.losses for own in rows], [own.costs for own in rows], list(limits.values()), names=list(limits)
    ).choice


@dataclass(frozen=True)
class FoundRanks(RankRule):
    """Choices made elsewhere, by path; all other layers are kept.

    Attributes:
        source: the name of the rule in the plan.
        choices: by path of the layer.
        otherwise: reason of all other layers.
    """

    source: str
    choices: Mapping[str, Choice]
    otherwise: str

    def to_dict(self) -> dict[str, Any]:
        """Return the name of the source."""
        return {"name": self.source}

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the choices; whoever made them respected the limits."""
        del limits
        return tuple(self.choices.get(p.path, Keep(self.otherwise)) for p in problems)
