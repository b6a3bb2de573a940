"""How much to keep. Each module registers one rule; adding a file here adds a rule."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.ranks.base import (
    RULES,
    Choice,
    Choose,
    Keep,
    Limits,
    OneKnobRule,
    RankProblem,
    RankRule,
    rule_from,
    total_cost,
    within,
)
from tenfold.ranks.patterns import check_patterns, first_match, matches

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "RULES",
    "Choice",
    "Choose",
    "Keep",
    "Limits",
    "OneKnobRule",
    "RankProblem",
    "RankRule",
    "check_patterns",
    "first_match",
    "matches",
    "rule_from",
    "total_cost",
    "within",
]
