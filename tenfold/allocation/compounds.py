"""Units with their layers as one layer each, so that a rule chooses between narrowing them and factorizing each alone.

A unit excludes the options of its layers. Its compound has the rows of both: the sizes of the unit, and those
combinations of its layers' rows that no other beats in what the budget counts and in distortion.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tenfold.allocation.knapsack import stays
from tenfold.allocation.pareto import pareto
from tenfold.allocation.rule import Choice, Factorize, Keep
from tenfold.records import FormatOptions, LayerOptions, OptionTable, UnitOptions

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

_MOST = 400  # combinations of the rows of several layers that are kept: thinned out evenly beyond
_COLUMNS = ("params", "macs", "latency", "distortion")


@dataclass(frozen=True, eq=False)
class Compound:
    """A unit with its layers: what each row of its ``layer`` stands for.

    Attributes:
        unit: the unit and its sizes.
        members: its layers, in the order of the table.
        rows: (n, members) which row of each of them a combination takes; the first is what they are now.
        layer: rows of the combinations, then those of the unit's sizes, as one layer.
    """

    unit: UnitOptions
    members: tuple[LayerOptions, ...]
    rows: Rows
    layer: LayerOptions

    @classmethod
    def of(cls, unit: UnitOptions, members: Sequence[LayerOptions], limited: Sequence[str]) -> Compound:
        """Return the compound, with the combinations that matter for limits of these names."""
        timed = unit.latency_ms is not None
        names = [name for name in _COLUMNS if timed or name != "latency"]
        names += [name for name in limited if name == "bytes"]
        rows = _combinations(members, [name for name in limited if name in names])
        columns = {name: _sums(members, rows, name) for name in names}
        options = unit.options
        assert options is not None  # noqa: S101 - a unit without options makes no compound
        item = min(layer.itemsize for layer in members)  # of mixed ones, rather less is said to be saved
        outside = {"params": unit.before.params, "macs": unit.before.macs, "bytes": item * unit.before.params}
        outside = {name: whole - columns[name][0] for name, whole in outside.items() if name in names}
        own = {"params": options.params, "macs": options.macs, "latency": options.latency_ms}
        own["bytes"] = item * options.params
        own["distortion"] = options.columns["distortion"]
        joined = {
            name: np.concatenate([columns[name][1:] + outside.get(name, 0), np.asarray(own[name])]) for name in names
        }
        count = len(joined["params"])
        buffers = {"buffer_bytes": joined["bytes"] - item * joined["params"]} if "bytes" in names else {}
        layer = LayerOptions(
            path=unit.unit.pivot,
            before=unit.before,
            itemsize=item,
            latency_ms=unit.latency_ms,
            options=(
                FormatOptions(
                    format=unit.unit.kind,
                    names=("row",),
                    ranks=np.arange(1, count + 1)[:, None],
                    params=joined["params"].astype(np.int64),
                    macs=joined["macs"].astype(np.int64),
                    latency_ms=joined.get("latency"),
                    columns={"distortion": joined["distortion"], **buffers},
                ),
            ),
        )
        return cls(unit, tuple(members), rows, layer)

    def expanded(self, choice: Choice) -> tuple[dict[str, Choice], int | None]:
        """Return the choices of the layers by path, and the option of the unit if that is what was chosen."""
        if isinstance(choice, Keep) or choice.row == 0:
            reason = choice.reason if isinstance(choice, Keep) else choice.note
            return {layer.path: Keep(reason) for layer in self.members}, None
        if choice.row >= len(self.rows):
            return {}, choice.row - len(self.rows)
        picked = zip(self.members, self.rows[choice.row].tolist(), strict=True)
        return {
            layer.path: Factorize(row, choice.note) if row else Keep(stays(choice.note)) for layer, row in picked
        }, None


@dataclass(frozen=True, eq=False)
class Compounds:
    """A table in which units and their layers are one layer each, by the path of the pivot."""

    table: OptionTable
    by_path: Mapping[str, Compound] = field(default_factory=dict)

    @classmethod
    def of(cls, table: OptionTable, limited: Sequence[str], apart: Collection[str] = ()) -> Compounds:
        """Return the compounds of a table.

        Args:
            table: with units.
            limited: what the budget limits: ``params``, ``macs``, ``bytes``, ``latency``.
            apart: layers that are set by hand: their units stay as they are.
        """
        units = [u for u in table.units if u.options is not None and not set(u.unit.members) & set(apart)]
        layers = {layer.path: layer for layer in table.layers}
        found: dict[str, Compound] = {}
        inside: set[str] = set()
        for unit in units:
            members = [layers[path] for path in unit.unit.members if path in layers]
            found[unit.unit.pivot] = Compound.of(unit, members, limited)
            inside |= {layer.path for layer in members}
        kept = (
            found[layer.path].layer if layer.path in found else layer
            for layer in table.layers
            if layer.path in found or layer.path not in inside
        )
        return cls(table.replace(layers=tuple(kept), units=()) if found else table, found)


def _combinations(members: Sequence[LayerOptions], limited: Sequence[str]) -> Rows:
    """Return which row each member takes (n, members): combinations that no other beats, the first of them as now."""
    chosen = np.zeros((1, 0), dtype=np.intp)
    distortion, costs = np.zeros(1), np.zeros((1, len(limited)))
    for layer in members:
        own = np.stack([_column(layer, name) for name in limited], axis=1).reshape(-1, len(limited))
        rows = np.indices((len(chosen), len(own))).reshape(2, -1)
        distortion = distortion[rows[0]] + _column(layer, "distortion")[rows[1]]
        costs = costs[rows[0]] + own[rows[1]]
        chosen = np.concatenate([chosen[rows[0]], rows[1][:, None]], axis=1)
        front = _thinned(_front(distortion, costs))
        front = np.concatenate([[0], front[front != 0]])  # as it is stays the first
        distortion, costs, chosen = distortion[front], costs[front], chosen[front]
    return chosen


def _front(distortion: Array, costs: Array) -> Rows:
    """Return the rows that no other beats, the cheapest first."""
    if costs.shape[1] != 1:
        return pareto(distortion, costs)
    order = np.lexsort((distortion, costs[:, 0]))
    best = np.minimum.accumulate(distortion[order])
    return np.asarray(order[np.concatenate([[True], distortion[order][1:] < best[:-1]])])


def _thinned(rows: Rows) -> Rows:
    if len(rows) <= _MOST:
        return rows
    return np.asarray(rows[np.unique(np.linspace(0, len(rows) - 1, _MOST).round().astype(int))])


def _sums(members: Sequence[LayerOptions], rows: Rows, name: str) -> Array:
    columns = [_column(layer, name)[rows[:, place]] for place, layer in enumerate(members)]
    return np.asarray(np.sum(columns, axis=0, dtype=np.float64)).reshape(len(rows))


def _column(layer: LayerOptions, name: str) -> Array:
    """Return a column of a layer; of one that is kept there is the first row alone."""
    if layer.keep_reason is None:
        return layer.column(name)
    now = {"params": layer.before.params, "macs": layer.before.macs, "latency": layer.latency_ms or 0.0}
    now["bytes"] = layer.itemsize * layer.before.params
    return np.array([now.get(name, 0.0)], dtype=np.float64)
