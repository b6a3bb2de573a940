"""What the page shows of an explorer and its answers: words and numbers, ready to be put in their places."""

from __future__ import annotations

from typing import Any

from tenfold.exploring.explorer import Answer, Explorer
from tenfold.exploring.tables import Pick, Table
from tenfold.knapsack import pareto
from tenfold.records import LayerPlan, Options
from tenfold.reporting.numbers import change, count, factor, milliseconds, percent, ranks, speed, three_digits

NAMES = {"params": "Parameters", "macs": "MACs", "latency": "Latency"}
AS_IT_IS = "kept"

Values = dict[str, Any]


def shown_explorer(explorer: Explorer) -> Values:
    """Return what stays the same while a person explores: budgets, the steps of each layer, and where to start."""
    return {
        "wish": explorer.start.wish.model_dump(),
        "budgets": [_budget(explorer, kind) for kind in explorer.ledger.kinds],
        "layers": [_layer(explorer, path) for path in explorer.tables],
        "damage": explorer.candidates.damage,
        "answer": shown_answer(explorer, explorer.start),
    }


def shown_answer(explorer: Explorer, answer: Answer) -> Values:
    """Return what an answer changes on the page."""
    left = {kind: explorer.left(answer, kind) for kind in explorer.ledger.kinds}
    told = ", ".join(f"{percent(share)} of the {NAMES[kind].replace('P', 'p')}" for kind, share in left.items())
    return {
        "tiles": tiles(explorer, answer),
        "left": left,
        "damage": answer.damage,
        "layers": [_picked(explorer, pick, answer) for pick in answer.picks],
        "told": f"{told} left; predicted damage {_damage(answer.damage)}",
    }


def tiles(explorer: Explorer, answer: Answer) -> list[Values]:
    """Return the headline: before and after, and beside it what the plan that was made comes to."""
    before, made = explorer.base.before, explorer.base.after
    found = []
    for kind in ("params", "macs"):
        old, new = getattr(before, kind), getattr(answer.cost, kind)
        if old:
            note = f"{percent(new / old)} left, {percent(getattr(made, kind) / old)} as planned"
            found.append(_tile(kind, f"{factor(old, new)} fewer", f"{count(old)} → {count(new)}", note, new / old))
    time, share = explorer.candidates.time, answer.latency_share
    if time is not None and share is not None:
        values = f"{milliseconds(time.dense_ms)} → {milliseconds(share * time.dense_ms)}"
        found.append(_tile("latency", speed(1 / share), values, "expected, by the times of the layers", share))
        found[-1]["name"] += "" if time.batch_size is None else f", batch {time.batch_size}"
    own = sum(layer.damage or 0.0 for layer in explorer.base.layers)
    last = _tile("damage", _damage(answer.damage), f"{_damage(own)} as planned", explorer.candidates.damage, None)
    return [*found, last | {"name": "Predicted damage"}]


def kept(explorer: Explorer) -> list[LayerPlan]:
    """Return the layers that there is no choice for."""
    return [layer for layer in explorer.base.layers if layer.path not in explorer.tables]


def _tile(kind: str, said: str, values: str, note: str, share: float | None) -> Values:
    name = NAMES.get(kind, kind)
    return {"id": kind, "name": name, "change": said, "values": values, "note": note, "share": share}


def _budget(explorer: Explorer, kind: str) -> Values:
    time = explorer.candidates.time
    whole = time.dense_ms if kind == "latency" and time is not None else getattr(explorer.base.before, kind, 0)
    shown = milliseconds(whole) if kind == "latency" else count(whole)
    asked = explorer.base.budget.get(kind)
    return {
        "kind": kind,
        "name": NAMES[kind],
        "least": explorer.least(kind),
        "whole": shown,
        "asked": None if asked is None else asked if asked <= 1 else asked / whole,
    }


def _layer(explorer: Explorer, path: str) -> Values:
    table = explorer.tables[path]
    layer = explorer.base.layer(path)
    return {
        "path": path,
        "kind": layer.kind,
        "planned": _planned(layer),
        "formats": {options.format: steps(table, options) for options in table.layer.options},
    }


def steps(table: Table, options: Options) -> list[list[Any]]:
    """Return the steps of a slider: option, words and cost, from small to large, each with less damage than the last.

    Costs are MACs, or parameters where the layer has none.
    """
    costs = options.macs if table.cost.macs else options.params
    front = pareto(options.damage, [[cost] for cost in costs])
    return [[int(i), _words(options, int(i)), costs[i]] for i in front]


def _words(options: Options, option: int) -> str:
    merged = next((m for m in options.merged if m.option == option), None)
    return ranks(options.rank(option) if merged is None else merged.rank)


def _planned(layer: LayerPlan) -> str:
    return f"{layer.format} {ranks(layer.rank)}" if layer.action == "factorize" else AS_IT_IS


def _picked(explorer: Explorer, pick: Pick, answer: Answer) -> Values:
    before = explorer.tables[pick.path].cost
    of = "macs" if before.macs else "params"
    share = getattr(pick.cost, of) / (getattr(before, of) or 1)
    now = f"{pick.format} {ranks(pick.rank)}" if pick.format is not None else AS_IT_IS
    planned = _planned(explorer.base.layer(pick.path))
    was_ms = explorer.tables[pick.path].layer.latency_ms
    ms = (
        "" if pick.latency_ms is None or was_ms is None else f"{three_digits(was_ms)} → {three_digits(pick.latency_ms)}"
    )
    return {
        "format": pick.format,
        "option": pick.option,
        "rank": ranks(pick.rank) if pick.format is not None else AS_IT_IS,
        "cost": getattr(pick.cost, of),
        "pinned": pick.path in answer.wish.pins,
        "planned": "" if now == planned else planned,
        "cells": {
            "params": [change(before.params, pick.cost.params), pick.cost.params],
            "macs": [change(before.macs, pick.cost.macs), pick.cost.macs],
            "left": [f"{100 * share:.0f} %", share],
            "damage": [_damage(pick.damage), pick.damage],
            "ms": [ms, pick.latency_ms],
        },
    }


def _damage(value: float) -> str:
    return f"{value:.3g}"
