"""Records that introduce themselves: a line for ``repr``, tables for ``summary``, a card for notebooks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tenfold.records.base import Record


class Introduced(Record):
    """A record that people look at: it says what it is in one line, in tables, and as a card in a notebook.

    The methods stand where users look for them; what they show is drawn by ``tenfold.reporting``, a room above.
    """

    def summary(self) -> str:
        """Return the record as text for people: totals, then every layer with its reasons."""
        return str(_views().text(self))

    def __repr__(self) -> str:
        return str(_views().line(self))

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Return the card that notebooks show."""
        return str(_views().card(self))


def _views() -> Any:
    # By name, as the package finds its public names: records depend on no room above them, and stay light.
    return import_module("tenfold.reporting.introduce")
