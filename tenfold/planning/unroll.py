"""Make layers of matrices that modules hold together, for planning, and leave whole what a plan does not touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tenfold.formats import FORMATS
from tenfold.patterns import first_match
from tenfold.records import Cost, LayerPlan, Plan, Recipe
from tenfold.surgery import find, fused_rnns, joined_projections, separate, separated, stacks, unrolled_rnns
from tenfold.surgery.separate_attention import is_projections
from tenfold.surgery.separate_map import flattened_maps, is_map
from tenfold.surgery.separate_padding import confirmed, is_padding, padded_convs

_IN_THE_KERNEL = "torch multiplies states within one kernel for all steps, which has no use for factors"


def unroll_for_plan(model: nn.Module, recipe: Recipe, inputs: Any, *, heads: bool = False) -> nn.Module:
    """Return the model with recurrent networks unrolled, experts unstacked and paddings apart, on a copy, for plans.

    The model itself where there are none. Those that ``recipe.keep`` names as a whole stay as they are. Experts do
    under a budget of latency, or where a runtime is named: they would run in Python, one by one. So do projections
    that an attention computes at once, which run the faster together. Linear layers know the maps that they take flat
    where a format reads them.

    Args:
        model: stays as it is.
        recipe: what is wanted.
        inputs: example inputs, as ``call_model`` takes them.
        heads: whether the heads of attentions may be narrowed, for which their projections are to be layers.
    """

    def wanted(kinds: Mapping[str, str]) -> dict[str, str]:
        return {path: kind for path, kind in kinds.items() if first_match(recipe.keep, path) is None}

    found = confirmed(model, wanted(padded_convs(model)), inputs)
    found |= wanted(fused_rnns(model) | ({} if recipe.timed else stacks(model, inputs)))
    found |= wanted(joined_projections(model)) if heads and not recipe.timed else {}
    if any(FORMATS.get(name).reads_map for name in recipe.formats):
        found |= wanted(flattened_maps(model, inputs))
    return separate(model, found)


def kept_states(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Return the path of each recurrent matrix that stays dense where a clock decides, and why.

    A clock times layers one by one. That of the inputs runs once, before the recurrence, in the time that it shows; the
    other one is part of torch's kernel, which multiplies with dense matrices.

    Example:
        >>> from tenfold.surgery import unroll_rnns
        >>> list(kept_states(unroll_rnns(nn.ModuleDict({"rnn": nn.LSTM(4, 8)})), Recipe.of("latency=0.5")))
        ['rnn.cells.0.hh']
    """
    if not recipe.timed:
        return {}
    inside = tuple(f"{path}.cells.".lstrip(".") for path in unrolled_rnns(model))
    paths = [path for path, _ in model.named_modules() if path.startswith(inside) and path.endswith(".hh")]
    return dict.fromkeys(paths if inside else [], _IN_THE_KERNEL)


def refuse_unused(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with those modules left whole of which it factorizes nothing.

    Each of these becomes one line, with the reasons of its layers.

    Args:
        plan: made for the model with such modules taken apart.
        model: the one that was given: what is taken apart there already stays so.
    """
    whole, narrowed = separated(model), {path for unit in plan.narrowed for path in unit.members}
    for path, kind in plan.unrolled.items():
        if is_map(kind):  # the layer itself, whose line stays as it is
            used = any(layer.path == path and _reads_map(layer) for layer in plan.layers)
            if path not in whole and not used:
                plan = plan.replace(unrolled={p: k for p, k in plan.unrolled.items() if p != path})
            continue
        padding, inner = is_padding(kind), _parts(kind)
        inside = tuple(f"{path}.{name}".lstrip(".") for name in inner)
        layers = [layer for layer in plan.layers if layer.path.startswith(inside)]
        if path in whole or any(layer.format or layer.path in narrowed for layer in layers):
            continue
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers))
        # What it holds besides, such as biases.
        own = [layer for layer in plan.layers if layer.path == path and not padding]
        line = LayerPlan(
            path=path,
            kind=layers[0].kind if padding else type(find(model, path)).__name__,
            action="keep",
            reason=reasons
            if padding
            else f"left whole, since none of its {len(layers)} matrices is factorized: {reasons}",
            before=sum((layer.before for layer in (*own, *layers)), Cost()),
            after=sum((layer.after for layer in (*own, *layers)), Cost()),
        )
        kept = list(plan.layers)
        kept[kept.index(layers[0]) : kept.index(layers[0])] = [line]
        plan = plan.replace(
            layers=tuple(layer for layer in kept if layer not in layers and layer not in own),
            unrolled={p: k for p, k in plan.unrolled.items() if p != path},
            units=tuple(unit for unit in plan.units if not any(m.startswith(inside) for m in unit.members)),
        )
    return plan


def _reads_map(layer: LayerPlan) -> bool:
    return layer.format is not None and FORMATS.get(layer.format).reads_map


def _parts(kind: str) -> list[str]:
    """Return how the paths of the matrices go on behind that of their module: see ``Plan.unrolled``."""
    if is_padding(kind) or is_projections(kind):
        return [""]
    return ["cells."] if kind in ("GRU", "LSTM") else [f"{name.removesuffix('.T')}." for name in kind.split(", ")]
