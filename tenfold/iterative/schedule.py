"""In how many stages, how far in each, and how long to train after it: a schedule that can be written down."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from tenfold.errors import TenfoldError, TuningError
from tenfold.planning import DEFAULT_FORMATS
from tenfold.ranks import RankRule, rule_from
from tenfold.records import Budget, Cost, Record, explain


class Schedule(Record):
    """How a model is compressed in stages, with training in between. Frozen, and a YAML file if wanted.

    Every layer is visited ``rounds`` times. A stage takes all layers at once, each a little, or ``layers_per_stage`` of
    them: then a round has as many stages as it takes to visit all. The run ends when the budget is met, when no rank
    changes any more, or after the last round.

    Attributes:
        rounds: how often each layer is visited; without ``layers_per_stage`` the number of stages.
        budget: what the whole model may cost at the end, as shares of the original model up to 1, or absolute.
        path: how the budget is approached. ``geometric``: each round takes the same share of what is left.
            ``linear``: each round takes as much as the others. ``rule``: the rule alone says how far each round goes,
            and the run ends when the budget is met.
        rule: how ranks are chosen: a name, or name and settings, such as ``{"name": "evbmf", "weaken": 0.8}``; or
            one for each round.
        layers_per_stage: how many layers to compress between two trainings; None for all of them.
        order: which come first: ``front`` or ``back`` of the network, or those that ``cost`` the most MACs.
        formats: what layers may turn into, the preferred first.
        keep: layers to leave alone, as paths, globs or ``re:`` expressions.
        keep_ends: leave a first and a last layer alone that cost next to nothing in the original model; by default
            unless the rule names layers itself.
        epochs: of training in each stage.
        final_epochs: of training after the last stage, in a stage of their own; 0 for none.

    Example:
        >>> schedule = Schedule(rounds=2, budget={"macs": 0.25}, epochs=5)
        >>> [schedule.limits(n, Cost(params=10, macs=1000)) for n in (1, 2)]
        [{'macs': 500.0}, {'macs': 250.0}]
    """

    rounds: PositiveInt = 3
    budget: Budget = Budget()
    path: Literal["geometric", "linear", "rule"] = "geometric"
    rule: dict[str, Any] | tuple[dict[str, Any], ...] = Field(default={"name": "global"})
    layers_per_stage: PositiveInt | None = None
    order: Literal["front", "back", "cost"] = "front"
    formats: tuple[str, ...] = DEFAULT_FORMATS
    keep: tuple[str, ...] = ()
    keep_ends: bool | None = None
    epochs: NonNegativeInt = 3
    final_epochs: NonNegativeInt = 0

    @classmethod
    def of(cls, schedule: Schedule | dict[str, Any]) -> Self:
        """Return a schedule from a mapping of its fields.

        Raises:
            TuningError: a field that does not exist, or a value that cannot be.
        """
        if isinstance(schedule, cls):
            return schedule
        try:
            return cls.model_validate(schedule)
        except ValidationError as error:
            msg = f"this schedule cannot be: {explain(error)}"
            raise TuningError(msg) from error

    @classmethod
    def musco(
        cls,
        *,
        ft_every: int | None = None,
        nglobal_compress_iters: int = 1,
        weaken: float = 0.8,
        min_rank: int = 8,
        epochs: int = 3,
    ) -> Self:
        """Return the published schedule of MUSCO (Gusak et al. 2019, arXiv 1903.09973), by the names of its code.

        EVBMF ranks of the present cores, weakened; Tucker-2 for kernels, low rank for 1×1 and linear layers.

        Args:
            ft_every: layers compressed between two trainings; None for all.
            nglobal_compress_iters: how often each layer is visited.
            weaken: the "weakening factor", 0.7 to 0.9 in the paper.
            min_rank: 8 in the code's development version, 21 in the paper.
            epochs: of training in each stage.
        """
        return cls(
            rounds=nglobal_compress_iters,
            path="rule",
            rule={"name": "evbmf", "weaken": weaken, "min_rank": min_rank},
            layers_per_stage=ft_every,
            formats=("tucker2", "low_rank"),
            epochs=epochs,
        )

    @field_validator("rule", mode="before")
    @classmethod
    def _read_rule(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple({"name": one} if isinstance(one, str) else one for one in value)
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Schedule:
        if isinstance(self.rule, tuple) and len(self.rule) != self.rounds:
            msg = f"{len(self.rule)} rules for {self.rounds} rounds: give one rule, or one for each round"
            raise ValueError(msg)
        for number in range(1, self.rounds + 1 if isinstance(self.rule, tuple) else 2):
            try:
                self.rule_of(number)
            except (TenfoldError, TypeError) as error:
                raise ValueError(str(error)) from error
        if self.budget.latency is not None:
            self._check_latency(self.budget.latency)
        return self

    def _check_latency(self, latency: float) -> None:
        if latency > 1:
            msg = f"latency={latency:g}: stages aim at a share of the original model's latency, up to 1"
            raise ValueError(msg)
        if self.layers_per_stage is not None:
            msg = "a latency is that of a whole model: leave layers_per_stage out, or give macs or params"
            raise ValueError(msg)

    def rule_of(self, number: int) -> RankRule:
        """Return the rank rule of a round, counted from 1."""
        settings = dict(self.rule[number - 1] if isinstance(self.rule, tuple) else self.rule)
        if not isinstance(settings.get("name"), str):
            msg = "a rule needs its name, such as {name: evbmf, weaken: 0.8}"
            raise TenfoldError(msg)
        return rule_from(settings.pop("name"), **settings)

    @property
    def aims(self) -> bool:
        """Whether each round is to meet a budget; otherwise the rule alone decides."""
        return bool(self.budget) and self.path != "rule"

    def target(self, original: Cost) -> dict[str, float]:
        """Return what the model may cost at the end, absolute, by name; ``latency`` is a share."""
        return self.budget.allowance(original, latency_ms=1.0)

    def limits(self, number: int, original: Cost) -> dict[str, float]:
        """Return what the whole model may cost after a round, absolute, by name; ``latency`` is a share.

        Args:
            number: of the round, from 1.
            original: what the original model costs.
        """
        if not self.aims:
            return {}
        part = number / self.rounds
        limits = {}
        for name, target in self.target(original).items():
            whole = 1.0 if name == "latency" else float(getattr(original, name))
            share = min(1.0, target / whole) if whole else 1.0
            limits[name] = whole * (share**part if self.path == "geometric" else 1 - (1 - share) * part)
        return limits
