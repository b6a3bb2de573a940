"""From an option table to a plan: numbers alone, in milliseconds, by the one function that all planning comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeInt

from tenfold.allocation.accounts import Accounts
from tenfold.allocation.compounds import Compounds
from tenfold.allocation.picks import Pick, unit_picks, unit_plan
from tenfold.allocation.reasons import listed
from tenfold.allocation.rule import Choice, Factorize, Keep, RankRule, UnreachableError, rule_of
from tenfold.errors import BudgetError, PlanError
from tenfold.records import Budget, Cost, LayerOptions, LayerPlan, OptionTable, Plan, Recipe
from tenfold.records.base import Record
from tenfold.registry import did_you_mean

SET_BY_HAND = "set by hand"


class Override(Record):
    """A layer set by hand: to an option of a format, or without a format to stay as it is."""

    format: str | None = None
    option: NonNegativeInt = 0


@dataclass(frozen=True)
class Selection:
    """One choice for each eligible layer, and what the whole model comes to.

    Attributes:
        picks: in the order of the table's eligible layers.
        cost: of the whole model.
        distortion: the sum over its layers; layers without one count as 0.
        latency_share: the expected time, as a share of that of the model as it is; None without a clock.
        chosen: whether a rule had anything to choose.
        units: which option of a unit was chosen, and why, by the path of its pivot; its layers have picks too.
    """

    picks: tuple[Pick, ...]
    cost: Cost
    distortion: float
    latency_share: float | None
    chosen: bool
    units: dict[str, tuple[int, str]] = field(default_factory=dict)


def choose(
    table: OptionTable, recipe: Recipe | None = None, *, overrides: Mapping[str, Override] | None = None
) -> Plan:
    """Return what is to happen to every layer: the rows that the rule selects within the budget.

    Args:
        table: what each layer could become.
        recipe: whose budget and rule to go by instead of those that the table was made for; all else, such as formats
            and layers to keep, is in the table.
        overrides: layers set by hand, by path; the rule decides on the others.

    Raises:
        BudgetError: the budget cannot be met, or the rule cannot aim at one.
        PlanError: the table lacks the rows or columns of the rule, or an override names an option that does not exist.

    Example:
        >>> import torch
        >>> from tenfold.planning import tabulate
        >>> from tenfold.profiling import profile
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> table = tabulate(net, profile(net, torch.zeros(1, 64)), "macs=0.5")
        >>> [choose(table, Recipe.of(f"macs={share}")).after.macs for share in (0.5, 0.25)]
        [4096, 2048]
    """
    asked = table.recipe if recipe is None else recipe
    # The plan claims no other formats or layers than those that it was chosen from.
    recipe = table.recipe.replace(budget=asked.budget, rule=asked.rule)
    return plan_of(table, recipe, select(table, recipe, overrides=overrides))


def check_budget(recipe: Recipe) -> None:
    """Raise BudgetError if the rule of a recipe needs a budget, for want of a number of its own, and there is none."""
    rule = rule_of(recipe.rule)
    if not recipe.budget and not rule.by_name:
        rule.select(())  # no rule can be without both


def limits_latency(recipe: Recipe) -> bool:
    """Whether the budget limits the time of a forward, so that layers have to be timed."""
    return "latency" in recipe.budget.limited


def select(table: OptionTable, recipe: Recipe, *, overrides: Mapping[str, Override] | None = None) -> Selection:
    """Return the rows that the rule of the recipe selects, around layers that are set by hand; see ``choose``.

    Where all layers are set by hand, the budget decides nothing.
    """
    rule = rule_of(recipe.rule)
    fixed = _rows_by_hand(table, overrides or {})
    compounds = Compounds.of(table if rule.uses_units else table.replace(units=()), recipe.budget.limited, fixed)
    accounts = Accounts(compounds.table)
    layers = compounds.table.eligible
    free = [layer for layer in layers if layer.path not in fixed]
    choices: dict[str, Choice] = {path: Factorize(row, SET_BY_HAND) for path, row in fixed.items()}
    if free or not layers:
        _check_serves(table, rule)
        limits = accounts.limits(recipe.budget, fixed) if recipe.budget else None
        try:
            chosen = rule.select(free, limits)
        except UnreachableError as error:
            if fixed or limits is None:
                raise
            raise BudgetError(accounts.out_of_reach(recipe.budget, limits, error)) from error
        except BudgetError as error:
            if fixed or limits is None or len(limits) < 2:
                raise
            msg = f"{error}. The lowest of each alone: {listed(map(accounts.lowest, limits))}"
            raise BudgetError(msg) from error
        choices |= {layer.path: choice for layer, choice in zip(free, chosen, strict=True)}
    picks = tuple(_pick(layer, choices[layer.path]) for layer in layers)
    units, singles = _expanded(compounds, choices)
    return Selection(
        tuple(singles[layer.path] for layer in table.layers if layer.path in singles),
        accounts.cost([pick.cost for pick in picks]),
        sum(pick.distortion or 0.0 for pick in picks),
        accounts.latency_share([pick.latency_ms for pick in picks]),
        bool(free),
        units,
    )


def _expanded(
    compounds: Compounds, choices: Mapping[str, Choice]
) -> tuple[dict[str, tuple[int, str]], dict[str, Pick]]:
    """Return the options of units that were chosen, and what becomes of every layer for which there was a choice."""
    units: dict[str, tuple[int, str]] = {}
    picks: dict[str, Pick] = {}
    for layer in compounds.table.eligible:
        choice, compound = choices[layer.path], compounds.by_path.get(layer.path)
        if compound is None:
            picks[layer.path] = _pick(layer, choice)
            continue
        own, option = compound.expanded(choice)
        if option is not None:
            units[layer.path] = option, choice.note if isinstance(choice, Factorize) else choice.reason
            picks |= unit_picks(compound.unit, compound.members, option, units[layer.path][1])
        picks |= {
            member.path: _pick(member, own[member.path])
            for member in compound.members
            if member.path in own and member.keep_reason is None
        }
    return units, picks


def plan_of(table: OptionTable, recipe: Recipe, selection: Selection) -> Plan:
    """Return the plan that carries a selection out. Of a budget that decided nothing it claims what is met."""
    if not selection.chosen:
        met = Accounts(table).met(recipe.budget, selection.cost, selection.latency_share)
        recipe = recipe.replace(budget=Budget(**met))
    picks = {pick.path: pick for pick in selection.picks}
    algorithms = {unit.unit.pivot: unit.algorithm for unit in table.units if unit.unit.pivot in selection.units}
    return Plan(
        tenfold=table.tenfold,
        model=table.model,
        recipe=recipe,
        before=table.before,
        after=selection.cost,
        layers=tuple(
            _layer_plan(layer, picks.get(layer.path), table.algorithms, algorithms.get(layer.path))
            for layer in table.layers
        ),
        unrolled=table.unrolled,
        units=tuple(unit_plan(unit, selection.units.get(unit.unit.pivot)) for unit in table.units),
    )


def _rows_by_hand(table: OptionTable, overrides: Mapping[str, Override]) -> dict[str, int]:
    eligible = {layer.path: layer for layer in table.eligible}
    for path in overrides:
        if path not in eligible:
            msg = f"there is no choice for a layer {path!r}. {did_you_mean(path, eligible)}"
            raise PlanError(msg)
    return {path: _row(eligible[path], own) for path, own in overrides.items()}


def _row(layer: LayerOptions, override: Override) -> int:
    if override.format is None:
        return 0
    first = 1
    for options in layer.options:
        if options.format == override.format and override.option < len(options):
            return first + override.option
        first += len(options)
    has = ", ".join(f"{o.format} up to {len(o) - 1}" for o in layer.options) or "none"
    msg = f"layer {layer.path!r} has no option {override.option} of {override.format}; it has {has}"
    raise PlanError(msg)


def _check_serves(table: OptionTable, rule: RankRule) -> None:
    """Raise PlanError unless the table has the rows and columns that the rule compares."""
    made_for = rule_of(table.recipe.rule)
    if made_for.rows != rule.rows or not set(rule.columns) <= set(made_for.columns):
        msg = f"the options were tabulated for the rule {made_for.name()}, not for {rule.name()}: tabulate them again"
        raise PlanError(msg)
    there = made_for.tabulated_for
    for name, value in rule.tabulated_for.items():
        if name not in there or there[name] != value:
            msg = (
                f"the options were tabulated for {name}={there.get(name)}, not for {name}={value}: tabulate them again"
            )
            raise PlanError(msg)


def _pick(layer: LayerOptions, choice: Choice) -> Pick:
    if isinstance(choice, Keep) or choice.row == 0:
        reason = choice.reason if isinstance(choice, Keep) else choice.note
        return Pick(layer.path, None, 0, layer.rank, layer.before, None, layer.latency_ms, reason)
    options, option = layer.place(choice.row)
    own, row = options.taken(option)
    column = own.columns.get("distortion", options.columns.get("distortion"))
    return Pick(
        layer.path,
        options.format,
        option,
        own.rank(row),
        own.cost(row),
        None if column is None else float(column[row if "distortion" in own.columns else option]),
        None if own.latency_ms is None else float(own.latency_ms[row]),
        choice.note + ("" if own is options and option in options.becomes else options.notes.get(option, "")),
    )


def _layer_plan(
    layer: LayerOptions, pick: Pick | None, algorithms: Mapping[str, dict[str, Any]], own: dict[str, Any] | None
) -> LayerPlan:
    common: dict[str, Any] = {"path": layer.path, "aliases": layer.aliases, "kind": layer.kind, "before": layer.before}
    if pick is None or pick.format is None:
        reason = str(layer.keep_reason) if pick is None else pick.reason
        after = layer.before if pick is None else pick.cost
        common |= {"format": layer.format, "rank": layer.rank, "after": after}
        return LayerPlan(**common, action="keep", reason=reason)
    return LayerPlan(
        **common,
        action="factorize",
        format=pick.format,
        rank=pick.rank,
        algorithm=own or algorithms[pick.format],
        reason=pick.reason,
        distortion=pick.distortion,
        after=pick.cost,
    )
