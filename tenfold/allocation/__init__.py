"""How much of each layer to keep: rules, the knapsack, and the choice of a plan. Numbers alone, no torch."""

from tenfold.allocation.accounts import Accounts
from tenfold.allocation.choose import Override, Selection, check_budget, choose, limits_latency, plan_of, select
from tenfold.allocation.pareto import explorable, pareto, pruned
from tenfold.allocation.picks import Pick
from tenfold.allocation.rule import (
    RULES,
    Choice,
    Factorize,
    Keep,
    Limits,
    RankRule,
    Total,
    beyond,
    rule_from,
    rule_of,
    total_cost,
)
from tenfold.allocation.rules.threshold import ThresholdRule
from tenfold.allocation.schedule import Schedule

__all__ = [
    "RULES",
    "Accounts",
    "Choice",
    "Factorize",
    "Keep",
    "Limits",
    "Override",
    "Pick",
    "RankRule",
    "Schedule",
    "Selection",
    "ThresholdRule",
    "Total",
    "beyond",
    "check_budget",
    "choose",
    "explorable",
    "limits_latency",
    "pareto",
    "plan_of",
    "pruned",
    "rule_from",
    "rule_of",
    "select",
    "total_cost",
]
