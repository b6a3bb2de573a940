"""A score of models: the function, what it depends on, and what its numbers mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tenfold.errors import DataError
from tenfold.records import Metric
from tenfold.records.metric import FRACTION


@dataclass(frozen=True)
class Score:
    """A score of models, with what it depends on and what it means.

    Wherever ``evaluate`` is asked for, a plain function stands for a score that is a fraction and the larger the
    better, such as an accuracy. Use this for any other: perplexity, loss, mAP in percent, PSNR.

    Attributes:
        evaluate: returns the score of a model; to choose by, on data held out from training, not on the test set.
        about: what the scores depend on, as plain values: the task, the number of images.
        metric: name, unit and direction.

    Example:
        >>> score = Score(lambda model: 7.9, metric=Metric(name="perplexity", better="lower"))
        >>> score(nn.Identity()), score.metric.text(7.9)
        (7.9, '7.9')
    """

    evaluate: Callable[[nn.Module], Any]
    about: Mapping[str, str | int | float | None] = field(default_factory=dict)
    metric: Metric = FRACTION

    @classmethod
    def of(cls, evaluate: Callable[[nn.Module], Any]) -> Score:
        """Return the score of a function, whose attribute ``metric`` says what it means if it has one."""
        if isinstance(evaluate, cls):
            return evaluate
        metric = getattr(evaluate, "metric", None)
        return cls(evaluate, metric=metric if isinstance(metric, Metric) else FRACTION)

    def __call__(self, model: nn.Module) -> float:
        """Return the score of a model.

        Raises:
            DataError: what ``evaluate`` returns is no number.
        """
        found = self.evaluate(model)
        try:
            value = found.item() if hasattr(found, "item") else found  # tensors and arrays of one number
            if value is None or isinstance(value, str | complex):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"evaluate returned {_shown(found)}: it has to return the score of the model, one number"
            raise DataError(msg) from error

    def of_original(self, model: nn.Module) -> float:
        """Return the score of the model as it is: measured before anything else, so that nothing is lost by an error.

        Raises:
            DataError: it is no finite number, or no fraction and not declared as something else.
        """
        value = self(model)
        if not math.isfinite(value):
            msg = f"evaluate returned {value} for the model as it is: a score must be a finite number"
            raise DataError(msg)
        if self.metric.fraction and not 0 <= value <= 1:
            fraction = f"return {value / 100:g}, or " if 1 < value <= 100 else ""
            msg = (
                f"evaluate returned {value:g}, and a score is a fraction from 0 to 1 unless it says otherwise: "
                f"{fraction}say what it is: evaluate=tenfold.Score(function, metric=tenfold.Metric(name='...', "
                "unit='...')), with better='lower' for a loss or perplexity"
            )
            raise DataError(msg)
        return value


def _shown(found: object) -> str:
    kind = type(found).__name__
    if isinstance(found, tuple | list | dict):
        return f"a {kind} of {len(found)}"
    shape = getattr(found, "shape", None)
    return "None" if found is None else f"a {kind}{f' {tuple(shape)}' if shape is not None else ''}"
