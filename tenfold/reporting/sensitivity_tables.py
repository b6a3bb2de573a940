"""The tables of a sensitivity: errors and losses of score at a few costs, and layers that cannot be compressed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tenfold.records import LayerSensitivity, SensitivityPoint, SensitivityTable
from tenfold.reporting.numbers import count
from tenfold.reporting.plan_tables import reasons_table
from tenfold.reporting.table_parts import grid

_SHARES = (0.25, 0.5, 0.75)


def sensitivity_tables(table: SensitivityTable) -> tuple[RenderableType, ...]:
    """Return a sensitivity table in short: numbers near a few shares of each layer's cost."""
    scored = any(p.score is not None for layer in table.layers for p in layer.points)
    head = Text(f"Sensitivity of {table.model}", style="bold")
    head.append(": each layer factorized alone", style="not bold")
    if table.baseline is not None:
        head.append(f"; {table.metric.name} of the model {table.metric.text(table.baseline)}", style="not bold")
    parts: list[RenderableType] = [head]
    if table.compressible:
        parts.append(_measured(table, scored=scored))
    rest = [layer for layer in table.layers if layer.state != "compressible"]
    if rest:
        parts.append(reasons_table("Not compressible", rest))
    return tuple(parts)


def _measured(table: SensitivityTable, *, scored: bool) -> Table:
    metric = table.metric
    of = f"points of {metric.name}" if metric.percent else f"change of {metric.label}"
    what = f"Error of the output, and {of}," if scored else "Error of the output"
    shown = grid(f"{what} at the rank nearest to this share of the layer's cost")
    shown.add_column("layer", overflow="fold")
    shown.add_column("is", no_wrap=True)
    shown.add_column("MACs", justify="right", no_wrap=True)
    shown.add_column("format", no_wrap=True)
    for share in _SHARES:
        shown.add_column(f"{share:.0%}", justify="right", no_wrap=True)
    for layer in table.compressible:
        for format in layer.formats:
            cells = [_cell(table, layer, layer.curve(format), share) for share in _SHARES]
            shown.add_row(layer.path or "(the model)", layer.kind, count(layer.before.macs), format, *cells)
    return shown


def _cell(table: SensitivityTable, layer: LayerSensitivity, points: Sequence[SensitivityPoint], share: float) -> str:
    whole = layer.before.macs or layer.before.params

    def left(point: SensitivityPoint) -> float:
        return (point.cost.macs if layer.before.macs else point.cost.params) / whole

    near = min(points, key=lambda p: abs(left(p) - share))
    text = "" if near.output_error is None else f"{near.output_error:.3f}"
    if near.score is not None and table.baseline is not None:
        metric = table.metric
        change = metric.plotted(near.score) - metric.plotted(table.baseline)
        text += f"  {change:+{'.1f' if metric.percent else '.3g'}}".replace("-", "−")
    return text
