"""How the error of a layer falls with its ranks: all ranks of a format from a few decompositions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.decompositions.base import Decomposition, default_algorithm
from tenfold.decompositions.covariance import Covariance, add_ridge
from tenfold.decompositions.fitting import decompose
from tenfold.decompositions.input_moments import Moments
from tenfold.formats import Factorization, join_groups
from tenfold.records import LayerSpec

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]
ErrorCurve = Callable[[Ranks], Floats]

_RIDGE = 1e-6

# Fits on each line of ranks.
_FITS = 3


def error_curve(
    weight: Tensor, spec: LayerSpec, format: type[Factorization], moments: Moments | None = None
) -> ErrorCurve:
    """Return a function from ranks (m, names) to the error (m,) of the format at these ranks, as its default finds it.

    With moments the error is the distortion tr(G Δ C Δᵀ), C the covariance of the input patches and G their
    ``output_gram`` (the identity if None: then it is the output error E‖y−ŷ‖²); without, ‖W − Ŵ‖²/‖W‖², at most 1. What
    is not in closed form comes from quick fits, or lies between them: it can be attained, so it is an upper bound of
    the optimum. Only what is asked for is computed, and once.

    Args:
        weight: groups apart: (groups, out/groups, in/groups, *kernel).
        spec: geometry of the layer.
        format: any registered format.
        moments: of the inputs of the layer.

    Example:
        >>> from tenfold.formats import FORMATS
        >>> x = torch.randn(200, 12).double() * torch.arange(1, 13)
        >>> spec = LayerSpec(kind="linear", in_channels=12, out_channels=8)
        >>> curve = error_curve(torch.randn(1, 8, 12), spec, FORMATS.get("low_rank"), Moments.of(x))
        >>> bool(np.all(np.diff(curve(np.arange(1, 9)[:, None])) <= 0))
        True
    """
    algorithm = default_algorithm(format.name(), data_aware=moments is not None)
    return algorithm.error_curve(CurveProblem(weight.detach(), spec, format, moments))


@dataclass(frozen=True, eq=False)
class CurveProblem:
    """A layer whose error is wanted at many ranks; the attributes are the arguments of ``error_curve``."""

    weight: Tensor
    spec: LayerSpec
    format: type[Factorization]
    moments: Moments | None = None

    @cached_property
    def kernel(self) -> Tensor:
        """The weight in float64, in coordinates where all output errors count alike; without moments, of norm 1."""
        kernel = self.weight.double()
        root = None if self.moments is None else self.moments.to(kernel.device).output_root()
        if self.moments is None:
            kernel = kernel / torch.linalg.vector_norm(kernel).clamp_min(1e-300)
        elif root is not None:
            kernel = (root @ kernel.flatten(2)).view_as(kernel)
        return kernel

    @cached_property
    def covariance(self) -> Covariance:
        """Covariance (groups, n, n) of the input patches, not singular; the identity without moments."""
        if self.moments is None:
            return torch.eye(self.kernel[0, 0].numel()).to(self.kernel).expand(len(self.kernel), -1, -1)
        return add_ridge(self.moments.covariance(), _RIDGE).to(self.weight.device)

    def fitted(self, algorithm: Decomposition, rank: list[int]) -> float:
        """Return the error of a fit by this algorithm at these ranks, in the order of the format's ``rank_names``."""
        named, blind = dict(zip(self.format.rank_names, rank, strict=True)), self.moments is None
        dense = join_groups(self.weight.float() if blind else self.weight, self.spec)
        fit = decompose(dense, self.format.name(), named, algorithm, spec=self.spec, moments=self.moments)
        if self.moments is None:
            return fit.rel_error**2
        approximation = fit.value.to(torch.float64).to_grouped().flatten(2)
        return self.moments.distortion(self.weight.double().flatten(2), approximation)

    def between_fits(self, algorithm: Decomposition) -> ErrorCurve:
        """Return the curve between fits at a dozen ranks; of formats with several ranks, a fit for each that is asked.

        Where the error depends on the start of the algorithm, half a dozen, which lie the denser the smaller the rank.
        """
        local = not self.format.svd_bounds_error
        errors = Memo(lambda *rank: np.array([self.fitted(algorithm, list(rank))]))

        def curve(ranks: Ranks) -> Floats:
            if len(self.format.rank_names) > 1:
                return self._bounded(np.concatenate([errors(*rank) for rank in ranks.tolist()]))
            return self._bounded(interpolated(errors, ranks[:, 0], 6 if local else 12, geometric=local)[:, 0])

        return curve

    def between_fits_on_lines(self, algorithm: Decomposition) -> ErrorCurve:
        """Return the curve from three fits on each line of ranks with the same first number.

        On a line errors lie between fits by the number of parameters, geometrically. The full rank, at which such
        formats are the dense layer, is part of no line. There may be no ranks to ask for.
        """
        errors = Memo(lambda *rank: np.array([self.fitted(algorithm, list(rank))]))
        return lambda ranks: self._bounded(on_lines(errors, ranks, self.spec, self.format))

    def _bounded(self, errors: Floats) -> Floats:
        return errors if self.moments is not None else np.minimum(errors, 1.0)


