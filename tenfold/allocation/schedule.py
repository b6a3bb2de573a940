"""In how many stages, how far in each, and how long to train after it: a schedule that can be written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from tenfold.allocation.rule import RankRule, rule_of
from tenfold.errors import TenfoldError, TuningError
from tenfold.records import Budget, Cost, Recipe, Record, explain

FitTo = Literal["original", "current"]


class Schedule(Record):
    """How a recipe is carried out in stages, with training in between. Frozen, and a YAML file if wanted.

    Use it with ``stages`` or ``compress_iteratively``, where one step to the budget costs too much accuracy.

    Every layer is visited ``rounds`` times. A stage takes all layers at once, each a little, or ``layers_per_stage`` of
    them: then a round has as many stages as it takes to visit all. The run ends when the budget of the recipe is met,
    when no rank changes any more, or after the last round.

    Attributes:
        rounds: how often each layer is visited; without ``layers_per_stage`` the number of stages.
        path: how the budget is approached. ``geometric``: each round takes the same share of what is left.
            ``linear``: each round takes as much as the others. ``rule``: the rule alone says how far each round goes,
            and the run ends when the budget is met.
        rules: the rank rule of each round, instead of that of the recipe; names, or names with settings.
        layers_per_stage: how many layers to compress between two trainings; None for all of them.
        order: which come first: ``front`` or ``back`` of the network, or those that ``cost`` the most MACs.
        fit_to: whose outputs the sequential fits of later stages are to meet: those of the ``current`` model, as
            trained last, or those of the ``original`` one. Training moves what layers put out, and the layers after
            them with it: fits to the original tear that apart again.
        epochs: of training in each stage.
        final_epochs: of training after the last stage, in a stage of their own; 0 for none.

    Example:
        >>> schedule = Schedule(rounds=2, epochs=5)
        >>> [schedule.limits(n, Budget(macs=0.25), Cost(params=10, macs=1000)) for n in (1, 2)]
        [{'macs': 500.0}, {'macs': 250.0}]
    """

    rounds: PositiveInt = 3
    path: Literal["geometric", "linear", "rule"] = "geometric"
    rules: tuple[dict[str, Any], ...] = ()
    layers_per_stage: PositiveInt | None = None
    order: Literal["front", "back", "cost"] = "front"
    fit_to: FitTo = "current"
    epochs: NonNegativeInt = 3
    final_epochs: NonNegativeInt = 0

    @classmethod
    def of(cls, schedule: Schedule | Mapping[str, Any] | None) -> Self:
        """Return a schedule from one, or from a mapping of its fields.

        Raises:
            TuningError: a field that does not exist, or a value that is not allowed.
        """
        if isinstance(schedule, cls):
            return schedule
        try:
            return cls.model_validate(dict(schedule or {}))
        except ValidationError as error:
            msg = f"invalid schedule: {explain(error)}"
            raise TuningError(msg) from error

    @field_validator("rules", mode="before")
    @classmethod
    def _read_rules(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple({"name": one} if isinstance(one, str) else one for one in value)
        return value

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.rules and len(self.rules) != self.rounds:
            msg = f"{len(self.rules)} rules for {self.rounds} rounds: give one for each round, or none"
            raise ValueError(msg)
        for rule in self.rules:
            try:
                rule_of(rule)
            except (TenfoldError, KeyError) as error:
                raise ValueError(str(error)) from error
        return self

    def check(self, recipe: Recipe) -> None:
        """Raise TuningError for a recipe that cannot be carried out in such stages."""
        if recipe.budget_of:
            msg = "stages approach a budget of the whole model: give budget in place of budget_of"
            raise TuningError(msg)
        if "bytes" in recipe.budget.limited:
            msg = "stages do not count bytes: give params, of which bytes are a multiple, in place of bytes"
            raise TuningError(msg)
        if recipe.budget.max_latency_ms is not None:
            msg = "stages aim at a share of the original model's latency: give latency=, up to 1, not max_latency_ms="
            raise TuningError(msg)
        if recipe.budget.latency is not None and self.layers_per_stage is not None:
            msg = "a latency is that of a whole model: leave layers_per_stage out, or give macs or params"
            raise TuningError(msg)
        rule_of(recipe.rule)

    def config_of(self, number: int, recipe: Recipe) -> dict[str, Any]:
        """Return the configuration of the rank rule of a round, counted from 1."""
        return self.rules[number - 1] if self.rules else recipe.rule

    def rule_of(self, number: int, recipe: Recipe) -> RankRule:
        """Return the rank rule of a round, counted from 1."""
        return rule_of(self.config_of(number, recipe))

    def aims(self, budget: Budget) -> bool:
        """Whether each round is to meet a budget; otherwise the rule alone decides."""
        return bool(budget) and self.path != "rule"

    def limits(self, number: int, budget: Budget, original: Cost) -> dict[str, float]:
        """Return what the whole model may cost after a round, absolute, by name; ``latency`` is a share.

        Args:
            number: of the round, from 1.
            budget: of the whole model at the end.
            original: what the original model costs.
        """
        if not self.aims(budget):
            return {}
        part = number / self.rounds
        limits = {}
        for name, target in target_of(budget, original).items():
            whole = 1.0 if name == "latency" else float(getattr(original, name))
            share = min(1.0, target / whole) if whole else 1.0
            limits[name] = whole * (share**part if self.path == "geometric" else 1 - (1 - share) * part)
        return limits


def target_of(budget: Budget, original: Cost) -> dict[str, float]:
    """Return what the model may cost at the end, absolute, by name; ``latency`` is a share."""
    return budget.allowance(original, latency_ms=1.0)


def musco(
    *,
    ft_every: int | None = None,
    nglobal_compress_iters: int = 1,
    weaken: float = 0.8,
    min_rank: int = 8,
    epochs: int = 3,
) -> tuple[Recipe, Schedule]:
    """Return the published recipe and schedule of MUSCO (Gusak et al. 2019, arXiv 1903.09973), by its code's names.

    EVBMF ranks of the present cores, weakened; Tucker-2 for kernels, low rank for 1×1 and linear layers.

    Args:
        ft_every: layers compressed between two trainings; None for all.
        nglobal_compress_iters: how often each layer is visited.
        weaken: the "weakening factor", 0.7 to 0.9 in the paper.
        min_rank: 8 in the code's development version, 21 in the paper.
        epochs: of training in each stage.
    """
    recipe = Recipe(rule={"name": "evbmf", "weaken": weaken, "min_rank": min_rank}, formats=("tucker2", "low_rank"))
    schedule = Schedule(rounds=nglobal_compress_iters, path="rule", layers_per_stage=ft_every, epochs=epochs)
    return recipe, schedule
