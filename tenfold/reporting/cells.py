"""Cells of tables on a page: what is shown, and the number that it is sorted by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """The head of a column. Numeric ones stand on the right and are sorted by the value of their cells."""

    name: str
    numeric: bool = False
    css: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell. ``share`` draws a bar, ``badge`` a coloured label, ``layer`` a link to the pictures of that layer.

    ``note`` follows the text, quietly.
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
    """Return a cell that is sorted by a number; empty where there is none.

    Example:
        >>> number(None, "")
        Cell(text='—', value=None, share=None, badge='', layer=None, note='')
    """
    return Cell("—") if value is None else Cell(text, value)
