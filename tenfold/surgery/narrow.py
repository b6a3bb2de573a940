"""Narrow the units of a plan: feeders absorb the inner factor of their pivot, and smaller layers take their places."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer
from tenfold.records import Plan, Unit, UnitPlan
from tenfold.surgery.modules import find, put
from tenfold.surgery.replacement import factorizable_spec, refuse_tied
from tenfold.units import UNITS, Narrowing, Size
from tenfold.units.one_head_size import partners


def absorb_(model: nn.Module, plan: Plan, dense: Mapping[str, nn.Module]) -> nn.Module:
    """Put the narrower layers of all units in place, in place, and return the model. Outputs stay the same.

    Args:
        model: in which the pivots are factorized as the plan says, and the feeders are as they were.
        plan: whose units are to be narrowed.
        dense: the pivots as they were, by path: a layer of the same class takes their place.
    """
    for unit in plan.narrowed:
        model = absorbed(model, unit, _size(unit), dense[unit.pivot])
    return model


def absorbed(model: nn.Module, unit: Unit, size: Size, dense: nn.Module) -> nn.Module:
    """Let the feeders of a unit absorb the inner factor of its pivot, in place; ``dense`` is the pivot as it was.

    Raises:
        PlanError: the pivot is not factorized, or with a structure that the feeders cannot absorb.
    """
    pivot = find(model, unit.pivot)
    if not isinstance(pivot, FactorizedLayer):
        msg = f"the pivot {unit.pivot!r} of {unit.kind} is to be factorized in a plan that narrows its unit, or neither"
        raise PlanError(msg)
    model = put(model, {unit.pivot: copy.copy(dense)})  # which takes over hooks: the original keeps its own
    model = _put(model, UNITS.get(unit.kind)().narrowed(model, unit, size, pivot))
    fitted: Any = find(model, unit.pivot)
    fitted.fit = pivot.fit  # what was factorized tells how well it met its weight
    return model


def narrow_(model: nn.Module, units: Sequence[UnitPlan]) -> nn.Module:
    """Give a model the structure of narrowed units, in place, with values that do not matter: to load weights into."""
    for unit in units:
        check_unit(model, unit)
        model = _put(model, UNITS.get(unit.kind)().narrowed(model, unit, _size(unit), None))
    return model


def check_units(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError unless the units of a plan can be narrowed: dense layers of their own, and a pivot to match."""
    for unit in plan.narrowed:
        check_unit(model, unit)
        fit, pivot = UNITS.get(unit.kind)().pivot_fit(unit, _size(unit)), plan.layer(unit.pivot)
        if (pivot.action, pivot.format, pivot.rank) != ("factorize", fit.format, fit.rank):
            msg = (
                f"the plan narrows {unit.kind} of {unit.pivot!r} to {unit.size}, for which that layer has to be "
                f"factorized as {fit.format} of rank {fit.rank}: edit both, or take the unit out of the plan"
            )
            raise PlanError(msg)
        factorized = [path for path in unit.feeders if plan.layer(path).action == "factorize"]
        if factorized:
            msg = f"the plan factorizes {factorized[0]!r} and narrows it with {unit.pivot!r}: do only one of both"
            raise PlanError(msg)
    refuse_tied(model, [plan.layer(path) for unit in plan.narrowed for path in unit.feeders])
    for pair in partners(plan.units):
        together = pair[0].size is not None and pair[0].size == pair[1].size
        if any(unit.settings["native"] != together for unit in pair):
            msg = (
                f"the plan says otherwise of the heads of {pair[0].path!r} than their sizes do: cost it again (recost)"
            )
            raise PlanError(msg)


def check_unit(model: nn.Module, unit: Unit) -> None:
    """Raise PlanError unless a model has the layers of a unit, dense."""
    UNITS.get(unit.kind)
    for path in unit.members:
        if isinstance(find(model, path), FactorizedLayer):
            msg = f"layer {path!r} of {unit.kind} of {unit.pivot!r} is factorized: only dense layers are narrowed"
            raise PlanError(msg)
    factorizable_spec(find(model, unit.pivot), unit.pivot)


def sampled(model: nn.Module, unit: Unit, size: Size) -> FactorizedLayer:
    """Return the pivot of a unit with some factors of its structure: to compare with the narrowed unit."""
    pivot: Any = find(model, unit.pivot)
    value = UNITS.get(unit.kind)().sample(model, unit, size)
    return FactorizedLayer.of(value, getattr(pivot, "bias", None))


def _put(model: nn.Module, narrowing: Narrowing) -> nn.Module:
    for path, values in narrowing.attributes.items():
        for name, value in values.items():
            setattr(find(model, path), name, value)
    return put(model, narrowing.modules)


def _size(unit: UnitPlan) -> Size:
    return dict(unit.size or unit.full)
