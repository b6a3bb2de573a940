"""One measurement at a time: a layer replaced alone, the error of its output, and the score of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tenfold.decompositions import Decomposition, Moments, default_algorithm
from tenfold.errors import DataError
from tenfold.formats import Rank
from tenfold.layers import FactorizedLayer
from tenfold.planning.outputs import output_errors
from tenfold.planning.substituting import replaced, substitute
from tenfold.surgery import find

Place = tuple[str, str]  # path, format


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and the conditions under which its layers are replaced, one alone; the model is left as it was.

    The fields are what ``Sensitivity`` was told; ``batches`` may be None where ``batchnorm`` is False.
    """

    model: nn.Module
    batches: Iterable[Any] | None
    moments: Mapping[str, Moments]
    algorithms: Mapping[str, Decomposition]
    batchnorm: bool
    seed: int
    evaluate: Callable[[nn.Module], float] | None

    def algorithm(self, path: str, format: str) -> Decomposition:
        """Return what finds the factors of a layer in a format."""
        return self.algorithms.get(format) or default_algorithm(format, self.seed, data_aware=path in self.moments)

    def errors(self, place: Place, ranks: Sequence[Rank]) -> list[float]:
        """Return the relative errors of a layer's output at some ranks; one pass over the batches finds them all."""
        layers = [self._substitute(place, rank) for rank in ranks]
        if self.batches is None:
            return [layer.fit.rel_error if layer.fit is not None else 0.0 for layer in layers]
        return output_errors(self.model, place[0], layers, self.batches)

    def score(self, place: Place, rank: Rank) -> float:
        """Return the score of the model with only this layer replaced."""
        layer, batches = self._substitute(place, rank), self.batches if self.batchnorm else None
        with replaced(self.model, place[0], layer, batchnorm=batches) as changed:
            return self.score_of(changed)

    def score_of(self, model: nn.Module) -> float:
        """Return the score of a model.

        Raises:
            DataError: there is no ``evaluate``, or the score is not a finite number.
        """
        if self.evaluate is None:
            msg = "scoring needs evaluate=, a function of the model"
            raise DataError(msg)
        score = float(self.evaluate(model))
        if not math.isfinite(score):
            msg = f"evaluate returned {score}: a score must be a finite number"
            raise DataError(msg)
        return score

    def _substitute(self, place: Place, rank: Rank) -> FactorizedLayer:
        path, format = place
        module, algorithm = find(self.model, path), self.algorithm(path, format)
        made = substitute(module, format, rank, algorithm=algorithm, metric=self.moments.get(path))
        return made.train(module.training)


def errors_of(bench: Bench, piece: tuple[Place, Sequence[Rank]]) -> list[float]:
    """Return what ``bench.errors`` says of a piece of work."""
    return bench.errors(*piece)


def score_of(bench: Bench, piece: tuple[Place, Rank]) -> float:
    """Return what ``bench.score`` says of a piece of work."""
    return bench.score(*piece)
