"""How the output error of a layer falls with its ranks: all ranks of a format from a few decompositions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.decompositions.base import Decomposition, decompose, default_algorithm
from tenfold.decompositions.metric import Moments, Square, ridged, roots
from tenfold.decompositions.slices import BySlices
from tenfold.decompositions.tt_als import Whitening
from tenfold.decompositions.weighted import Weighted, WeightedALS, alternate, gram_under
from tenfold.formats import Factorization, Rank, join_groups
from tenfold.formats.block_term import BlockTerm
from tenfold.formats.cp import CP3
from tenfold.formats.low_rank import LowRank
from tenfold.formats.spatial import Spatial
from tenfold.formats.tensor_ring import TensorRing
from tenfold.formats.tensor_train import TensorTrain
from tenfold.formats.train import TrainFormat
from tenfold.formats.tucker2 import Tucker2
from tenfold.records import LayerSpec
from tenfold.tensors import gram

Curve = Callable[[NDArray[np.int64]], NDArray[np.float64]]

# Few sweeps: a curve is to rank the candidates, the chosen one is decomposed with care.
_QUICK = WeightedALS(n_iter=3, cg_steps=4)
_QUICK_SWEEPS = 12
_TRAIN_SWEEPS = 2
_TRAIN_FITS = 5
_FLOOR = 1e-9
_MINDED = 1e-3

# Formats with one line of ranks for each value of the first, and the settings of the fits on these.
_SLICED = (TensorRing, BlockTerm)
_SLICED_SWEEPS = {"n_iter": 20, "data_iter": 3, "starts": 1}


def damage_curve(
    weight: Tensor, spec: LayerSpec, format: type[Factorization], moments: Moments, *, ridge: float = 1e-6
) -> Curve:
    """Return a function from ranks (m, names) to the damage tr(G Δ C Δᵀ) (m,) of the format at these ranks.

    C is the covariance of the input patches and G = ``moments.output`` how much the network minds (the identity if
    None: then the damage is the output error E‖y−ŷ‖²). Low rank is exact: a tail of eigenvalues. For Tucker-2 each
    input rank takes one input factor, for which all output ranks follow from one spectrum; for spatial each rank takes
    a fit; a dozen are made, and the rest lies between them. Those are attained, so upper bounds of the optimum. Only
    what is asked for is computed, and once. Rings and blocks are fitted at a few ranks for each closing bond or number
    of blocks; other formats rank by rank with their own algorithm.

    Args:
        weight: groups apart: (groups, out/groups, in/groups, *kernel).
        spec: geometry of the layer.
        format: any format.
        moments: of the inputs of the layer.
        ridge: added to the covariance, as a share of the mean variance.

    Example:
        >>> x = torch.randn(200, 12).double() * torch.arange(1, 13)
        >>> spec = LayerSpec(kind="linear", in_channels=12, out_channels=8)
        >>> curve = damage_curve(torch.randn(1, 8, 12), spec, LowRank, Moments.of(x))
        >>> bool(np.all(np.diff(curve(np.arange(1, 9)[:, None])) <= 0))
        True
    """
    kernel, square = weight.detach().double(), ridged(moments.covariance(), ridge).to(weight.device)
    if moments.output is not None:
        root, _ = roots(ridged(moments.output.to(kernel), _MINDED))
        kernel = (root @ kernel.flatten(2)).view_as(kernel)
    if format is LowRank:
        tails = _tails(torch.linalg.eigvalsh(gram_under(kernel.flatten(2), square)))
        return lambda ranks: tails[ranks[:, 0]]
    if format is Tucker2:
        return _Tucker2Curve(Weighted.of(kernel.flatten(3), square))
    if format is Spatial:
        groups, out, inner, first = kernel.shape[:4]
        return _SpatialCurve(Weighted.of(kernel.reshape(groups, out, inner * first, prod(spec.kernel[1:])), square))
    if issubclass(format, TrainFormat):
        pair = _Tucker2Curve(Weighted.of(kernel.flatten(3), square)) if format is TensorTrain else None
        return _TrainCurve(weight.detach(), spec, format, moments, square, pair)
    if format in _SLICED:
        return BySlices(spec, format, _FittedCurve(weight.detach(), spec, format, moments, _SLICED_SWEEPS))
    return _FittedCurve(weight.detach(), spec, format, moments)


def error_curve(weight: Tensor, spec: LayerSpec, format: type[Factorization]) -> Curve:
    """Return a function from ranks (m, names) to the relative squared error ‖W − Ŵ‖²/‖W‖² (m,) of sums of terms.

    By a few quick fits and what lies between them: for formats whose error no spectrum tells (not ``tails_bound``). Of
    sums of rank-one terms the last rank is the number of these. Frames before it (Tucker-CP) drop their tails, and what
    is left is at least as near to so many terms as the whole weight is: the sum of both is an upper bound.

    Args:
        weight: groups apart: (groups, out/groups, in/groups, *kernel).
        spec: geometry of the layer.
        format: a format that is not ``tails_bound``.
    """
    if format in _SLICED:
        slices = BySlices(spec, format, _QuickFits(join_groups(weight.detach().float(), spec), spec, format))
        return lambda ranks: np.minimum(slices(ranks), 1.0)
    *frames, name = format.rank_names
    unfoldings = format.unfoldings(weight.detach().double(), spec)
    spectra = [_tails(torch.linalg.eigvalsh(gram(unfoldings[side]))) for side in frames]
    tails = [tail / max(float(tail[0]), 1e-300) for tail in spectra]
    terms = CP3 if frames else format
    dense = join_groups(weight.detach().float(), spec)
    settings = default_algorithm(terms.name()).to_dict()
    quick = Decomposition.from_dict(settings | {k: _QUICK_SWEEPS for k in settings if k == "n_iter"})
    known: dict[int, NDArray[np.float64]] = {}

    def at(rank: int) -> NDArray[np.float64]:
        if rank not in known:
            fit = decompose(dense, terms.name(), {name: rank}, quick, spec=spec)
            known[rank] = np.array([fit.rel_error**2])
        return known[rank]

    def curve(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        fitted = between(at, ranks[:, -1], most=6, geometric=True)[:, 0]
        dropped = [tail[ranks[:, k]] for k, tail in enumerate(tails)]
        return np.minimum(fitted + sum(dropped, np.zeros(len(ranks))), 1.0)

    return curve


def _tails(values: Tensor, power: float | None = None) -> NDArray[np.float64]:
    """Return what the eigenvalues (groups, n), ascending, beyond each rank 0..n add up to; plus what they all lack."""
    kept = values.clamp_min(0).sum(0).flip(0).cumsum(0).cpu().numpy()
    total = kept[-1] if power is None else power
    return np.asarray(np.maximum(total - np.concatenate([[0.0], kept]), 0.0))


class _Tucker2Curve:
    def __init__(self, problem: Weighted) -> None:
        self._problem = problem
        self._known: dict[int, NDArray[np.float64]] = {}

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        return between(self._at, ranks[:, 1])[np.arange(len(ranks)), ranks[:, 0]]

    def _at(self, inner: int) -> NDArray[np.float64]:
        """Return the damage (out + 1,) at every output rank."""
        if inner not in self._known:
            problem = self._problem
            out, most = problem.kernel.shape[1:3]
            near = min(out, max(1, round(1.1 * inner * out / most)))  # output ranks near this one are the useful ones
            v = None if inner == most else alternate(problem, near, inner, _QUICK).v
            _, explained = problem.outputs(v)
            self._known[inner] = _tails(torch.linalg.eigvalsh(explained), float(problem.power.sum()))
        return self._known[inner]


class _SpatialCurve:
    def __init__(self, problem: Weighted) -> None:
        self._problem = problem
        self._known: dict[int, NDArray[np.float64]] = {}

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        return between(self._at, ranks[:, 0])[:, 0]

    def _at(self, rank: int) -> NDArray[np.float64]:
        if rank not in self._known:
            problem = self._problem
            out, most = problem.kernel.shape[1:3]
            v = None if rank >= most else alternate(problem, out, rank, _QUICK).v
            _, explained = problem.outputs(v)
            kept = float(explained.diagonal(dim1=-2, dim2=-1).sum())
            self._known[rank] = np.array([max(float(problem.power.sum()) - kept, 0.0)])
        return self._known[rank]


class _TrainCurve:
    """Trains: what the unfoldings of all bonds drop, the inputs whitened mode by mode, tells one rank from another.

    The sum of these tails bounds the error of TT-SVD in that metric. A few fits along the family tell what it comes to
    in the real one. The two large bonds of ``tensor_train`` are those of Tucker-2, whose curve knows better.
    """

    def __init__(
        self,
        weight: Tensor,
        spec: LayerSpec,
        format: type[TrainFormat],
        moments: Moments,
        square: Square,
        pair: _Tucker2Curve | None,
    ) -> None:
        self._weight, self._spec, self._format, self._moments, self._pair = weight, spec, format, moments, pair
        wide = weight.double()
        white = Whitening.of(square, format.input_modes(spec)).there(wide) if format.splits_inputs else wide
        self._tails = []
        for matrix in format.unfoldings(white, spec).values():
            tails = _tails(torch.linalg.eigvalsh(gram(matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT)))
            self._tails.append(tails / (tails[0] or 1.0))
        self._power = moments.damage(wide.flatten(2), torch.zeros_like(wide.flatten(2)))
        self._knots: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        lost = np.stack([tail[ranks[:, k]] for k, tail in enumerate(self._tails)], axis=1)
        if self._pair is not None:
            return np.asarray(self._pair(ranks[:, 1:3]) + self._power * (lost[:, 0] + lost[:, 3]))
        bounds, found = self._attained()
        return np.asarray(np.exp(np.interp(np.log(lost.sum(1) + _FLOOR), bounds, found)) * self._power)

    def _attained(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the logarithms of the bounds of some ranks, ascending, and of the shares that their fits miss."""
        if self._knots is None:
            family = [list(rank.values()) for rank in self._format.rank_family(self._spec)]
            places = np.unique(np.linspace(0, len(family) - 1, _TRAIN_FITS).round().astype(int))
            rows = np.array([family[at] for at in places])
            bounds = np.sum([tail[rows[:, k]] for k, tail in enumerate(self._tails)], axis=0)
            found = np.array([self._fitted(row) for row in rows.tolist()]) / (self._power or 1.0)
            order = np.argsort(bounds)
            logs = np.log(found[order] + _FLOOR)
            self._knots = np.log(bounds[order] + _FLOOR), np.maximum.accumulate(logs)
        return self._knots

    def _fitted(self, row: list[int]) -> float:
        name = self._format.name()
        settings = default_algorithm(name, aware=True).to_dict()
        quick = Decomposition.from_dict(settings | {k: _TRAIN_SWEEPS for k in settings if k == "n_iter"})
        dense, rank = join_groups(self._weight, self._spec), dict(zip(self._format.rank_names, row, strict=True))
        fit = decompose(dense, name, rank, quick, spec=self._spec, metric=self._moments)
        return self._moments.damage(
            self._weight.double().flatten(2), fit.value.to(torch.float64).to_grouped().flatten(2)
        )


