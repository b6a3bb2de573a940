"""What a rule is to decide on: the layers that nothing else keeps as they are, and what may be known of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.decompositions import Moments
from tenfold.errors import PlanError
from tenfold.formats import FORMATS, split_groups
from tenfold.layers import dense_weight
from tenfold.planning.damage import Curve, with_damage
from tenfold.ranks import RankProblem, check_patterns, first_match
from tenfold.records import LayerProfile, Profile
from tenfold.surgery import find

Memory = dict[str, dict[Any, Any]]  # by path

# A first or last layer below this share of the model's cost is not worth its damage.
_CHEAP_END = 0.02
_UNSEEN = "no moments of its inputs were collected, which a plan by data needs"


def kept_layers(
    model: nn.Module,
    profile: Profile,
    formats: Sequence[str],
    *,
    keep: Sequence[str] = (),
    keep_ends: bool = True,
    moments: Mapping[str, Moments] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return for the path of every layer why no rule may touch it, or an empty string; the arguments are ``plan``'s.

    Raises:
        UnknownNameError: a format or a pattern that names nothing.
    """
    for name in formats:
        FORMATS.get(name)
    check_patterns(keep, [p for layer in profile.layers for p in (layer.path, *layer.aliases)])
    _check_same_model(model, profile)
    ends = cheap_ends(profile) if keep_ends else {}
    kept = {layer.path: reason_to_keep(model, layer, formats, keep, ends) for layer in profile.layers}
    kept |= {path: reason for path, reason in (reasons or {}).items() if not kept[path]}
    if moments is not None:
        kept |= {path: _UNSEEN for path in kept if not kept[path] and path not in moments}
    return kept


def problems_of(
    model: nn.Module,
    layers: Sequence[LayerProfile],
    formats: Sequence[str],
    *,
    moments: Mapping[str, Moments] | None = None,
    damages: Callable[[str, str], Curve] | None = None,
    memory: Memory | None = None,
) -> list[RankProblem]:
    """Return what a rule may know of layers that it is to decide on, without time; the arguments are ``plan``'s."""
    problems = [problem_of(model, layer, formats, memory) for layer in layers]
    if moments is not None:
        problems = with_damage(problems, moments)
    if damages is not None:
        problems = [dataclasses.replace(p, damage_at=partial(damages, p.path)) for p in problems]
    return problems


def cheap_ends(profile: Profile) -> dict[str, str]:
    """Return the first and the last layer with a geometry, where they cost next to nothing, with the reason."""
    used = [layer for layer in profile.layers if layer.spec is not None and layer.calls]
    ends = {}
    for layer, name in ((used[0], "first"), (used[-1], "last")) if len(used) > 2 else ():
        share = max(layer.params / max(profile.params, 1), layer.macs / max(profile.macs, 1))
        if share < _CHEAP_END:
            ends[layer.path] = f"the {name} layer is {share:.1%} of the cost: too little to be worth damage there"
    return ends


def _check_same_model(model: nn.Module, profile: Profile) -> None:
    for layer in profile.layers:
        find(model, layer.path)


def reason_to_keep(
    model: nn.Module,
    layer: LayerProfile,
    formats: Sequence[str],
    keep: Sequence[str] = (),
    ends: Mapping[str, str] | None = None,
) -> str:
    """Return why no rule may touch the layer, or an empty string.

    Args:
        model: that the layer is in.
        layer: what is known of it.
        formats: that it may get.
        keep: layers to leave alone, as ``plan`` takes them.
        ends: further layers to leave alone, by path, with the reasons.
    """
    pattern = first_match(keep, layer.path, layer.aliases)
    if pattern is not None:
        return f"kept as asked by {pattern!r}"
    if layer.spec is None or layer.tied or layer.read or not layer.calls:
        return layer.note or "not called by the forward"
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
    return ""


def _weight(model: nn.Module, path: str) -> Tensor:
    with torch.no_grad():
        return dense_weight(find(model, path)).detach()


def problem_of(
    model: nn.Module, layer: LayerProfile, formats: Sequence[str], memory: Memory | None = None
) -> RankProblem:
    """Return what there is to know of a layer, in those of the formats that serve it.

    Raises:
        PlanError: the layer has no geometry.
    """
    spec = layer.spec
    if spec is None:
        msg = f"layer {layer.path!r} has no geometry"
        raise PlanError(msg)
    current = None if layer.format is None or layer.rank is None else (layer.format, dict(layer.rank))
    return RankProblem(
        path=layer.path,
        spec=spec,
        formats=tuple(f for f in formats if FORMATS.get(f).unsupported_reason(spec) is None),
        calls=layer.calls,
        cost=layer.cost,
        load_weight=lambda: split_groups(_weight(model, layer.path), spec),
        current=current,
        _cache={} if memory is None else memory.setdefault(layer.path, {}),
    )
