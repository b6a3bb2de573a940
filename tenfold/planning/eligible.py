"""Select the layers eligible for factorization, say why the others are kept, and cost the options of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tenfold.allocation import rule_of
from tenfold.allocation.parts import OUTSIDE
from tenfold.allocation.reasons import CHEAP_END
from tenfold.calibration import called_layers
from tenfold.decompositions import Moments
from tenfold.errors import PlanError
from tenfold.formats import FORMATS, Rank, split_groups
from tenfold.layers import dense_weight
from tenfold.patterns import check_patterns, first_match
from tenfold.planning.target import Target
from tenfold.planning.unit_kinds import pivots_to_judge
from tenfold.planning.unroll import kept_states
from tenfold.profiling.profile import NOT_REACHED
from tenfold.records import Call, Cost, LayerProfile, LayerSpec, Plan, Profile, Recipe
from tenfold.surgery import find

Ints = NDArray[np.int64]

# A first or last layer below this share of the model's cost is not worth its distortion.
_CHEAP_END = 0.02
_UNNAMED = "no rank was given for this layer"
_UNJUDGED = "the data cannot judge it: on no sample do the outputs depend on this layer"
UNSEEN = "no moments of its inputs, which a plan by data needs: none of the data reach it"


@dataclass(frozen=True, eq=False)
class EligibleLayer:
    """A layer that may be factorized, with what its options are computed from.

    Attributes:
        path: dotted module name.
        spec: geometry of the (dense) layer.
        formats: names of the formats that support it, the preferred first.
        calls: input shapes of one forward of the model.
        cost: what the layer costs now.
        load_weight: returns the dense weight, groups apart: (groups, out/groups, in/groups, *kernel).
        current: format and rank that the layer has now, if it is factorized already.
        moments: statistics of its inputs, and its output Gram matrix; None without data.
        step: what ranks should be multiples of in the runtime that is planned for; None where nothing says so.
        likes: whose step it is.
    """

    path: str
    spec: LayerSpec
    formats: tuple[str, ...]
    calls: tuple[Call, ...]
    cost: Cost
    load_weight: Callable[[], Tensor] = field(repr=False)
    current: tuple[str, Rank] | None = None
    moments: Moments | None = field(default=None, repr=False)
    step: int | None = None
    likes: str = ""

    def cost_at(self, format: str, rank: Rank) -> Cost:
        """Return what the layer would cost in this format at this rank."""
        kind = FORMATS.get(format)
        macs = sum(kind.macs(self.spec, rank, call.in_shape) * call.count for call in self.calls)
        return Cost(params=kind.num_params(self.spec, rank), macs=macs)

    def saving_family(self, format: str) -> tuple[tuple[Rank, Cost], ...]:
        """Return those ranks of the format's family, from small to full, that make the layer cheaper, with costs."""
        family = ((rank, self.cost_at(format, rank)) for rank in FORMATS.get(format).rank_family(self.spec))
        return tuple((rank, cost) for rank, cost in family if cost.below(self.cost))


def kept_reasons(
    model: nn.Module, profile: Profile, recipe: Recipe, moments: Mapping[str, Moments] | None = None
) -> dict[str, str]:
    """Return for the path of every layer why a recipe must not touch it, or an empty string.

    Args:
        model: that was profiled.
        profile: what ``profile`` said of it.
        recipe: formats, layers to keep, and the rule.
        moments: of the inputs of the layers; those without are kept.

    Raises:
        UnknownNameError: a format or a pattern that names nothing.
    """
    rule, formats, keep = rule_of(recipe.rule), recipe.formats, recipe.keep
    check_formats(recipe)
    check_layers(profile, recipe)
    for layer in profile.layers:
        find(model, layer.path)  # the profile is that of this model
    keep_ends = not rule.by_name if recipe.keep_ends is None else recipe.keep_ends
    ends = cheap_ends(profile) if keep_ends else {}
    known = moments or {}
    kept = {
        layer.path: reason_to_keep(model, layer, formats, keep, ends, measured=layer.path in known)
        for layer in profile.layers
    }
    kept |= {path: why for path, why in kept_states(model, recipe).items() if not kept.get(path)}
    if recipe.budget_of:
        parts = tuple(recipe.budget_of)
        aliases = {layer.path: layer.aliases for layer in profile.layers}
        kept |= {p: OUTSIDE for p in kept if not kept[p] and first_match(parts, p, aliases.get(p, ())) is None}
    if rule.patterns:
        free = [path for path in kept if not kept[path]]
        check_patterns(rule.patterns, free)
        kept |= {path: _UNNAMED for path in free if first_match(rule.patterns, path) is None}
    if moments is not None:
        kept |= {path: UNSEEN for path in kept if not kept[path] and path not in moments}
        blind = [path for path, own in moments.items() if not own.judged]
        if len(blind) < len(moments):  # where outputs depend on no layer at all, none is special
            kept |= {path: _UNJUDGED for path in blind if not kept.get(path, UNSEEN)}
    return kept


def check_formats(recipe: Recipe) -> None:
    """Raise UnknownNameError where a recipe names a format that does not exist, or an algorithm for one."""
    for name in (*recipe.formats, *recipe.algorithms):
        FORMATS.get(name)


