"""What layers may cost together under a budget of the whole model, and what the whole model then comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tenfold.errors import BudgetError
from tenfold.records import Budget, Cost, ForwardTime, LayerOptions, OptionTable

WORDS = {"params": "parameters", "macs": "MACs", "latency": "time"}
_ORDER = ("latency", "params", "macs")  # of the columns that the knapsack weighs


class Accounts:
    """Budgets of a whole model, translated to the layers that there is a choice for.

    Args:
        table: the options of the model.
    """

    def __init__(self, table: OptionTable) -> None:
        self.before, self.time, self.layers = table.before, table.time, table.eligible

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a budget can be of: of what the model has any, and of latency where there is a clock."""
        counted = [kind for kind in ("params", "macs") if getattr(self.before, kind)]
        return (*counted, "latency") if self.time is not None else tuple(counted)

    def rest(self, kind: str) -> float:
        """Return what no choice changes: layers that are kept for other reasons, and what is no layer at all."""
        whole = self._clock().whole_ms if kind == "latency" else float(getattr(self.before, kind))
        return whole - sum(_now(layer, kind) for layer in self.layers)

    def share(self, kind: str, used: float) -> float:
        """Return what share of the model's cost it is if the layers that there is a choice for use so much."""
        total = self.rest(kind) + used
        return self._clock().share(total) if kind == "latency" else total / (float(getattr(self.before, kind)) or 1.0)

    def least(self, kind: str, fixed: Mapping[str, int] | None = None) -> float:
        """Return the least that the layers can use, with some of them fixed to a row."""
        columns = ((layer.column(kind), (fixed or {}).get(layer.path)) for layer in self.layers)
        return sum(float(column.min() if row is None else column[row]) for column, row in columns)

    def limits(self, budget: Budget, fixed: Mapping[str, int] | None = None) -> dict[str, float]:
        """Return what the layers that are not fixed may use together, by name.

        Args:
            budget: of the whole model.
            fixed: rows of layers that are not to be chosen, by path.

        Raises:
            BudgetError: what no choice changes is above the budget, or a latency is asked for without a clock.
        """
        fixed = fixed or {}
        allowed = budget.allowance(self.before, None if self.time is None else self.time.dense_ms)
        found: dict[str, float] = {}
        for name in sorted(allowed, key=_ORDER.index):
            limit, rest = self._limit(name, allowed[name]), self.rest(name)
            if rest > limit or (name == "latency" and rest >= limit):
                raise BudgetError(self._too_low(name, allowed[name]))
            taken = sum(float(layer.column(name)[fixed[layer.path]]) for layer in self.layers if layer.path in fixed)
            found[name] = limit - rest - taken
            low = self.least(name, fixed) - taken
            if fixed and low > found[name] * (1 + 1e-9) and low - found[name] > 1e-9:
                msg = (
                    f"the budget asks for {self.share(name, limit - rest):.1%} of the {WORDS[name]}; "
                    f"{self.share(name, low + taken):.1%} is the least that can be reached with the layers that are "
                    "set by hand"
                )
                raise BudgetError(msg)
        return found

    def cost(self, after: Sequence[Cost]) -> Cost:
        """Return what the whole model costs once the layers cost so much."""
        pairs = [(layer.before, now) for layer, now in zip(self.layers, after, strict=True)]
        return Cost(
            params=self.before.params - sum(before.params - now.params for before, now in pairs),
            macs=self.before.macs - sum(before.macs - now.macs for before, now in pairs),
        )

    def latency_share(self, after_ms: Sequence[float | None]) -> float | None:
        """Return the expected time as a share of that of the model as it is; None without a clock."""
        return None if self.time is None else self.share("latency", sum(ms or 0.0 for ms in after_ms))

    def met(self, budget: Budget, cost: Cost, latency_share: float | None) -> dict[str, float]:
        """Return those fields of a budget that a model of this cost meets."""
        kept: dict[str, float] = {}
        for field, value in budget.given.items():
            (name, limit), *_ = Budget(**{field: value}).allowance(self.before, self._dense_ms()).items()
            now = (latency_share or 0.0) * (self._dense_ms() or 0.0) if name == "latency" else getattr(cost, name)
            if now <= limit:
                kept[field] = value
        return kept

    def _limit(self, name: str, allowed: float) -> float:
        """Return what the whole model may use, in the units of the table."""
        if name != "latency":
            return allowed
        time = self._clock()
        return time.allowed(allowed / time.dense_ms)

    def _too_low(self, name: str, allowed: float) -> str:
        if name == "latency":
            time = self._clock()
            return (
                f"the budget allows {allowed / time.dense_ms * time.tighten:.1%} of the time, and what no plan changes "
                f"(layers that stay, activations, the interpreter) takes "
                f"{self.rest(name) / time.whole_ms / time.best_share:.1%}. Raise the budget or keep fewer layers."
            )
        total = getattr(self.before, name)
        return (
            f"the budget {name}={allowed:,.0f} is below the {self.rest(name):,.0f} {name} of the layers that stay as "
            f"they are (of {total:,} in all). Raise the budget, allow more formats, or keep fewer layers."
        )

    def _dense_ms(self) -> float | None:
        return None if self.time is None else self.time.dense_ms

    def _clock(self) -> ForwardTime:
        if self.time is None:
            msg = "a latency budget needs measured latencies: make the plan with one, or pass a clock"
            raise BudgetError(msg)
        return self.time


def _now(layer: LayerOptions, kind: str) -> float:
    return (layer.latency_ms or 0.0) if kind == "latency" else float(getattr(layer.before, kind))
