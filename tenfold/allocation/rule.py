"""What a rank rule is: configuration that selects rows of an option table."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tenfold.errors import BudgetError, TenfoldError
from tenfold.records import Cost, LayerOptions
from tenfold.registry import Registry

Limits = Mapping[str, float]  # by name: params, macs, bytes, and latency in milliseconds


@dataclass(frozen=True)
class Factorize:
    """Give the layer the option in a row (from 1 on) of its table; ``note`` is the reason that the plan shows."""

    row: int
    note: str


@dataclass(frozen=True)
class Keep:
    """Keep the layer as it is, for a reason."""

    reason: str


Choice = Factorize | Keep


class RankRule(abc.ABC):
    """A way to choose ranks. Its dataclass fields are its configuration and nothing else; a subclass is final.

    A rule says which rows of the table it wants and which columns it compares; only these are measured. Then it selects
    one row for each layer, from numbers alone.

    Laws: every selected option costs less than the layer does now; limits are met within one step.

    Attributes:
        rows: name of the row source that enumerates the ranks of a layer: ``grid``, all that a budget might want;
            ``family``, from small to full along one line; or one of the rule's own (see ``tenfold.planning.rows``).
        by_name: the rule selects layers by name, so that none is kept by default.
    """

    rows: ClassVar[str] = "grid"
    by_name: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rule compares, by name; see ``tenfold.planning.rule_columns``."""
        return ()

    @property
    def tabulated_for(self) -> dict[str, Any]:
        """The settings that the rows and columns depend on: a table serves only rules with the same."""
        return {}

    @property
    def uses_units(self) -> bool:
        """Whether it may choose groups of layers that are narrowed together; it compares their distortions then."""
        return False

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns by which the rule names layers; each has to match one that there is a choice for."""
        return ()

    @abc.abstractmethod
    def select(self, layers: Sequence[LayerOptions], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return one choice for each layer.

        Args:
            layers: those that there is a choice for, with the rows and columns that the rule names.
            limits: what all of them together may cost; None for no budget.

        Raises:
            BudgetError: the limits cannot be met, or the rule cannot aim at a budget.
        """

    @classmethod
    def name(cls) -> str:
        """Return the name under which the rule is registered."""
        return next((n for n, c in RULES.loaded() if c is cls), cls.__name__)

    def to_dict(self) -> dict[str, Any]:
        """Return name and configuration as plain values, for a recipe."""
        return {"name": self.name(), **dataclasses.asdict(self)}  # type: ignore[call-overload]


RULES: Registry[RankRule] = Registry("rank rule")


def rule_from(name: str, **settings: Any) -> RankRule:
    """Return the rule of that name with these settings.

    Raises:
        UnknownNameError: no rule of that name.
        TenfoldError: a setting that the rule does not have, or a value that it refuses.
    """
    kind = RULES.get(name)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        msg = f"the rule {name} has the settings {', '.join(known) or 'none'}, not {', '.join(unknown)}"
        raise TenfoldError(msg)
    try:
        return kind(**settings)
    except TypeError as error:
        msg = f"the rule {name} cannot be made from {settings}: {error}"
        raise TenfoldError(msg) from error


def rule_of(config: Mapping[str, Any]) -> RankRule:
    """Return the rule that a recipe names."""
    return rule_from(str(config["name"]), **{key: value for key, value in config.items() if key != "name"})


@dataclass(frozen=True)
class Total:
    """What several layers cost together; ``latency`` is in milliseconds by the lookup table, 0 without a clock."""

    params: int = 0
    macs: int = 0
    latency: float = 0.0
    bytes: int = 0


def total_cost(layers: Sequence[LayerOptions], choices: Sequence[Choice]) -> Total:
    """Return what all the layers cost after these choices."""
    params = macs = 0
    latency = size = 0.0
    for layer, choice in zip(layers, choices, strict=True):
        if isinstance(choice, Keep):
            params, macs = params + layer.before.params, macs + layer.before.macs
            latency, size = latency + (layer.latency_ms or 0.0), size + layer.itemsize * layer.before.params
            continue
        options, option = layer.place(choice.row)
        size += float(layer.column("bytes")[choice.row])
        params, macs = params + int(options.params[option]), macs + int(options.macs[option])
        latency += 0.0 if options.latency_ms is None else float(options.latency_ms[option])
    return Total(params, macs, latency, int(size))


def beyond(cost: Total | Cost, limits: Limits) -> list[tuple[str, float, float]]:
    """Return (name, cost, limit) of the limits that a cost does not respect."""
    return [(name, getattr(cost, name), limit) for name, limit in limits.items() if getattr(cost, name) > limit]


class UnreachableError(BudgetError):
    """Limits that a rule cannot meet. Whoever knows the whole model says in its words what can be met.

    Attributes:
        least: what the rule can reach of everything, for all its layers together.
        what: that cannot reach more: the rule with its number, for instance; the formats and layers if empty.
        advice: what else to try, with commas between.
    """

    def __init__(self, least: Total, limits: Limits, *, what: str = "", advice: str = "") -> None:
        self.least, self.what, self.advice = least, what, advice
        parts = [f"{k} {amount(limit)} (lowest {amount(low)})" for k, low, limit in beyond(least, limits)]
        super().__init__(
            "the budget cannot be met: the layers that can be factorized would have to fit into "
            f"{', '.join(parts)}. Raise the budget, allow more formats, or keep fewer layers."
        )


def amount(value: float) -> str:
    """Return a number for a message."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
