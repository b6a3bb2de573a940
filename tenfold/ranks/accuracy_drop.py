"""The same loss of accuracy for every layer, each replaced alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, Protocol

import numpy as np

from tenfold.errors import BudgetError, RankError, TenfoldError
from tenfold.formats import Rank
from tenfold.ranks.base import RULES, Choice, Keep, OneKnobRule, RankProblem, first_saving


class Scores(Protocol):
    """What the rule asks for: scores of the model with one layer replaced, measured and remembered by the planner."""

    @property
    def baseline(self) -> float:
        """The score of the model as it is, larger is better."""
        ...

    def score(self, path: str, format: str, rank: Rank) -> float:
        """Return the score with this layer alone in this format at this rank."""
        ...

    def errors(self, path: str, format: str, ranks: Sequence[Rank]) -> Sequence[float]:
        """Return the relative errors of the layer's output at some ranks: what is cheap to know, all in one pass."""
        ...

    def curve(self, path: str, format: str, ranks: Sequence[Rank]) -> Sequence[float]:
        """Return the scores expected at some ranks along a family, from few measurements, never falling with cost."""
        ...


@RULES.register("accuracy_drop")
@dataclass(frozen=True)
class AccuracyDrop(OneKnobRule):
    """Smallest ranks at which the model, with that layer alone replaced, loses at most ``drop`` of its score.

    The same drop for all layers (MUSCO's constant layer accuracy drop). The rank is found by bisection between a rank
    that is good enough and one that is not; where to look first is told by the output error at which earlier layers
    came to lie, which costs little, and the score confirms. With a budget and no drop, the drop is found that meets the
    budget, on curves through a few measured ranks of each layer.

    Attributes:
        drop: in [0, 1), of a score that is a fraction: 0.01 is one percentage point; None to let a budget set it.
        step: try every ``step``-th rank of the format's family only.
        scores: what measures; ``tenfold.planning.Sensitivity`` for one.
    """

    drop: float | None = None
    step: int = 1
    scores: Scores | None = field(default=None, repr=False, compare=False)

    numbers: ClassVar[tuple[str, ...]] = ("drop",)

    def __post_init__(self) -> None:
        if self.drop is not None and not 0 <= self.drop < 1:
            msg = f"drop={self.drop} must be in [0, 1): 0.01 is one percentage point of the score"
            raise TenfoldError(msg)
        if self.step < 1:
            msg = f"step={self.step} must be a whole number from 1 on"
            raise RankError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return name and configuration as plain values, without what measures."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "scores"}
        return {"name": self.name(), **plain}

    def knob(self) -> float | None:
        """Return the share of the score to keep."""
        return None if self.drop is None else 1 - self.drop

    def choose(self, problem: RankProblem, knob: float) -> Choice:
        """Return the smallest rank whose expected score loses at most 1 − ``knob``."""
        scores, allowed = self._measuring(), 1 - knob

        def smallest(format: str) -> Rank | None:
            ranks = self._ranks(problem, format)
            expected = scores.curve(problem.path, format, ranks) if ranks else ()
            least = scores.baseline - allowed - _ROUND
            return next((rank for rank, score in zip(ranks, expected, strict=True) if score >= least), None)

        return first_saving(problem, smallest, f"expected to cost at most {_points(allowed)} alone")

    def as_configured(self, problems: Sequence[RankProblem], knob: float) -> tuple[Choice, ...]:
        """Return for each layer the smallest rank that is measured to be good enough."""
        del knob
        scores = self._measuring()
        least = scores.baseline - (self.drop or 0.0) - _ROUND
        crossed: list[float] = []
        return tuple(self._search(problem, scores, least, crossed) for problem in problems)

    def _search(self, problem: RankProblem, scores: Scores, least: float, crossed: list[float]) -> Choice:
        def smallest(format: str) -> Rank | None:
            ranks = self._ranks(problem, format)
            if not ranks:
                return None
            place = (problem.path, format)
            asked = np.unique(np.linspace(0, len(ranks) - 1, _ERRORS).round().astype(int))
            known = np.minimum.accumulate(scores.errors(*place, [ranks[i] for i in asked]))
            errors = np.interp(np.arange(len(ranks)), asked, known)
            guess = int((errors > median(crossed)).sum()) if crossed else len(ranks) // 2
            found = _gallop(lambda i: scores.score(*place, ranks[i]) >= least, guess, len(ranks))
            if found == len(ranks):
                return None
            crossed.append(float(errors[found]))
            return ranks[found]

        drop = _points(self.drop or 0.0)
        choice = first_saving(problem, smallest, f"costs at most {drop} alone, as measured")
        if isinstance(choice, Keep) and any(self._ranks(problem, format) for format in problem.formats):
            return Keep(f"every rank that is cheaper costs more than {drop}")
        return choice

    def _ranks(self, problem: RankProblem, format: str) -> list[Rank]:
        """Return the ranks to try: of the format's family, those that make the layer cheaper."""
        saving = [rank for rank, cost in problem.family(format) if cost.below(problem.cost)]
        return saving[self.step - 1 :: self.step] or saving[-1:]

    def _measuring(self) -> Scores:
        if self.scores is None:
            msg = (
                "the rule accuracy_drop needs scores of the model: pass scores=tenfold.planning.Sensitivity(model, "
                "profile, evaluate=...), or on the command line a task"
            )
            raise BudgetError(msg)
        return self.scores


# Scores are counts of images over images: what is lost in rounding must not decide.
_ROUND = 1e-9
# Errors of the output are measured at so many ranks of a layer, and interpolated between.
_ERRORS = 8


def _bisect(good: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest index in [low, high) that is good, ``high`` if none; bad ones come before good ones."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _gallop(good: Callable[[int], bool], guess: int, size: int) -> int:
    """Return the smallest good index in [0, size), ``size`` if none, trying around ``guess`` in doubling strides first.

    Example:
        >>> tried = []
        >>> _gallop(lambda i: bool(tried.append(i)) or i >= 41, 40, 100), tried
        (41, [40, 41])
    """
    if size == 0:
        return 0
    at, stride = min(guess, size - 1), 1
    if good(at):
        while at - stride >= 0 and good(at - stride):
            at, stride = at - stride, 2 * stride
        return _bisect(good, max(at - stride + 1, 0), at)
    while at + stride < size and not good(at + stride):
        at, stride = at + stride, 2 * stride
    return _bisect(good, at + 1, min(at + stride, size))


def _points(drop: float) -> str:
    return f"{100 * drop:.2g} points of score"
