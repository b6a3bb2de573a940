"""Unroll recurrent networks for planning, and leave those fused that a plan does not touch."""

from __future__ import annotations

from torch import nn

from tenfold.allocation import limits_latency
from tenfold.patterns import first_match
from tenfold.records import Cost, LayerPlan, Plan, Recipe
from tenfold.surgery import fused_rnns, unroll_rnns, unrolled_rnns


def unroll_for_plan(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Return the model with its recurrent networks unrolled, on a copy, so that a plan reaches their matrices.

    The model itself where there are none. Those that ``recipe.keep`` names as a whole stay fused, and all do under a
    budget of latency: an unrolled network runs its recurrence in Python, step by step, which torch's own does not.
    """
    if limits_latency(recipe):
        return model
    return unroll_rnns(model, [path for path in fused_rnns(model) if first_match(recipe.keep, path) is None])


def refuse_unused(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with networks left fused that were unrolled for it and of which it factorizes nothing.

    Each of these becomes one line, with the reasons of its layers.

    Args:
        plan: made for the unrolled model.
        model: the one that was given: what is unrolled there already stays so.
    """
    for path, kind in plan.unrolled.items():
        inside = f"{path}.cells." if path else "cells."
        layers = [layer for layer in plan.layers if layer.path.startswith(inside)]
        if path in unrolled_rnns(model) or any(layer.format for layer in layers):
            continue
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers))
        whole = LayerPlan(
            path=path,
            kind=kind,
            action="keep",
            reason=f"left fused, since none of its {len(layers)} matrices is factorized: {reasons}",
            before=sum((layer.before for layer in layers), Cost()),
            after=sum((layer.after for layer in layers), Cost()),
        )
        kept = list(plan.layers)
        kept[kept.index(layers[0]) : kept.index(layers[0])] = [whole]
        plan = plan.replace(
            layers=tuple(layer for layer in kept if layer not in layers),
            unrolled={p: k for p, k in plan.unrolled.items() if p != path},
        )
    return plan
