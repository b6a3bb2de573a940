"""Open recurrent networks and padded convolutions for planning, and leave those closed that a plan does not touch."""

from __future__ import annotations

from typing import Any

from torch import nn

from tenfold.allocation import limits_latency
from tenfold.patterns import first_match
from tenfold.records import Cost, LayerPlan, Plan, Recipe
from tenfold.surgery import open_layers, openable, opened
from tenfold.surgery.separate_padding import confirmed, is_padding


def unroll_for_plan(model: nn.Module, recipe: Recipe, inputs: Any) -> nn.Module:
    """Return the model with recurrent networks unrolled and convolutions behind their padding, on a copy.

    So a plan reaches their matrices. The model itself where there are none. Those that ``recipe.keep`` names as a whole
    stay as they are, and all recurrent networks do under a budget of latency: an unrolled one runs its recurrence in
    Python, step by step, which torch's own does not.
    """
    kinds = {path: kind for path, kind in openable(model).items() if first_match(recipe.keep, path) is None}
    convs = confirmed(model, {path: kind for path, kind in kinds.items() if is_padding(kind)}, inputs)
    networks = {path: kind for path, kind in kinds.items() if not is_padding(kind)}
    return open_layers(model, convs if limits_latency(recipe) else networks | convs)


def refuse_unused(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with layers left closed that were opened for it and of which it factorizes nothing.

    Each of these becomes one line, with the reasons of its layers.

    Args:
        plan: made for the model with these layers open.
        model: the one that was given: what is open there already stays so.
    """
    already = opened(model)
    for path, kind in plan.unrolled.items():
        inside = f"{path}." if path else ""
        layers = [layer for layer in plan.layers if layer.path.startswith(inside)]
        if path in already or any(layer.format for layer in layers):
            continue
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers))
        whole = LayerPlan(
            path=path,
            kind=layers[0].kind if is_padding(kind) else kind,
            action="keep",
            reason=reasons
            if is_padding(kind)
            else f"left fused, since none of its {len(layers)} matrices is factorized: {reasons}",
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
