"""What becomes of single layers and of units in a selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.records import Cost, LayerOptions, UnitOptions, UnitPlan

_NOT_CHOSEN = "its layers one by one serve the budget better, or stay as they are"


@dataclass(frozen=True)
class Pick:
    """What becomes of a layer that there is a choice for; ``format`` is None where it stays as it is."""

    path: str
    format: str | None
    option: int
    rank: dict[str, int] | None
    cost: Cost
    distortion: float | None
    latency_ms: float | None
    reason: str


def unit_picks(unit: UnitOptions, members: Sequence[LayerOptions], option: int, why: str) -> dict[str, Pick]:
    """Return what becomes of the layers of a unit at one of its options, by path.

    The pivot is factorized, and has the distortion and the time of all; the feeders stay, narrower.
    """
    assert unit.options is not None  # noqa: S101 - one of its options was chosen
    assert unit.pivot is not None  # noqa: S101
    size = unit.unit.sized(unit.options.rank(option))
    latency = unit.options.latency_ms
    picks = {}
    for layer in members:
        cost = unit.member_cost(layer.path, option)
        if layer.path == unit.unit.pivot:
            distortion = float(unit.options.columns["distortion"][option])
            ms = None if latency is None else float(latency[option])
            rank, reason = unit.pivot.rank(option), f"{why}; {unit.unit.kind}: {size}"
            picks[layer.path] = Pick(layer.path, unit.pivot.format, option, rank, cost, distortion, ms, reason)
        else:
            picks[layer.path] = Pick(
                layer.path, None, 0, None, cost, None, 0.0, f"narrowed with {unit.unit.pivot}: {size}"
            )
    return picks


def unit_plan(unit: UnitOptions, chosen: tuple[int, str] | None) -> UnitPlan:
    """Return what becomes of a unit: the option that was chosen and why, or None where it stays."""
    known = unit.unit.model_dump()
    if chosen is None or unit.options is None:
        reason = unit.unit.keep_reason or _NOT_CHOSEN
        return UnitPlan(**known, reason=reason, before=unit.before, after=unit.before)
    option, why = chosen
    latency = unit.options.latency_ms
    return UnitPlan(
        **known,
        size=unit.options.rank(option),
        reason=why,
        before=unit.before,
        after=unit.options.cost(option),
        distortion=float(unit.options.columns["distortion"][option]),
        latency_before_ms=unit.latency_ms,
        latency_after_ms=None if latency is None else float(latency[option]),
    )
