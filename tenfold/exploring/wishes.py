"""What a person asks of a plan: budgets, and layers set by hand."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt

from tenfold.records.base import Record


class Pin(Record):
    """A layer set by hand: to an option of a format (see ``Options``), or without a format to stay as it is."""

    format: str | None = None
    option: NonNegativeInt = 0


class Wish(Record):
    """Budgets of the whole model, as ``Budget`` takes them, and layers set by hand, by path.

    Example:
        >>> Wish(budget={"macs": 0.5}, pins={"conv1": Pin()}).pins["conv1"].format is None
        True
    """

    budget: dict[str, float] = Field(default_factory=dict)
    pins: dict[str, Pin] = Field(default_factory=dict)
