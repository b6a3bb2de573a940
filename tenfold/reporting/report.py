"""The report of a run: one HTML file, from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tenfold.allocation.parts import in_words
from tenfold.files import write_text
from tenfold.records import LayerPlan, Plan, RunRecord
from tenfold.reporting import charts
from tenfold.reporting.charts import Chart
from tenfold.reporting.numbers import count, factor, limits, percent, plural, ranks, seconds, size, speed
from tenfold.reporting.page_tables import NORM, layer_table, shown_layers, stage_table
from tenfold.reporting.pages import page
from tenfold.reporting.run_files import Run
from tenfold.reporting.run_tables import latency_cell, latency_conditions

Tile = dict[str, Any]
Figure = tuple[str, Chart | None, str, str]  # its name, what to draw, title and a sentence about it


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of a run as one HTML file, whole or not at all, and return its path.

    Args:
        run: as ``read_run`` returned it.
        path: of the file.
    """
    path = Path(path)
    write_text(path, report(run))
    return path


def report(run: Run) -> str:
    """Return the report of a run as HTML that needs nothing else: no network, no torch, no other file."""
    record, plan = run.record, run.record.plan
    columns, rows = layer_table(record, run.analysis)
    changed = [x for x in plan.layers if x.action == "factorize" or x.path in plan.narrowed_paths]
    kept = len(rows) - len(changed)
    norms = sum(row.kind == NORM for row in rows)
    layers = _layers(run)
    overview, choices, training = _overview(run), _choices(run), _training(record)
    drawn = {name: chart for name, chart, _, _ in (*overview, *choices, *training) if chart is not None}
    return page(
        "report.html",
        title=f"{record.task or plan.model}: {_headline(record)}",
        data={"charts": drawn, "layers": layers},
        lead=_lead(record),
        tiles=tiles(record),
        counted=f"{len(changed)} of the {len(rows)} layers with parameters are {_changes(plan)}, {kept} are kept.",
        columns=columns,
        rows=rows,
        norms=norms,
        picked=[layer["path"] for layer in layers],
        stages=dict(zip(("columns", "rows"), stage_table(record), strict=True)) if record.stages else None,
        command=record.command or "",
        facts=facts(record),
        overview=_places(overview),
        choices=_places(choices),
        training=_places(training),
    )


def _places(figures: Sequence[Figure]) -> list[dict[str, str]]:
    return [{"id": name, "title": title, "about": about} for name, chart, title, about in figures if chart is not None]


def tiles(record: RunRecord) -> list[Tile]:
    """Return the headline numbers before and after, each with what changed and, where it means one, a share."""
    before, after = record.before, record.after
    found = [
        _cost_tile("Parameters", before.params, after.params, count, "fewer"),
        _cost_tile("MACs", before.macs, after.macs, count, "fewer"),
    ]
    if before.bytes and after.bytes:
        found.append(_cost_tile("Size", before.bytes, after.bytes, size, "smaller"))
    if before.latency_ms and after.latency_ms:
        found.append(_latency_tile(record))
    if after.score is not None:
        found.append(_score_tile(record, after.score))
    return found


def _cost_tile(name: str, before: float, after: float, show: Callable[[float], str], word: str) -> Tile:
    share = after / before if before else None
    return {
        "name": name,
        "change": f"{factor(before, after)} {word}",
        "tone": _tone(before - after),
        "before": show(before),
        "after": show(after),
        "note": "" if share is None else f"{percent(share)} left",
        "share": share,
    }


def _latency_tile(record: RunRecord) -> Tile:
    old, new = record.before.latency_ms or 0.0, record.after.latency_ms or 1.0
    fast, latency = record.speedup, record.after.latency
    ratio = old / new if fast is None else fast.ratio
    doubt = "" if fast is None else fast.in_doubt.partition(":")[0]
    certain = not doubt and (fast is None or fast.low > 1 or fast.high < 1)
    return {
        "name": "Latency" if latency is None or latency.batch_size is None else f"Latency, batch {latency.batch_size}",
        "change": doubt or (speed(ratio) if certain else "no difference seen"),
        "tone": _tone(ratio - 1) if certain else "",
        "before": latency_cell(record.before),
        "after": latency_cell(record.after),
        "note": "" if fast is None else fast.doubt or f"{fast.confidence:.0%} interval {fast.low:.2f}–{fast.high:.2f}×",
        "share": None if doubt else new / old,
    }


def _score_tile(record: RunRecord, score: float) -> Tile:
    metric, start = record.metric, record.scores.get("original", record.before.score)
    steps = {name: value for name, value in record.scores.items() if name != "original"}
    on_the_way = ", ".join(f"{name} {metric.text(value)}" for name, value in steps.items())
    return {
        "name": _capital(metric.name),
        "change": "—" if start is None else metric.change(start, score),
        "tone": "" if start is None else _tone(round(metric.lost(score, start), 4)),
        "before": "—" if start is None else metric.text(start),
        "after": metric.text(score),
        "note": on_the_way if len(set(steps.values())) > 1 else "",
        "share": None,
    }


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _tone(gain: float) -> str:
    return "" if gain == 0 else "good" if gain > 0 else "bad"


def _headline(record: RunRecord) -> str:
    before, after = record.before, record.after
    if before.macs:
        return f"{factor(before.macs, after.macs)} fewer MACs"
    return f"{factor(before.params, after.params)} fewer parameters"


def _changes(plan: Plan) -> str:
    return "factorized or narrower" if plan.narrowed else "factorized"


