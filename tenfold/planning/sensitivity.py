"""Per-layer sensitivity: output error and score with one layer factorized. Measured lazily, cached on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tenfold import __version__
from tenfold.decompositions import Decomposition, Moments
from tenfold.errors import DataError, PlanError
from tenfold.files import check_writable, locked
from tenfold.formats import FORMATS, Rank
from tenfold.parallel import Workers
from tenfold.patterns import check_patterns
from tenfold.planning.eligible import EligibleLayer, eligible_layer, reason_to_keep
from tenfold.planning.error_curves import weight_curve
from tenfold.planning.score import Score
from tenfold.planning.single_layer import Bench, Place, errors_of, score_of
from tenfold.records import (
    Cost,
    LayerSensitivity,
    Profile,
    Recipe,
    SensitivityPoint,
    SensitivityTable,
)
from tenfold.records.metric import FRACTION
from tenfold.tensors.finite import check_finite
from tenfold.tracing import copied
from tenfold.tracing.input_batches import input_batches

T = TypeVar("T")
R = TypeVar("R")
Array = NDArray[np.float64]
Progress = Callable[[int, int], None]
Spot = tuple[str, str, tuple[tuple[str, int], ...]]  # path, format, rank

# The untouched layer has the score of the untouched model, without noise.
_CERTAIN = 1e6


class Sensitivity:
    """Per-layer sensitivity: output error and score with one layer factorized. Measured lazily, cached on disk.

    Use it to see which layers a network can spare, and as the ``scores`` of a plan: the rule ``accuracy_drop`` needs
    them, and ``global`` can minimise their loss. With a ``path`` the table is written after every measurement, and
    another run under the same conditions, later or at the same time, adds to it. The model given is never changed.

    Args:
        model: that was profiled; it may hold factorized layers.
        profile: what ``profile`` said of it.
        recipe: formats, algorithms, layers to leave alone and seed; with the calibration method ``batchnorm``, batch
            norm is re-estimated on the batches before every score.
        evaluate: returns the score of a model, or a ``Score``.
        batches: unlabeled, on the device of the model, to go through repeatedly; without these the output error is the
            relative error of the weight.
        moments: of the layers' inputs, by path: layers that have them are decomposed for the data.
        path: JSON file to take measurements over from, and to write them to.
        workers: who measures where several measurements are wanted at once; this process if None.

    Raises:
        WeightError: a parameter or buffer has NaN or infinity.
        FileError: the file at ``path`` cannot be written.
        DataError: the file at ``path`` was measured under other conditions, or is damaged.

    Example:
        >>> import torch
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> found = Sensitivity(net, profile(net, torch.zeros(1, 16)), evaluate=lambda m: 0.9)
        >>> found.baseline, found.score("0", "low_rank", {"rank": 4})
        (0.9, 0.9)
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        recipe: Recipe | Mapping[str, Any] | None = None,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        batches: Iterable[Any] | None = None,
        moments: Mapping[str, Moments] | None = None,
        path: str | Path | None = None,
        workers: Workers | None = None,
    ) -> None:
        recipe = Recipe.of(recipe)
        check_finite(model)
        batchnorm = recipe.calibration.method == "batchnorm" and batches is not None
        if isinstance(batches, Iterator):
            msg = "the calibration batches are gone through repeatedly: give a list or the like, not an iterator"
            raise DataError(msg)
        batches = None if batches is None else input_batches(batches, model)
        check_patterns(recipe.keep, [p for layer in profile.layers for p in (layer.path, *layer.aliases)])
        self._model = copied(model)
        self._name = profile.model
        self._workers = workers or Workers()
        self._path = None if path is None else Path(path)
        algorithms = {format: Decomposition.from_dict(own) for format, own in recipe.algorithms.items()}
        score = None if evaluate is None else Score.of(evaluate)
        self.metric = FRACTION if score is None else score.metric
        self._bench = Bench(self._model, batches, dict(moments or {}), algorithms, batchnorm, recipe.seed, score)
        self._layers = {layer.path: layer for layer in profile.layers if layer.params or layer.macs}
        formats, keep = recipe.formats, recipe.keep
        self._reasons = {p: reason_to_keep(self._model, layer, formats, keep) for p, layer in self._layers.items()}
        self._eligible = {
            p: eligible_layer(self._model, layer, formats) for p, layer in self._layers.items() if not self._reasons[p]
        }
        for name, layer in self._eligible.items():
            if not any(self.candidates(name, format) for format in layer.formats):
                self._reasons[name] = f"no {' or '.join(layer.formats)} rank makes the layer cheaper"
        formats_of = {path: layer.formats for path, layer in self._eligible.items()}
        self._key = self._bench.key(formats_of, {} if score is None else score.about)
        self._baseline: float | None = None
        self._points: dict[Spot, SensitivityPoint] = {}
        if self._path is not None:
            check_writable(self._path)
        if self._path is not None and self._path.exists():
            self._take_over(SensitivityTable.load(self._path))

    @property
    def compressible(self) -> dict[str, tuple[str, ...]]:
        """The formats by path of the layers that can be compressed."""
        return {path: layer.formats for path, layer in self._eligible.items() if not self._reasons[path]}

    @property
    def table(self) -> SensitivityTable:
        """What was measured so far, every layer of the model named."""
        points: dict[str, list[SensitivityPoint]] = {path: [] for path in self._layers}
        for spot in sorted(self._points):
            points.setdefault(spot[0], []).append(self._points[spot])
        layers = tuple(
            LayerSensitivity(
                path=path,
                kind=layer.kind if layer.spec is None else str(layer.spec),
                before=layer.cost,
                state="not compressible" if self._reasons[path] else "compressible",
                reason=self._reasons[path],
                points=tuple(points[path]),
            )
            for path, layer in self._layers.items()
        )
        return SensitivityTable(
            tenfold=__version__,
            model=self._name,
            key=self._key,
            baseline=self._baseline,
            metric=self.metric,
            layers=layers,
        )

    @property
    def baseline(self) -> float:
        """The score of the model as it is."""
        if self._baseline is None:
            self._baseline = self._bench.score_of(self._model, original=True)
            self._save()
        return self._baseline

    def candidates(self, path: str, format: str, number: int | None = None) -> tuple[Rank, ...]:
        """Return ranks along the format's family that make the layer cheaper, from small to large.

        ``number`` of them evenly spread, the smallest and the largest included; all of them if None.
        """
        ranks = [rank for rank, _ in self._layer_at(path).saving_family(format)]
        if number is None or number >= len(ranks):
            return tuple(ranks)
        chosen = np.unique(np.linspace(0, len(ranks) - 1, max(number, 1)).round().astype(int))
        return tuple(ranks[i] for i in chosen)

    def error(self, path: str, format: str, rank: Rank) -> float:
        """Return the relative error of the layer's output, cheap to measure; see ``output_errors``."""
        return self.errors(path, format, [rank])[0]

    def errors(self, path: str, format: str, ranks: Sequence[Rank]) -> list[float]:
        """Return the relative errors at several ranks; one pass over the calibration batches finds all new ones."""
        self._measure_errors([((path, format), ranks)])
        return [float(self._point(path, format, rank).output_error or 0.0) for rank in ranks]

    def score(self, path: str, format: str, rank: Rank) -> float:
        """Return the score of the model with only this layer replaced."""
        self._measure_scores([((path, format), rank)])
        return float(self._point(path, format, rank).score or 0.0)

    def measure(
        self, ranks: int = 8, *, errors: bool = True, scores: bool = False, progress: Progress | None = None
    ) -> SensitivityTable:
        """Return the table with this many ranks of every layer and format measured.

        Args:
            ranks: per layer and format, evenly spread along the format's family of ranks.
            errors: measure the errors of the outputs.
            scores: measure the scores.
            progress: called with (done, in all).
        """
        places = [(path, format) for path, formats in self.compressible.items() for format in formats]
        chosen = [(place, self.candidates(*place, ranks)) for place in places]
        total, done = sum(len(spots) for _, spots in chosen) * (errors + scores), 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            if progress is not None:
                progress(done, total)

        if errors:
            self._measure_errors(chosen, advance)
        if scores:
            self._measure_scores([(place, rank) for place, spots in chosen for rank in spots], advance)
        self._save()
        return self.table

    def curve(self, path: str, format: str, ranks: Sequence[Rank], *, measured: int = 6) -> list[float]:
        """Return scores at some ranks, interpolated through the measured ones, that never get worse with cost.

        Scores on few images are noisy: what was measured is replaced by the nearest such sequence, which ends at the
        baseline. Where nothing is measured yet, ``measured`` ranks are.
        """
        from scipy.optimize import isotonic_regression

        layer = self._layer_at(path)

        def size(cost: Cost) -> int:
            return cost.macs if layer.cost.macs else cost.params

        points = self._scored(path, format, measured)
        x = np.array([*(size(p.cost) for p in points), size(layer.cost)], dtype=np.float64)
        sign = 1.0 if self.metric.better == "higher" else -1.0
        y = [*(sign * float(p.score or 0.0) for p in points), sign * self.baseline]
        fitted = sign * isotonic_regression(y, weights=[1.0] * len(points) + [_CERTAIN]).x
        wanted = [float(size(layer.cost_at(format, rank))) for rank in ranks]
        return [float(v) for v in np.interp(wanted, x, fitted)]

    def distortion_at(self, path: str, format: str, *, measured: int = 6) -> Callable[[NDArray[np.int64]], Array]:
        """Return a function from ranks (n, names) to the loss of score (n,), monotone in the weight's error there.

        The measured ranks lie along one family; others are compared with these by what their unfoldings drop.
        """
        from scipy.optimize import isotonic_regression

        layer = self._layer_at(path)
        tails = weight_curve(layer, format, layer.load_weight())
        names = FORMATS.get(format).rank_names
        points = self._scored(path, format, measured)
        at = np.array([[p.rank[name] for name in names] for p in points], dtype=np.int64).reshape(-1, len(names))
        lost = np.array([self.metric.lost(self.baseline, float(p.score or 0.0)) for p in points])
        errors, group, weights = np.unique(tails(at), return_inverse=True, return_counts=True)
        mean = np.bincount(group.ravel(), lost) / weights
        fitted = np.maximum(isotonic_regression([0.0, *mean], weights=[_CERTAIN, *weights]).x, 0.0)
        errors = np.concatenate([[0.0], errors])
        return lambda ranks: np.interp(tails(ranks), errors, fitted)

    def _scored(self, path: str, format: str, number: int) -> list[SensitivityPoint]:
        """Return the points of a layer that have a score, the cheapest first; measure some where there are none."""

        def known() -> list[SensitivityPoint]:
            own = [p for s, p in self._points.items() if s[:2] == (path, format) and p.score is not None]
            return sorted(own, key=lambda p: (p.cost.macs, p.cost.params))

        chosen = self.candidates(path, format, number)
        if len(known()) < len(chosen):
            self._measure_scores([((path, format), rank) for rank in chosen])
        return known()

    def _measure_errors(
        self, wanted: Sequence[tuple[Place, Sequence[Rank]]], advance: Callable[[int], None] = lambda _: None
    ) -> None:
        """Measure the errors that are not known yet; each piece of work is a layer in one format."""
        points = [(place, [self._point(*place, rank) for rank in ranks]) for place, ranks in wanted]
        new = [(place, [p for p in found if p.output_error is None]) for place, found in points]
        advance(sum(len(found) for _, found in points) - sum(len(found) for _, found in new))
        pieces = [(place, [p.rank for p in found]) for place, found in new if found]
        measured = self._by_workers(errors_of, pieces)
        for (place, ranks), found in zip(pieces, measured, strict=True):
            for rank, error in zip(ranks, found, strict=True):
                self._store(place[0], self._point(*place, rank).replace(output_error=error))
            self._save()
            advance(len(ranks))

    def _measure_scores(
        self, wanted: Sequence[tuple[Place, Rank]], advance: Callable[[int], None] = lambda _: None
    ) -> None:
        """Measure the scores that are not known yet; each is a piece of work."""
        pieces = [(place, rank) for place, rank in wanted if self._point(*place, rank).score is None]
        advance(len(wanted) - len(pieces))
        if pieces:
            _ = self.baseline  # measured first, so that every table has it
        for (place, rank), score in zip(pieces, self._by_workers(score_of, pieces), strict=True):
            self._store(place[0], self._point(*place, rank).replace(score=score))
            self._save()
            advance(1)

    def _by_workers(self, work: Callable[[Bench, T], R], pieces: Sequence[T]) -> Iterator[R]:
        workers = self._workers if len(pieces) > 1 else Workers()
        return workers.map(work, self._bench, pieces)

    def _layer_at(self, path: str) -> EligibleLayer:
        if path not in self._eligible:
            reason = self._reasons.get(path, "the model has no such layer")
            msg = f"layer {path!r} cannot be compressed: {reason}"
            raise PlanError(msg)
        return self._eligible[path]

    def _point(self, path: str, format: str, rank: Rank) -> SensitivityPoint:
        layer = self._layer_at(path)
        rank = FORMATS.get(format).check_rank(layer.spec, rank)
        known = self._points.get(_spot(path, format, rank))
        return known or SensitivityPoint(format=format, rank=rank, cost=layer.cost_at(format, rank))

    def _store(self, path: str, point: SensitivityPoint) -> None:
        self._points[_spot(path, point.format, point.rank)] = point

    def _save(self) -> None:
        """Write the table down, with what others measured under the same conditions and wrote there meanwhile."""
        if self._path is not None:
            with locked(self._path):
                if self._path.exists():
                    self._take_over(SensitivityTable.load(self._path))
                self.table.save(self._path)

    def _take_over(self, table: SensitivityTable) -> None:
        own, there = self._key, table.key
        scored = table.baseline is not None or any(p.score is not None for layer in table.layers for p in layer.points)
        if not scored:
            there = there.replace(about=own.about)
        elif self._bench.evaluate is None:
            own, self.metric = own.replace(about=there.about), table.metric
        differences = there.differences(own)
        if scored and table.metric != self.metric:
            differences.append(f"metric ({table.metric.label}, now {self.metric.label})")
        if differences:
            msg = (
                f"{self._path} was measured under other conditions: {'; '.join(differences)}. "
                "Choose another file, or delete this one."
            )
            raise DataError(msg)
        self._key = own.joined(there)
        self._baseline = table.baseline if self._baseline is None else self._baseline
        for layer in table.layers:
            for point in layer.points:
                own_point = self._points.get(_spot(layer.path, point.format, point.rank))
                self._store(layer.path, point if own_point is None else own_point.filled(point))


def _spot(path: str, format: str, rank: Rank) -> Spot:
    return path, format, tuple(sorted(rank.items()))
