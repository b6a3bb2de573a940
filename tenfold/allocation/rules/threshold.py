"""Rules with one number, the same for all layers: the cheapest row within a threshold on a column."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from tenfold.allocation.rule import (
    RULES,
    Choice,
    Factorize,
    Keep,
    Limits,
    RankRule,
    Total,
    UnreachableError,
    beyond,
    total_cost,
)
from tenfold.errors import BudgetError, RankError, TenfoldError
from tenfold.records import FormatOptions, LayerOptions

_BISECTIONS = 40
_LEAST = 1e-9  # the strictest threshold: at 0 some rules would keep everything
_ROUND = 1e-13  # what rounding leaves of spectra where nothing is dropped, as a share of all


class ThresholdRule(RankRule):
    """A rule with a single ``level`` in (0, 1] that trades cost for fidelity: nearer to 1 costs more.

    A level that is configured holds, and limits are checked. Without one, the limits set it: it is found by bisection,
    since costs are monotone in it.

    Attributes:
        numbers: the fields that give the level, None in all of them for none.
    """

    numbers: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def level(self) -> float | None:
        """Return the level as configured, or None when a budget is to set it."""

    @abc.abstractmethod
    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the cheapest option of a format within the level; None where there is none."""

    @abc.abstractmethod
    def note(self, level: float) -> str:
        """Return the reason that plans show of options at this level."""

    def choose(self, layer: LayerOptions, level: float) -> Choice:
        """Return the first format whose option makes the layer cheaper; else why the layer is kept."""
        formats = [options.format for options in layer.options]
        if layer.format in formats:  # a rule that looks at one layer does not trade one factorization for another
            formats = [str(layer.format)]
        first = 1
        for options in layer.options:
            option = self.row(layer, options, level) if options.format in formats else None
            if option is not None and options.cost(option).below(layer.before):
                return Factorize(first + option, self.note(level))
            first += len(options)
        names = " or ".join(formats)
        if layer.format is not None:
            return Keep(f"factorized already; no {names} rank that the rule allows is cheaper")
        return Keep(f"no {names} rank that the rule allows is cheaper than the dense layer")

    def without_number(self) -> Self:
        """Return the rule with nothing but budgets to go by."""
        return dataclasses.replace(self, **dict.fromkeys(self.numbers))  # type: ignore[type-var]

    def select(self, layers: Sequence[LayerOptions], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the choices at the configured level, which must respect the limits; without, at the largest that does.

        Raises:
            BudgetError: the limits cannot be met, or not at the configured level; or there is neither.
        """
        level = self.level()
        if level is None:
            if not limits:
                msg = f"the rule {self.name()} needs a number of its own or a budget, such as macs=0.5"
                raise BudgetError(msg)
            return self.within_limits(layers, limits)
        choices = tuple(self.choose(layer, level) for layer in layers)
        if limits and beyond(total := total_cost(layers, choices), limits):
            raise self._over(total, limits)
        return choices

    def within_limits(self, layers: Sequence[LayerOptions], limits: Limits) -> tuple[Choice, ...]:
        """Return the choices at the largest level that respects the limits."""
        if not beyond(total_cost(layers, [Keep("")] * len(layers)), limits):
            return (Keep("the budget is met as it is"),) * len(layers)

        def at(level: float) -> tuple[Choice, ...]:
            return tuple(self.choose(layer, level) for layer in layers)

        best = at(_LEAST)
        least = total_cost(layers, best)
        if beyond(least, limits):
            raise UnreachableError(least, limits, what=f"the rule {self.name()}")
        low, high = 0.0, 1.0
        if not beyond(total_cost(layers, at(high)), limits):
            return at(high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            choices = at(middle)
            if beyond(total_cost(layers, choices), limits):
                high = middle
            else:
                low, best = middle, choices
        return best

    def _over(self, total: Total, limits: Limits) -> UnreachableError:
        given = [name for name in self.numbers if getattr(self, name) is not None]
        shown = " and ".join(f"{name}={getattr(self, name):g}" for name in given) or "its number"
        number = " and ".join(given) or "the number"
        advice = f"change {number}, or leave it out: then the budget sets it"
        return UnreachableError(total, limits, what=f"the rule {self.name()} with {shown}", advice=advice)


def first_within(column: np.ndarray, bound: float) -> int | None:
    """Return the first entry of at most ``bound``, entries that are not numbers left out; None if there is none."""
    (within,) = np.nonzero(column <= bound)
    return int(within[0]) if len(within) else None


@RULES.register("ratio")
@dataclass(frozen=True)
class Ratio(ThresholdRule):
    """Constant rate: every layer keeps the same share of its parameters or MACs (MUSCO's rule "nx").

    The rank is the largest of the format's family that costs at most ``share`` of what the layer costs now. With a
    budget and no share, the share is found that meets the budget of the whole model. Use it as a baseline.

    Attributes:
        share: in (0, 1]; None to let a budget set it.
        of: what is shared, ``params`` or ``macs``.
    """

    share: float | None = None
    of: Literal["params", "macs"] = "macs"

    rows: ClassVar[str] = "family"
    numbers: ClassVar[tuple[str, ...]] = ("share",)

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            msg = f"share={self.share} must be in (0, 1]: the part of each layer's {self.of} that stays"
            raise TenfoldError(msg)
        if self.of not in ("params", "macs"):
            msg = f"of={self.of!r} must be params or macs"
            raise TenfoldError(msg)

    def level(self) -> float | None:
        """Return the share."""
        return self.share

    def note(self, level: float) -> str:
        """Return the share in words."""
        return f"at most {level:.1%} of the layer's {self.of}"

    def choose(self, layer: LayerOptions, level: float) -> Choice:
        """Return the largest rank within the share; the smallest there is when even that costs more."""
        if level >= 1:
            return Keep("all of the layer was asked for")
        if not getattr(layer.before, self.of):
            return Keep(f"the layer has no {self.of} to save")
        return super().choose(layer, level)

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the last option of the family within the share."""
        before, costs = layer.before, getattr(options, self.of)
        counted = options.macs if before.macs else np.zeros_like(options.macs)
        no_more = (options.params <= before.params) & (counted <= before.macs)
        less = (options.params < before.params) | (counted < before.macs)
        (within,) = np.nonzero((costs <= level * getattr(before, self.of)) & no_more & less)
        return int(within[-1]) if len(within) else 0


@RULES.register("energy")
@dataclass(frozen=True)
class Energy(ThresholdRule):
    """Smallest ranks whose relative error stays below a bound, the same for all layers.

    Each unfolding may drop singular values worth rel_error²/n of ‖W‖², n the number of ranks; by the HOSVD bound the
    factorization then has ‖W − Ŵ‖ ≤ rel_error·‖W‖. Of sums of rank-one terms (CP), whose error no spectrum bounds,
    quick fits tell the smallest rank. With a budget and no bound, the bound is found that meets the budget (a uniform
    tolerance, as in PGSVD). Use it where a tolerance is known and the budget is not.

    Attributes:
        rel_error: bound in (0, 1); None to let a budget set it.
        energy: the same bound as the share of ‖W‖² to keep, 1 − rel_error²; give one of the two.
    """

    rel_error: float | None = None
    energy: float | None = None

    rows: ClassVar[str] = "tolerance"
    numbers: ClassVar[tuple[str, ...]] = ("rel_error", "energy")

    def __post_init__(self) -> None:
        if self.rel_error is not None and self.energy is not None:
            msg = "give rel_error or energy, not both"
            raise TenfoldError(msg)
        for name in self.numbers:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                msg = f"{name}={value} must lie between 0 and 1"
                raise TenfoldError(msg)

    def level(self) -> float | None:
        """Return the share of ‖W‖² to keep."""
        if self.energy is not None:
            return self.energy
        return None if self.rel_error is None else 1 - self.rel_error**2

    def note(self, level: float) -> str:
        """Return the bound in words."""
        return f"relative error at most {(1 - level) ** 0.5:.3f}"

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the first option whose dropped share of ‖W‖² is small enough."""
        del layer
        return first_within(options.columns["dropped"], 1 - level)


@RULES.register("error")
@dataclass(frozen=True)
class ErrorBound(ThresholdRule):
    """Smallest ranks at which the factorization itself stays within a relative error, the same for all layers.

    Of formats with one unfolding the spectrum tells the rank at once. For all others, CP above all, factorizations are
    fitted: the rank is bracketed and the bracket closed where a straight line through its ends crosses the bound, each
    fit warm-started from that of the nearest rank. Compare ``energy``, which needs no fits and gives ranks that
    suffice, but larger ones. With a budget the bound is found that meets it, on curves through a few quick fits of each
    layer.

    Attributes:
        rel_error: bound in (0, 1) of ‖W − Ŵ‖/‖W‖, or of the missed share √(E‖y−ŷ‖²/E‖y−ȳ‖²) of the output where there
            are moments; None to let a budget set it.
        within: stop when the rank is known to this share of itself. 0: the smallest one of the format's family.
        sweeps: of each fit, at most. The final fit takes its own, and as a rule comes lower.
        seed: of algorithms that draw random numbers.
    """

    rel_error: float | None = None
    within: float = 0.02
    sweeps: int = 30
    seed: int = 0

    rows: ClassVar[str] = "saving"
    numbers: ClassVar[tuple[str, ...]] = ("rel_error",)

    def __post_init__(self) -> None:
        if self.rel_error is not None and not 0 < self.rel_error < 1:
            msg = f"rel_error={self.rel_error} must lie between 0 and 1"
            raise TenfoldError(msg)
        if not 0 <= self.within < 1 or self.sweeps < 1:
            msg = f"within={self.within} must be in [0, 1), and sweeps={self.sweeps} at least 1"
            raise TenfoldError(msg)

    @property
    def columns(self) -> tuple[str, ...]:
        """Errors of fits around the bound; without a bound those that are expected."""
        return ("expected_error",) if self.rel_error is None else ("fitted_error",)

    @property
    def tabulated_for(self) -> dict[str, Any]:
        """With a bound all settings: fits are tried around it only."""
        return {} if self.rel_error is None else dataclasses.asdict(self)

    def level(self) -> float | None:
        """Return the share of the norm to keep."""
        return None if self.rel_error is None else 1 - self.rel_error

    def note(self, level: float) -> str:
        """Return the bound in words."""
        if self.rel_error is not None:
            return f"error at most {self.rel_error:g}, as fitted"
        return f"expected relative error at most {1 - level:.3f}"

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the first option whose error is within the bound."""
        del layer
        if self.rel_error is not None:
            return first_within(options.columns["fitted_error"], self.rel_error * (1 + _ROUND))
        return first_within(options.columns["expected_error"], (1 - level) ** 2 + _ROUND)


@RULES.register("accuracy_drop")
@dataclass(frozen=True)
class AccuracyDrop(ThresholdRule):
    """Smallest ranks at which the model, with that layer alone replaced, loses at most ``drop`` of its score.

    The same drop for all layers (MUSCO's constant layer accuracy drop). The rank is found by bisection between a rank
    that is good enough and one that is not; where to look first is guessed from the output error at which earlier
    layers ended, which is cheap, and confirmed by the score. With a budget and no drop, the drop is found that meets
    the budget, on curves through a few measured ranks of each layer. Needs a score: ``tenfold.Sensitivity``.

    Attributes:
        drop: how much worse the score may get, in its own unit: of a fraction 0.01 is one percentage point, and it is
            below 1. None to let a budget set it.
        step: try every ``step``-th rank of the format's family only.
    """

    drop: float | None = None
    step: int = 1

    rows: ClassVar[str] = "saving"
    numbers: ClassVar[tuple[str, ...]] = ("drop",)

    def __post_init__(self) -> None:
        if self.drop is not None and not 0 <= self.drop < np.inf:
            msg = f"drop={self.drop} must be 0 or more: how much worse the score may get, in its unit"
            raise TenfoldError(msg)
        if self.step < 1:
            msg = f"step={self.step} must be a whole number from 1 on"
            raise RankError(msg)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is lost of the score: as searched for a drop, as interpolated without."""
        return ("expected_drop",) if self.drop is None else ("measured_drop",)

    @property
    def tabulated_for(self) -> dict[str, Any]:
        """The step, and the drop if there is one: scores are measured around it only."""
        return {"step": self.step, "drop": self.drop}

    def level(self) -> float | None:
        """Return 1 for no drop, towards 0 for any: drops of scores that are no fractions have no largest."""
        return None if self.drop is None else 1 / (1 + self.drop)

    def note(self, level: float) -> str:
        """Return the drop in words."""
        if self.drop is None:
            return f"expected to cost the score at most {_allowed(level):.2g} alone"
        return f"costs the score at most {self.drop:.2g} alone, as measured"

    def choose(self, layer: LayerOptions, level: float) -> Choice:
        """Return the smallest rank that loses little enough."""
        choice = super().choose(layer, level)
        if self.drop is not None and isinstance(choice, Keep) and any(len(options) for options in layer.options):
            return Keep(f"every rank that is cheaper costs the score more than {self.drop:.2g}")
        return choice

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the first option that loses little enough."""
        del layer
        (column,) = self.columns
        allowed = _allowed(level) if self.drop is None else self.drop
        return first_within(options.columns[column], allowed + _SCORE_ROUND)


# Scores are counts of images over images: what is lost in rounding must not decide.
_SCORE_ROUND = 1e-9


def _allowed(level: float) -> float:
    """Return the drop of a level."""
    return (1 - level) / level
