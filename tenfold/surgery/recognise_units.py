"""Find the units of a model: layers that could be narrowed together, confirmed by its forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from tenfold.errors import TenfoldError
from tenfold.records import Profile, Unit
from tenfold.surgery.model_outputs import agree, outputs_of
from tenfold.surgery.modules import find, put
from tenfold.surgery.narrow import absorbed, sampled
from tenfold.tensors import normal_tensors
from tenfold.tracing import copied
from tenfold.units import UNITS, Size
from tenfold.units.one_head_size import native, partners

_FAILURES = 2  # of units that are alike, before the others are given up

_NOT_ONE = "the outputs of the model change when its layers are narrowed: something else reads or mixes what is between"


@normal_tensors()
def recognise_units(model: nn.Module, profile: Profile, inputs: Any, kinds: Iterable[str]) -> tuple[Unit, ...]:
    """Return the units of a model, and what looks like one but has to stay, with the reason.

    The forward is asked, not the class: what has the shapes of a unit is narrowed to about half on a copy, with factors
    that need no data, and the outputs have to be those of the model whose pivots have these factors and whose other
    layers are as they were. So whatever normalises, mixes or reads what lies in between is noticed, and whatever does
    not take the smaller size. All that could be units are tried at once, and one by one where that fails.

    Args:
        model: that was profiled; unchanged.
        profile: what ``profile`` said of it.
        inputs: example inputs, as ``call_model`` takes them.
        kinds: names of the kinds of units.

    Raises:
        UnknownNameError: a kind that does not exist.

    Example:
        >>> import torch
        >>> from tenfold.profiling import profile
        >>> net, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(2, 8)
        >>> [(unit.pivot, unit.full) for unit in recognise_units(net, profile(net, x), x, ["mlp_width"])]
        [('2', {'width': 32})]
    """
    found = [unit for kind in kinds for unit in UNITS.get(kind)().candidates(model, profile)]
    tried = [unit for unit in found if unit.keep_reason is None and trial_size(unit)]
    likely = [unit for unit in tried if _stands_out(unit, profile)]
    confirmed = list(_disjoint(likely, ()))
    if not confirms(model, confirmed, inputs):
        confirmed = []
    for group in _alike(unit for unit in tried if unit not in confirmed):
        confirmed += _confirmed(model, group, inputs, confirmed)
    found, confirmed = _resizable(model, inputs, found, confirmed)
    return tuple(_in_order(found, confirmed, model, profile))


def _confirmed(model: nn.Module, group: Sequence[Unit], inputs: Any, taken: Sequence[Unit]) -> list[Unit]:
    """Return those units of a group that a forward confirms: all at once, or else one by one while some are."""
    open_ = list(_disjoint(group, taken))
    if not open_ or confirms(model, open_, inputs):
        return open_
    found: list[Unit] = []
    for number, unit in enumerate(open_ if len(open_) > 1 else []):
        if number >= _FAILURES and not found:
            break
        if confirms(model, [unit], inputs):
            found.append(unit)
    return found


def _resizable(
    model: nn.Module, inputs: Any, found: Sequence[Unit], confirmed: Sequence[Unit]
) -> tuple[list[Unit], list[Unit]]:
    """Return both with the attributes of attentions left out where a forward does not run on narrower heads."""
    pairs = [tuple(native(unit, together=True) for unit in pair) for pair in partners(confirmed)]
    if not confirms(model, [unit for pair in pairs for unit in pair], inputs):
        pairs = [pair for pair in pairs if confirms(model, pair, inputs)]
    known = {unit.settings["attention"] for pair in pairs for unit in pair}

    def told(unit: Unit) -> Unit:
        stays = not unit.settings.get("resizes") or unit.settings["attention"] in known
        return unit if stays else unit.replace(settings=unit.settings | {"resizes": {}})

    return [told(unit) for unit in found], [told(unit) for unit in confirmed]


def _alike(units: Iterable[Unit]) -> list[list[Unit]]:
    """Return units in groups whose paths differ in numbers alone, as those of repeated blocks do."""
    groups: dict[tuple[str, ...], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.kind, *(re.sub(r"\d+", "#", path) for path in unit.members)), []).append(unit)
    return list(groups.values())


def confirms(model: nn.Module, units: Sequence[Unit], inputs: Any) -> bool:
    """Whether a forward of the model runs narrowed units, each at about half its size, to the same outputs."""
    if not units:
        return True
    pivots = {unit.pivot: sampled(model, unit, trial_size(unit) or unit.full) for unit in units}
    watched = [UNITS.get(unit.kind)().watched(unit) for unit in units]
    try:
        wide = put(copied(model), pivots)
        wanted = outputs_of(wide, inputs, watched)
        for unit in units:
            wide = absorbed(wide, unit, trial_size(unit) or unit.full, find(model, unit.pivot))
        return agree(outputs_of(wide, inputs, watched), wanted)
    except (TenfoldError, RuntimeError, ValueError):
        return False  # a forward that does not run on smaller sizes


def trial_size(unit: Unit) -> Size | None:
    """Return the size at which a unit is tried, in the middle; None where it cannot be smaller."""
    sizes = UNITS.get(unit.kind)().sizes(unit)
    return sizes[len(sizes) // 2] if sizes else None


def _disjoint(units: Iterable[Unit], taken: Iterable[Unit]) -> Iterator[Unit]:
    """Iterate over those units that share no layer with one before, nor with those that are taken."""
    used = {path for unit in taken for path in unit.members}
    for unit in units:
        if used.isdisjoint(unit.members):
            used.update(unit.members)
            yield unit


def _stands_out(unit: Unit, profile: Profile) -> bool:
    return UNITS.get(unit.kind)().stands_out(unit, profile)


def _in_order(found: Sequence[Unit], confirmed: Sequence[Unit], model: nn.Module, profile: Profile) -> Iterator[Unit]:
    """Iterate over the confirmed units, and over those that stand out and share nothing with these, with the reason."""
    used, told = {path for unit in confirmed for path in unit.members}, set[str]()
    for unit in found:
        if unit in confirmed:
            yield unit
        elif unit.pivot not in told and used.isdisjoint(unit.members) and _stands_out(unit, profile):
            told.add(unit.pivot)
            obstacle = unit.keep_reason or UNITS.get(unit.kind)().obstacle(model, unit)
            yield unit.replace(keep_reason=obstacle or _NOT_ONE)
