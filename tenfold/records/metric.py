"""What a score is: its name, its unit, and which direction is better."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from tenfold.records.base import Record


class Metric(Record):
    """What a score is called, in which unit it is, and which direction is better; shown as such everywhere.

    Use it in a ``Score`` or a ``Task`` whose score is not a fraction, the larger the better.

    Attributes:
        name: such as ``perplexity``, ``mAP``, ``PSNR``.
        unit: of its values, such as ``dB`` or ``%``; none if empty.
        better: which direction is.
        fraction: whether values are shares from 0 to 1, to be shown in percent.

    Example:
        >>> ppl = Metric(name="perplexity", better="lower")
        >>> ppl.text(7.9123), ppl.change(7.9, 8.4), ppl.lost(7.0, 8.5)
        ('7.912', '+0.5', 1.5)
        >>> FRACTION.text(0.9339), FRACTION.change(0.9339, 0.9283)
        ('93.39 %', '−0.56 points')
    """

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    fraction: bool = False

    @property
    def percent(self) -> bool:
        """Whether values are shown in percent: shares, or numbers up to 100 whose unit that is."""
        return self.fraction or self.unit == "%"

    @property
    def shown_unit(self) -> str:
        """The unit as values are shown."""
        return "%" if self.percent else self.unit

    @property
    def label(self) -> str:
        """Name and unit, for an axis or the head of a column."""
        return f"{self.name} ({self.shown_unit})" if self.shown_unit else self.name

    @property
    def lost_label(self) -> str:
        """What is lost of it, for an axis."""
        unit = "percentage points" if self.percent else self.unit
        return f"{self.name} {'lost' if self.better == 'higher' else 'added'}{f' ({unit})' if unit else ''}"

    def plotted(self, value: float) -> float:
        """Return a value in the unit that it is shown in."""
        return 100 * value if self.fraction else value

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        number = self.number(value)
        return f"{number} {self.shown_unit}" if self.shown_unit and isfinite(value) else number

    def number(self, value: float) -> str:
        """Return a value without its unit: two decimals in percent, otherwise four digits."""
        shown = self.plotted(value)
        if not isfinite(shown):
            return "not a number" if shown != shown else f"{shown:+}"  # noqa: PLR0124
        return f"{shown:.2f}" if self.percent else _digits(shown, 4)

    def change(self, before: float, after: float) -> str:
        """Return the change between two values with its sign: in percentage points, or in the unit."""
        change = self.plotted(after) - self.plotted(before)
        if not isfinite(change):
            return "—"
        size = f"{abs(change):.2f}" if self.percent else _digits(abs(change), 3)
        sign = "±" if float(size.replace(",", "")) == 0 else "+" if change > 0 else "−"
        unit = "points" if self.percent else self.unit
        return f"{sign}{size} {unit}".rstrip()

    def lost(self, before: float, after: float) -> float:
        """Return how much worse a value is than another; below 0 where it is better."""
        return before - after if self.better == "higher" else after - before


FRACTION = Metric(name="score", fraction=True)  # of a score of which nothing was declared, such as an accuracy


def _digits(value: float, digits: int) -> str:
    """Return a number in so many digits, and no fewer than it has before the point."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
