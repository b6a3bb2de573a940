"""The tables of a run: what the model cost and scored before and after, stage by stage, and under which conditions."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tenfold.records import Agreement, Latency, Measurement, RunRecord
from tenfold.reporting.numbers import (
    count,
    factor,
    interval,
    milliseconds,
    plural,
    seconds,
    size,
    speed,
)
from tenfold.reporting.page_tables import stage_table
from tenfold.reporting.plan_tables import plan_tables
from tenfold.reporting.table_parts import grid, rich_table


def record_tables(record: RunRecord) -> tuple[RenderableType, ...]:
    """Return the tables of before and after, of the stages if there were any, of conditions, and of the plan."""
    stages = (rich_table("stages", *stage_table(record)),) if record.stages else ()
    agreed = () if record.agreement is None else (agreement_line(record.agreement),)
    return (cost_table(record), *agreed, *stages, conditions(record), *plan_tables(record.plan))


def cost_table(record: RunRecord) -> Table:
    """Return parameters, MACs, bytes, measured latency and score, before and after."""
    before, after, metric = record.before, record.after, record.metric
    table = grid(record.task or record.plan.model)
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, old, new in (("parameters", before.params, after.params), ("MACs", before.macs, after.macs)):
        table.add_row(name, count(old), count(new), f"{factor(old, new)} fewer")
    if before.bytes and after.bytes:
        table.add_row("size", size(before.bytes), size(after.bytes), f"{factor(before.bytes, after.bytes)} smaller")
    if before.latency_ms and after.latency_ms:
        table.add_row("latency", latency_cell(before), latency_cell(after), _speedup(record))
    for name, score in _scores(record):
        start = record.scores.get("original", before.score)
        change = "" if start is None else metric.change(start, score)
        table.add_row(name, "" if start is None else metric.text(start), metric.text(score), change)
    return table


def agreement_line(agreed: Agreement) -> Text:
    """Return how far the compressed model agrees with the original, marked where that is little."""
    low = agreed.is_low and agreed.can_be_judged
    verdict = "It no longer does what the original does. " if low else ""
    return Text(f"Agreement with the original: {agreed.in_words()}. {verdict}".strip(), style="bold red" if low else "")


def conditions(record: RunRecord) -> Text:
    """Return what the measured numbers depend on, in a line or two."""
    lines = []
    latency = record.after.latency or record.before.latency
    if latency is not None:
        lines.append(f"Latency: {latency_conditions(latency)}; {_certainty(record, latency)}.")
    e = record.environment
    total = f", {seconds(sum(record.seconds.values()))} in all" if record.seconds else ""
    lines.append(f"On {e.device_name or e.device}, {plural(e.threads, 'thread')}, torch {e.torch}{total}.")
    return Text("\n".join(lines), style="dim")


def latency_conditions(latency: Latency) -> str:
    """Return how a latency was measured."""
    batch = "" if latency.batch_size is None else f"batch {latency.batch_size}, "
    how = f"median of {latency.runs} interleaved rounds [quartiles]"
    clock = ", by processor time" if latency.clock == "processor" else ""
    load = f"; {latency.load}" if latency.load else ""
    where = latency.memory_format if latency.runtime == "torch" else latency.runtime
    return f"{how}, {batch}{latency.dtype}, {where}, {plural(latency.threads, 'thread')}{clock}{load}"


def latency_cell(measured: Measurement) -> str:
    """Return the latency of a model with its quartiles."""
    if measured.latency is None:
        return milliseconds(measured.latency_ms or 0.0)
    return interval(measured.latency.median_ms, measured.latency.low_ms, measured.latency.high_ms)


def _certainty(record: RunRecord, latency: Latency) -> str:
    doubt = "" if record.speedup is None else record.speedup.doubt
    if not doubt:
        return "speed-up with its 95 % interval"
    return "no speed-up can be claimed" + ("" if doubt == latency.load else f": {doubt}")


def _speedup(record: RunRecord) -> str:
    if record.speedup is None:
        return speed((record.before.latency_ms or 0.0) / (record.after.latency_ms or 1.0))
    if record.speedup.doubt:
        return record.speedup.in_doubt.partition(":")[0]
    return f"{speed(record.speedup.ratio)} [{record.speedup.low:.2f}–{record.speedup.high:.2f}×]"


def _scores(record: RunRecord) -> list[tuple[str, float]]:
    steps = [(name, value) for name, value in record.scores.items() if name != "original"]
    if len(steps) > 1:
        return [(f"{record.metric.name}, {name}", value) for name, value in steps]
    return [] if record.after.score is None else [(record.metric.name, record.after.score)]
