"""Charts as descriptions, which ``page/chart.js`` draws: from records only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenfold.records import Analysis, LayerAnalysis, LayerPlan, Plan, RunRecord, SensitivityTable, TradeOff
from tenfold.reporting.numbers import count, percent, ranks

Chart = dict[str, Any]


def cost_bars(layers: Sequence[LayerPlan], of: str = "macs") -> Chart:
    """Return what each layer cost before, and what it does now, in the order of the model."""
    name = "MACs" if of == "macs" else "parameters"
    return {
        "type": "bars",
        "alt": f"{name} of each layer before and after",
        "names": [layer.path or "(the model)" for layer in layers],
        "x": {"label": "layers, in the order of the model"},
        "y": {"label": name},
        "series": [
            {"name": "before", "values": [getattr(layer.before, of) for layer in layers]},
            {"name": "after", "values": [getattr(layer.after, of) for layer in layers]},
        ],
    }


def spectrum(layer: LayerAnalysis, plan: LayerPlan) -> Chart:
    """Return the singular values of a layer's unfoldings and its chosen ranks."""
    chosen = plan.rank or {}
    names = list(layer.spectra)
    return {
        "type": "xy",
        "alt": f"singular values of {layer.path}, chosen: {ranks(chosen)}",
        "x": {"label": "number of the singular value", "min": 1},
        "y": {"label": "singular value, relative", "log": True},
        "series": [
            {"name": name, "dots": False, "points": list(zip(found.index, found.values, strict=True))}
            for name, found in layer.spectra.items()
        ],
        "rules": [
            {"x": chosen[name], "label": f"{name} = {chosen[name]}", "colour": i, "row": i}
            for i, name in enumerate(names)
            if name in chosen
        ],
    }


def error_curve(layer: LayerAnalysis, plan: LayerPlan) -> Chart:
    """Return the error of a layer's weight against its cost along a family of ranks, and what was chosen."""
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
    points = [*sorted(points, key=lambda p: float(p[0])), [100.0, 0.0, "as it was"]]
    rings = []
    if plan.rel_error is not None:
        x = 100 * getattr(plan.after, of) / whole
        words = f"chosen: {ranks(plan.rank)}\n{x:.3g} % left, error {plan.rel_error:.3g}"
        rings.append({"x": x, "y": plan.rel_error, "label": ranks(plan.rank), "words": words})
    return {
        "type": "xy",
        "alt": f"error of {layer.path} against its cost",
        "x": {"label": f"{'MACs' if of == 'macs' else 'parameters'} left of the layer (%)", "min": 0, "max": 100},
        "y": {"label": "relative error of the weight", "min": 0},
        "series": [{"name": f"{layer.format}, ranks in proportion", "points": points}],
        "rings": rings,
    }


def equal_error(plan: Plan, analysis: Analysis) -> Chart | None:
    """Return what is left of the model if all factorized layers had the same error at most, and where the plan is.

    It needs nothing but the error–cost curves of the layers: at each error, every layer takes its cheapest rank that
    is no worse, or stays as it is. None where there are no curves.
    """
    known = {layer.path: layer for layer in analysis.layers if layer.curve}
    planned = [layer for layer in plan.factorized if layer.path in known]
    if not planned or not plan.before.macs:
        return None
    fixed = plan.before.macs - sum(layer.before.macs for layer in planned)
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
    return {
        "type": "xy",
        "alt": "error of the weights against what is left of the model",
        "x": {"label": "MACs left of the model (%)", "max": 100},
        "y": {"label": "error of the weights (root mean square)", "min": 0},
        "series": [{"name": "the same error in all factorized layers", "points": points}],
        "rings": rings,
    }


def trade_off(curve: TradeOff, plan: Plan, value: str) -> Chart:
    """Return predicted damage or score of plans for a row of budgets, that of this plan's cost marked."""
    whole = getattr(curve.before, curve.budget, None)
    points, marked = [], None
    for p in curve.points:
        y = getattr(p, value)
        if y is None:
            continue
        x = 100 * getattr(p.cost, curve.budget) / whole if whole else 100 * p.budget
        points.append([x, 100 * y if value == "score" else y])
    own = getattr(plan.after, curve.budget, None)
    if own is not None and whole and points:
        marked = min(points, key=lambda p: abs(p[0] - 100 * own / whole))
    rules = []
    if value == "score" and curve.baseline is not None:
        rules.append({"y": 100 * curve.baseline, "label": f"dense {percent(curve.baseline)}"})
    names = {"macs": "MACs", "params": "parameters", "latency": "latency"}
    return {
        "type": "xy",
        "alt": f"{value} against the budget",
        "x": {"label": f"{names.get(curve.budget, curve.budget)} left (%)"},
        "y": {"label": "score (%)" if value == "score" else "predicted damage"},
        "series": [{"name": value, "points": points}],
        "rings": [] if marked is None else [{"x": marked[0], "y": marked[1], "label": "nearest to this plan"}],
        "rules": rules,
    }


