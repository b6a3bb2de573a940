"""From a profile to a plan in one call; and a plan that was edited by hand, costed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tenfold.allocation import choose
from tenfold.allocation.parts import missed_parts
from tenfold.decompositions import Moments
from tenfold.errors import PlanError, TenfoldError
from tenfold.formats import FORMATS
from tenfold.planning.rule_columns import Scores
from tenfold.planning.tabulate import tabulate
from tenfold.planning.timing import Timing
from tenfold.planning.unit_options import member_costs, planned_unit
from tenfold.records import Budget, Cost, LayerPlan, LayerProfile, Plan, Profile, Recipe, UnitPlan
from tenfold.runtime import Runtime

_SAID = dict.fromkeys(("rel_error", "distortion", "latency_before_ms", "latency_after_ms"))


def plan(
    model: nn.Module,
    profile: Profile,
    recipe: Recipe | Mapping[str, Any] | str,
    *,
    moments: Mapping[str, Moments] | None = None,
    scores: Scores | None = None,
    timing: Timing | None = None,
    runtime: Runtime | None = None,
) -> Plan:
    """Return what is to happen to every layer of the model: factorized, or kept with the reason.

    Use it to read what would be done, and why, before anything is.

    The same as ``choose(tabulate(...))``. Keep the table instead, where several budgets are to be tried.

    Args:
        model: the model that was profiled; it may hold factorized layers, which can be compressed further.
        profile: what ``profile`` said of it.
        recipe: what is wanted: a ``Recipe``, a mapping of its fields, or a budget such as ``"macs=0.5"``.
        moments: statistics of the layers' inputs, by path; see ``tabulate``.
        scores: of the model with one layer replaced; see ``tabulate``.
        timing: how long the model and its layers take, for a latency budget.
        runtime: workers and progress.

    Raises:
        BudgetError: the budget cannot be met.
        UnknownNameError: a format, rule or pattern that names nothing.

    Example:
        >>> import torch
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> p = plan(net, profile(net, torch.zeros(1, 64)), {"rule": "ratio", "budget": "macs=0.5"})
        >>> p.layer("0").rank, p.after.macs / p.before.macs
        ({'rank': 16}, 0.5)
    """
    return choose(tabulate(model, profile, recipe, moments=moments, scores=scores, timing=timing, runtime=runtime))


def recost(plan: Plan, profile: Profile) -> Plan:
    """Return the plan with its costs recomputed after its ranks or actions were edited by hand.

    What was measured or predicted of layers that were edited goes: those whose fingerprint is not that of what is to be
    done, or whose parameters are others than the plan says.

    Raises:
        PlanError: the plan has a layer that the profile does not have, or has with another geometry, or one that its
            format cannot serve at its rank.
    """
    layers, narrower = [], member_costs(plan, profile)
    for planned in plan.layers:
        layer = planned
        try:
            known = profile.layer(layer.path)
        except KeyError as error:
            msg = f"the plan has a layer {layer.path!r} that the model does not have: was it made for another model?"
            raise PlanError(msg) from error
        after = known.cost
        if layer.path in narrower:
            after = narrower[layer.path]
        elif layer.action == "factorize":
            after = _cost_planned(layer, known)
        else:  # in the format that the layer has, whatever was planned before somebody decided to keep it
            layer = layer.replace(format=known.format, rank=known.rank, algorithm=None)
        if planned.edited or after.params != layer.after.params:
            layer = layer.replace(**_SAID, reason="edited after it was planned")
        layers.append(layer.replace(before=known.cost, after=after, fingerprint=None))
    units = tuple(planned_unit(unit, profile) for unit in plan.units)
    after = _total(profile, layers, units)
    # An edit may have left the budget behind: then the plan no longer claims it.
    counted = plan.recipe.budget.of_cost().given
    missed = {
        name: None
        for name, value in counted.items()
        if any(getattr(after, k) > most for k, most in Budget(**{name: value}).allowance(profile.cost).items())
    }
    if after.params > plan.after.params:
        missed |= {"bytes": None, "max_bytes": None}
    over = missed_parts(layers, plan.recipe)
    parts = {pattern: own for pattern, own in plan.recipe.budget_of.items() if pattern not in over}
    recipe = plan.recipe.replace(budget=plan.recipe.budget.replace(**missed), budget_of=parts)
    return plan.replace(before=profile.cost, after=after, layers=tuple(layers), recipe=recipe, units=units)


def _cost_planned(layer: LayerPlan, known: LayerProfile) -> Cost:
    """Return what a layer will cost when it is factorized as planned."""
    if known.spec is None:
        msg = f"layer {layer.path!r} cannot be factorized: {known.note}"
        raise PlanError(msg)
    if layer.kind != str(known.spec):
        msg = f"layer {layer.path!r} is {layer.kind} in the plan and {known.spec} in the model: another model's plan"
        raise PlanError(msg)
    kind = FORMATS.get(str(layer.format))
    try:
        rank = kind.check_rank(known.spec, layer.rank or {})
    except TenfoldError as error:
        msg = f"layer {layer.path!r}: {error}"
        raise PlanError(msg) from error
    macs = sum(kind.macs(known.spec, rank, call.in_shape) * call.count for call in known.calls)
    return Cost(params=kind.num_params(known.spec, rank), macs=macs)


def _total(profile: Profile, layers: Sequence[LayerPlan], units: Sequence[UnitPlan]) -> Cost:
    """Return what the whole model costs once layers and units cost what they are planned to."""
    inside = {path for unit in units if unit.size is not None for path in unit.members}
    changed: list[LayerPlan | UnitPlan] = [*(layer for layer in layers if layer.path not in inside), *units]
    saved_params = sum(each.before.params - each.after.params for each in changed)
    saved_macs = sum(each.before.macs - each.after.macs for each in changed)
    return Cost(params=profile.params - saved_params, macs=profile.macs - saved_macs)
