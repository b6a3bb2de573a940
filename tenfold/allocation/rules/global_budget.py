"""The best ranks for a budget of the whole model: the exact optimum over all layers, formats and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.allocation.knapsack import solve
from tenfold.allocation.rule import RULES, Choice, Factorize, Keep, Limits, RankRule, Total, UnreachableError
from tenfold.errors import BudgetError, RankError
from tenfold.records import LayerOptions


@RULES.register("global")
@dataclass(frozen=True)
class GlobalBudget(RankRule):
    """Least distortion of the whole network within its budgets: a multiple-choice knapsack, solved with a certificate.

    Every layer may stay as it is or take any of its formats at any rank of a grid. The distortions of the layers add
    up: what the network's output loses where data are known, or the relative squared error of the weight, by the tails
    of its spectra. Use it whenever there is a budget; it is the default.

    Attributes:
        step: of the grid of ranks; None for 8, which suits the hardware, and finer in small layers.
        gap: relative gap to the optimum that is good enough.
        time_limit: seconds that branch and bound may take.
    """

    step: int | None = None
    gap: float = 1e-3
    time_limit: float = 20.0

    def __post_init__(self) -> None:
        if self.step is not None and (isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 1):
            msg = f"step={self.step!r} must be a whole number from 1 on: ranks on the grid are its multiples"
            raise RankError(msg)

    @property
    def columns(self) -> tuple[str, ...]:
        """The distortion, which is minimised."""
        return ("distortion",)

    @property
    def tabulated_for(self) -> dict[str, Any]:
        """The step of the grid."""
        return {"step": self.step}

    @property
    def uses_units(self) -> bool:
        """It does: a unit is one more option beside those of its layers."""
        return True

    def select(self, layers: Sequence[LayerOptions], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the optimum within the limits."""
        if not limits:
            msg = "the rule global spends a budget: give one, such as macs=0.5"
            raise BudgetError(msg)
        names = list(limits)
        costs = [np.stack([layer.column(name) for name in names], axis=1) for layer in layers]
        least = {name: sum(float(c[:, k].min()) for c in costs) for k, name in enumerate(names)}
        if any(low > limits[name] * (1 + 1e-9) for name, low in least.items()):
            counted = {name: int(low) for name, low in least.items() if name != "latency"}
            total = Total(latency=least.get("latency", 0.0), **counted)
            raise UnreachableError(total, limits)
        best = solve(
            [layer.column("distortion") for layer in layers],
            costs,
            [limits[n] for n in names],
            gap=self.gap,
            time_limit=self.time_limit,
            names=names,
        )
        return tuple(Factorize(row, best.proof) if row else Keep(best.stays) for row in best.choice)