def _lead(record: RunRecord) -> str:
    plan = record.plan
    alone = [layer for layer in plan.factorized if layer.path not in plan.narrowed_paths]
    formats = sorted({str(layer.format) for layer in alone})
    budget = " and ".join(limits(plan.recipe.budget, record.before)) or in_words(plan.recipe.budget_of)
    parts = [f"{plan.model}, {plural(len(alone), 'layer')} as {', '.join(formats)}" if formats else plan.model]
    parts += [f"{plural(len(plan.narrowed), 'unit')} narrowed"] if plan.narrowed else []
    parts.append(f"ranks by the rule {plan.recipe.rule_name}{f' for a budget of {budget}' if budget else ''}")
    if record.stages:
        parts.append(f"in {plural(len(record.stages), 'stage')}")
    epochs = sum(len(s.tuning) for s in record.stages) or len(record.tuning)
    parts.append(f"tuned for {plural(epochs, 'epoch')}" if epochs else "not tuned")
    return ", ".join(parts) + "."


def _overview(run: Run) -> list[Figure]:
    of = "macs" if run.record.plan.before.macs else "params"
    layers = [layer for layer in shown_layers(run.record.plan.layers) if getattr(layer.before, of)]
    chart = charts.cost_bars(layers, of) if layers else None
    about = "Hover over a bar, or use the arrow keys, to read its layer and its numbers."
    return [("costs", chart, "Cost of each layer, before and after", about)]


def _choices(run: Run) -> list[Figure]:
    plan = run.record.plan
    found: list[Figure] = []
    if run.tradeoff is not None:
        about = f"Plans by the rule {run.tradeoff.rule.get('name', '')}. {run.tradeoff.distortion.capitalize()}."
        marked = charts.nearest(run.tradeoff, plan.after)
        drawn = charts.trade_offs(run.tradeoff, marked, "nearest to this plan")
        titles = {"score": _capital(run.tradeoff.metric.name), "distortion": "Distortion"}
        found += [(name, chart, f"{titles[name]} by budget", about) for name, chart in drawn.items()]
    if run.analysis is not None:
        about = "All factorized layers at the same error of their weights; ringed: this plan, which may use data."
        found.append(("equal", charts.equal_error(plan, run.analysis), "Error of the weights by budget", about))
    if run.sensitivity is not None:
        layers = charts.measured_layers(run.sensitivity, "output_error")[:6]
        chart = charts.sensitivity(layers, "output_error", run.sensitivity) if layers else None
        found.append(("sensitivity", chart, "Sensitivity of layers", "Each of the costliest layers factorized alone."))
    return found


def _training(record: RunRecord) -> list[Figure]:
    titles = {
        "loss": ("Loss", "Mean over the batches of an epoch."),
        "score": (_capital(record.metric.name), "After each epoch, as far as it was evaluated."),
    }
    found: list[Figure] = [
        (f"training-{name}", chart, *titles[name]) for name, chart in charts.training(record).items()
    ]
    if record.stages and any(s.scores for s in record.stages):
        about = "From the dense model, on the right, to the left."
        found.append(("stages", charts.stage_path(record), f"{_capital(record.metric.name)} by stage", about))
    return found


def _layers(run: Run) -> list[dict[str, Any]]:
    if run.analysis is None:
        return []
    known = {layer.path: layer for layer in run.analysis.layers}
    return [
        {
            "path": layer.path,
            "words": _words(layer),
            "spectrum": charts.spectrum(known[layer.path], layer),
            "curve": charts.error_curve(known[layer.path], layer),
        }
        for layer in run.record.plan.factorized
        if layer.path in known
    ]


def _words(layer: LayerPlan) -> str:
    error = "" if layer.rel_error is None else f", error {layer.rel_error:.3f}"
    saved = f"{count(layer.before.macs)} → {count(layer.after.macs)} MACs"
    return f"{layer.kind} as {layer.format} {ranks(layer.rank)}: {saved}{error}. {_capital(layer.reason)}"


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return what the outcome depends on: rule, seed, machine, versions, settings and time, by name."""
    e = record.environment
    versions = {"tenfold": e.tenfold, "python": e.python, "torch": e.torch, **e.versions}
    latency = record.after.latency or record.before.latency
    recipe = record.plan.recipe
    rule = ", ".join(f"{k}={v}" for k, v in recipe.rule.items() if k not in ("name", "ranks") and v is not None)
    found = [
        ("Rule", f"{recipe.rule_name}{f' ({rule})' if rule else ''}"),
        ("Budget", ", ".join(limits(recipe.budget, record.before)) or in_words(recipe.budget_of)),
        ("Runtime", recipe.runtime or ""),
        ("Agreement with the original", "" if record.agreement is None else record.agreement.in_words()),
        ("Seed", str(record.seed)),
        ("Batch norms fused", str(len(record.plan.fused) or "")),
        *((name.replace("_", " ").capitalize(), _setting(value)) for name, value in record.settings.items()),
        ("Machine", f"{e.device_name or e.device}, {plural(e.threads, 'thread')}, {e.platform}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Latency", "" if latency is None else latency_conditions(latency)),
        ("Time", ", ".join(f"{name} {seconds(value)}" for name, value in record.seconds.items())),
    ]
    return [(name, value) for name, value in found if value]


def _setting(value: Any, depth: int = 0) -> str:
    """Return a setting in words: unset values left out, nested ones in brackets."""
    if isinstance(value, dict):
        text = ", ".join(f"{k}={_setting(v, depth + 1)}" for k, v in value.items() if v not in (None, [], {}))
        return f"({text})" if depth else text
    if isinstance(value, list | tuple):
        return " ".join(_setting(item, depth + 1) for item in value)
    return "" if value is None else str(value)
