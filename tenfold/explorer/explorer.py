"""The best plan for other budgets and around layers set by hand: the optimum that ``plan`` finds, without the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tenfold.allocation.knapsack import Allocation, solve
from tenfold.errors import PlanError
from tenfold.explorer.ledger import Ledger
from tenfold.explorer.tables import Pick, Table
from tenfold.explorer.wishes import Wish
from tenfold.records import Budget, Candidates, Cost, LayerPlan, Plan

BY_HAND = "set by hand"
UNASKED = "no budget asks for less of it"


@dataclass(frozen=True)
class Answer:
    """The best that a wish allows.

    Attributes:
        wish: what was asked.
        picks: one for each layer that has candidates, in their order.
        best: the certificate of the optimum; None where there was nothing to choose.
        cost: of the whole model.
        distortion: the sum over its layers.
        latency_share: the expected time, as a share of that of the model as it is; None without a clock.
    """

    wish: Wish
    picks: tuple[Pick, ...]
    best: Allocation | None
    cost: Cost
    distortion: float
    latency_share: float | None = None


class Explorer:
    """Makes plans anew from what an earlier one chose from.

    Args:
        candidates: as ``tenfold.planning.candidates`` returned them.

    Example:
        >>> from tenfold.records import LayerCandidates, Options
        >>> dense, small = Cost(params=8, macs=8), {"params": (2, 4), "macs": (2, 4), "distortion": (0.5, 0.1)}
        >>> fc = LayerPlan(path="fc", kind="Linear", action="keep", reason="", before=dense, after=dense)
        >>> made = Plan(tenfold="0.1", model="Net", before=dense, after=dense, layers=(fc,))
        >>> options = Options(format="low_rank", names=("rank",), ranks=((1,), (2,)), **small)
        >>> layer = LayerCandidates(path="fc", options=(options,))
        >>> explorer = Explorer(Candidates(tenfold="0.1", plan=made, layers=(layer,)))
        >>> explorer.answer(Wish(budget={"macs": 0.5})).picks[0].rank
        {'rank': 2}
    """

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self.base = candidates.plan
        before = {layer.path: layer.before for layer in self.base.layers}
        self.tables = {layer.path: Table.of(layer, before[layer.path]) for layer in candidates.layers}
        self.ledger = Ledger(self.base.before, self.tables, candidates.time)

    @cached_property
    def start(self) -> Answer:
        """The answer to the budget that the earlier plan was made for."""
        return self.answer(Wish(budget=self.base.budget))

    def answer(self, wish: Wish) -> Answer:
        """Return the plan of least distortion within the budgets, with those layers set by hand that are.

        Without a budget, all other layers stay as they are. Where all are set by hand, a budget decides nothing.

        Raises:
            PlanError: a layer or an option that does not exist.
            BudgetError: the budgets cannot be read, or cannot be met.
        """
        budget = Budget.of(wish.budget)
        unknown = sorted(set(wish.pins) - set(self.tables))
        if unknown:
            msg = f"there is no choice for a layer {unknown[0]!r}"
            raise PlanError(msg)
        fixed = {path: self.tables[path].row(pin) for path, pin in wish.pins.items()}
        rows, best = dict.fromkeys(self.tables, 0) | fixed, None
        if budget and len(fixed) < len(rows):
            best = self._solve(self.ledger.limits(budget, fixed), fixed)
            rows = dict(zip(rows, best.choice, strict=True)) | fixed
        picks = tuple(table.pick(rows[path]) for path, table in self.tables.items())
        return Answer(wish, picks, best, self._cost(picks), sum(p.distortion for p in picks), self._share(picks))

    def plan(self, answer: Answer) -> Plan:
        """Return the plan of an answer; with no layer set by hand, the one that ``tenfold.plan`` makes.

        It claims the budgets that were asked for; where nothing was left to choose, those that are met.
        """
        picks = {pick.path: pick for pick in answer.picks}
        layers = tuple(
            self._layer_plan(layer, picks[layer.path], answer) if layer.path in picks else layer
            for layer in self.base.layers
        )
        budget = {name: value for name, value in Budget.of(answer.wish.budget) if value is not None}
        if answer.best is None:
            asked, share = budget.items(), answer.latency_share
            budget = {name: value for name, value in asked if self.ledger.met(name, value, answer.cost, share)}
        return self.base.replace(budget=budget, after=answer.cost, layers=layers)

    def left(self, answer: Answer, kind: str) -> float:
        """Return what share of the parameters, of the MACs or of the time is left."""
        if kind == "latency":
            return answer.latency_share or 0.0
        return float(getattr(answer.cost, kind) / (getattr(self.base.before, kind) or 1))

    def least(self, kind: str) -> float:
        """Return the smallest share that a budget can ask for."""
        return self.ledger.share(kind, self.ledger.least(kind))

    def _solve(self, limits: dict[str, float], fixed: dict[str, int]) -> Allocation:
        names = list(limits)
        tables = [table.only(fixed.get(path)) for path, table in self.tables.items()]
        rule = self.base.rule if self.base.rule.get("name") == "global" else {}
        return solve(
            [table.columns["distortion"] for table in tables],
            [table.costs(names) for table in tables],
            list(limits.values()),
            names=names,
            **{name: rule[name] for name in ("gap", "time_limit") if name in rule},
        )

    def _cost(self, picks: tuple[Pick, ...]) -> Cost:
        before, now = self.base.before, [(self.tables[p.path].cost, p.cost) for p in picks]
        return Cost(
            params=before.params - sum(old.params - new.params for old, new in now),
            macs=before.macs - sum(old.macs - new.macs for old, new in now),
        )

    def _share(self, picks: tuple[Pick, ...]) -> float | None:
        if self.candidates.time is None:
            return None
        return self.ledger.share("latency", sum(p.latency_ms or 0.0 for p in picks))

    def _layer_plan(self, layer: LayerPlan, pick: Pick, answer: Answer) -> LayerPlan:
        """Return what an answer does to a layer, in the words of a plan."""
        reason = self._reason(pick, answer)
        common: dict[str, Any] = {
            "path": layer.path,
            "aliases": layer.aliases,
            "kind": layer.kind,
            "before": layer.before,
        }
        common |= {"after": pick.cost, "reason": reason, "rank": pick.rank}
        if pick.format is None:
            now = self.tables[layer.path].layer.format
            return LayerPlan(**common, action="keep", format=now)
        same = (layer.format, layer.rank) == (pick.format, pick.rank)  # then what was measured of it still holds
        times = {name: getattr(layer, name) for name in ("latency_before_ms", "latency_after_ms") if same}
        algorithm = self.candidates.algorithms.get(pick.format)
        return LayerPlan(
            **common, **times, action="factorize", format=pick.format, algorithm=algorithm, distortion=pick.distortion
        )

    def _reason(self, pick: Pick, answer: Answer) -> str:
        if pick.path in answer.wish.pins:
            return f"{BY_HAND}{pick.note}"
        if answer.best is None:
            return UNASKED
        count = len(answer.wish.pins)
        beside = f", beside {count} {'layer' if count == 1 else 'layers'} {BY_HAND}" if count else ""
        return f"{answer.best.stays}{beside}" if pick.format is None else f"{answer.best.proof}{beside}{pick.note}"
