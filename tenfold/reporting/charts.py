"""Charts as descriptions, from records only: ``page/chart.js`` draws them on a page, ``pictures`` into a PNG.

A description is JSON. ``type`` is ``xy`` or ``bars``, ``alt`` says what is shown, ``x`` and ``y`` are axes with a
``label`` and, if wanted, ``min``, ``max`` and ``log``. Each of the ``series`` has a ``name`` and ``points``: x, y, the
words of its tooltip, a standard deviation, and a name to stand beside it, as far as there are any. It is drawn as
markers unless ``dots`` is false and as a line unless ``line`` is false, through the points of ``fit`` if it has one.
``rings`` mark points, ``rules`` mark an x or a y; ``legend`` names a series that is alone. Bars have ``names`` and
``values``, and ``notes`` for their tooltips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.records import (
    Analysis,
    Cost,
    LayerAnalysis,
    LayerPlan,
    LayerSensitivity,
    Metric,
    Plan,
    RunRecord,
    SensitivityPoint,
    SensitivityTable,
    TradeOff,
    TradeOffPoint,
)
from tenfold.reporting.numbers import QUANTITIES, count, factor, ranks

Chart = dict[str, Any]


def xy(alt: str, x: Chart, y: Chart, series: Sequence[Chart], **marks: list[Chart]) -> Chart:
    """Return a chart of points and lines; ``marks`` are its ``rings`` and ``rules``."""
    return {"type": "xy", "alt": alt, "x": x, "y": y, "series": list(series), **marks}


def dense_rule(score: float | None, metric: Metric) -> list[Chart]:
    """Return a rule at the score of the dense model; none where nobody measured it."""
    return [] if score is None else [{"y": metric.plotted(score), "label": f"dense {metric.text(score)}"}]


def bars(alt: str, names: Sequence[str], of: str, series: Mapping[str, Sequence[float]]) -> Chart:
    """Return bars for each layer, in the order of the model: one for each of the ``series``, all of one quantity."""
    return {
        "type": "bars",
        "alt": alt,
        "names": [name or "(the model)" for name in names],
        "x": {"label": "layers, in the order of the model"},
        "y": {"label": QUANTITIES[of]},
        "series": [{"name": name, "values": list(values)} for name, values in series.items()],
    }


def cost_bars(layers: Sequence[LayerPlan], of: str = "macs") -> Chart:
    """Return the cost of each layer before and after, in the order of the model."""
    before, after = ([getattr(getattr(x, when), of) for x in layers] for when in ("before", "after"))
    alt = f"{QUANTITIES[of]} of each layer before and after"
    notes = [_gain(layer, of) for layer in layers]
    return {**bars(alt, [layer.path for layer in layers], of, {"before": before, "after": after}), "notes": notes}


def _gain(layer: LayerPlan, of: str) -> str:
    """Return what a layer became, and how many times cheaper that is."""
    if layer.action == "keep":
        return "kept"
    gain = factor(getattr(layer.before, of), getattr(layer.after, of))
    return f"{layer.format} {ranks(layer.rank)}, {gain} fewer {QUANTITIES[of]}"


def spectrum(layer: LayerAnalysis, plan: LayerPlan) -> Chart:
    """Return the singular values of a layer's unfoldings, its ranks marked."""
    chosen = plan.rank or {}
    series = [
        {"name": name, "dots": False, "points": list(zip(found.index, found.values, strict=True))}
        for name, found in layer.spectra.items()
    ]
    rules = [
        {"x": chosen[name], "label": f"{name} = {chosen[name]}", "colour": i, "row": i}
        for i, name in enumerate(layer.spectra)
        if name in chosen
    ]
    return xy(
        f"singular values of {layer.path}, chosen: {ranks(chosen)}",
        {"label": "number of the singular value", "min": 1},
        {"label": "singular value, relative", "log": True},
        series,
        rules=rules,
    )


def error_curve(layer: LayerAnalysis, plan: LayerPlan) -> Chart | None:
    """Return the error of a layer's weight against its cost along a family of ranks, its own ranks marked.

    None where the analysis has no curve, as of CP, which takes fits.
    """
    if not layer.curve:
        return None
    of = "macs" if plan.before.macs else "params"
    whole = getattr(plan.before, of) or 1
    points = [
        [
            100 * getattr(p.cost, of) / whole,
            p.error,
            f"{ranks(p.rank)}\n{count(getattr(p.cost, of))}, error {p.error:.3g}",
        ]
        for p in layer.curve
        if getattr(p.cost, of) < whole
    ]
    points = [*sorted(points, key=lambda p: float(p[0])), [100.0, 0.0, "dense"]]
    rings = []
    if plan.rel_error is not None:
        x = 100 * getattr(plan.after, of) / whole
        gain = factor(whole, getattr(plan.after, of))
        words = f"chosen: {ranks(plan.rank)}\n{x:.3g} % left ({gain} fewer), error {plan.rel_error:.3g}"
        rings.append({"x": x, "y": plan.rel_error, "label": f"{ranks(plan.rank)}, {gain}", "words": words})
    return xy(
        f"error of {layer.path} against its cost",
        {"label": f"{QUANTITIES[of]} left of the layer (%)", "min": 0, "max": 100},
        {"label": "relative error of the weight", "min": 0},
        [{"name": f"{layer.format}, ranks in proportion", "points": points}],
        rings=rings,
    )


