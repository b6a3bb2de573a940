"""The way of a run in stages: what each one cost, changed and scored."""

from __future__ import annotations

from rich.table import Table

from tenfold.records import RunRecord, StageRecord
from tenfold.reporting.numbers import count, percent
from tenfold.reporting.style import grid


def stages_table(record: RunRecord) -> Table:
    """Return one row for each stage of a run: layers changed, cost after it, scores before and after its training."""
    table = grid("stages")
    for name in ("stage", "layers", "parameters", "MACs", "of the original", "compressed", "tuned", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in record.stages:
        table.add_row(
            str(stage.index),
            "tuned only" if stage.final else str(len(stage.layers)),
            count(stage.after.params),
            count(stage.after.macs),
            percent(stage.after.macs / record.before.macs) if record.before.macs else "",
            _score(stage, "compressed"),
            _score(stage, "tuned"),
            str(len(stage.tuning)) if stage.tuning else "",
        )
    return table


def _score(stage: StageRecord, name: str) -> str:
    return percent(stage.scores[name]) if name in stage.scores else ""
