"""Decide first, then do: everything that is decided about a model ends up in a Plan."""

from tenfold.planning.plan import DEFAULT_FORMATS, plan, recost
from tenfold.planning.timing import Timing

__all__ = ["DEFAULT_FORMATS", "Timing", "plan", "recost"]
