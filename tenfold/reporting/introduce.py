"""How records introduce themselves: in a line, as tables, as a card. One function of each for every kind."""

from __future__ import annotations

from functools import singledispatch

from tenfold.records import Cost, ExportRecord, OptionTable, Plan, Profile, Record, RunRecord
from tenfold.reporting import charts
from tenfold.reporting.cards import card as drawn
from tenfold.reporting.numbers import QUANTITIES, change, count, factor, milliseconds, percent, plural, size, speed
from tenfold.reporting.option_tables import least, num_options, option_tables
from tenfold.reporting.page_tables import shown_layers
from tenfold.reporting.report import tiles
from tenfold.reporting.text import as_text, render_plan, render_profile, render_record

HEAD = ("", "before", "after", "change")


@singledispatch
def line(record: Record) -> str:
    """Return what a record is in one line."""
    raise NotImplementedError(type(record))


@singledispatch
def text(record: Record) -> str:
    """Return a record as tables in plain text."""
    raise NotImplementedError(type(record))


@singledispatch
def card(record: Record) -> str:
    """Return a record as a card in HTML."""
    raise NotImplementedError(type(record))


@line.register
def _(record: Profile) -> str:
    time = "" if record.latency is None else f", {milliseconds(record.latency.median_ms)}"
    costs = f"{count(record.params)} parameters, {count(record.macs)} MACs{time}"
    return f"<Profile of {record.model} on {_shapes(record)}: {costs}, {plural(len(record.layers), 'layer')}>"


@text.register
def _(record: Profile) -> str:
    return render_profile(record)


@card.register
def _(record: Profile) -> str:
    rows = [("Parameters", count(record.params)), ("MACs", count(record.macs)), ("Size", size(record.bytes))]
    if record.latency is not None:
        rows.append(("Latency", milliseconds(record.latency.median_ms)))
    of = "macs" if record.macs else "params"
    layers = [layer for layer in record.layers if getattr(layer, of)]
    series = {"now": [getattr(layer, of) for layer in layers]}
    chart = charts.bars(f"{QUANTITIES[of]} of each layer", [layer.path for layer in layers], of, series)
    return drawn(f"Profile of {record.model}", f"on {_shapes(record)}", [("", ""), *rows], chart)


@line.register
def _(record: Plan) -> str:
    return f"<Plan for {record.model}: {_planned(record)}, {_costs(record.before, record.after)}>"


@text.register
def _(record: Plan) -> str:
    return render_plan(record)


@card.register
def _(record: Plan) -> str:
    about = f"{_planned(record)}, by the rule {record.recipe.rule_name}"
    rows = [
        (name, count(old), count(new), f"{factor(old, new)} fewer")
        for name, old, new in (
            ("Parameters", record.before.params, record.after.params),
            ("MACs", record.before.macs, record.after.macs),
        )
    ]
    return drawn(f"Plan for {record.model}:", about, [HEAD, *rows], _bars(record))


@line.register
def _(record: OptionTable) -> str:
    formats = ", ".join(sorted({one.format for layer in record.eligible for one in layer.options}))
    return f"<OptionTable of {record.model}: {_choice(record)}{f', {formats}' if formats else ''}>"


@text.register
def _(record: OptionTable) -> str:
    return as_text(*option_tables(record))


@card.register
def _(record: OptionTable) -> str:
    of = "macs" if record.before.macs else "params"
    now, low = ([getattr(cost, of) for cost in costs] for costs in _now_and_least(record))
    names = [layer.path for layer in record.eligible]
    alt = f"{QUANTITIES[of]} of each layer now, and the least that its options cost"
    return drawn(
        f"Options of {record.model}:", _choice(record), [], charts.bars(alt, names, of, {"now": now, "least": low})
    )


@line.register
def _(record: RunRecord) -> str:
    before, after = record.before, record.after
    parts = [_costs(Cost(params=before.params, macs=before.macs), Cost(params=after.params, macs=after.macs))]
    if record.speedup is not None and not record.speedup.doubt:
        parts.append(speed(record.speedup.ratio))
    if after.score is not None:
        parts.append(f"{record.metric.name} {record.metric.text(after.score)}")
    return f"<RunRecord of {record.task or record.plan.model}: {', '.join(parts)}>"


