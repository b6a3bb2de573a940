"""The tables of an option table: what each layer could become, and which layers there is no choice for."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tenfold.records import Cost, LayerOptions, LayerPlan, OptionTable
from tenfold.reporting.numbers import change, milliseconds, plural
from tenfold.reporting.plan_tables import reasons_table
from tenfold.reporting.table_parts import grid


def option_tables(table: OptionTable) -> tuple[RenderableType, ...]:
    """Return what an option table holds, the layers with their options, and those without and why."""
    parts: list[RenderableType] = [_totals(table)]
    if table.eligible:
        parts.append(_options(table))
    kept = [
        LayerPlan(path=x.path, kind=x.kind, action="keep", reason=x.keep_reason, before=x.before, after=x.before)
        for x in table.layers
        if x.keep_reason is not None and (x.before.params or x.before.macs)
    ]
    if kept:
        parts.append(reasons_table("No choice", kept))
    return tuple(parts)


def least(layer: LayerOptions) -> Cost:
    """Return the least that a layer can cost: its fewest parameters and its fewest MACs, if of different options."""
    params = min((int(one.params.min()) for one in layer.options if len(one)), default=layer.before.params)
    macs = min((int(one.macs.min()) for one in layer.options if len(one)), default=layer.before.macs)
    return Cost(params=params, macs=macs)


def num_options(table: OptionTable) -> int:
    """Return how many options all layers have together."""
    return sum(len(one) for layer in table.layers for one in layer.options)


def _totals(table: OptionTable) -> Text:
    text = Text(f"Options of {table.model}", style="bold")
    of = f"{len(table.eligible)} of {plural(len(table.layers), 'layer')}"
    text.append(f": {num_options(table):,} for {of}, rows of the rule {table.recipe.rule_name}", style="not bold")
    if table.distortion:
        text.append(f"\nDistortion: {table.distortion}", style="not bold")
    if table.time is not None:
        text.append(f"\nOne forward takes {milliseconds(table.time.dense_ms)} in {table.recipe.target}", "not bold")
    return text


def _options(table: OptionTable) -> Table:
    shown = grid(f"At the least: {plural(len(table.eligible), 'layer')}")
    shown.add_column("layer", overflow="fold")
    shown.add_column("is")
    shown.add_column("could become", ratio=1)
    for name in ("params", "MACs"):
        shown.add_column(name, justify="right", no_wrap=True)
    for layer in table.eligible:
        formats = ", ".join(f"{one.format} ({len(one)})" for one in layer.options)
        low, now = least(layer), layer.before
        costs = change(now.params, low.params), change(now.macs, low.macs)
        shown.add_row(layer.path or "(the model)", layer.kind, formats, *costs)
    return shown