def equal_error(plan: Plan, analysis: Analysis) -> Chart | None:
    """Return what is left of the model if no factorized layer had more than some error, and where the plan is.

    It needs nothing but the error–cost curves of the layers: at each error, every layer takes its cheapest rank that
    is no worse, or stays dense; layers without a curve are as the plan has them. None where there are no curves.
    """
    known = {layer.path: layer for layer in analysis.layers if layer.curve}
    planned = [layer for layer in plan.factorized if layer.path in known]
    if not planned or not plan.before.macs:
        return None
    fixed = plan.after.macs - sum(layer.after.macs for layer in planned)
    points = []
    for step in range(2, 20):
        allowed, used, lost = 0.05 * step, float(fixed), 0.0
        for layer in planned:
            fitting = [p for p in known[layer.path].curve if p.error <= allowed and p.cost.macs < layer.before.macs]
            best = min(fitting, key=lambda p: p.cost.macs, default=None)
            used += layer.before.macs if best is None else best.cost.macs
            lost += 0.0 if best is None else best.error**2
        points.append([100 * used / plan.before.macs, (lost / len(planned)) ** 0.5, f"error up to {allowed:.2f}"])
    errors = [layer.rel_error for layer in planned if layer.rel_error is not None]
    rings = []
    if errors:
        own = (fixed + sum(layer.after.macs for layer in planned)) / plan.before.macs
        mean = (sum(e**2 for e in errors) / len(errors)) ** 0.5
        words = f"this plan\n{100 * own:.3g} % of the MACs, error {mean:.3g}"
        rings.append({"x": 100 * own, "y": mean, "label": "this plan", "words": words})
    return xy(
        "error of the weights against what is left of the model",
        {"label": "MACs left of the model (%)", "max": 100},
        {"label": "error of the weights (root mean square)", "min": 0},
        [{"name": "the same error in all factorized layers", "points": points}],
        rings=rings,
    )


def trade_offs(curve: TradeOff, marked: TradeOffPoint | None, label: str) -> dict[str, Chart]:
    """Return score and predicted distortion of plans for a row of budgets, as far as there are any, by name.

    Args:
        curve: plans for a row of budgets.
        marked: the point of the curve to mark.
        label: what to call that.
    """
    whole = getattr(curve.before, curve.budget, None)
    quantity = QUANTITIES.get(curve.budget, curve.budget)
    axis: Chart = {"label": f"{quantity} left (% of {count(whole)})" if whole else f"{quantity} left (%)"}
    found = {}
    metric = curve.metric
    for value, name, label_y, scale in (
        ("score", metric.name, metric.label, metric.plotted(1.0)),
        ("distortion", "distortion", "predicted distortion", 1.0),
    ):
        measured = [p for p in curve.points if getattr(p, value) is not None]
        points = [(left_of(curve, p), scale * getattr(p, value), p) for p in measured]
        unit = f" {metric.shown_unit}".rstrip() if value == "score" else ""
        rings: list[Chart] = [
            {"x": x, "y": y, "label": label, "words": f"{label}: {x:.3g} % left, {name} {y:.3g}{unit}"}
            for x, y, point in points
            if point is marked
        ]
        rules = dense_rule(curve.baseline, metric) if value == "score" else []
        series = [{"name": name, "points": [[x, y] for x, y, _ in points]}]
        if points:
            found[value] = xy(f"{name} against the budget", axis, {"label": label_y}, series, rings=rings, rules=rules)
    return found


def nearest(curve: TradeOff, cost: Cost) -> TradeOffPoint | None:
    """Return the point of a curve whose plan costs most nearly so much; None for budgets of latency."""
    if not hasattr(cost, curve.budget):
        return None
    wanted = getattr(cost, curve.budget)
    return min(curve.points, key=lambda p: abs(getattr(p.cost, curve.budget) - wanted), default=None)


def left_of(curve: TradeOff, point: TradeOffPoint) -> float:
    """Return what is left of the model, in percent: as the plan comes out, or for latency as the budget says."""
    whole = getattr(curve.before, curve.budget, None)
    return float(100 * getattr(point.cost, curve.budget) / whole if whole else 100 * point.budget)


def sensitivity(layers: Sequence[LayerSensitivity], value: str, table: SensitivityTable) -> Chart:
    """Return the loss of layers against what is left of them, each factorized alone: one series for each format.

    Markers are measured; lines are the nearest curves that never rise with cost.

    Args:
        layers: to draw together; their paths are in the names of the series if there are several.
        value: ``score`` for the loss of score, ``output_error`` for the relative error of the layer's output.
        table: that the layers are of, for the score of the model and what it is.
    """
    series = []
    for layer in layers:
        for format in layer.formats if len(layers) == 1 else layer.formats[:1]:
            points = _losses(layer, layer.curve(format), value, table)
            if points:
                name = format if len(layers) == 1 else f"{layer.path}, {format}"
                series.append({"name": name, "points": points, "fit": _falling(points)})
    lost = table.metric.lost_label
    return xy(
        "loss against cost, as measured, each layer factorized alone",
        {"label": "left of the layer (%)", "min": 0, "max": 100},
        {"label": lost if value == "score" else "error of the layer's output, ‖y−ŷ‖ / ‖y−ȳ‖", "min": 0},
        series,
    )


