"""How long units take at each of their sizes, by the lookup table of layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tenfold.profiling import LatencyTable
from tenfold.records import LayerProfile, Profile, Unit, UnitOptions
from tenfold.units import UNITS, Size
from tenfold.units.base import narrowed_calls

_MEASURED = 6  # sizes of a unit that are measured; times in between lie on lines

_SLOWER = "no smaller size is faster"


def time_unit(
    own: UnitOptions, profile: Profile, clock: LatencyTable, now_ms: Callable[[LayerProfile], float]
) -> UnitOptions:
    """Return a unit with what it takes now and at each size, and without the sizes at which it is not faster.

    A unit takes as long as its layers one after the other, as dense layers of the smaller sizes.

    Args:
        own: the unit and its options.
        profile: has the calls of its layers.
        clock: times layers.
        now_ms: what a layer takes as it is.
    """
    now = sum(now_ms(profile.layer(path)) for path in own.unit.members)
    if own.options is None:
        return own.replace(latency_ms=now)
    options = own.options
    known = np.unique(np.linspace(0, len(options) - 1, _MEASURED).round().astype(int))
    measured = [_size_ms(own.unit, options.rank(int(i)), profile, clock) for i in known]
    rising = np.maximum.accumulate(measured)  # fewer channels take no longer
    times = np.interp(np.arange(len(options)), known, rising)
    timed = own.replace(latency_ms=now, options=options.replace(latency_ms=times))
    faster = np.flatnonzero(times < now)
    return timed.only(faster) if len(faster) else timed.kept(_SLOWER)


def _size_ms(unit: Unit, size: Size, profile: Profile, clock: LatencyTable) -> float:
    known = {path: profile.layer(path) for path in unit.members}
    specs = {path: layer.spec for path, layer in known.items() if layer.spec is not None}
    narrow = UNITS.get(unit.kind)().geometry(unit, size, specs)
    return sum(clock.layer_ms(spec, narrowed_calls(known[path], spec)) for path, spec in narrow.items())
