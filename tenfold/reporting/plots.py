"""Curves to choose by looking: error against cost of each layer, and damage or score against the budget of a model.

Each plot is a PNG with its numbers beside it, as CSV and JSON. Needs the extra ``plots``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal

from tenfold.errors import DataError, require
from tenfold.records import (
    Cost,
    LayerSensitivity,
    SensitivityPoint,
    SensitivityTable,
    TradeOff,
    TradeOffPoint,
    write_text,
    written_whole,
)
from tenfold.reporting.numbers import count, percent

Value = Literal["auto", "score", "output_error"]

# Okabe & Ito 2008: told apart by the colour-blind too; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#666666"
_NAMES = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def plot_sensitivity(
    table: SensitivityTable, path: str | Path, *, layers: int = 12, value: Value = "auto"
) -> tuple[Path, ...]:
    """Write the error–cost curves of the costliest layers as small multiples, and return the files written.

    Dots are measured; lines are the nearest curves that never rise with cost. All panels share their axes, so that
    layers can be compared. The numbers of *all* layers are in the CSV and JSON files beside the picture.

    Args:
        table: what was measured.
        path: of the PNG.
        layers: how many layers to show, those with the most MACs.
        value: ``score`` for the loss of score, ``output_error`` for the relative error of the layer's output; by
            default the score where it was measured.

    Raises:
        DataError: nothing of that kind was measured.
        MissingExtraError: matplotlib is not installed.
    """
    chosen = _value(table, value)
    measured = [layer for layer in table.compressible if any(_of(p, chosen) is not None for p in layer.points)]
    if not measured:
        msg = f"nothing to plot: the table has no {chosen.replace('_', ' ')} of any layer. Measure some first."
        raise DataError(msg)
    shown = sorted(measured, key=_weight, reverse=True)[: max(layers, 1)]
    shown.sort(key=measured.index)
    formats = list(dict.fromkeys(f for layer in measured for f in layer.formats))
    columns = min(4, len(shown))
    rows = ceil(len(shown) / columns)
    figure = _figure(max(3.0 * columns, 5.5), 2.3 * rows + 1.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    total = sum(_size(layer.before, layer) for layer in table.layers) or 1
    for panel, layer in zip(panels, shown, strict=False):
        for format in layer.formats:
            _draw_layer(panel, layer, format, chosen, table.baseline, formats.index(format))
        panel.set_title(f"{layer.path or '(the model)'} · {_size(layer.before, layer) / total:.1%}", fontsize=9)
        _tidy(panel)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for i in range(max(len(shown) - columns, 0), len(shown)):
        panels[i].tick_params(labelbottom=True)
    of_cost = "parameters" if all(layer.before.macs == 0 for layer in shown) else "MACs"
    figure.supxlabel(f"{of_cost} left of the layer (%)", fontsize=10)
    figure.supylabel(_label(chosen), fontsize=10)
    many = len(measured)
    which = f"{many} layer{'s' * (many > 1)}" if len(shown) == many else f"the {len(shown)} costliest of {many} layers"
    figure.suptitle(
        f"{table.model}: each layer factorized alone\n{which}, with the share of the model's {of_cost}", fontsize=11
    )
    handles, labels = _unique_legend(panels[: len(shown)])
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return _write(figure, Path(path), _sensitivity_rows(table), table.to_json())


def plot_tradeoff(
    curve: TradeOff, path: str | Path, *, chosen: float | None = None, cost: Cost | None = None
) -> tuple[Path, ...]:
    """Write predicted damage, and the score where it was measured, against what is left; return the files written.

    Args:
        curve: plans for a row of budgets.
        path: of the PNG.
        chosen: the budget to mark: that of the curve's point nearest to it.
        cost: mark the point nearest to this cost instead.

    Raises:
        DataError: the curve has no points.
        MissingExtraError: matplotlib is not installed.
    """
    if not curve.points:
        msg = "nothing to plot: no budget of the curve can be met. Ask for larger ones."
        raise DataError(msg)
    marked = _marked(curve, chosen, cost)
    parts: list[tuple[str, Callable[[TradeOffPoint], float | None]]] = []
    if any(p.score is not None for p in curve.points):
        parts.append(("score (%)", lambda p: None if p.score is None else 100 * p.score))
    if any(p.damage is not None for p in curve.points):
        parts.append((_wrapped(curve.damage or "predicted damage"), lambda p: p.damage))
    figure = _figure(6.4, 1.1 + 2.9 * max(len(parts), 1))
    panels = figure.subplots(max(len(parts), 1), 1, sharex=True, squeeze=False).ravel()
    for i, (panel, (label, get)) in enumerate(zip(panels, parts, strict=False)):
        _draw_tradeoff(panel, curve, get, marked, _COLOURS[i])
        if label.startswith("score") and curve.baseline is not None:
            panel.axhline(100 * curve.baseline, color=_GREY, linewidth=1, linestyle="--")
            panel.annotate(
                f"dense {percent(curve.baseline)}",
                (0.99, 100 * curve.baseline),
                xycoords=("axes fraction", "data"),
                xytext=(0, -11),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=_GREY,
            )
        panel.set_ylabel(label, fontsize=9)
        _tidy(panel)
    whole = getattr(curve.before, curve.budget, None)
    unit = f" (% of {count(whole)})" if whole else " (% of the dense model)"
    panels[-1].set_xlabel(f"{_NAMES.get(curve.budget, curve.budget)} left{unit}", fontsize=10)
    rule = curve.rule.get("name", "")
    figure.suptitle(f"{curve.model}: what a budget costs{f', rule {rule}' if rule else ''}", fontsize=11)
    return _write(figure, Path(path), _tradeoff_rows(curve, marked), curve.to_json())


def _value(table: SensitivityTable, value: Value) -> Literal["score", "output_error"]:
    if value != "auto":
        return value
    return "score" if any(p.score is not None for layer in table.layers for p in layer.points) else "output_error"


def _of(point: SensitivityPoint, value: str) -> float | None:
    found: float | None = getattr(point, value)
    return found


def _size(cost: Cost, layer: LayerSensitivity) -> int:
    return cost.macs if layer.before.macs else cost.params


def _weight(layer: LayerSensitivity) -> tuple[int, int]:
    return layer.before.macs, layer.before.params


def _label(value: str) -> str:
    return "score lost (percentage points)" if value == "score" else "error of the layer's output\n‖y−ŷ‖/‖y−ȳ‖"


def _draw_layer(
    panel: Any, layer: LayerSensitivity, format: str, value: str, baseline: float | None, number: int
) -> None:
    """Draw the measured points of one format, and the nearest curve that never rises with cost."""
    from scipy.optimize import isotonic_regression

    points = [p for p in layer.curve(format) if _of(p, value) is not None]
    if not points:
        return
    whole = _size(layer.before, layer)
    x = [100 * _size(p.cost, layer) / whole for p in points]
    raw = [float(_of(p, value) or 0.0) for p in points]
    top = baseline if baseline is not None else max(raw)
    y = [100 * (top - v) for v in raw] if value == "score" else raw
    fitted = -isotonic_regression(
        [*(-v for v in y), 0.0], weights=[1.0] * len(y) + [1e6]
    ).x  # untouched, the layer loses nothing
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    panel.plot([*x, 100.0], fitted, color=colour, linewidth=1.4, alpha=0.8)
    panel.plot(x, y, marker, color=colour, markersize=4, markeredgewidth=0, label=format)


def _draw_tradeoff(
    panel: Any, curve: TradeOff, get: Callable[[TradeOffPoint], float | None], marked: TradeOffPoint | None, colour: str
) -> None:
    points = [p for p in curve.points if get(p) is not None]
    panel.plot([_left(curve, p) for p in points], [get(p) for p in points], "-o", color=colour, markersize=4)
    found = None if marked is None else get(marked)
    if marked is None or found is None:
        return
    x = _left(curve, marked)
    panel.plot([x], [found], "o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.5)
    panel.annotate(
        f"chosen: {x:.3g} %, {found:.3g}",
        (x, found),
        xytext=(10, 10 if float(get(points[0]) or 0.0) > float(get(points[-1]) or 0.0) else -16),
        textcoords="offset points",
        fontsize=9,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _left(curve: TradeOff, point: TradeOffPoint) -> float:
    """Return what is left of the model, in percent: as the plan comes out, or for latency as the budget says."""
    whole = getattr(curve.before, curve.budget, None)
    return 100 * getattr(point.cost, curve.budget) / whole if whole else 100 * point.budget


def _marked(curve: TradeOff, chosen: float | None, cost: Cost | None) -> TradeOffPoint | None:
    if cost is not None and hasattr(cost, curve.budget):
        wanted = getattr(cost, curve.budget)
        return min(curve.points, key=lambda p: abs(getattr(p.cost, curve.budget) - wanted))
    return None if chosen is None else min(curve.points, key=lambda p: abs(p.budget - chosen))


def _wrapped(text: str, width: int = 34) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _figure(width: float, height: float) -> Any:
    """Return an empty figure that no global state of matplotlib knows."""
    require("matplotlib", "plots")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def _tidy(panel: Any) -> None:
    panel.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _unique_legend(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _sensitivity_rows(table: SensitivityTable) -> list[dict[str, Any]]:
    rows = []
    for layer in table.layers:
        start = {"path": layer.path, "kind": layer.kind, "state": layer.state, "reason": layer.reason}
        for p in layer.points or ():
            rank = " ".join(f"{k}={v}" for k, v in p.rank.items())
            drop = None if p.score is None or table.baseline is None else table.baseline - p.score
            values = {"format": p.format, "rank": rank, "params": p.cost.params, "macs": p.cost.macs}
            measured = {"output_error": p.output_error, "score": p.score, "score_lost": drop}
            rows.append({**start, **values, **measured})
        if not layer.points:
            rows.append(dict(start))
    return rows


def _tradeoff_rows(curve: TradeOff, marked: TradeOffPoint | None) -> list[dict[str, Any]]:
    return [
        {
            "budget": curve.budget,
            "share": p.budget,
            "params": p.cost.params,
            "macs": p.cost.macs,
            "damage": p.damage,
            "score": p.score,
            "chosen": int(p is marked),
        }
        for p in curve.points
    ]


def _write(figure: Any, path: Path, rows: Sequence[dict[str, Any]], text: str) -> tuple[Path, ...]:
    """Write picture, CSV and JSON, each whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = path if path.suffix.lower() == ".png" else path.with_name(path.name + ".png")
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", metadata={"Software": "tenfold"})
    numbers = io.StringIO()
    writer = csv.DictWriter(numbers, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data, values = path.with_suffix(".csv"), path.with_suffix(".json")
    write_text(data, numbers.getvalue())
    write_text(values, text)
    with written_whole(path) as partial:
        partial.write_bytes(picture.getvalue())
    return path, data, values
