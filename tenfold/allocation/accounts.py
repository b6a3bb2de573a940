"""What layers may cost together under a budget of the whole model, and what the whole model then comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10

from tenfold.allocation.picks import Pick
from tenfold.allocation.reasons import CHEAP_END, grouped_reasons, in_words, listed, share, ways_to_be_faster
from tenfold.allocation.rule import UnreachableError
from tenfold.errors import BudgetError
from tenfold.records import Budget, Cost, ForwardTime, LayerOptions, OptionTable
from tenfold.records.budget import LIMITED

WORDS = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "time"}
_ORDER = ("latency", "params", "macs", "bytes")  # of the columns that the knapsack weighs


class Accounts:
    """Budgets of a whole model, translated to the layers that there is a choice for.

    Args:
        table: the options of the model.
    """

    def __init__(self, table: OptionTable) -> None:
        self.table, self.before, self.time, self.layers = table, table.before, table.time, table.eligible

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a budget can be of: what the model has any of, bytes where they are limited, latency with a clock."""
        counted = [kind for kind in ("params", "macs") if getattr(self.before, kind)]
        counted += ["bytes"] if "bytes" in self.table.recipe.budget.limited else []
        return (*counted, "latency") if self.time is not None else tuple(counted)

    def rest(self, kind: str) -> float:
        """Return what no choice changes: layers that are kept for other reasons, and what is no layer at all."""
        whole = self._clock().whole_ms if kind == "latency" else self._whole(kind)
        return whole - sum(_now(layer, kind) for layer in self.layers)

    def bytes(self, picks: Sequence[Pick]) -> float:
        """Return the bytes that the layers that there is a choice for use as picked."""
        total = 0.0
        for layer, pick in zip(self.layers, picks, strict=True):
            buffers = None if pick.format is None else layer.of(pick.format).columns.get("buffer_bytes")
            total += layer.itemsize * pick.cost.params + (0.0 if buffers is None else float(buffers[pick.option]))
        return total

    def share(self, kind: str, used: float) -> float:
        """Return what share of the model's cost it is if the layers that there is a choice for use so much."""
        total = self.rest(kind) + used
        return self._clock().share(total) if kind == "latency" else total / (self._whole(kind) or 1.0)

    def least(self, kind: str, fixed: Mapping[str, int] | None = None) -> float:
        """Return the least that the layers can use, with some of them fixed to a row."""
        columns = ((layer.column(kind), (fixed or {}).get(layer.path)) for layer in self.layers)
        return sum(float(column.min() if row is None else column[row]) for column, row in columns)

    def limits(self, budget: Budget, fixed: Mapping[str, int] | None = None) -> dict[str, float]:
        """Return what the layers that are not fixed may use together, by name.

        Args:
            budget: of the whole model.
            fixed: rows of layers that are not to be chosen, by path.

        They are below 0 where what no choice changes is above the budget: then no rule can meet it.

        Raises:
            BudgetError: layers that are fixed leave too little, or a latency is asked for without a clock.
        """
        fixed = fixed or {}
        allowed = budget.allowance(self.before, self._dense_ms(), self.table.bytes)
        found: dict[str, float] = {}
        for name in sorted(allowed, key=_ORDER.index):
            limit, rest = self._limit(name, allowed[name]), self.rest(name)
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

    def lowest(self, kind: str, least: float | None = None) -> str:
        """Return the lowest budget of a kind that can be met, as a share and in full, as a budget is written.

        Args:
            kind: of cost.
            least: what the layers that there is a choice for cost at least; what their options allow if None.
        """
        least = self.least(kind) if least is None else least
        reached = self.share(kind, least)
        if reached >= 1:
            return f"{kind}=1 (the model as it is)"
        whole = self._clock().dense_ms if kind == "latency" else 1.0
        most = _up(reached * whole) if kind == "latency" else str(ceil(self.rest(kind) + least))
        return f"{kind}={_up(reached)} ({LIMITED[kind]}={most})"

    def out_of_reach(self, budget: Budget, limits: Mapping[str, float], error: UnreachableError) -> str:
        """Return in words why a rule cannot meet a budget: what stays and why, what can be met, and what to try.

        Args:
            budget: of the whole model.
            limits: that ``limits`` made of it.
            error: what the rule raised.
        """
        over = [name for name, limit in limits.items() if getattr(error.least, name) > limit]
        asked = ", ".join(f"{k}={v:g}" for k, v in budget.given.items() if any(k in (n, LIMITED[n]) for n in over))
        what = error.what or "these formats and layers"
        lowest = listed([self.lowest(name, getattr(error.least, name)) for name in over])
        stays = ". ".join(self._what_stays(name, getattr(error.least, name)) for name in over)
        return (
            f"the budget {asked} cannot be met: the lowest that {what} can reach is {lowest}. {stays}. "
            f"{self._way_out(error, over)}."
        )

    def _what_stays(self, kind: str, least: float) -> str:
        """Return why layers stay, by reason, with their share of a cost, and what the others need."""
        whole = self._clock().allowed(1.0) if kind == "latency" else self._whole(kind)
        kept = [(layer.keep_reason, _now(layer, kind)) for layer in self.table.layers if layer.keep_reason]
        fixed = grouped_reasons(kept)
        stuck = [layer for layer in self.layers if layer.column(kind).min() >= _now(layer, kind)]
        reason = f"{listed(self.table.recipe.formats, 'or')} costs no less at any rank that was tried"
        groups = grouped_reasons([*kept, *((reason, _now(layer, kind)) for layer in stuck)])
        parts = [in_words([group for group in groups if group.cost > 0], whole)]
        rest = self.rest(kind) - sum(group.cost for group in fixed)
        if rest > 0.0005 * whole:
            outside = (
                "activations, the interpreter and what else is no layer" if kind == "latency" else "outside layers"
            )
            parts.append(f"{share(rest, whole)} {outside}")
        if len(stuck) < len(self.layers):
            left = least - sum(_now(layer, kind) for layer in stuck)
            parts.append(
                f"{share(left, whole)} as the least of the {len(self.layers) - len(stuck)} that can be factorized"
            )
        return f"What stays of the {WORDS[kind]}: {'; '.join(filter(None, parts))}"

    def _way_out(self, error: UnreachableError, over: Sequence[str]) -> str:
        recipe, reasons = self.table.recipe, [layer.keep_reason or "" for layer in self.table.layers]
        ways = [f"allow more formats than {listed(recipe.formats)}"]
        ways += [f"keep fewer layers than keep={listed(map(repr, recipe.keep))}"] if recipe.keep else []
        ways += ["keep_ends=False"] if any(reason.endswith(CHEAP_END) for reason in reasons) else []
        ways += ["data that reach all layers"] if any("moments" in reason for reason in reasons) else []
        ways += [error.advice] if error.advice else []
        ways += ways_to_be_faster(recipe, self._clock().batch_size) if "latency" in over else []
        return f"Raise the budget, or try: {'; '.join(ways)}"

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
        """Return those fields of a budget that a model of this cost meets; whether bytes are met it does not say."""
        kept: dict[str, float] = {}
        for field, value in budget.replace(bytes=None, max_bytes=None).given.items():
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

    def _whole(self, kind: str) -> float:
        """Return what the whole model has of what can be counted, as it is."""
        if kind != "bytes":
            return float(getattr(self.before, kind))
        if self.table.bytes is None:
            msg = "nobody counted the bytes of this model: make the plan from the model, not from this table"
            raise BudgetError(msg)
        return float(self.table.bytes)

    def _dense_ms(self) -> float | None:
        return None if self.time is None else self.time.dense_ms

    def _clock(self) -> ForwardTime:
        if self.time is None:
            msg = "a latency budget needs measured latencies: make the plan with one, or pass a clock"
            raise BudgetError(msg)
        return self.time


def _now(layer: LayerOptions, kind: str) -> float:
    if kind == "bytes":
        return float(layer.itemsize * layer.before.params)
    return (layer.latency_ms or 0.0) if kind == "latency" else float(getattr(layer.before, kind))


def _up(value: float) -> str:
    """Return a number in three digits, rounded up: a budget of so much can be met.

    Example:
        >>> _up(0.61234), _up(0.5), _up(12.341)
        ('0.613', '0.5', '12.4')
    """
    if value <= 0:
        return "0"
    step = 10.0 ** (floor(log10(value)) - 2)
    return f"{ceil(value / step * (1 - 1e-12)) * step:.6g}"