@text.register
def _(record: RunRecord) -> str:
    return render_record(record)


@card.register
def _(record: RunRecord) -> str:
    rows = [(tile["name"], tile["before"], tile["after"], tile["change"]) for tile in tiles(record)]
    about = _planned(record.plan)
    if record.agreement is not None:
        about += f"; agreement with the original: {record.agreement.in_words()}"
    return drawn(f"{record.task or record.plan.model}:", about, [HEAD, *rows], _bars(record.plan))


@line.register
def _(record: ExportRecord) -> str:
    faster = record.int8.speedup if record.int8 is not None else record.speedup
    parts = [f"{record.target}{', int8' if record.int8 is not None else ''}", size(record.bytes)]
    parts.append(f"largest error {max(record.parity.values(), default=0):.1e}")
    if faster is not None and not faster.doubt:
        parts.append(f"{faster.ratio:.2f}× as fast as in {'floating point' if record.int8 is not None else 'torch'}")
    return f"<ExportRecord of {record.file}: {', '.join(parts)}>"


@text.register
def _(record: ExportRecord) -> str:
    return "\n".join(export_lines(record))


@card.register
def _(record: ExportRecord) -> str:
    return drawn(f"{record.file}:", repr(record).partition(": ")[2].removesuffix(">"), [], None)


def export_lines(made: ExportRecord) -> list[str]:
    """Return what came of an export: the file, its error, how it was quantized, how fast it is."""
    opset = f", opset {made.opset}" if made.opset else ""
    batches = "batches of any size" if made.dynamic_batch else "one size of the batch"
    fused = f", {made.fused} batch norms fused" if made.fused else ""
    lines = [f"{made.file}: {made.target}{opset}, {made.bytes:,} bytes, {batches}{fused}"]
    errors = ", ".join(f"{error:.1e} at batch {size}" for size, error in made.parity.items())
    lines.append(f"largest error against the model: {errors}")
    if made.int8 is not None:
        number = sum(made.int8.operators.values())
        same = "" if made.int8.agreement is None else f", {percent(made.int8.agreement)} the same answer"
        lines.append(
            f"int8: {number} operators, {made.int8.was_bytes:,} bytes before, outputs change by "
            f"{percent(made.int8.noise)}{same} ({made.int8.samples} samples)"
        )
    speedup = made.int8.speedup if made.int8 is not None else made.speedup
    if made.latency is not None and speedup is not None:
        than = "the file in floating point" if made.int8 is not None else "the model in torch"
        clock = " of processor time" if made.latency.clock == "processor" else ""
        ratio = f"{speedup.ratio:.3g} [{speedup.low:.3g}–{speedup.high:.3g}] times as fast as {than}"
        if speedup.doubt:
            ratio = f"against {than} {speedup.in_doubt}"
        lines.append(f"latency: {milliseconds(made.latency.median_ms)}{clock}, {ratio}")
        if made.latency.load and not speedup.doubt:
            lines.append(f"it was measured while {made.latency.load}")
    return lines


def _shapes(profile: Profile) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in profile.input_shapes) or "its inputs"


def _planned(plan: Plan) -> str:
    budget = f" for {plan.recipe.budget}" if plan.recipe.budget else ""
    return f"{len(plan.factorized)} of {plural(len(shown_layers(plan.layers)), 'layer')} factorized{budget}"


def _choice(table: OptionTable) -> str:
    counted = sum(bool(x.before.params or x.before.macs) for x in table.layers)
    return f"{num_options(table):,} options for {len(table.eligible)} of {plural(counted, 'layer')}"


def _now_and_least(table: OptionTable) -> tuple[list[Cost], list[Cost]]:
    return [layer.before for layer in table.eligible], [least(layer) for layer in table.eligible]


def _bars(plan: Plan) -> charts.Chart | None:
    of = "macs" if plan.before.macs else "params"
    layers = [layer for layer in plan.layers if getattr(layer.before, of)]
    return charts.cost_bars(layers, of) if layers else None


def _costs(before: Cost, after: Cost) -> str:
    pairs = (("parameters", before.params, after.params), ("MACs", before.macs, after.macs))
    return ", ".join(f"{change(old, new)} {name}" for name, old, new in pairs if old)
