"""The tables of all layers and of all stages, as columns and rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from tenfold.records import Analysis, LayerPlan, RunRecord
from tenfold.reporting.numbers import change, count, percent, ranks, three_digits
from tenfold.reporting.table_parts import Cell, Column, Row, number

_STABILITY = re.compile(r"; sensitivity (\S+), largest term (\S+)")


def shown_layers(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Return the layers that cost anything."""
    return [layer for layer in layers if layer.before.params or layer.before.macs]


def layer_table(record: RunRecord, analysis: Analysis | None) -> tuple[list[Column], list[Row]]:
    """Return the columns and rows of every layer; columns of what nobody measured are left out."""
    layers = shown_layers(record.plan.layers)
    drawn = {layer.path for layer in analysis.layers} if analysis is not None else set()
    narrower = {path: unit.words for unit in record.plan.narrowed for path in unit.members}
    wanted = _columns(layers, narrower)
    rows = [
        Row(
            (_name(layer, drawn), *(make(layer) for _, make in wanted)),
            kind="factorize" if layer.path in narrower else layer.action,
        )
        for layer in layers
    ]
    return [Column("layer"), *(column for column, _ in wanted)], rows


Make = Callable[[LayerPlan], Cell]


def _columns(layers: Sequence[LayerPlan], narrower: Mapping[str, str]) -> list[tuple[Column, Make]]:
    found: list[tuple[Column, Make]] = [(Column("was", css="kind"), lambda x: Cell(x.kind))]
    found.append((Column("now"), lambda x: _now(x, narrower.get(x.path))))
    if any(layer.rel_error is not None for layer in layers):
        found.append((Column("error", numeric=True), lambda x: number(x.rel_error, f"{x.rel_error or 0:.3f}")))
    if any(_stability(layer) for layer in layers):
        found.append((Column("sensitivity", numeric=True), _stability_cell))
    found += [
        (Column("params", numeric=True), lambda x: _change(x.before.params, x.after.params)),
        (Column("MACs", numeric=True), lambda x: _change(x.before.macs, x.after.macs)),
        (Column("left", numeric=True), _left),
    ]
    if any(layer.latency_after_ms is not None for layer in layers):
        found += [
            (Column("ms before", numeric=True), lambda x: _milliseconds(x.latency_before_ms)),
            (Column("ms after", numeric=True), lambda x: _milliseconds(x.latency_after_ms)),
        ]
    found.append((Column("why", css="why"), lambda x: Cell(_STABILITY.sub("", x.reason))))
    return found


def _name(layer: LayerPlan, drawn: set[str]) -> Cell:
    return Cell(layer.path or "(the model)", layer=layer.path if layer.path in drawn else None)


def _now(layer: LayerPlan, narrower: str | None) -> Cell:
    if narrower is not None:
        return Cell("narrower", badge="factorize", note=narrower)
    return Cell(layer.format or "kept", badge=layer.action, note=ranks(layer.rank))


def _change(before: int, after: int) -> Cell:
    return Cell(change(before, after) if before != after else count(before), before)


def _left(layer: LayerPlan) -> Cell:
    of = "macs" if layer.before.macs else "params"
    share = getattr(layer.after, of) / getattr(layer.before, of)
    return Cell(f"{100 * share:.0f} %", share, share=share)


def _milliseconds(value: float | None) -> Cell:
    return number(value, three_digits(value or 0.0))


def _stability(layer: LayerPlan) -> re.Match[str] | None:
    return _STABILITY.search(layer.reason)


def _stability_cell(layer: LayerPlan) -> Cell:
    # A CP fit says in its reason how sensitive its factors are (see ``Stability``).
    found = _stability(layer)
    return Cell("—") if found is None else Cell(found[1], float(found[1]), note=f"largest term {found[2]}")


def stage_table(record: RunRecord) -> tuple[list[Column], list[Row]]:
    """Return the columns and rows of the stages of a run."""
    names = ["stage", "round", "layers", "params", "MACs", "of the original", "compressed", "tuned", "epochs"]
    rows, text = [], record.metric.text
    for s in record.stages:
        share = s.after.macs / record.before.macs if record.before.macs else None
        cells = [
            Cell(f"{s.index}{' (training only)' if s.final else ''}"),
            number(s.round, str(s.round)),
            number(len(s.layers), str(len(s.layers))),
            number(s.after.params, count(s.after.params)),
            number(s.after.macs, count(s.after.macs)),
            number(share, percent(share or 0.0)),
            *(number(s.scores.get(name), text(s.scores.get(name, 0.0))) for name in ("compressed", "tuned")),
            number(len(s.tuning), str(len(s.tuning))),
        ]
        rows.append(Row(tuple(cells)))
    return [Column(name, numeric=i > 0) for i, name in enumerate(names)], rows
