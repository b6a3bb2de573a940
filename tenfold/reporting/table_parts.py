"""Tables as columns and rows: rendered on a page by ``page/parts.html``, in a terminal by ``rich_table``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """The head of a column. Numeric ones are aligned right and sorted by the value of their cells."""

    name: str
    numeric: bool = False
    css: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: what the cell is sorted by in a numeric column.
        share: draws a bar of this length, from 0 to 1.
        badge: draws a coloured label.
        layer: path of the layer whose charts the cell links to.
        note: small print after the text.
    """

    text: str
    value: float | None = None
    share: float | None = None
    badge: str = ""
    layer: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row; a choice above the table narrows it down to one ``kind``."""

    cells: tuple[Cell, ...]
    kind: str = ""


def number(value: float | None, text: str) -> Cell:
    """Return a cell that is sorted by a number; a dash without one.

    Example:
        >>> number(None, "").text, number(0.5, "50 %").value
        ('—', 0.5)
    """
    return Cell("—") if value is None else Cell(text, value)


def grid(title: str = "") -> Table:
    """Return an empty rich table in the style that all share: a rule under its head, the title on the left."""
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        pad_edge=False,
        padding=(0, 1),
    )


def rich_table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Return a table of short cells for a terminal."""
    table = grid(title)
    for column in columns:
        table.add_column(column.name, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.text for cell in row.cells))
    return table
