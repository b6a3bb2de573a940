"""Decide first, then do: everything that is decided about a model ends up in a Plan."""

from tenfold.planning.decide import Decision, decide
from tenfold.planning.latency_budget import FastPlan, LatencySearch, plan_within_latency
from tenfold.planning.layer_bench import LayerBench, LayerTiming, keep_slower_layers_dense
from tenfold.planning.plan import plan, recost
from tenfold.planning.score import Score
from tenfold.planning.sensitivity import Sensitivity
from tenfold.planning.tabulate import tabulate
from tenfold.planning.timing import Timing
from tenfold.planning.tradeoff import tradeoff
from tenfold.planning.weight_analysis import analyse

__all__ = [
    "Decision",
    "FastPlan",
    "LatencySearch",
    "LayerBench",
    "LayerTiming",
    "Score",
    "Sensitivity",
    "Timing",
    "analyse",
    "decide",
    "keep_slower_layers_dense",
    "plan",
    "plan_within_latency",
    "recost",
    "tabulate",
    "tradeoff",
]