def check_layers(profile: Profile, recipe: Recipe) -> None:
    """Raise UnknownNameError where a recipe names a layer that the profile does not have."""
    names = [name for layer in profile.layers for name in (layer.path, *layer.aliases)]
    for patterns in (recipe.keep, tuple(recipe.budget_of), rule_of(recipe.rule).patterns):
        check_patterns(patterns, names)


def changeable(model: nn.Module, profile: Profile, wanted: Recipe | Plan) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of the layers that a recipe or a plan may change: those that data have to judge."""
    specs = called_layers(profile)
    if isinstance(wanted, Plan):
        return {layer.path: specs[layer.path] for layer in wanted.factorized if layer.path in specs}
    kept = kept_reasons(model, profile, wanted)
    judged = {path for path in specs if kept[path] in ("", NOT_REACHED)} | set(pivots_to_judge(profile, wanted))
    return {path: spec for path, spec in specs.items() if path in judged}


def cheap_ends(profile: Profile) -> dict[str, str]:
    """Return the first and the last layer with a geometry, where they cost next to nothing, with the reason."""
    used = [layer for layer in profile.layers if layer.spec is not None and layer.calls]
    ends = {}
    for layer, name in ((used[0], "first"), (used[-1], "last")) if len(used) > 2 else ():
        share = max(layer.params / max(profile.params, 1), layer.macs / max(profile.macs, 1))
        if share < _CHEAP_END:
            ends[layer.path] = f"the {name} layer is {share:.1%} of the cost: {CHEAP_END}"
    return ends


def reason_to_keep(
    model: nn.Module,
    layer: LayerProfile,
    formats: Sequence[str],
    keep: Sequence[str] = (),
    ends: Mapping[str, str] | None = None,
    *,
    measured: bool = False,
) -> str:
    """Return why no rule may touch the layer, or an empty string.

    Args:
        model: that the layer is in.
        layer: what is known of it.
        formats: that it may get.
        keep: layers to leave alone, as paths, globs or ``re:`` expressions.
        ends: further layers to leave alone, by path, with the reasons.
        measured: whether data reach it, though the example inputs may not.
    """
    pattern = first_match(keep, layer.path, layer.aliases)
    if pattern is not None:
        return f"kept as asked by {pattern!r}"
    if layer.spec is None or layer.tied or layer.read:
        return layer.note
    if ends and layer.path in ends:
        return ends[layer.path]
    refusals = {name: FORMATS.get(name).unsupported_reason(layer.spec) for name in formats}
    if all(refusals.values()):
        return "; ".join(dict.fromkeys(str(r) for r in refusals.values())) or "no format is allowed"
    weight = _weight(model, layer.path)
    if weight.is_meta:
        msg = f"the weight of layer {layer.path!r} is on the meta device and has no values: load the model first"
        raise PlanError(msg)
    if not torch.isfinite(weight).all():
        return "the weight has NaN or infinite entries: repair the model first"
    return "" if measured or layer.reached else NOT_REACHED


def eligible_layer(
    model: nn.Module,
    layer: LayerProfile,
    formats: Sequence[str],
    moments: Moments | None = None,
    target: Target | None = None,
) -> EligibleLayer:
    """Return what the options of a layer are computed from, in those of the formats that support it.

    Raises:
        PlanError: the layer has no geometry.
    """
    spec = layer.spec
    if spec is None:
        msg = f"layer {layer.path!r} has no geometry"
        raise PlanError(msg)
    return EligibleLayer(
        path=layer.path,
        spec=spec,
        formats=tuple(
            f
            for f in formats
            if not FORMATS.get(f).unsupported_reason(spec) and (target is None or not target.refusal(f, spec))
        ),
        calls=layer.calls,
        cost=layer.cost,
        load_weight=lambda: split_groups(_weight(model, layer.path), spec),
        current=None if layer.format is None or layer.rank is None else (layer.format, dict(layer.rank)),
        moments=moments,
        step=None if target is None else target.step_of(spec),
        likes="" if target is None else target.runtime.name,
    )


def costs_of(layer: EligibleLayer, format: str, ranks: Ints) -> tuple[Ints, Ints]:
    """Return parameters and MACs (n,) of all calls of a layer at many ``ranks`` (n, names)."""
    kind = FORMATS.get(format)
    macs = np.zeros(len(ranks), dtype=np.int64)
    if not layer.calls:  # reached by data alone
        return kind.params_at(layer.spec, ranks), macs
    for call in layer.calls:
        params, once = kind.cost(layer.spec, ranks, call.in_shape)
        macs = macs + call.count * once
    return params, macs


def saves(layer: EligibleLayer, params: Ints, macs: Ints) -> NDArray[np.bool_]:
    """Return which costs (n,) are below what the layer costs now; a lookup is judged by its parameters."""
    now = layer.cost
    counted = macs if now.macs else np.zeros_like(macs)
    no_more = (params <= now.params) & (counted <= now.macs)
    return np.asarray(no_more & ((params < now.params) | (counted < now.macs)))


def _weight(model: nn.Module, path: str) -> Tensor:
    with torch.no_grad():
        return dense_weight(find(model, path)).detach()
