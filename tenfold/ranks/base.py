"""How much to keep: one signature for rules that look at one layer and for those that weigh all of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat
from torch import Tensor

from tenfold.decompositions import Moments, error_curve
from tenfold.errors import BudgetError, TenfoldError
from tenfold.formats import FORMATS, Factorization, Rank
from tenfold.parallel import Workers
from tenfold.records import Call, Cost, LayerSpec
from tenfold.registry import Registry
from tenfold.tensors import singular_values

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Choose:
    """Factorize the layer: into this format, at this rank.

    ``note`` is shown as the reason in the plan; ``damage`` is what the rule predicts that it does to the network.
    """

    format: str
    rank: Rank
    note: str
    damage: float | None = None


@dataclass(frozen=True)
class Keep:
    """Keep the layer as it is, for a reason."""

    reason: str


Choice = Choose | Keep


@dataclass(frozen=True, eq=False)
class RankProblem:
    """What a rule may know of one layer: geometry, use, cost now, admissible formats, and its weight on demand.

    Attributes:
        path: dotted module name.
        spec: geometry of the (dense) layer.
        formats: names of the formats that accept it, the preferred first.
        calls: input shapes of one forward of the model.
        cost: what the layer costs now.
        load_weight: returns the dense weight, groups apart: (groups, out/groups, in/groups, *kernel).
        current: format and rank that the layer has now, if it is factorized already.
        latency_ms: what the layer takes now in one forward; None when there is no clock.
        latency_at: returns the milliseconds that it would take in a format, one for each of some ranks; None when there
            is no clock.
        damage_at: returns for a format the function from ranks (n, names) to the damage (n,) that the network takes, on
            one scale for all layers; None where nothing is known of the data.
        metric: what data say of the layer's inputs, for rules that fit factorizations themselves; None as above.
    """

    path: str
    spec: LayerSpec
    formats: tuple[str, ...]
    calls: tuple[Call, ...]
    cost: Cost
    load_weight: Callable[[], Tensor]
    current: tuple[str, Rank] | None = None
    latency_ms: float | None = None
    latency_at: Callable[[str, Sequence[Rank]], FloatArray] | None = None
    damage_at: Callable[[str], Callable[[NDArray[np.int64]], FloatArray]] | None = None
    metric: Moments | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def cost_at(self, format: str, rank: Rank) -> Cost:
        """Return what the layer would cost in this format at this rank."""
        kind = FORMATS.get(format)
        full = kind.check_rank(self.spec, rank)
        ((params,), (macs,)) = self.costs_at(format, np.array([[full[name] for name in kind.rank_names]]))
        return Cost(params=int(params), macs=int(macs))

    def costs_at(self, format: str, ranks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return parameters and multiply-accumulates (n,) of the layer in this format at many ranks (n, names)."""
        costs = [FORMATS.get(format).cost(self.spec, ranks, call.in_shape) for call in self.calls]
        macs = [macs * call.count for (_, macs), call in zip(costs, self.calls, strict=True)]
        return costs[0][0], np.sum(macs, axis=0)

    def latency(self, choice: Choice) -> float:
        """Return the milliseconds that the layer would take after this choice; 0 when there is no clock."""
        if self.latency_ms is None or self.latency_at is None:
            return 0.0
        if isinstance(choice, Keep):
            return self.latency_ms
        return float(self.latency_at(choice.format, [choice.rank])[0])

    def family(self, format: str) -> tuple[tuple[Rank, Cost], ...]:
        """Return the ranks that a rule with one knob walks along, from small to full, with their costs."""
        key = ("family", format)
        if key not in self._cache:
            kind = FORMATS.get(format)
            ranks = kind.rank_family(self.spec)
            costs = self.costs_at(format, np.array([[rank[name] for name in kind.rank_names] for rank in ranks]))
            self._cache[key] = tuple(
                (rank, Cost(params=params, macs=macs))
                for rank, params, macs in zip(ranks, *(column.tolist() for column in costs), strict=True)
            )
        return self._cache[key]  # type: ignore[no-any-return]

    def fitted(self, format: str) -> Callable[[NDArray[np.int64]], FloatArray]:
        """Return the function from ranks (n, names) to the relative squared error (n,) that quick fits come to."""
        key = ("fitted", format)
        if key not in self._cache:
            self._cache[key] = error_curve(self.load_weight(), self.spec, FORMATS.get(format))
        return self._cache[key]  # type: ignore[no-any-return]

    def spectra(self, format: str) -> dict[str, Tensor]:
        """Return for each rank name the singular values (float64, descending) of its unfolding, pooled over groups."""
        key = ("spectra", format)
        if key not in self._cache:
            kind: type[Factorization] = FORMATS.get(format)
            unfoldings = kind.unfoldings(self.load_weight(), self.spec)
            self._cache[key] = {k: singular_values(m).square().sum(0).sqrt().cpu() for k, m in unfoldings.items()}
        return self._cache[key]  # type: ignore[no-any-return]


