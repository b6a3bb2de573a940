"""The explorer's page as plain values: words and numbers, ready to be put in their places."""

from __future__ import annotations

from typing import Any

from tenfold.allocation import Pick, Selection, pareto
from tenfold.explorer.explorer import Explorer, Query
from tenfold.records import FormatOptions, LayerOptions
from tenfold.records.budget import LIMITED
from tenfold.reporting.numbers import change, count, factor, milliseconds, percent, ranks, speed, three_digits

NAMES = {"params": "Parameters", "macs": "MACs", "bytes": "Bytes", "latency": "Latency"}
KEPT = "kept"

Values = dict[str, Any]


def initial_view(explorer: Explorer) -> Values:
    """Return what stays the same while a person explores: budgets, the steps of each layer, and where to start."""
    start = Query(budget=explorer.table.recipe.budget)
    planned = explorer.start.picks
    return {
        "query": {"budget": start.budget.given},
        "budgets": [_budget(explorer, kind) for kind in explorer.accounts.kinds],
        "layers": [_layer(layer, pick) for layer, pick in zip(explorer.table.eligible, planned, strict=True)],
        "distortion": explorer.table.distortion,
        "left_out": explorer.left_out,
        "selection": selection_view(explorer, explorer.start, start),
    }


def selection_view(explorer: Explorer, selection: Selection, query: Query) -> Values:
    """Return what a selection changes on the page."""
    left = {kind: explorer.left(selection, kind) for kind in explorer.accounts.kinds}
    summary = ", ".join(f"{percent(share)} of the {NAMES[kind].replace('P', 'p')}" for kind, share in left.items())
    rows = zip(explorer.table.eligible, selection.picks, explorer.start.picks, strict=True)
    return {
        "tiles": _tiles(explorer, selection),
        "left": left,
        "distortion": selection.distortion,
        "layers": [_picked(layer, pick, planned, pinned=pick.path in query.overrides) for layer, pick, planned in rows],
        "summary": f"{summary} left; predicted distortion {_distortion(selection.distortion)}",
    }


def layer_steps(layer: LayerOptions, options: FormatOptions) -> list[list[Any]]:
    """Return the steps of a slider: option, words and cost, from small to large, each with less distortion.

    Costs are MACs, or parameters where the layer has none.
    """
    costs = options.macs if layer.before.macs else options.params
    front = pareto(options.columns["distortion"], costs)
    return [[int(i), ranks(options.rank(int(i))), int(costs[i])] for i in front]


def _tiles(explorer: Explorer, selection: Selection) -> list[Values]:
    """Return the headline: before and after, and beside it what the plan that was made comes to."""
    before, planned = explorer.table.before, explorer.start
    tiles = []
    for kind in ("params", "macs"):
        old, new = getattr(before, kind), getattr(selection.cost, kind)
        if old:
            note = f"{percent(new / old)} left, {percent(getattr(planned.cost, kind) / old)} as planned"
            tiles.append(_tile(kind, f"{factor(old, new)} fewer", f"{count(old)} → {count(new)}", note, new / old))
    time, share = explorer.table.time, selection.latency_share
    if time is not None and share is not None:
        values = f"{milliseconds(time.dense_ms)} → {milliseconds(share * time.dense_ms)}"
        tiles.append(_tile("latency", speed(1 / share), values, "expected, by the times of the layers", share))
        tiles[-1]["name"] += "" if time.batch_size is None else f", batch {time.batch_size}"
        tiles[-1]["name"] += f" in {explorer.table.recipe.runtime}" if explorer.table.recipe.runtime else ""
    note = f"{_distortion(planned.distortion)} as planned"
    last = _tile("distortion", _distortion(selection.distortion), note, explorer.table.distortion, None)
    return [*tiles, last | {"name": "Predicted distortion"}]


def _tile(kind: str, change: str, values: str, note: str, share: float | None) -> Values:
    return {
        "id": kind,
        "name": NAMES.get(kind, kind),
        "change": change,
        "values": values,
        "note": note,
        "share": share,
    }


def _budget(explorer: Explorer, kind: str) -> Values:
    """Return a kind of budget; ``asked`` is what the plan was made for, absolute limits as shares."""
    table, time = explorer.table, explorer.table.time
    known = {"latency": 0.0 if time is None else time.dense_ms, "bytes": float(table.bytes or 0)}
    whole = known[kind] if kind in known else float(getattr(table.before, kind))
    budget = table.recipe.budget
    dense_ms = None if time is None else time.dense_ms
    allowed = budget.allowance(table.before, dense_ms, table.bytes) if kind in budget.limited else {}
    return {
        "kind": kind,
        "limit": LIMITED[kind],
        "name": NAMES[kind],
        "least": explorer.least(kind),
        "whole": milliseconds(whole) if kind == "latency" else count(whole),
        "asked": allowed[kind] / whole if allowed else None,
    }


def _layer(layer: LayerOptions, planned: Pick) -> Values:
    return {
        "path": layer.path,
        "kind": layer.kind,
        "planned": _words(planned),
        "formats": {options.format: layer_steps(layer, options) for options in layer.options},
    }


def _words(pick: Pick) -> str:
    return KEPT if pick.format is None else f"{pick.format} {ranks(pick.rank)}"


def _picked(layer: LayerOptions, pick: Pick, planned: Pick, *, pinned: bool) -> Values:
    before, distortion = layer.before, pick.distortion or 0.0
    of = "macs" if before.macs else "params"
    share = getattr(pick.cost, of) / (getattr(before, of) or 1)
    times = (layer.latency_ms, pick.latency_ms)
    ms = "" if None in times else " → ".join(three_digits(value) for value in times if value is not None)
    return {
        "format": pick.format,
        "option": pick.option,
        "rank": KEPT if pick.format is None else ranks(pick.rank),
        "cost": getattr(pick.cost, of),
        "pinned": pinned,
        "planned": "" if _words(pick) == _words(planned) else _words(planned),
        "cells": {
            "params": [_change(before.params, pick.cost.params), pick.cost.params],
            "macs": [_change(before.macs, pick.cost.macs), pick.cost.macs],
            "left": [f"{100 * share:.0f} %", share],
            "distortion": [_distortion(distortion), distortion],
            "ms": [ms, pick.latency_ms],
        },
    }


def _change(before: int, after: int) -> str:
    return count(before) if before == after else change(before, after)


def _distortion(value: float) -> str:
    return f"{value:.3g}"
