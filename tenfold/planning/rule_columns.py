"""Fill the columns of an option table: what rules compare, computed from weights and data or measured as scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tenfold.allocation.rules.threshold import AccuracyDrop
from tenfold.errors import BudgetError
from tenfold.formats import FORMATS, Rank
from tenfold.planning.eligible import EligibleLayer
from tenfold.planning.error_curves import Curve, distortion_curve, weight_curve
from tenfold.records import Metric

Ranks = NDArray[np.int64]
Floats = NDArray[np.float64]
WeightColumn = Callable[[EligibleLayer, str, Tensor], Curve]

# Of weights and data: computed layer by layer, by workers if there are any.
BY_WEIGHT: dict[str, WeightColumn] = {"distortion": distortion_curve, "expected_error": weight_curve}
_SCORE_ROUND = 1e-9  # scores are counts of images over images: what is lost in rounding must not decide
_ERRORS = 8  # output errors are measured at so many ranks of a layer, and interpolated between


class Scores(Protocol):
    """Scores of the model with one layer replaced, measured on demand and remembered; ``Sensitivity`` is one."""

    @property
    def metric(self) -> Metric:
        """What the scores are, and which direction is better."""
        ...

    @property
    def baseline(self) -> float:
        """The score of the model as it is."""
        ...

    def score(self, path: str, format: str, rank: Rank) -> float:
        """Return the score with this layer alone in this format at this rank."""
        ...

    def errors(self, path: str, format: str, ranks: Sequence[Rank]) -> Sequence[float]:
        """Return the relative errors of the layer's output at some ranks, all in one pass."""
        ...

    def curve(self, path: str, format: str, ranks: Sequence[Rank]) -> Sequence[float]:
        """Return the scores expected at some ranks along a family, from few measurements, never worse with cost."""
        ...

    def distortion_at(self, path: str, format: str) -> Curve:
        """Return the function from ranks (n, names) to the expected loss of score (n,)."""
        ...


def score_columns(
    rule_columns: Sequence[str], ranks: Mapping[str, Mapping[str, Ranks]], rule: object, scores: Scores | None
) -> dict[str, dict[str, dict[str, Floats]]]:
    """Return the columns that scores fill, by path, format and name.

    Args:
        rule_columns: names of the columns that the rule compares.
        ranks: (n, names) of each layer and format.
        rule: the rule itself, for the drop that it searches.
        scores: measures.

    Raises:
        BudgetError: there are no scores and the rule needs some.
    """
    found: dict[str, dict[str, dict[str, Floats]]] = {path: {f: {} for f in own} for path, own in ranks.items()}
    if scores is None:
        if {"expected_drop", "measured_drop"} & set(rule_columns):
            msg = (
                "the rule accuracy_drop needs scores of the model: pass scores=tenfold.Sensitivity(model, profile, "
                "evaluate=...), or on the command line a task"
            )
            raise BudgetError(msg)
        return found
    _check_drop(rule, scores)
    crossed: list[float] = []
    for path, own in ranks.items():
        if "distortion" in rule_columns:
            for format, rows in own.items():
                found[path][format]["distortion"] = np.asarray(scores.distortion_at(path, format)(rows))
        if "expected_drop" in rule_columns:
            for format, rows in own.items():
                expected = scores.curve(path, format, _named(format, rows)) if len(rows) else []
                lost = [scores.metric.lost(scores.baseline, score) for score in expected]
                found[path][format]["expected_drop"] = np.asarray(lost, dtype=np.float64)
        if "measured_drop" in rule_columns and isinstance(rule, AccuracyDrop):
            for format, drops in _measured(path, own, rule.drop or 0.0, scores, crossed).items():
                found[path][format]["measured_drop"] = drops
    return found


def _check_drop(rule: object, scores: Scores) -> None:
    if isinstance(rule, AccuracyDrop) and scores.metric.fraction and (rule.drop or 0.0) >= 1:
        msg = f"drop={rule.drop} of a score that is a fraction must be in [0, 1): 0.01 is one percentage point"
        raise BudgetError(msg)


def _measured(
    path: str, ranks: Mapping[str, Ranks], drop: float, scores: Scores, crossed: list[float]
) -> dict[str, Floats]:
    """Return the drops that were measured to find the smallest rank within ``drop``; else not a number.

    Args:
        path: of the layer.
        ranks: by format, the preferred first; the first that has a rank within the drop ends the search.
        drop: that is allowed.
        scores: measures.
        crossed: output errors at which earlier layers came to lie; that of this one is added. Where to look first is
            guessed from their median, which is cheap, and confirmed by the score.
    """
    found = {format: np.full(len(rows), np.nan) for format, rows in ranks.items()}
    for format, rows in ranks.items():
        if not len(rows):
            continue
        named, drops = _named(format, rows), found[format]
        asked = np.unique(np.linspace(0, len(rows) - 1, _ERRORS).round().astype(int))
        known = np.minimum.accumulate(scores.errors(path, format, [named[i] for i in asked]))
        errors = np.interp(np.arange(len(rows)), asked, known)
        guess = int((errors > median(crossed)).sum()) if crossed else len(rows) // 2

        def good(index: int, format: str = format, named: list[Rank] = named, drops: Floats = drops) -> bool:
            drops[index] = scores.metric.lost(scores.baseline, scores.score(path, format, named[index]))
            return bool(drops[index] <= drop + _SCORE_ROUND)

        index = gallop(good, guess, len(rows))
        if index < len(rows):
            crossed.append(float(errors[index]))
            break
    return found


def _named(format: str, rows: Ranks) -> list[Rank]:
    return [dict(zip(FORMATS.get(format).rank_names, row, strict=True)) for row in rows.tolist()]


def _bisect(good: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest index in [low, high) that is good, ``high`` if none; bad ones come before good ones."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low


def gallop(good: Callable[[int], bool], guess: int, size: int) -> int:
    """Return the smallest good index in [0, size), ``size`` if none, trying around ``guess`` in doubling strides first.

    Example:
        >>> tried = []
        >>> gallop(lambda i: bool(tried.append(i)) or i >= 41, 40, 100), tried
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