class Memo:
    """A memoized function of ranks; unlike ``functools.cache`` it can be pickled, with what it has computed."""

    def __init__(self, function: Callable[..., Floats]) -> None:
        self._function = function
        self._known: dict[tuple[int, ...], Floats] = {}

    def __call__(self, *rank: int) -> Floats:
        """Return the result, computed at most once."""
        if rank not in self._known:
            self._known[rank] = self._function(*rank)
        return self._known[rank]


def tails(eigenvalues: Tensor, power: float | None = None) -> Floats:
    """Return what the eigenvalues (groups, n), ascending, beyond each rank 0..n add up to (n + 1,).

    ``power`` is the sum of all, where there are more than these.
    """
    kept = eigenvalues.clamp_min(0).sum(0).flip(0).cumsum(0).cpu().numpy()
    total = kept[-1] if power is None else power
    return np.asarray(np.maximum(total - np.concatenate([[0.0], kept]), 0.0))


def interpolated(at: Callable[[int], Floats], ranks: Ranks, most: int = 12, *, geometric: bool = False) -> Floats:
    """Return ``at`` (k,) of every rank (m,), as (m, k): asked for at ``most`` ranks at most, geometric in between.

    These lie evenly, or with ``geometric`` ever further apart, for when large ranks are expensive.

    Example:
        >>> ranks = np.arange(1, 41)
        >>> errors = interpolated(lambda r: np.array([0.5**r]), ranks)
        >>> bool(np.allclose(errors[:, 0], 0.5**ranks))
        True
    """
    asked, place = np.unique(ranks, return_inverse=True)
    count = min(most, len(asked))
    places = np.geomspace(1, len(asked), count) - 1 if geometric else np.linspace(0, len(asked) - 1, count)
    knots = asked[np.unique(places.round().astype(int))]
    values = np.stack([at(int(rank)) for rank in knots])
    if len(knots) == 1:
        return np.repeat(values, len(ranks), axis=0)
    floor = 1e-12 * values.max(initial=0.0) + np.finfo(np.float64).tiny
    logs = np.log(np.maximum(values, floor))
    upper = np.clip(np.searchsorted(knots, asked), 1, len(knots) - 1)
    part = ((asked - knots[upper - 1]) / (knots[upper] - knots[upper - 1]))[:, None]
    errors = np.exp((1 - part) * logs[upper - 1] + part * logs[upper])
    errors[np.isin(asked, knots)] = values
    return np.asarray(errors[place.reshape(-1)])


def on_lines(at: Callable[..., Floats], ranks: Ranks, spec: LayerSpec, format: type[Factorization]) -> Floats:
    """Return ``at`` (1,) of all ranks (m, names), as (m,); see ``CurveProblem.between_fits_on_lines``.

    Example:
        >>> from tenfold.formats import FORMATS
        >>> spec = LayerSpec(kind="conv", in_channels=64, out_channels=64, kernel=(3, 3))
        >>> asked = []
        >>> def at(*rank):
        ...     asked.append(rank)
        ...     return np.array([1.0 / rank[1]])
        >>> ranks = np.array([[c, r, r] for c in (2, 4) for r in range(1, 21)])
        >>> errors = on_lines(at, ranks, spec, FORMATS.get("block_term"))
        >>> len(errors), len(asked), bool((np.diff(errors[:20]) < 0).all())
        (40, 6, True)
    """
    names = format.rank_names
    ranks = ranks.reshape(-1, len(names))
    errors = np.empty(len(ranks))
    dense = (ranks == [format.max_rank(spec)[name] for name in names]).all(1)
    for row in np.flatnonzero(dense):
        errors[row] = at(*ranks[row].tolist())[0]
    for first in np.unique(ranks[~dense, 0]):
        rows = np.flatnonzero(~dense & (ranks[:, 0] == first))
        sizes = np.array(
            [format.num_params(spec, dict(zip(names, rank, strict=True))) for rank in ranks[rows].tolist()]
        )
        order = np.argsort(sizes, kind="stable")
        knots = order[np.unique(np.linspace(0, len(order) - 1, min(_FITS, len(order))).round().astype(int))]
        fitted = [at(*rank)[0] for rank in ranks[rows[knots]].tolist()]
        # More parameters do no worse where fits are good ones.
        falling = np.log(np.minimum.accumulate(np.maximum(fitted, np.finfo(np.float64).tiny)))
        errors[rows] = np.exp(np.interp(np.log(sizes), np.log(sizes[knots]), falling))
    return errors
