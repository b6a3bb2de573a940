"""Decide first, then do: everything that is decided about a model ends up in a Plan."""

from tenfold.planning.analysis import analyse
from tenfold.planning.candidates import candidates, candidates_for
from tenfold.planning.fast import FastPlan, plan_fast
from tenfold.planning.gate import LayerBench, LayerTiming, plan_never_slower
from tenfold.planning.opening import close_idle, open_for_plan
from tenfold.planning.plan import DEFAULT_FORMATS, plan, recost
from tenfold.planning.sensitivity import Sensitivity
from tenfold.planning.timing import Timing
from tenfold.planning.tradeoff import tradeoff

__all__ = [
    "DEFAULT_FORMATS",
    "FastPlan",
    "LayerBench",
    "LayerTiming",
    "Sensitivity",
    "Timing",
    "analyse",
    "candidates",
    "candidates_for",
    "close_idle",
    "open_for_plan",
    "plan",
    "plan_fast",
    "plan_never_slower",
    "recost",
    "tradeoff",
]
