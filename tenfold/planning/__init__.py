"""Decide first, then do: everything that is decided about a model ends up in a Plan."""

from tenfold.planning.plan import plan, recost
from tenfold.planning.sensitivity import Score, Sensitivity
from tenfold.planning.tabulate import tabulate
from tenfold.planning.timing import Timing
from tenfold.planning.tradeoff import tradeoff

__all__ = ["Score", "Sensitivity", "Timing", "plan", "recost", "tabulate", "tradeoff"]
