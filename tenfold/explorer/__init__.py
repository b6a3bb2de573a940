"""Explore an option table: plans for other budgets and around layers set by hand, on a local page. No torch."""

from tenfold.explorer.explorer import Explorer, Query

__all__ = ["Explorer", "Query"]
