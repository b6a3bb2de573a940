"""The outcome of a run: what the model cost and scored before, and what it does after."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tenfold.records import Latency, Measurement, RunRecord
from tenfold.reporting.numbers import count, factor, milliseconds, percent, points, seconds, size, speed, three_digits
from tenfold.reporting.plans import plan_tables
from tenfold.reporting.stages import stages_table
from tenfold.reporting.style import grid


def record_tables(record: RunRecord) -> tuple[RenderableType, ...]:
    """Return the tables of before and after, of the stages if there were any, of conditions, and of the plan."""
    way = (stages_table(record),) if record.stages else ()
    return (cost_table(record), *way, conditions(record), *plan_tables(record.plan))


def cost_table(record: RunRecord) -> Table:
    """Return parameters, MACs, bytes, measured latency and score, before and after."""
    before, after = record.before, record.after
    table = grid(record.task or record.plan.model)
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("parameters", count(before.params), count(after.params), _fewer(before.params, after.params))
    table.add_row("MACs", count(before.macs), count(after.macs), _fewer(before.macs, after.macs))
    if before.bytes and after.bytes:
        table.add_row("size", size(before.bytes), size(after.bytes), f"{factor(before.bytes, after.bytes)} smaller")
    if before.latency_ms and after.latency_ms:
        table.add_row("latency", _latency(before), _latency(after), _speedup(record))
    for name, score in _scores(record):
        start = record.scores.get("original", before.score)
        change = "" if start is None else points(start, score)
        table.add_row(name, "" if start is None else percent(start), percent(score), change)
    return table


def conditions(record: RunRecord) -> Text:
    """Return what the measured numbers depend on, in a line or two."""
    lines = []
    latency = record.after.latency or record.before.latency
    if latency is not None:
        lines.append(f"Latency: {_measured_on(latency)}.")
    e = record.environment
    machine = f"{e.device_name or e.device}, {e.threads} {'thread' if e.threads == 1 else 'threads'}"
    total = f", {seconds(sum(record.seconds.values()))} in all" if record.seconds else ""
    lines.append(f"On {machine}, torch {e.torch}{total}.")
    return Text("\n".join(lines), style="dim")


def _measured_on(latency: Latency) -> str:
    batch = "" if latency.batch_size is None else f"batch {latency.batch_size}, "
    how = f"median of {latency.runs} rounds in turns [quartiles], speed-up with its 95 % interval"
    return f"{batch}{latency.dtype}, {latency.memory_format}; {how}"


def _latency(measured: Measurement) -> str:
    if measured.latency is None:
        return milliseconds(measured.latency_ms or 0.0)
    low, high = measured.latency.low_ms, measured.latency.high_ms
    return f"{milliseconds(measured.latency.median_ms)} [{three_digits(low)}–{three_digits(high)}]"


def _speedup(record: RunRecord) -> str:
    if record.speedup is None:
        return speed((record.before.latency_ms or 0.0) / (record.after.latency_ms or 1.0))
    return f"{speed(record.speedup.ratio)} [{record.speedup.low:.2f}–{record.speedup.high:.2f}×]"


def _fewer(before: int, after: int) -> str:
    return f"{factor(before, after)} fewer"


def _scores(record: RunRecord) -> list[tuple[str, float]]:
    """Return the scores on the way to the last one, named."""
    steps = [(name, value) for name, value in record.scores.items() if name != "original"]
    if len(steps) > 1:
        return [(f"score, {name}", value) for name, value in steps]
    return [] if record.after.score is None else [("score", record.after.score)]