Limits = Mapping[str, float]


class RankRule(abc.ABC):
    """A way to choose ranks. Its dataclass fields are its configuration; a subclass is final.

    Laws: every choice has 1 ≤ rank ≤ max_rank and costs less than the layer does now; limits are met within one step.
    ``by_name`` tells that the rule names the layers it wants itself, so that none is kept by default; ``by_damage``
    that it weighs what data say of the damage.
    """

    by_name: ClassVar[bool] = False
    by_damage: ClassVar[bool] = False

    def with_workers(self, workers: Workers) -> Self:
        """Return the rule with who does what it computes layer by layer; itself where it does no such work."""
        del workers
        return self

    @abc.abstractmethod
    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return one choice for each problem.

        Args:
            problems: the layers to decide on.
            limits: what all of them together may cost, by name (``params``, ``macs``, ``latency`` in ms); None for no
                budget.

        Raises:
            BudgetError: the limits cannot be met, or the rule cannot aim at a budget.
        """

    @classmethod
    def name(cls) -> str:
        """Return the name under which the rule is registered."""
        return next((n for n, c in RULES.loaded() if c is cls), cls.__name__)

    def to_dict(self) -> dict[str, Any]:
        """Return name and configuration as plain values, for a plan."""
        return {"name": self.name(), **dataclasses.asdict(self)}  # type: ignore[call-overload]


RULES: Registry[RankRule] = Registry("rank rule")


def rule_from(name: str, **settings: Any) -> RankRule:
    """Return the rule of that name with these settings.

    Raises:
        UnknownNameError: no rule of that name.
        TenfoldError: a setting that the rule does not have.
    """
    kind = RULES.get(name)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        msg = f"the rule {name} has the settings {', '.join(known) or 'none'}, not {', '.join(unknown)}"
        raise TenfoldError(msg)
    return kind(**settings)


class Total(Cost):
    """What several layers cost together; ``latency`` is in predicted milliseconds, 0 when there is no clock."""

    latency: NonNegativeFloat = 0.0


def total_cost(problems: Sequence[RankProblem], choices: Sequence[Choice]) -> Total:
    """Return what all the layers cost after these choices."""
    total, latency = Cost(), 0.0
    for problem, choice in zip(problems, choices, strict=True):
        total += problem.cost if isinstance(choice, Keep) else problem.cost_at(choice.format, choice.rank)
        latency += problem.latency(choice)
    return Total(params=total.params, macs=total.macs, latency=latency)


def within(cost: Cost, limits: Limits) -> bool:
    """Whether ``cost`` respects every limit."""
    return not beyond(cost, limits)


def first_saving(problem: RankProblem, ranks: Callable[[str], Rank | None], note: str) -> Choice:
    """Return the first admissible format whose rank makes the layer cheaper; else why the layer is kept."""
    formats = problem.formats
    if problem.current is not None and problem.current[0] in formats:
        formats = (problem.current[0],)  # a rule that looks at one layer does not trade one factorization for another
    for format in formats:
        rank = ranks(format)
        if rank is not None and problem.cost_at(format, rank).below(problem.cost):
            return Choose(format, rank, note)
    names = " or ".join(formats)
    if problem.current is not None:
        return Keep(f"factorized already; no {names} rank that the rule allows is cheaper")
    return Keep(f"no {names} rank that the rule allows is cheaper than the dense layer")


class OneKnobRule(RankRule):
    """A rule with a single number, the same for all layers, that trades cost for fidelity.

    A number that is given holds, and limits are checked. Without one, the limits set it: it is found by bisection,
    since the costs are monotone in it. ``numbers`` are the fields that give it, None in all of them for none.
    """

    numbers: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def knob(self) -> float | None:
        """Return the number as configured, or None when a budget is to set it."""

    @abc.abstractmethod
    def choose(self, problem: RankProblem, knob: float) -> Choice:
        """Return the choice for one layer; a knob nearer to 1 costs more, in (0, 1]."""

    def as_configured(self, problems: Sequence[RankProblem], knob: float) -> tuple[Choice, ...]:
        """Return the choices at the configured knob."""
        return tuple(self.choose(p, knob) for p in problems)

    def without_number(self) -> Self:
        """Return the rule with nothing but budgets to go by."""
        return dataclasses.replace(self, **dict.fromkeys(self.numbers))  # type: ignore[type-var]

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the choices at the configured knob, which must respect the limits; without, at the largest that does.

        Raises:
            BudgetError: the limits cannot be met, or not at the configured knob; or there is neither.
        """
        knob = self.knob()
        if knob is None:
            if not limits:
                msg = f"the rule {self.name()} needs a number of its own or a budget, such as macs=0.5"
                raise BudgetError(msg)
            return self.within_limits(problems, limits)
        found = self.as_configured(problems, knob)
        if limits and not within(total := total_cost(problems, found), limits):
            raise BudgetError(self._over(total, limits))
        return found

    def within_limits(self, problems: Sequence[RankProblem], limits: Limits) -> tuple[Choice, ...]:
        """Return the choices at the largest knob that respects the limits."""
        if within(total_cost(problems, [Keep("")] * len(problems)), limits):
            return (Keep("the budget is met as it is"),) * len(problems)
        return self._bisect(problems, limits)

    def _over(self, total: Cost, limits: Limits) -> str:
        """Return the message for limits that the configured number does not respect."""
        given = [name for name in self.numbers if getattr(self, name) is not None]
        shown = " and ".join(f"{name}={getattr(self, name):g}" for name in given) or "its number"
        over = [f"{k} {_amount(now)} (allowed {_amount(limit)})" for k, now, limit in beyond(total, limits)]
        return (
            f"the rule {self.name()} with {shown} does not meet the budget: the layers that can be factorized keep "
            f"{', '.join(over)}. Raise the budget, change {' and '.join(given) or 'the number'}, or leave it out: then "
            "the budget sets it."
        )

    def _bisect(self, problems: Sequence[RankProblem], limits: Limits) -> tuple[Choice, ...]:
        def at(knob: float) -> tuple[Choice, ...]:
            return tuple(self.choose(p, knob) for p in problems)

        low, high = 0.0, 1.0
        best = at(1e-9)
        least = total_cost(problems, best)
        if not within(least, limits):
            raise BudgetError(unreachable(least, limits))
        if within(total_cost(problems, at(high)), limits):
            return at(high)
        for _ in range(40):
            middle = (low + high) / 2
            choices = at(middle)
            if within(total_cost(problems, choices), limits):
                low, best = middle, choices
            else:
                high = middle
        return best


def beyond(cost: Cost, limits: Limits) -> list[tuple[str, float, float]]:
    """Return (name, cost, limit) of the limits that a cost does not respect."""
    return [(name, getattr(cost, name), limit) for name, limit in limits.items() if getattr(cost, name) > limit]


def unreachable(least: Cost, limits: Limits) -> str:
    """Return the message for limits that are below what the layers cost at the very least."""
    parts = [f"{k} {_amount(limit)} (lowest {_amount(low)})" for k, low, limit in beyond(least, limits)]
    return (
        f"the budget cannot be met: the layers that can be factorized would have to fit into {', '.join(parts)}. "
        "Raise the budget, allow more formats, or keep fewer layers."
    )


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
