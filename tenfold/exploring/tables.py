"""The options of one layer as rows of numbers: first to stay as it is, then the options of its formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import PlanError
from tenfold.exploring.wishes import Pin
from tenfold.records import Cost, LayerCandidates, Options

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pick:
    """What becomes of a layer: an option of a format, or without a format to stay as it is.

    ``rank`` and what follows is how a plan carries it out; ``latency_ms`` is None without a clock.
    """

    path: str
    format: str | None
    option: int
    rank: dict[str, int] | None
    cost: Cost
    damage: float
    latency_ms: float | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one layer.

    Attributes:
        layer: whose options they are.
        cost: of the layer as it is.
        columns: ``params``, ``macs``, ``damage`` and, with a clock, ``latency``, each (n,), as the knapsack takes them.
    """

    layer: LayerCandidates
    cost: Cost
    columns: dict[str, Array]

    @classmethod
    def of(cls, layer: LayerCandidates, cost: Cost) -> Self:
        """Return the table of a layer that costs ``cost`` as it is."""
        found = {
            "params": _column(cost.params, [o.params for o in layer.options]),
            "macs": _column(cost.macs, [o.macs for o in layer.options]),
            "damage": _column(0.0, [o.damage for o in layer.options]),
        }
        if layer.latency_ms is not None:
            found["latency"] = _column(layer.latency_ms, [o.latency_ms for o in layer.options])
        return cls(layer, cost, found)

    def only(self, row: int | None) -> Table:
        """Return a table of one row alone; of all if None."""
        return self if row is None else replace(self, columns={k: v[row : row + 1] for k, v in self.columns.items()})

    def costs(self, names: Sequence[str]) -> Array:
        """Return the costs (n, budgets)."""
        return np.stack([self.columns[name] for name in names], axis=1)

    def row(self, pin: Pin) -> int:
        """Return the row of an option.

        Raises:
            PlanError: there is no such option.
        """
        if pin.format is None:
            return 0
        first = 1
        for options in self.layer.options:
            if options.format == pin.format and pin.option < len(options):
                return first + pin.option
            first += len(options)
        has = ", ".join(f"{o.format} up to {len(o) - 1}" for o in self.layer.options) or "none"
        msg = f"layer {self.layer.path!r} has no option {pin.option} of {pin.format}; it has {has}"
        raise PlanError(msg)

    def pick(self, row: int) -> Pick:
        """Return what a plan makes of a row."""
        if row == 0:
            layer = self.layer
            return Pick(layer.path, None, 0, layer.rank, self.cost, 0.0, layer.latency_ms)
        options, option = self._place(row)
        merged = next((m for m in options.merged if m.option == option), None)
        path, format = self.layer.path, options.format
        if merged is not None:
            damage = 0.0 if merged.damage is None else merged.damage
            return Pick(path, format, option, merged.rank, merged.cost, damage, merged.latency_ms, merged.note)
        cost = Cost(params=options.params[option], macs=options.macs[option])
        ms = options.latency_ms[option] if options.latency_ms else None
        return Pick(path, format, option, options.rank(option), cost, options.damage[option], ms)

    def _place(self, row: int) -> tuple[Options, int]:
        row -= 1
        for options in self.layer.options:
            if row < len(options):
                return options, row
            row -= len(options)
        msg = f"layer {self.layer.path!r} has no row {row}"
        raise IndexError(msg)


def _column(first: float, rest: Sequence[Sequence[float]]) -> Array:
    return np.array([first, *(value for values in rest for value in values)], dtype=np.float64)
