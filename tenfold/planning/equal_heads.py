"""Where all heads of an attention get one size its module becomes narrower: the plan says so and counts it."""

from __future__ import annotations

from tenfold.planning.unit_options import planned_unit
from tenfold.records import Cost, Plan, Profile
from tenfold.units.one_head_size import native, partners


def with_one_head_size(plan: Plan, profile: Profile) -> Plan:
    """Return the plan in which attentions run on narrow heads where both of their units have one size.

    Others fill their heads up to the size that the forward expects. Scores and weighted values are cheaper then, and
    so is the memory of keys and values, which a choice unit by unit could not know.

    Args:
        plan: chosen from a table, or edited by hand.
        profile: of the model.
    """
    changed = {}
    for pair in partners(unit for unit in plan.units if unit.keep_reason is None):
        together = pair[0].size is not None and pair[0].size == pair[1].size
        for unit in pair:
            if unit.settings["native"] != together:
                changed[unit.kind, unit.pivot] = planned_unit(native(unit, together=together), profile)
    if not changed:
        return plan
    units = tuple(changed.get((unit.kind, unit.pivot), unit) for unit in plan.units)
    saved = sum(_saved(unit.before, unit.after) for unit in units) - sum(_saved(u.before, u.after) for u in plan.units)
    after = Cost(params=plan.after.params, macs=plan.after.macs - saved)
    return plan.replace(units=units, after=after)


def _saved(before: Cost, after: Cost) -> int:
    return before.macs - after.macs