def sensitivities(table: SensitivityTable, most: int = 6) -> Chart | None:
    """Return the errors of the costliest layers' outputs against what is left of each; None where nobody measured."""
    measured = [layer for layer in table.compressible if any(p.output_error is not None for p in layer.points)]
    shown = sorted(measured, key=lambda layer: (layer.before.macs, layer.before.params), reverse=True)[:most]
    if not shown:
        return None
    series = []
    for layer in shown:
        of = "macs" if layer.before.macs else "params"
        curve = layer.curve(layer.formats[0])
        points = [
            [100 * getattr(p.cost, of) / getattr(layer.before, of), p.output_error]
            for p in curve
            if p.output_error is not None
        ]
        series.append({"name": f"{layer.path}, {layer.formats[0]}", "points": points})
    return {
        "type": "xy",
        "alt": "error of layers' outputs against their cost, as measured",
        "x": {"label": "left of the layer (%)", "min": 0, "max": 100},
        "y": {"label": "error of the output", "min": 0},
        "series": series,
    }


def training(record: RunRecord) -> dict[str, Chart]:
    """Return loss and score by epoch, with the stages marked; nothing where nobody trained."""
    parts = [(f"stage {s.index}", s.tuning, s.scores.get("compressed")) for s in record.stages if s.tuning]
    parts = parts or ([("tuning", record.tuning, record.scores.get("compressed"))] if record.tuning else [])
    loss: list[list[Any]] = []
    score: list[list[Any]] = []
    rules: list[Chart] = []
    done = 0
    for name, epochs, start in parts:
        if len(parts) > 1:
            rules.append({"x": done, "label": name, "row": len(rules) % 3})
        if start is not None:
            score.append([done, 100 * start, f"{name}, before training\nscore {percent(start)}"])
        for number, epoch in enumerate(epochs, start=1):
            where = f"{name}, epoch {number}"
            if epoch.get("loss") is not None:
                loss.append([done + number, epoch["loss"], f"{where}\nloss {epoch['loss']:.4g}"])
            if epoch.get("score") is not None:
                score.append([done + number, 100 * epoch["score"], f"{where}\nscore {percent(epoch['score'])}"])
        done += len(epochs)
        last = record.scores.get("tuned") if name == "tuning" else None
        last = next((s.scores.get("tuned") for s in record.stages if name == f"stage {s.index}"), last)
        if last is not None and not any(epoch.get("score") is not None for epoch in epochs):
            score.append([done, 100 * last, f"{name}, after training\nscore {percent(last)}"])
    return _by_epoch(loss, score, rules, record.scores.get("original", record.before.score))


def _by_epoch(loss: list[Any], score: list[Any], rules: list[Chart], dense: float | None) -> dict[str, Chart]:
    found: dict[str, Chart] = {}
    x: Chart = {"label": "epochs of training", "min": 0}
    if loss:
        series: list[Chart] = [{"name": "loss", "points": loss}]
        found["loss"] = {"type": "xy", "alt": "loss by epoch", "x": x, "y": {"label": "loss"}, "series": series}
        found["loss"]["rules"] = rules
    if score:
        level = [] if dense is None else [{"y": 100 * dense, "label": f"dense {percent(dense)}"}]
        series = [{"name": "score", "points": score, "colour": 2}]
        found["score"] = {"type": "xy", "alt": "score by epoch", "x": x, "y": {"label": "score (%)"}, "series": series}
        found["score"]["rules"] = [*rules, *level]
    return found


def stage_path(record: RunRecord) -> Chart:
    """Return the scores of the stages against what was left of the model after each."""
    whole = record.before.macs or 1
    dense = record.scores.get("original", record.before.score)
    way = [] if dense is None else [[100.0, 100 * dense, f"dense\n{percent(dense)}"]]
    steps: dict[str, list[list[Any]]] = {"compressed": [], "tuned": []}
    for stage in record.stages:
        for name, found in steps.items():
            score = stage.scores.get(name)
            if score is not None and (name == "compressed" or stage.tuning):
                words = f"stage {stage.index}, {name}\n{percent(score)}"
                found.append([100 * stage.after.macs / whole, 100 * score, words])
                way.append(found[-1])
    series: list[Chart] = [{"name": "the way", "points": way, "dots": False, "colour": 5}]
    for number, (name, found) in enumerate(steps.items()):
        if found:
            series.append({"name": name, "points": found, "line": False, "colour": number})
    return {
        "type": "xy",
        "alt": "score of each stage against the MACs left",
        "x": {"label": "MACs left of the model (%)", "max": 100},
        "y": {"label": "score (%)"},
        "series": series,
        "rules": [] if dense is None else [{"y": 100 * dense, "label": f"dense {percent(dense)}"}],
    }
