"""The table of all layers and that of all stages, as rows of a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tenfold.records import Analysis, LayerPlan, RunRecord
from tenfold.reporting.cells import Cell, Column, Row, number
from tenfold.reporting.numbers import count, percent, ranks, three_digits

_STABILITY = re.compile(r"; sensitivity (\S+), largest term (\S+)")


def shown_layers(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Return the layers that cost anything."""
    return [layer for layer in layers if layer.before.params or layer.before.macs]


def layer_table(record: RunRecord, analysis: Analysis | None) -> tuple[list[Column], list[Row]]:
    """Return the columns and rows of every layer; columns of what nobody measured are left out."""
    layers = shown_layers(record.plan.layers)
    drawn = {layer.path for layer in analysis.layers} if analysis is not None else set()
    wanted = _columns(layers)
    rows = [Row((_name(layer, drawn), *(make(layer) for _, make in wanted)), kind=layer.action) for layer in layers]
    return [Column("layer"), *(column for column, _ in wanted)], rows


Make = Callable[[LayerPlan], Cell]


def _columns(layers: Sequence[LayerPlan]) -> list[tuple[Column, Make]]:
    found: list[tuple[Column, Make]] = [
        (Column("was", css="kind"), lambda x: Cell(x.kind)),
        (Column("now"), lambda x: Cell(x.format or "kept", badge=x.action)),
    ]
    if any(layer.rank for layer in layers):
        found.append((Column("ranks", css="kind"), lambda x: Cell(ranks(x.rank) or "—")))
    if any(layer.rel_error is not None for layer in layers):
        found.append((Column("error", numeric=True), lambda x: number(x.rel_error, f"{x.rel_error or 0:.3f}")))
    if any(layer.damage is not None for layer in layers):
        found.append((Column("damage", numeric=True), lambda x: number(x.damage, f"{x.damage or 0:.3g}")))
    if any(_stability(layer) for layer in layers):
        found += [(Column("stability", numeric=True), _stability_cell)]
    for name, label in (("params", "params"), ("macs", "MACs")):
        found += [_before(name, f"{label} before"), _after(name, f"{label} after")]
    found.append((Column("left", numeric=True), _left))
    if any(layer.latency_after_ms is not None or layer.latency_before_ms is not None for layer in layers):
        found += [
            (Column("ms before", numeric=True), lambda x: _milliseconds(x.latency_before_ms)),
            (Column("ms after", numeric=True), lambda x: _milliseconds(x.latency_after_ms)),
        ]
    found.append((Column("why", css="why"), lambda x: Cell(_STABILITY.sub("", x.reason))))
    return found


def _name(layer: LayerPlan, drawn: set[str]) -> Cell:
    return Cell(layer.path or "(the model)", layer=layer.path if layer.path in drawn else None)


def _before(name: str, label: str) -> tuple[Column, Make]:
    return Column(label, numeric=True), lambda x: number(getattr(x.before, name), count(getattr(x.before, name)))


def _after(name: str, label: str) -> tuple[Column, Make]:
    return Column(label, numeric=True), lambda x: number(getattr(x.after, name), count(getattr(x.after, name)))


def _left(layer: LayerPlan) -> Cell:
    of = "macs" if layer.before.macs else "params"
    share = getattr(layer.after, of) / getattr(layer.before, of)
    return Cell(f"{100 * share:.0f} %", share, share=share)


def _milliseconds(value: float | None) -> Cell:
    return number(value, three_digits(value or 0.0))


def _stability(layer: LayerPlan) -> re.Match[str] | None:
    return _STABILITY.search(layer.reason)


def _stability_cell(layer: LayerPlan) -> Cell:
    """Return how sensitive the factors of a CP fit are, as its reason says (see ``Stability``)."""
    found = _stability(layer)
    return Cell("—") if found is None else number(float(found[1]), f"{found[1]} (largest term {found[2]})")


def stage_table(record: RunRecord) -> tuple[list[Column], list[Row]]:
    """Return the columns and rows of the stages of a run."""
    names = ["stage", "round", "layers", "params", "MACs", "of the original", "compressed", "tuned", "epochs"]
    rows = []
    for s in record.stages:
        share = s.after.macs / record.before.macs if record.before.macs else None
        cells = [
            Cell(f"{s.index}{' (training only)' if s.final else ''}"),
            number(s.round, str(s.round)),
            number(len(s.layers), str(len(s.layers))),
            number(s.after.params, count(s.after.params)),
            number(s.after.macs, count(s.after.macs)),
            number(share, percent(share or 0.0)),
            *(number(s.scores.get(name), percent(s.scores.get(name, 0.0))) for name in ("compressed", "tuned")),
            number(len(s.tuning), str(len(s.tuning))),
        ]
        rows.append(Row(tuple(cells)))
    return [Column(name, numeric=i > 0) for i, name in enumerate(names)], rows
