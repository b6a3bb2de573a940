"""What layers may cost together under a budget of the whole model, and how little they can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tenfold.errors import BudgetError
from tenfold.exploring.tables import Table
from tenfold.records import Budget, Cost, ForwardTime

WORDS = {"params": "parameters", "macs": "MACs", "latency": "time"}


@dataclass(frozen=True, eq=False)
class Ledger:
    """Budgets of a model, reckoned as ``plan`` does.

    Attributes:
        before: cost of the model as it is.
        tables: of the layers that there is a choice for, by path.
        time: of a forward; None without a clock.
    """

    before: Cost
    tables: Mapping[str, Table]
    time: ForwardTime | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a budget can be of: of what the model has any, and of latency where there was a clock."""
        counted = [kind for kind in ("params", "macs") if getattr(self.before, kind)]
        return (*counted, "latency") if self.time is not None else tuple(counted)

    def rest(self, kind: str) -> float:
        """Return what no choice changes: layers that are kept for other reasons, and what is no layer at all."""
        whole = self._clock().whole_ms if kind == "latency" else float(getattr(self.before, kind))
        return whole - sum(float(table.columns[kind][0]) for table in self.tables.values())

    def share(self, kind: str, used: float) -> float:
        """Return what share of the model's cost it is if the layers that there is a choice for use so much."""
        total = self.rest(kind) + used
        return self._clock().share(total) if kind == "latency" else total / (float(getattr(self.before, kind)) or 1.0)

    def least(self, kind: str, fixed: Mapping[str, int] | None = None) -> float:
        """Return the least that the layers can use, with some of them fixed to a row."""
        return sum(float(t.only((fixed or {}).get(path)).columns[kind].min()) for path, t in self.tables.items())

    def limits(self, budget: Budget, fixed: Mapping[str, int] | None = None) -> dict[str, float]:
        """Return what the layers may use together, by name, in the order in which ``plan`` asks.

        Args:
            budget: of the whole model.
            fixed: rows of layers that are not to be chosen, by path.

        Raises:
            BudgetError: it is out of reach, or of a latency without a clock.
        """
        found: dict[str, float] = {}
        if budget.latency is not None:
            time = self._clock()
            allowed = budget.allowance(self.before, time.dense_ms)["latency"]
            found["latency"] = time.allowed(allowed / time.dense_ms) - self.rest("latency")
        for name, allowed in budget.replace(latency=None).allowance(self.before).items():
            found[name] = allowed - self.rest(name)
        for name, limit in found.items():
            low = self.least(name, fixed)
            if low > limit * (1 + 1e-9) and low - limit > 1e-9:
                beside = " with the layers that are set by hand" if fixed else ""
                msg = (
                    f"the budget asks for {self.share(name, limit):.1%} of the {WORDS[name]}; "
                    f"{self.share(name, low):.1%} is the least that can be reached{beside}"
                )
                raise BudgetError(msg)
        return found

    def met(self, name: str, value: float, cost: Cost, latency_share: float | None) -> bool:
        """Whether a model that costs so much is within one budget."""
        if name != "latency":
            return bool(getattr(cost, name) <= Budget.of({name: value}).allowance(self.before)[name])
        allowed = value if value <= 1 else value / self._clock().dense_ms
        return latency_share is not None and latency_share <= allowed

    def _clock(self) -> ForwardTime:
        if self.time is None:
            msg = "this plan was made without a clock: make it for a budget of latency, then explore that"
            raise BudgetError(msg)
        return self.time
