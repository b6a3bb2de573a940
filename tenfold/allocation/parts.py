"""Budgets of parts of a model: the rule spends each on the layers of its part, and leaves the others alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenfold.allocation.picks import Pick
from tenfold.patterns import check_patterns, first_match
from tenfold.records import Budget, Cost, LayerOptions, LayerPlan, OptionTable, Recipe

OUTSIDE = "outside of the parts that have a budget"


@dataclass(frozen=True)
class Part:
    """The layers that a pattern means, as a table of their own, with the recipe that spends the budget on them."""

    pattern: str
    table: OptionTable
    recipe: Recipe


def parts_of(table: OptionTable, recipe: Recipe) -> tuple[Part, ...]:
    """Return the parts that ``recipe.budget_of`` names; a layer belongs to the first that means it.

    Units of layers of two parts are in neither. Parts have no clock: a time is one of the whole model.

    Raises:
        UnknownNameError: a pattern that means no layer.
    """
    patterns = tuple(recipe.budget_of)
    check_patterns(patterns, [path for layer in table.layers for path in (layer.path, *layer.aliases)])
    place = {layer.path: first_match(patterns, layer.path, layer.aliases) for layer in table.layers}
    parts = []
    for pattern, budget in recipe.budget_of.items():
        layers = tuple(layer for layer in table.layers if place[layer.path] == pattern)
        units = tuple(own for own in table.units if {place.get(path) for path in own.unit.members} == {pattern})
        before = _cost(layer.before for layer in layers)
        inside = {layer.path: layer.before for layer in layers}
        for own in units:  # what a unit computes outside of its layers, such as the products of queries and keys
            members = _cost(inside[path] for path in own.unit.members if path in inside)
            before = before + (own.before - members)
        own_table = table.replace(layers=layers, units=units, before=before)
        parts.append(Part(pattern, own_table, recipe.replace(budget=budget, budget_of={})))
    return tuple(parts)


def missed_parts(layers: Sequence[LayerPlan], recipe: Recipe) -> tuple[str, ...]:
    """Return the patterns of those parts whose layers, as they are planned, cost more than their budgets allow."""
    patterns = tuple(recipe.budget_of)
    place = [first_match(patterns, layer.path, layer.aliases) for layer in layers]
    missed = []
    for pattern, budget in recipe.budget_of.items():
        own = [layer for layer, where in zip(layers, place, strict=True) if where == pattern]
        allowed = budget.allowance(_cost(layer.before for layer in own))
        after = _cost(layer.after for layer in own)
        if any(getattr(after, name) > limit for name, limit in allowed.items()):
            missed.append(pattern)
    return tuple(missed)


def kept(layer: LayerOptions) -> Pick:
    """Return what becomes of a layer outside of all parts: nothing."""
    return Pick(layer.path, None, 0, layer.rank, layer.before, None, layer.latency_ms, OUTSIDE)


def in_words(budget_of: Mapping[str, Budget]) -> str:
    """Return budgets of parts as text.

    Example:
        >>> in_words({"backbone.*": Budget(macs=0.5), "head": Budget(params=0.3)})
        'macs=0.5 of backbone.*, params=0.3 of head'
    """
    return ", ".join(f"{budget} of {pattern}" for pattern, budget in budget_of.items())


def _cost(costs: object) -> Cost:
    return sum(costs, Cost())  # type: ignore[call-overload,no-any-return]
