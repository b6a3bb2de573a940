"""Charts as PNGs, their numbers beside them as CSV and JSON: to choose by looking. Needs the extra ``plots``.

What is drawn is described in ``charts``, as for the pages; here is how, with matplotlib.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal

from tenfold.errors import DataError, require
from tenfold.records import Cost, SensitivityTable, TradeOff, TradeOffPoint, atomic_write, write_text
from tenfold.reporting import charts
from tenfold.reporting.charts import Chart

Value = Literal["auto", "score", "output_error"]

# Okabe & Ito 2008, distinct for the colour-blind too; markers differ as well. page/style.css has the same order.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#666666"


def plot_sensitivity(
    table: SensitivityTable, path: str | Path, *, layers: int = 12, value: Value = "auto"
) -> tuple[Path, ...]:
    """Write the error–cost curves of the costliest layers as small multiples, and return the files written.

    All panels share their axes, so that layers can be compared. The numbers of *all* layers are in the CSV and JSON
    files beside the picture.

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
    if value == "auto":
        scored = any(p.score is not None for layer in table.layers for p in layer.points)
        value = "score" if scored else "output_error"
    measured = charts.measured_layers(table, value)
    if not measured:
        msg = f"nothing to plot: the table has no {value.replace('_', ' ')} of any layer. Measure some first."
        raise DataError(msg)
    shown = sorted(measured[: max(layers, 1)], key=table.layers.index)
    of, name = ("macs", "MACs") if any(layer.before.macs for layer in shown) else ("params", "parameters")
    total = sum(getattr(layer.before, of) for layer in table.layers) or 1
    drawn = [charts.sensitivity([layer], value, table) for layer in shown]
    titles = [f"{layer.path or '(the model)'} · {getattr(layer.before, of) / total:.1%}" for layer in shown]
    many = len(measured)
    which = f"{many} layer{'s' * (many > 1)}" if len(shown) == many else f"the {len(shown)} costliest of {many} layers"
    columns = min(4, len(shown))
    rows = ceil(len(shown) / columns)
    figure = _figure(max(3.0 * columns, 5.5), 2.3 * rows + 1.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    formats = list(dict.fromkeys(format for layer in measured for format in layer.formats))
    for panel, chart, title in zip(panels, drawn, titles, strict=False):
        for series in chart["series"]:
            series["colour"] = formats.index(series["name"])  # the same in all panels
        _draw(panel, chart)
        panel.set_title(title, fontsize=9)
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for i in range(max(len(shown) - columns, 0), len(shown)):
        panels[i].tick_params(labelbottom=True)
    figure.supxlabel(f"{name} left of the layer (%)", fontsize=10)
    figure.supylabel(drawn[0]["y"]["label"], fontsize=10)
    about = f"{table.model}: each layer factorized alone\n{which}, with the share of the model's {name}"
    figure.suptitle(about, fontsize=11)
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=9)
    return _write(figure, Path(path), _sensitivity_rows(table), table.to_json())


def plot_tradeoff(
    curve: TradeOff, path: str | Path, *, chosen: float | None = None, cost: Cost | None = None
) -> tuple[Path, ...]:
    """Write predicted distortion, and the score where it was measured, against what is left; return the files written.

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
    marked, label = None, "chosen"
    if cost is not None:
        marked, label = charts.nearest(curve, cost), "nearest to the plan"
    elif chosen is not None:
        marked = min(curve.points, key=lambda p: abs(p.budget - chosen))
    drawn = charts.trade_offs(curve, marked, label)
    figure = _figure(6.4, 1.1 + 2.9 * len(drawn))
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False).ravel()
    labels = (
        {"distortion": curve.distortion} if curve.distortion else {}
    )  # says what kind; on a page, the text beside it does
    for number, (panel, (name, chart)) in enumerate(zip(panels, drawn.items(), strict=True)):
        chart["series"][0]["colour"] = number
        _draw(panel, chart)
        panel.set_ylabel(textwrap.fill(labels.get(name, chart["y"]["label"]), 34), fontsize=9)
    panels[-1].set_xlabel(next(iter(drawn.values()))["x"]["label"], fontsize=10)
    rule = curve.rule.get("name", "")
    figure.suptitle(f"{curve.model}: what a budget costs{f', rule {rule}' if rule else ''}", fontsize=11)
    return _write(figure, Path(path), _tradeoff_rows(curve, marked), curve.to_json())


def check_drawable() -> None:
    """Raise MissingExtraError if there is nothing to draw with: better before the work than after it."""
    require("matplotlib", "plots")


def _figure(width: float, height: float) -> Any:
    """Return an empty figure that no global state of matplotlib knows."""
    check_drawable()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def _draw(panel: Any, chart: Chart) -> None:
    for number, series in enumerate(chart["series"]):
        colour = series.get("colour", number)
        style = {"color": _COLOURS[colour % len(_COLOURS)], "markersize": 4}
        x, y = zip(*series["points"], strict=True)
        line = "-"
        if "fit" in series:
            panel.plot(*zip(*series["fit"], strict=True), color=style["color"], linewidth=1.4, alpha=0.8)
            line = ""
        panel.plot(x, y, f"{_MARKERS[colour % len(_MARKERS)]}{line}", **style, label=series["name"])
    for rule in chart.get("rules", ()):
        panel.axhline(rule["y"], color=_GREY, linewidth=1, linestyle="--")
        at = {"xycoords": ("axes fraction", "data"), "xytext": (0, -11), "textcoords": "offset points"}
        panel.annotate(rule["label"], (0.99, rule["y"]), **at, ha="right", fontsize=8, color=_GREY)
    for ring in chart.get("rings", ()):
        _ring(panel, ring, chart["series"][0]["points"])
    panel.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _ring(panel: Any, ring: Chart, points: Sequence[Sequence[float]]) -> None:
    look = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.5}
    panel.plot([ring["x"]], [ring["y"]], "o", **look)
    right = ring["x"] > (points[0][0] + points[-1][0]) / 2
    falls = points[0][1] > points[-1][1]  # a falling curve leaves room above it on the right, a rising one below
    panel.annotate(
        ring["words"],
        (ring["x"], ring["y"]),
        xytext=(-10 if right else 10, 10 if falls != right else -16),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=9,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _sensitivity_rows(table: SensitivityTable) -> list[dict[str, Any]]:
    rows = []
    for layer in table.layers:
        start = {"path": layer.path, "kind": layer.kind, "state": layer.state, "reason": layer.reason}
        for p in layer.points or ():
            rank = " ".join(f"{k}={v}" for k, v in p.rank.items())
            drop = None if p.score is None or table.baseline is None else table.metric.lost(table.baseline, p.score)
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
            "distortion": p.distortion,
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
    with atomic_write(path) as partial:
        partial.write_bytes(picture.getvalue())
    return path, data, values
