"""The report of a run: one HTML file, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.records import Latency, LayerPlan, RunRecord, write_text
from tenfold.reporting import charts
from tenfold.reporting.layers import layer_table, shown_layers, stage_table
from tenfold.reporting.numbers import (
    count,
    factor,
    milliseconds,
    percent,
    points,
    ranks,
    seconds,
    size,
    speed,
    three_digits,
)
from tenfold.reporting.pages import page
from tenfold.reporting.reading import Run


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
    drawn: dict[str, charts.Chart] = {}
    overview, choices = _overview(run, drawn), _choices(run, drawn)
    trained = _training(record, drawn)
    columns, rows = layer_table(record, run.analysis)
    picked = _picked(run)
    stages = dict(zip(("columns", "rows"), stage_table(record), strict=True)) if record.stages else None
    kept = len(rows) - len(plan.factorized)
    return page(
        "report.html",
        title=f"{record.task or plan.model}: {_headline(record)}",
        data={"charts": drawn, "layers": picked},
        lead=_lead(record),
        tiles=tiles(record),
        counted=f"{len(plan.factorized)} of the {len(rows)} layers with parameters are factorized, {kept} are kept.",
        overview=overview,
        columns=columns,
        rows=rows,
        picked=[layer["path"] for layer in picked],
        choices=choices,
        training=trained,
        stages=stages,
        command=record.command or "",
        facts=facts(record),
    )


def tiles(record: RunRecord) -> list[dict[str, Any]]:
    """Return the headline numbers before and after, each with what changed and, where it means one, a share."""
    before, after = record.before, record.after
    found = [
        _tile("Parameters", before.params, after.params, count, "fewer"),
        _tile("MACs", before.macs, after.macs, count, "fewer"),
    ]
    if before.bytes and after.bytes:
        found.append(_tile("Size", before.bytes, after.bytes, size, "smaller"))
    if before.latency_ms and after.latency_ms:
        found.append(_latency(record))
    start, end = record.scores.get("original", before.score), after.score
    if end is not None:
        change = "—" if start is None else points(start, end)
        tone = "" if start is None or round(end - start, 4) == 0 else "good" if end > start else "bad"
        first = "—" if start is None else percent(start)
        found.append({"name": "Score", "change": change, "tone": tone, "before": first, "after": percent(end)})
        found[-1] |= {"note": _steps(record), "share": None}
    return found


def _tile(name: str, before: float, after: float, show: Any, word: str) -> dict[str, Any]:
    share = after / before if before else None
    tone = "" if before == after else "good" if after < before else "bad"
    note = "" if share is None else f"{percent(share)} left"
    change = f"{factor(before, after)} {word}"
    return {"name": name, "change": change, "tone": tone, "before": show(before), "after": show(after)} | {
        "note": note,
        "share": share,
    }


def _latency(record: RunRecord) -> dict[str, Any]:
    old, new = record.before.latency_ms or 0.0, record.after.latency_ms or 1.0
    fast = record.speedup
    ratio = old / new if fast is None else fast.ratio
    certain = fast is None or fast.low > 1 or fast.high < 1
    note = "" if fast is None else f"{fast.confidence:.0%} interval {fast.low:.2f}–{fast.high:.2f}×"
    return {
        "name": f"Latency{_batch(record.after.latency)}",
        "change": speed(ratio) if certain else "no difference seen",
        "tone": ("good" if ratio > 1 else "bad") if certain else "",
        "before": _interval(record.before.latency, old),
        "after": _interval(record.after.latency, new),
        "note": note,
        "share": new / old,
    }


def _interval(latency: Latency | None, value: float) -> str:
    quartiles = "" if latency is None else f" [{three_digits(latency.low_ms)}–{three_digits(latency.high_ms)}]"
    return f"{milliseconds(value)}{quartiles}"


def _batch(latency: Latency | None) -> str:
    return "" if latency is None or latency.batch_size is None else f", batch {latency.batch_size}"


def _steps(record: RunRecord) -> str:
    steps = {name: value for name, value in record.scores.items() if name != "original"}
    told = ", ".join(f"{name} {percent(value)}" for name, value in steps.items())
    return told if len(set(steps.values())) > 1 else ""


def _headline(record: RunRecord) -> str:
    what = record.before.macs, record.after.macs
    name = "MACs"
    if not what[0]:
        what, name = (record.before.params, record.after.params), "parameters"
    return f"{factor(*what)} fewer {name}"


def _lead(record: RunRecord) -> str:
    plan = record.plan
    formats = sorted({str(layer.format) for layer in plan.factorized})
    budget = " and ".join(_limit(name, value, record) for name, value in plan.budget.items())
    parts = [f"{plan.model}, {len(plan.factorized)} layers as {', '.join(formats)}" if formats else plan.model]
    if plan.rule.get("name"):
        parts.append(f"ranks by the rule {plan.rule['name']}{f' for a budget of {budget}' if budget else ''}")
    if record.stages:
        parts.append(f"in {len(record.stages)} stages")
    epochs = sum(len(s.tuning) for s in record.stages) or len(record.tuning)
    parts.append(f"tuned for {epochs} {'epoch' if epochs == 1 else 'epochs'}" if epochs else "not tuned")
    return ", ".join(parts) + "."


def _limit(name: str, value: float, record: RunRecord) -> str:
    """Return a budget in words, as a share of the model that there was."""
    whole = getattr(record.before, {"latency": "latency_ms"}.get(name, name), None)
    share = value if value <= 1 else value / whole if whole else None
    of = {"macs": "MACs", "params": "parameters"}.get(name, name)
    return f"{value:g} {of}" if share is None else f"{100 * share:.3g} % of the {of}"


def _overview(run: Run, drawn: dict[str, charts.Chart]) -> list[dict[str, str]]:
    of = "macs" if run.record.plan.before.macs else "params"
    layers = [layer for layer in shown_layers(run.record.plan.layers) if getattr(layer.before, of)]
    if not layers:
        return []
    drawn["costs"] = charts.cost_bars(layers, of)
    return [
        {
            "id": "costs",
            "title": "Where the cost was, and is",
            "about": "Every bar tells its layer and its numbers, to the mouse and to the arrow keys.",
        }
    ]


def _choices(run: Run, drawn: dict[str, charts.Chart]) -> list[dict[str, str]]:
    plan = run.record.plan
    found: list[tuple[str, charts.Chart | None, str, str]] = []
    if run.tradeoff is not None:
        about = f"Plans by the rule {run.tradeoff.rule.get('name', '')}. {run.tradeoff.damage.capitalize()}."
        found += [
            (value, charts.trade_off(run.tradeoff, plan, value), f"{value.capitalize()} by budget", about)
            for value in ("score", "damage")
            if any(getattr(p, value) is not None for p in run.tradeoff.points)
        ]
    if run.analysis is not None:
        about = (
            "All factorized layers at the same error of their weights; ringed, this plan, which may weigh them by data."
        )
        found.append(("equal", charts.equal_error(plan, run.analysis), "Error of the weights by budget", about))
    if run.sensitivity is not None:
        about = "As measured, each layer factorized alone: the costliest ones."
        found.append(("sensitivity", charts.sensitivities(run.sensitivity), "Sensitivity of layers", about))
    drawn.update({name: chart for name, chart, _, _ in found if chart is not None})
    return [{"id": name, "title": title, "about": about} for name, chart, title, about in found if chart is not None]


def _training(record: RunRecord, drawn: dict[str, charts.Chart]) -> list[dict[str, str]]:
    found = []
    titles = {
        "loss": ("Loss", "Mean over the batches of an epoch."),
        "score": ("Score", "After each epoch, as far as it was evaluated."),
    }
    for name, chart in charts.training(record).items():
        drawn[f"training-{name}"] = chart
        found.append({"id": f"training-{name}", "title": titles[name][0], "about": titles[name][1]})
    if record.stages and any(s.scores for s in record.stages):
        drawn["stages"] = charts.stage_path(record)
        about = "The way from the dense model, on the right, to the left."
        found.append({"id": "stages", "title": "Score by stage", "about": about})
    return found


def _picked(run: Run) -> list[dict[str, Any]]:
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
    return f"{layer.kind} as {layer.format} {ranks(layer.rank)}: {saved}{error}. {layer.reason}"


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return what the outcome depends on: rule, seed, machine, versions, settings and time, by name."""
    e = record.environment
    rule = ", ".join(f"{k}={v}" for k, v in record.plan.rule.items() if k not in ("name", "ranks") and v is not None)
    found = [
        ("Rule", f"{record.plan.rule.get('name', '')}{f' ({rule})' if rule else ''}"),
        ("Budget", ", ".join(_limit(k, v, record) for k, v in record.plan.budget.items())),
        ("Seed", str(record.seed)),
        ("Batch norms folded", str(len(record.plan.fused) or "")),
        *((name.replace("_", " ").capitalize(), _setting(value)) for name, value in record.settings.items()),
        (
            "Machine",
            f"{e.device_name or e.device}, {e.threads} {'thread' if e.threads == 1 else 'threads'}, {e.platform}",
        ),
        (
            "Versions",
            ", ".join(
                f"{k} {v}"
                for k, v in {"tenfold": e.tenfold, "python": e.python, "torch": e.torch, **e.versions}.items()
            ),
        ),
        ("Latency", _conditions(record)),
        ("Time", ", ".join(f"{name} {seconds(value)}" for name, value in record.seconds.items())),
    ]
    return [(name, value) for name, value in found if value]


def _setting(value: Any, depth: int = 0) -> str:
    """Return a setting without what is not set; what is inside of it, in brackets."""
    if isinstance(value, dict):
        text = ", ".join(f"{k}={_setting(v, depth + 1)}" for k, v in value.items() if v not in (None, [], {}))
        return f"({text})" if depth else text
    if isinstance(value, list | tuple):
        return " ".join(_setting(item, depth + 1) for item in value)
    return "" if value is None else str(value)


def _conditions(record: RunRecord) -> str:
    latency = record.after.latency or record.before.latency
    if latency is None:
        return ""
    return (
        f"median of {latency.runs} rounds in turns [quartiles], {latency.dtype}, {latency.memory_format}"
        f"{_batch(latency)}, {latency.threads} {'thread' if latency.threads == 1 else 'threads'}"
    )
