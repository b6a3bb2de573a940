"""What the units of a model could become: sizes with their costs, times and distortion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tenfold.allocation import rule_of
from tenfold.decompositions import CurveProblem, Decomposition, Moments
from tenfold.formats import FORMATS, split_groups
from tenfold.layers import dense_weight
from tenfold.planning.error_curves import by_data
from tenfold.planning.target import Target
from tenfold.planning.unit_kinds import kept_as_asked, kinds_of
from tenfold.records import Cost, FormatOptions, Plan, Profile, Recipe, Unit, UnitOptions, UnitPlan
from tenfold.surgery import find
from tenfold.tensors import plain_arithmetic
from tenfold.units import UNITS, PivotFit, Size

Ints = np.ndarray[Any, np.dtype[np.int64]]

_SLOWER = "no smaller size costs less"


@plain_arithmetic()
def unit_options(
    model: nn.Module, profile: Profile, recipe: Recipe, moments: Mapping[str, Moments] | None, target: Target | None
) -> tuple[UnitOptions, ...]:
    """Return the options of all units of a profile, and those that stay with the reason.

    Args:
        model: that was profiled.
        profile: with units, as ``recognise_units`` finds them.
        recipe: kinds of units, layers to keep.
        moments: of the inputs of the pivots; without any there are no options.
        target: the runtime whose steps sizes should be multiples of.
    """
    if moments is None or not rule_of(recipe.rule).uses_units:
        return ()
    kinds = kinds_of(recipe)
    return tuple(
        _options(model, profile, unit, recipe, moments.get(unit.pivot), target)
        for unit in profile.units
        if unit.kind in kinds
    )


def planned_unit(unit: UnitPlan, profile: Profile) -> UnitPlan:
    """Return the plan of a unit with its costs computed again; what was said of another size goes."""
    before = _total(unit.unit, unit.full, profile)
    after = before if unit.size is None else _total(unit.unit, unit.size, profile)
    said = {} if after == unit.after else dict.fromkeys(("distortion", "latency_before_ms", "latency_after_ms"))
    return unit.replace(before=before, after=after, **said)


def member_costs(plan: Plan, profile: Profile) -> dict[str, Cost]:
    """Return what the layers of narrowed units of a plan cost, by path."""
    costs: dict[str, Cost] = {}
    for unit in plan.narrowed:
        costs |= UNITS.get(unit.kind)().costs(unit.unit, dict(unit.size or unit.full), profile)
    return {path: cost for path, cost in costs.items() if path}


def _options(
    model: nn.Module, profile: Profile, unit: Unit, recipe: Recipe, moments: Moments | None, target: Target | None
) -> UnitOptions:
    own = UnitOptions(unit=unit, before=_total(unit, unit.full, profile))
    reason = unit.keep_reason or kept_as_asked(unit, profile, recipe) or _not_judged(model, unit, moments)
    if reason or moments is None:
        return own.kept(reason)
    kind, spec = UNITS.get(unit.kind)(), profile.layer(unit.pivot).spec
    step = None if target is None or spec is None else target.step_of(spec)
    sizes = kind.sizes(unit, step if step is not None and step >= 8 else None)
    priced = [(size, kind.costs(unit, size, profile)) for size in sizes]
    priced = [(size, costs) for size, costs in priced if sum(costs.values(), Cost()).below(own.before)]
    if not priced or spec is None:
        return own.kept(_SLOWER)
    fits = [kind.pivot_fit(unit, size) for size, _ in priced]
    algorithm = Decomposition.from_dict({"seed": recipe.seed, **fits[0].algorithm})
    weight = split_groups(dense_weight(find(model, unit.pivot)).detach(), spec)
    pivot = _pivot_ranks(fits)
    problem = CurveProblem(weight, spec, FORMATS.get(pivot.format), moments)
    totals = [sum(costs.values(), Cost()) for _, costs in priced]
    return own.replace(
        options=FormatOptions(
            format=unit.kind,
            names=kind.size_names,
            ranks=_rows([size for size, _ in priced], kind.size_names),
            params=_column([cost.params for cost in totals]),
            macs=_column([cost.macs for cost in totals]),
            columns={"distortion": by_data(algorithm.error_curve(problem), moments, weight)(pivot.ranks)},
        ),
        pivot=pivot,
        algorithm=algorithm.to_dict(),
        params={path: _column([costs[path].params for _, costs in priced]) for path in unit.members},
        macs={path: _column([costs[path].macs for _, costs in priced]) for path in unit.members},
    )


def _not_judged(model: nn.Module, unit: Unit, moments: Moments | None) -> str:
    """Return why nothing can be said of what a unit loses, or an empty string."""
    if moments is None:
        return f"no moments of the inputs of {unit.pivot!r}, which a plan by data needs: none of the data reach it"
    if not moments.judged:
        return f"the data cannot judge it: on no sample do the outputs depend on {unit.pivot!r}"
    for path in unit.members:
        if any(not bool(torch.isfinite(p).all()) for p in find(model, path).parameters() if not p.is_meta):
            return f"its layer {path!r} has NaN or infinite entries: repair the model first"
    return ""


def _pivot_ranks(fits: Sequence[PivotFit]) -> FormatOptions:
    """Return format and ranks of the pivot at each size; its costs are those of the members."""
    names = FORMATS.get(fits[0].format).rank_names
    ranks = _rows([fit.rank for fit in fits], names)
    none = np.zeros(len(fits), dtype=np.int64)
    return FormatOptions(format=fits[0].format, names=names, ranks=ranks, params=none, macs=none)


def _rows(sizes: Sequence[Size], names: Sequence[str]) -> Ints:
    return np.array([[size[name] for name in names] for size in sizes], dtype=np.int64).reshape(-1, len(names))


def _column(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _total(unit: Unit, size: Size, profile: Profile) -> Cost:
    """Return what a unit costs at a size; of one that was not tried only what its layers cost now."""
    if unit.keep_reason is not None:
        return sum((profile.layer(path).cost for path in unit.members), Cost())
    return sum(UNITS.get(unit.kind)().costs(unit, dict(size), profile).values(), Cost())
