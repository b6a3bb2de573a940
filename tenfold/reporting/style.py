"""The look that all tables share."""

from __future__ import annotations

from rich import box
from rich.table import Table


def grid(title: str = "") -> Table:
    """Return an empty table with a rule under its head and nothing else, its title on the left."""
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        pad_edge=False,
        padding=(0, 1),
    )
