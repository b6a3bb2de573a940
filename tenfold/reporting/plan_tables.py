"""The tables of a plan: layers to factorize, and layers kept, with reasons."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tenfold.records import LayerPlan, LayerSensitivity, Plan, UnitPlan
from tenfold.reporting.grouping import grouped, kind_name, kinds_in_short, paths_in_short
from tenfold.reporting.numbers import change, count, factor, plural, ranks
from tenfold.reporting.table_parts import grid

WHOLE_PATH = 28  # paths up to this length are not broken, however narrow the page


def plan_tables(plan: Plan) -> tuple[RenderableType, ...]:
    """Return the totals of a plan, its units to narrow, its layers to factorize, then its layers to keep, with reasons.

    Kept layers of one kind that share a reason take one line. Layers without parameters and MACs are left out.
    """
    kept = [
        layer
        for layer in plan.layers
        if layer.action == "keep" and (layer.before.params or layer.before.macs)
        if layer.path not in plan.narrowed_paths
    ]
    factorized = [layer for layer in plan.factorized if layer.path not in plan.narrowed_paths]
    parts: list[RenderableType] = [_totals(plan)]
    if plan.narrowed:
        parts.append(_narrowed(plan.narrowed))
    if factorized:
        parts.append(_factorized(factorized))
    if kept:
        parts.append(reasons_table("Kept", kept))
    return tuple(parts)


def _totals(plan: Plan) -> Text:
    before, after = plan.before, plan.after
    recipe = plan.recipe
    rule = " ".join(f"{k}={v}" for k, v in recipe.rule.items() if k not in ("name", "ranks") and v is not None)
    budget = ", ".join(f"{k}={v:g}" for k, v in recipe.budget.given.items())
    how = [f"rule {recipe.rule_name}{f' ({rule})' if rule else ''}"]
    how += [f"budget {budget}"] if budget else []
    how += [f"seed {plan.seed}"]
    text = Text(f"Plan for {plan.model}", style="bold")
    text.append(f": {', '.join(how)}\n", style="not bold")
    for name, old, new in (("params", before.params, after.params), ("MACs", before.macs, after.macs)):
        text.append(f"{name} {count(old)} → {count(new)} ({factor(old, new)})   ", style="not bold")
    text.rstrip()
    return text


def _narrowed(units: Sequence[UnitPlan]) -> Table:
    reasons = {unit.reason for unit in units}
    shared = next(iter(reasons)) if len(reasons) == 1 else ""
    table = grid(f"Narrowed: {plural(len(units), 'unit')}" + (f" — {shared}" if shared else ""))
    table.add_column("in", overflow="fold", no_wrap=max(len(unit.path) for unit in units) <= WHOLE_PATH)
    table.add_column("unit")
    table.add_column("layers", justify="right")
    table.add_column("size", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    if not shared:
        table.add_column("why", ratio=1)
    for unit in units:
        row = [unit.path or "(the model)", unit.kind, str(len(unit.members)), unit.words]
        row += [change(unit.before.params, unit.after.params), change(unit.before.macs, unit.after.macs)]
        table.add_row(*row, *([] if shared else [unit.reason]))
    return table


def _factorized(layers: Sequence[LayerPlan]) -> Table:
    reasons = {layer.reason for layer in layers}
    shared = next(iter(reasons)) if len(reasons) == 1 else ""
    title = f"Factorized: {plural(len(layers), 'layer')}" + (f" — {shared}" if shared else "")
    table = grid(title)
    fitted = any(layer.rel_error is not None for layer in layers)
    longest = max(len(layer.path) for layer in layers)
    table.add_column("layer", overflow="fold", no_wrap=longest <= WHOLE_PATH)
    table.add_column("was")
    table.add_column("now")
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    if fitted:
        table.add_column("error", justify="right", no_wrap=True)
    if not shared:
        table.add_column("why", ratio=1)
    for layer in layers:
        row = [layer.path or "(the model)", layer.kind, f"{layer.format} {ranks(layer.rank)}"]
        row += [change(layer.before.params, layer.after.params), change(layer.before.macs, layer.after.macs)]
        row += [("" if layer.rel_error is None else f"{layer.rel_error:.3f}")] if fitted else []
        table.add_row(*row, *([] if shared else [layer.reason]))
    return table


def reasons_table(title: str, layers: Sequence[LayerPlan | LayerSensitivity]) -> Table:
    """Return layers with the reason why each is not factorized; those of one kind that share a reason take one line."""
    table = grid(f"{title}: {plural(len(layers), 'layer')}")
    table.add_column("layer", overflow="fold", max_width=36)
    table.add_column("is", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("why", ratio=1)
    for group in grouped(layers, lambda layer: (kind_name(layer.kind), layer.reason)):
        table.add_row(
            paths_in_short([layer.path for layer in group]),
            kinds_in_short([layer.kind for layer in group]),
            count(sum(layer.before.params for layer in group)),
            count(sum(layer.before.macs for layer in group)),
            group[0].reason,
        )
    return table
