"""Rows of the option table for one part of a network, and the table of the whole once all parts have theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from tenfold import __version__
from tenfold.allocation import rule_of
from tenfold.allocation.parts import OUTSIDE
from tenfold.patterns import first_match
from tenfold.planning.eligible import cheap_ends, check_layers
from tenfold.records import LayerOptions, OptionTable, Profile, Recipe, Unit
from tenfold.streaming.chain import Chain
from tenfold.streaming.network_parts import OUTER
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model

AnyUnit = TypeVar("AnyUnit", bound=Unit)

LEAD, TAIL = "lead", "tail"  # names of the parts around the blocks


def parts_of(model: nn.Module, inputs: Any, chain: Chain, profile: Profile) -> dict[str, tuple[str, ...]]:
    """Return the paths of the layers by part of the network: before the blocks, by block, after them.

    Args:
        model: on the meta device.
        inputs: there too.
        chain: of its blocks.
        profile: of the model.
    """
    found: dict[str, list[str]] = {LEAD: [], **{path: [] for path in chain.blocks}, TAIL: []}
    outside = [layer.path for layer in profile.layers if not layer.path.startswith(chain.prefixes)]
    before = _called_before(model, inputs, chain.blocks[0], [p for p in outside if p and p not in chain.blocks])
    for layer in profile.layers:
        block = next(
            (b for b, own in zip(chain.blocks, chain.prefixes, strict=True) if layer.path.startswith(own)), None
        )
        part = block or next((b for b in chain.blocks if b == layer.path), None)
        found[part or (LEAD if layer.path in before else TAIL)].append(layer.path)
    return {part: tuple(paths) for part, paths in found.items()}


def kept_of_whole(profile: Profile, recipe: Recipe) -> dict[str, str]:
    """Return by path what stays as it is whatever the parts say: as asked, outside of budgets, cheap ends.

    Raises:
        UnknownNameError: a pattern that names nothing.
    """
    rule = rule_of(recipe.rule)
    check_layers(profile, recipe)
    ends = not rule.by_name if recipe.keep_ends is None else recipe.keep_ends
    kept = dict(cheap_ends(profile)) if ends else {}
    for layer in profile.layers:
        pattern = first_match(recipe.keep, layer.path, layer.aliases)
        if pattern is not None:
            kept[layer.path] = f"kept as asked by {pattern!r}"
        elif recipe.budget_of and first_match(tuple(recipe.budget_of), layer.path, layer.aliases) is None:
            kept.setdefault(layer.path, OUTSIDE)
    return kept


def inside(profile: Profile, part: str, paths: Iterable[str]) -> Profile:
    """Return the profile of a part, with the paths that layers have in it; aliases in other parts go."""
    wanted = set(paths)
    layers = tuple(
        layer.replace(path=into(part, layer.path), aliases=())
        for layer in profile.layers
        if layer.path in wanted and (layer.path or part not in (LEAD, TAIL))
    )
    return profile.replace(
        layers=layers,
        params=sum(layer.params for layer in layers),
        macs=sum(layer.macs for layer in layers),
        other_macs=0,
        units=(),
    )


def recipe_of_part(recipe: Recipe, part: str, paths: Iterable[str], kept: Mapping[str, str]) -> Recipe:
    """Return the recipe for a part of a network, of which the whole has said already what stays as it is."""
    names = tuple(into(part, path) for path in paths if path in kept)
    return recipe.replace(keep=names, keep_ends=False, budget_of={})


def into(part: str, path: str) -> str:
    """Return the path that a layer has within the module of its part.

    Example:
        >>> into(LEAD, "model.embed"), into("model.layers.3", "model.layers.3.mlp.up")
        ('outer.model.embed', 'mlp.up')
    """
    return f"{OUTER}.{path}" if part in (LEAD, TAIL) else path.removeprefix(part).removeprefix(".")


def out_of(part: str, path: str) -> str:
    """Return the path that a layer of a part has in the network: the inverse of ``into``."""
    if part in (LEAD, TAIL):
        return path.removeprefix(f"{OUTER}.")
    return f"{part}.{path}" if path else part


def moved(unit: AnyUnit, change: Callable[[str], str]) -> AnyUnit:
    """Return a unit with other paths."""
    settings = dict(unit.settings)
    if "attention" in settings:
        settings["attention"] = change(settings["attention"])
    if "output" in settings:
        settings["output"] = change(settings["output"])
    return unit.replace(
        path=change(unit.path), pivot=change(unit.pivot), feeders=tuple(map(change, unit.feeders)), settings=settings
    )


def joined(
    profile: Profile,
    recipe: Recipe,
    tables: Mapping[str, OptionTable],
    kept: Mapping[str, str],
    itemsizes: Mapping[str, int],
) -> OptionTable:
    """Return the table of the whole network.

    Args:
        profile: of the whole.
        recipe: that was given.
        tables: those of the parts, in order.
        kept: see ``kept_of_whole``.
        itemsizes: bytes of a parameter, by path of the layer.
    """
    known: dict[str, LayerOptions] = {}
    units, algorithms = [], dict[str, dict[str, Any]]()
    for part, table in tables.items():
        for own in table.layers:
            path = out_of(part, own.path)
            known[path] = own.replace(path=path)
        for unit in table.units:
            params = {out_of(part, path): column for path, column in unit.params.items()}
            macs = {out_of(part, path): column for path, column in unit.macs.items()}
            units.append(unit.replace(unit=moved(unit.unit, partial(out_of, part)), params=params, macs=macs))
        algorithms |= table.algorithms
    layers = []
    for layer in profile.layers:
        if layer.path in known:
            found = known[layer.path].replace(aliases=layer.aliases)
            if layer.path in kept:
                found = found.replace(keep_reason=kept[layer.path], options=())
        elif layer.spec is None and not layer.params and not layer.macs:
            continue
        else:  # of no part that has options, such as parameters of the network itself
            found = LayerOptions(
                path=layer.path,
                aliases=layer.aliases,
                kind=layer.kind,
                before=layer.cost,
                itemsize=itemsizes.get(layer.path, 4),
                keep_reason=layer.note or "it lies outside of the blocks, and is no layer that could be factorized",
            )
        layers.append(found)
    said = next((table.distortion for table in tables.values() if table.distortion), "")
    return OptionTable(
        tenfold=__version__,
        model=profile.model,
        recipe=recipe,
        before=profile.cost,
        bytes=profile.bytes,
        layers=tuple(layers),
        distortion=said,
        algorithms=algorithms,
        units=tuple(units),
    )


def _called_before(model: nn.Module, inputs: Any, block: str, paths: Sequence[str]) -> set[str]:
    """Return which of the modules a forward calls before a block."""
    found: list[str] = []
    reached: list[bool] = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda *_, path=path: None if reached else found.append(path)
        )
        for path in paths
    ]
    hooks.append(model.get_submodule(block).register_forward_pre_hook(lambda *_: reached.append(True)))
    try:
        with evaluating(model), layer_by_layer():
            call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return set(found)