def between(
    at: Callable[[int], NDArray[np.float64]], ranks: NDArray[np.int64], most: int = 12, *, geometric: bool = False
) -> NDArray[np.float64]:
    """Return ``at`` (k,) of every rank (m,), as (m, k): asked for at ``most`` ranks at most, geometric in between.

    These lie evenly, or with ``geometric`` ever further apart, for when large ranks are dear.

    Example:
        >>> ranks = np.arange(1, 41)
        >>> found = between(lambda r: np.array([0.5**r]), ranks)
        >>> bool(np.allclose(found[:, 0], 0.5**ranks))
        True
    """
    asked, place = np.unique(ranks, return_inverse=True)
    places = np.geomspace(1, len(asked), min(most, len(asked))) - 1 if geometric else None
    if places is None:
        places = np.linspace(0, len(asked) - 1, min(most, len(asked)))
    knots = asked[np.unique(places.round().astype(int))]
    values = np.stack([at(int(rank)) for rank in knots])
    floor = 1e-12 * values.max(initial=0.0) + np.finfo(np.float64).tiny
    logs = np.log(np.maximum(values, floor))
    upper = np.clip(np.searchsorted(knots, asked), 1, max(len(knots) - 1, 1))
    if len(knots) == 1:
        return np.repeat(values, len(ranks), axis=0)
    part = ((asked - knots[upper - 1]) / (knots[upper] - knots[upper - 1]))[:, None]
    found = np.exp((1 - part) * logs[upper - 1] + part * logs[upper])
    exact = np.isin(asked, knots)
    found[exact] = values
    return np.asarray(found[place.reshape(-1)])


