"""Which units a recipe allows, and which of them it must not touch."""

from __future__ import annotations

from tenfold.allocation import rule_of
from tenfold.patterns import first_match
from tenfold.records import Profile, Recipe, Unit
from tenfold.units import UNITS


def kinds_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the kinds of units that a recipe allows: those that it names, or those that are meant for all models.

    Raises:
        UnknownNameError: a kind that does not exist.
    """
    if recipe.units is None:
        return tuple(name for name, kind in UNITS.items() if kind.default)
    for name in recipe.units:
        UNITS.get(name)
    return recipe.units


def wants_units(recipe: Recipe) -> bool:
    """Whether units are to be looked for: the rule may choose them, and data are there to judge them by."""
    return rule_of(recipe.rule).uses_units and recipe.calibration.plans and bool(kinds_of(recipe))


def pivots_to_judge(profile: Profile, recipe: Recipe) -> tuple[str, ...]:
    """Return the pivots of units that there is a choice for: those that data have to judge, whatever the formats."""
    return tuple(unit.pivot for unit in profile.units if not kept_as_asked(unit, profile, recipe))


def kept_as_asked(unit: Unit, profile: Profile, recipe: Recipe) -> str:
    """Return why a recipe must not touch a unit, or an empty string."""
    for path in unit.members:
        layer = profile.layer(path)
        pattern = first_match(recipe.keep, layer.path, layer.aliases)
        if pattern is not None:
            return f"its layer {path!r} is kept as asked by {pattern!r}"
    return unit.keep_reason or ""
