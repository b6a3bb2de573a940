"""How the output error of a layer falls with its ranks: all ranks of a format from a few decompositions."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.decompositions.metric import Moments, ridged, roots
from tenfold.decompositions.weighted import Weighted, WeightedALS, alternate, gram_under
from tenfold.formats import Factorization
from tenfold.formats.low_rank import LowRank
from tenfold.formats.spatial import Spatial
from tenfold.formats.tucker2 import Tucker2
from tenfold.records import LayerSpec

Curve = Callable[[NDArray[np.int64]], NDArray[np.float64]]

# Few sweeps: a curve is to rank the candidates, the chosen one is decomposed with care.
_QUICK = WeightedALS(n_iter=3, cg_steps=4)
_MINDED = 1e-3


def damage_curve(
    weight: Tensor, spec: LayerSpec, format: type[Factorization], moments: Moments, *, ridge: float = 1e-6
) -> Curve:
    """Return a function from ranks (m, names) to the damage tr(G Δ C Δᵀ) (m,) of the format at these ranks.

    C is the covariance of the input patches and G = ``moments.output`` how much the network minds (the identity if
    None: then the damage is the output error E‖y−ŷ‖²). Low rank is exact: a tail of eigenvalues. For Tucker-2 each
    input rank takes one input factor, for which all output ranks follow from one spectrum; for spatial each rank takes
    a fit. All are attained, so upper bounds of the optimum. Only what is asked for is computed, and once.

    Args:
        weight: groups apart: (groups, out/groups, in/groups, *kernel).
        spec: geometry of the layer.
        format: low rank, Tucker-2 or spatial.
        moments: of the inputs of the layer.
        ridge: added to the covariance, as a share of the mean variance.

    Raises:
        TypeError: another format.

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
    msg = f"there is no curve of output errors for {format.__name__}"
    raise TypeError(msg)


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
        return np.array([self._at(inner)[out] for out, inner in ranks.tolist()], dtype=np.float64)

    def _at(self, inner: int) -> NDArray[np.float64]:
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
        self._known: dict[int, float] = {}

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([self._at(rank) for rank in ranks[:, 0].tolist()], dtype=np.float64)

    def _at(self, rank: int) -> float:
        if rank not in self._known:
            problem = self._problem
            out, most = problem.kernel.shape[1:3]
            v = None if rank >= most else alternate(problem, out, rank, _QUICK).v
            _, explained = problem.outputs(v)
            kept = float(explained.diagonal(dim1=-2, dim2=-1).sum())
            self._known[rank] = max(float(problem.power.sum()) - kept, 0.0)
        return self._known[rank]
