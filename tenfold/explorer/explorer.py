"""Selections for other budgets and around layers set by hand, by the same ``select`` that planning uses."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from pydantic import Field

from tenfold.allocation import Accounts, Override, Pick, Selection, plan_of, select
from tenfold.allocation.picks import unit_plan
from tenfold.records import Budget, OptionTable, Plan, Recipe
from tenfold.records.base import Record

ALONE = "the explorer plans layers one by one"
UNASKED = "no budget asks for less of it"


class Query(Record):
    """A budget of the whole model, and layers set by hand, by path.

    Example:
        >>> Query(budget={"macs": 0.5}, overrides={"conv1": Override()}).overrides["conv1"].format is None
        True
    """

    budget: Budget = Budget()
    overrides: dict[str, Override] = Field(default_factory=dict)


class Explorer:
    """Answers queries from an option table. The page of ``tenfold explore`` shows one.

    Args:
        table: with the distortion of every option, as a run leaves it in ``options.json``.

    Example:
        >>> import torch
        >>> from tenfold.planning import tabulate
        >>> from tenfold.profiling import profile
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> explorer = Explorer(tabulate(net, profile(net, torch.zeros(1, 64)), "macs=0.5"))
        >>> [explorer.select(Query(budget={"macs": share})).cost.macs for share in (0.5, 0.25)]
        [4096, 2048]
    """

    def __init__(self, table: OptionTable) -> None:
        self.table = table.replace(units=())  # they would change several layers at once
        self._units = table.units
        self.accounts = Accounts(self.table)

    @cached_property
    def start(self) -> Selection:
        """The selection for the budget that the table was made for."""
        return self.select(Query(budget=self.table.recipe.budget))

    def select(self, query: Query) -> Selection:
        """Return the selection of least distortion within the budget, around the layers set by hand.

        Without a budget, all other layers stay as they are. Where all are set by hand, a budget decides nothing.

        Raises:
            PlanError: an override names a layer or an option that does not exist.
            BudgetError: the budget cannot be met.
        """
        overrides = query.overrides
        if not query.budget:
            overrides = {layer.path: Override() for layer in self.table.eligible} | overrides
        selection = select(self.table, self._recipe(query), overrides=overrides)
        return replace(selection, picks=tuple(replace(p, reason=_reason(p, query)) for p in selection.picks))

    def plan(self, query: Query) -> Plan:
        """Return the plan that carries the selection for a query out; raises what ``select`` does."""
        found = plan_of(self.table, self._recipe(query), self.select(query))
        return found.replace(units=tuple(unit_plan(unit.kept(ALONE), None) for unit in self._units))

    @property
    def left_out(self) -> str:
        """What to say of units that the run could have narrowed; empty where there were none."""
        count = sum(unit.options is not None for unit in self._units)
        units = f"{count} unit{'' if count == 1 else 's'} of layers that could become narrower together"
        return f"{units}: {ALONE}." if count else ""

    def left(self, selection: Selection, kind: str) -> float:
        """Return what share of the parameters, MACs, bytes or time is left."""
        if kind == "latency":
            return selection.latency_share or 0.0
        if kind == "bytes":
            return self.accounts.share(kind, self.accounts.bytes(selection.picks))
        return float(getattr(selection.cost, kind) / (getattr(self.table.before, kind) or 1))

    def least(self, kind: str) -> float:
        """Return the smallest share that a budget can ask for."""
        return self.accounts.share(kind, self.accounts.least(kind))

    def _recipe(self, query: Query) -> Recipe:
        return self.table.recipe.replace(budget=query.budget, budget_of={})


def _reason(pick: Pick, query: Query) -> str:
    if pick.path in query.overrides:
        return pick.reason
    if not query.budget:
        return UNASKED
    count = len(query.overrides)
    return f"{pick.reason}, beside {count} {'layer' if count == 1 else 'layers'} set by hand" if count else pick.reason
