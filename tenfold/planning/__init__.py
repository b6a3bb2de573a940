"""Decide first, then do: everything that is decided about a model ends up in a Plan."""

from tenfold.planning.plan import DEFAULT_FORMATS, plan, recost

__all__ = ["DEFAULT_FORMATS", "plan", "recost"]