@dataclass(frozen=True, eq=False)
class _FittedCurve:
    """Any format: a fit with its own algorithm at every rank, made once."""

    weight: Tensor
    spec: LayerSpec
    format: type[Factorization]
    moments: Moments
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the algorithm, where they are not its defaults
    _known: dict[tuple[int, ...], NDArray[np.float64]] = field(default_factory=dict, repr=False)

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        names = self.format.rank_names
        if len(names) == 1 and not self.format.tails_bound:
            found = between(lambda rank: self._at({names[0]: rank}), ranks[:, 0], most=6, geometric=True)
            return np.asarray(found[:, 0])
        if len(names) == 1:
            return between(lambda rank: self._at({names[0]: rank}), ranks[:, 0])[:, 0]
        rows = [dict(zip(names, row, strict=True)) for row in ranks.tolist()]
        return np.concatenate([self._at(row) for row in rows])

    def _at(self, rank: Rank) -> NDArray[np.float64]:
        key = tuple(rank[name] for name in self.format.rank_names)
        if key not in self._known:
            self._known[key] = self._fitted(rank)
        return self._known[key]

    def _fitted(self, rank: Rank) -> NDArray[np.float64]:
        name = self.format.name()
        algorithm = Decomposition.from_dict(default_algorithm(name, aware=True).to_dict() | dict(self.settings))
        fit = decompose(join_groups(self.weight, self.spec), name, rank, algorithm, spec=self.spec, metric=self.moments)
        found = fit.value.to(torch.float64).to_grouped().flatten(2)
        return np.array([self.moments.damage(self.weight.double().flatten(2), found)])


@dataclass(frozen=True, eq=False)
class _QuickFits:
    """Rings and blocks without data: squared relative errors of quick fits, one for each rank that is asked for."""

    dense: Tensor
    spec: LayerSpec
    format: type[Factorization]

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        name = self.format.name()
        quick = Decomposition.from_dict(default_algorithm(name).to_dict() | _SLICED_SWEEPS)
        rows = [dict(zip(self.format.rank_names, row, strict=True)) for row in ranks.tolist()]
        return np.array([decompose(self.dense, name, row, quick, spec=self.spec).rel_error ** 2 for row in rows])