def _losses(
    layer: LayerSensitivity, curve: Sequence[SensitivityPoint], value: str, table: SensitivityTable
) -> list[list[float]]:
    of = "macs" if layer.before.macs else "params"
    whole = getattr(layer.before, of)
    found = [(100 * getattr(p.cost, of) / whole, getattr(p, value)) for p in curve if getattr(p, value) is not None]
    if value != "score":
        return [[x, y] for x, y in found]
    metric, best = table.metric, max if table.metric.better == "higher" else min
    top = table.baseline if table.baseline is not None else best((y for _, y in found), default=0.0)
    return [[x, metric.plotted(metric.lost(top, y))] for x, y in found]


def _falling(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the nearest curve that never rises; the last weight pins its end: a dense layer loses nothing."""
    from scipy.optimize import isotonic_regression

    values, weights = [*(y for _, y in points), 0.0], [1.0] * len(points) + [1e6]
    fitted = isotonic_regression(values, weights=weights, increasing=False).x
    return [[x, float(y)] for x, y in zip([*(x for x, _ in points), 100.0], fitted, strict=True)]


def measured_layers(table: SensitivityTable, value: str) -> list[LayerSensitivity]:
    """Return the layers with measurements of ``value``, the costliest first."""
    found = [layer for layer in table.compressible if any(getattr(p, value) is not None for p in layer.points)]
    return sorted(found, key=lambda layer: (layer.before.macs, layer.before.params), reverse=True)


def training(record: RunRecord) -> dict[str, Chart]:
    """Return loss and score by epoch, with the stages marked; nothing without training."""
    parts = [(f"stage {s.index}", s.tuning, s.scores) for s in record.stages if s.tuning]
    parts = parts or ([("tuning", record.tuning, record.scores)] if record.tuning else [])
    loss: list[list[Any]] = []
    score: list[list[Any]] = []
    rules: list[Chart] = []
    done, metric = 0, record.metric
    for name, epochs, scores in parts:
        if len(parts) > 1:
            rules.append({"x": done, "label": name, "row": len(rules) % 3})
        if (start := scores.get("compressed")) is not None:
            score.append([done, metric.plotted(start), f"{name}, before training\n{_words(metric, start)}"])
        for number, epoch in enumerate(epochs, start=1):
            where = f"{name}, epoch {number}"
            if epoch.get("loss") is not None:
                loss.append([done + number, epoch["loss"], f"{where}\nloss {epoch['loss']:.4g}"])
            if epoch.get("score") is not None:
                value = epoch["score"]
                score.append([done + number, metric.plotted(value), f"{where}\n{_words(metric, value)}"])
        done += len(epochs)
        end = scores.get("tuned")
        if end is not None and not any(epoch.get("score") is not None for epoch in epochs):
            score.append([done, metric.plotted(end), f"{name}, after training\n{_words(metric, end)}"])
    x, found = {"label": "epochs of training", "min": 0}, {}
    if loss:
        found["loss"] = xy("loss by epoch", x, {"label": "loss"}, [{"name": "loss", "points": loss}], rules=rules)
    if score:
        series = [{"name": metric.name, "points": score, "colour": 2}]
        level = dense_rule(record.scores.get("original", record.before.score), metric)
        found["score"] = xy(f"{metric.name} by epoch", x, {"label": metric.label}, series, rules=[*rules, *level])
    return found


def _words(metric: Metric, value: float) -> str:
    return f"{metric.name} {metric.text(value)}"


def stage_path(record: RunRecord) -> Chart:
    """Return the scores of the stages against what was left of the model after each."""
    whole, metric = record.before.macs or 1, record.metric
    dense = record.scores.get("original", record.before.score)
    way = [] if dense is None else [[100.0, metric.plotted(dense), f"dense\n{metric.text(dense)}"]]
    steps: dict[str, list[list[Any]]] = {"compressed": [], "tuned": []}
    for stage in record.stages:
        for name, found in steps.items():
            score = stage.scores.get(name)
            if score is not None and (name == "compressed" or stage.tuning):
                words = f"stage {stage.index}, {name}\n{metric.text(score)}"
                found.append([100 * stage.after.macs / whole, metric.plotted(score), words])
                way.append(found[-1])
    series: list[Chart] = [{"name": "all steps", "points": way, "dots": False, "colour": 5}]
    for number, (name, found) in enumerate(steps.items()):
        if found:
            series.append({"name": name, "points": found, "line": False, "colour": number})
    x = {"label": "MACs left of the model (%)", "max": 100}
    title, rules = f"{metric.name} of each stage against the MACs left", dense_rule(dense, metric)
    return xy(title, x, {"label": metric.label}, series, rules=rules)
