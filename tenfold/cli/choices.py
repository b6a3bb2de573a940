"""What is to be done: the recipe, checked before any work begins, or a plan that has decided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from tenfold.cli.record_options import Fields
from tenfold.cli.terminal import Misuse
from tenfold.records import Recipe

if TYPE_CHECKING:
    from tenfold.records import Plan

RecipeOptions: TypeAlias = Annotated[Recipe, Fields("Recipe", file=True)]
_BESIDE_A_PLAN = {"calibration", "fuse_batchnorm", "seed"}  # a plan does not decide these


def check_recipe(recipe: Recipe) -> None:
    """Raise an error for a rule, format or algorithm that does not exist or does not fit.

    Raises:
        UnknownNameError: a name that does not exist.
        TenfoldError: a setting that the rule does not have.
        Misuse: an algorithm for a format that is not in use, or that does not find its factors; units that the rule or
            the calibration cannot choose.
    """
    from tenfold.allocation import rule_of
    from tenfold.decompositions import DECOMPOSITIONS
    from tenfold.formats import FORMATS
    from tenfold.units import UNITS

    rule = rule_of(recipe.rule)
    for name in recipe.units or ():
        UNITS.get(name)
    if recipe.units and not (rule.uses_units and recipe.calibration.plans):
        why = (
            f"the rule {recipe.rule_name} chooses no units; the rule global does"
            if not rule.uses_units
            else "they need data that decide: --calibration-method sequential or independent"
        )
        msg = f"--units {','.join(recipe.units)}: {why}."
        raise Misuse(msg)
    for format in recipe.formats:
        FORMATS.get(format)
    for format, config in recipe.algorithms.items():
        kind, algorithm = FORMATS.get(format), DECOMPOSITIONS.get(str(config.get("name")))
        if not algorithm.supports(kind):
            finders = [name for name, one in DECOMPOSITIONS.items() if one.supports(kind)]
            msg = f"{config['name']} does not find {format} factors. Use {' or '.join(finders)}."
            raise Misuse(msg)
        if format not in recipe.formats:
            given, names = f"--algorithms {format}={config['name']}", ", ".join(recipe.formats)
            msg = f"{given}: {format} is not among the formats {names}; name it with --formats."
            raise Misuse(msg)


def plan_or_recipe(recipe: Recipe, file: Path | None) -> Plan | Recipe:
    """Return the plan of a file, with what the recipe says beside it; without a file the recipe, checked.

    Raises:
        Misuse: the recipe decides what the plan has decided.
        BudgetError: the rule needs a budget and there is none.
        PlanError: there is no plan at that path.
    """
    from tenfold.allocation import check_budget
    from tenfold.records import Plan

    if file is None:
        check_recipe(recipe)
        check_budget(recipe)
        return recipe
    refuse_choices(recipe, _BESIDE_A_PLAN, "--plan decides everything; leave {} out, or edit the plan.")
    plan = Plan.load(file)
    beside = {name: getattr(recipe, name) for name in recipe.model_fields_set}
    return plan.replace(recipe=plan.recipe.replace(**beside))


def refuse_choices(recipe: Recipe, allowed: set[str], message: str) -> None:
    """Raise a usage error if a recipe sets other fields than the allowed ones; ``message`` has a place for them."""
    given = [name for name in type(recipe).model_fields if name in recipe.model_fields_set - allowed]
    names = ["rank" if name == "rule" and recipe.rule_name == "fixed" else name for name in given]
    if given:
        raise Misuse(message.format(", ".join(f"--{name.replace('_', '-')}" for name in names)))
