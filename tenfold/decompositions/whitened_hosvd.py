"""Tensor regressions: HOSVD of all modes of a map, plain or under the data, then alternating least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, CovarianceDecomposition, Decomposition, Factors, FitProblem
from tenfold.decompositions.covariance import Covariance, Sketch, marginal
from tenfold.decompositions.curves import CurveProblem, ErrorCurve, Floats, Memo, Ranks, tails
from tenfold.decompositions.roots import Whitening, preconditioner, solve_spd
from tenfold.formats.map_tucker import MapTucker
from tenfold.records import Shape
from tenfold.tensors import gram, symmetrize_
from tenfold.tensors.conjugate_gradients import conjugate_gradients

Frames = tuple[Tensor, Tensor, Tensor]


@DECOMPOSITIONS.register("map_hooi")
@dataclass(frozen=True)
class MapHOOI(Decomposition):
    """HOSVD of the weight of a linear layer over all modes of the map that it takes, then alternating least squares.

    De Lathauwer, De Moor & Vandewalle 2000: the factor of each mode from its own unfolding, then one after the other
    given all others, until what they explain stops growing.

    Attributes:
        n_iter: sweeps over the modes at most.
        tol: stop when a sweep explains less than this share of ‖W‖² more.
    """

    n_iter: int = 10
    tol: float = 1e-4

    formats = (MapTucker,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the core and the orthonormal factors of the sides that are not full."""
        return _alternated(problem, None, self.n_iter, self.tol, 1)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the curve of the HOSVD, which is exact for its nested frames and an upper bound after the sweeps."""
        return _curve(problem)


@DECOMPOSITIONS.register("whitened_hosvd")
@dataclass(frozen=True)
class WhitenedHOSVD(CovarianceDecomposition):
    """HOSVD of a weight whose inputs are whitened mode by mode, then alternating least squares on the output error.

    Each mode of the map is whitened by the covariance that it has on its own (its Gram matrix over samples and all
    other modes); the leading singular vectors of the unfoldings, brought back, span what is kept of the mode. Given
    these, the core and the output factor that minimise tr(Δ C Δᵀ) under the whole covariance C of the flattened map
    follow from linear least squares and the leading eigenvectors of what that explains. Sweeps over the modes then
    lower the error by conjugate gradients.

    Attributes:
        n_iter: sweeps over the modes at most; 0 stays at the start.
        tol: stop when a sweep explains less than this share of E‖y−ȳ‖² more.
        cg_steps: steps of conjugate gradients for each mode of a sweep.
        ridge: added to the covariance, as a share of the mean variance.
    """

    n_iter: int = 10
    tol: float = 1e-4
    cg_steps: int = 4

    formats = (MapTucker,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the core and the orthonormal factors of the sides that are not full."""
        covariance = None if problem.covariance is None else self.regularized(problem)
        return _alternated(problem, covariance, self.n_iter, self.tol, self.cg_steps)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the curve of the start, which is exact for its nested frames and an upper bound after the sweeps."""
        return _curve(problem)


def _alternated(problem: FitProblem, covariance: Covariance | None, n_iter: int, tol: float, steps: int) -> Factors:
    """Return the factors after sweeps over the modes of the map that are not full; the error never grows."""
    modes, rank, weight = problem.spec.in_modes, problem.rank, problem.weight
    regression = _Regression.of(weight, covariance, modes)
    kept = tuple(rank[name] for name in MapTucker.rank_names[1:])
    best = regression.step(_cut(_frames(weight, covariance, modes), kept), rank["out"])
    sweeps, converged = 0, kept == tuple(modes)
    while not converged and sweeps < n_iter:
        found = best
        for at in (k for k, size in enumerate(kept) if size < modes[k]):
            found = regression.step(regression.improved(found, at, steps), rank["out"])
        gain = found.captured - best.captured
        if bool((gain > 0).all()):
            best = found
        converged = bool((gain <= tol * regression.power).all())
        sweeps += 1
    fields = ("in_factor", "height_factor", "width_factor")
    factors = {
        field: frame if size < full else None
        for field, frame, size, full in zip(fields, best.frames, kept, modes, strict=True)
    }
    tensors = {"core": best.core.unflatten(2, kept), "out_factor": best.outer, **factors}
    return Factors(tensors, max(sweeps, 1), converged)


def _curve(problem: CurveProblem) -> ErrorCurve:
    """Return the error at the start of all ranks: the frames are nested, so these are blocks of one covariance."""
    modes, weight = problem.spec.in_modes, problem.kernel.flatten(2)
    covariance = None if problem.moments is None else problem.covariance
    frames = _frames(weight, covariance, modes)
    turned = _through(weight.mT, frames, modes).mT
    square = None if covariance is None else _sandwiched(covariance, frames, modes)
    product = turned if square is None else turned @ square  # the frames are square, so nothing is lost
    power = float((turned * (turned if square is None else turned @ square)).sum())

    def errors(*kept: int) -> Floats:
        inside = _inside(modes, kept)
        right = product[..., inside]
        core = right if square is None else solve_spd(square[:, inside][..., inside], right.mT).mT
        found = core @ right.mT
        return tails(torch.linalg.eigvalsh(symmetrize_(found)), power)

    known = Memo(errors)

    def curve(ranks: Ranks) -> Floats:
        return np.array([known(*kept)[out] for out, *kept in ranks.tolist()])

    return curve


def _frames(weight: Tensor, covariance: Covariance | None, modes: Shape) -> Frames:
    """Return an orthonormal square matrix (batch, n, n) for each mode, whose first columns span what matters most."""
    whitening = None if covariance is None else Whitening.of(covariance, modes)
    white = (weight if whitening is None else whitening.whiten(weight)).unflatten(2, modes)
    found = []
    for at in range(len(modes)):
        vectors: Tensor = torch.linalg.eigh(gram(white.movedim(at + 2, 1).flatten(2))).eigenvectors.flip(-1)
        back = vectors if whitening is None else whitening.inverses[at] @ vectors
        found.append(torch.linalg.qr(back).Q)
    first, second, third = found
    return first, second, third


def _cut(frames: Frames, kept: Sequence[int]) -> Frames:
    """Return the leading columns of each frame; the identity for one that is full, which then has no factor."""
    first, second, third = (
        torch.eye(size).to(frame).expand(len(frame), -1, -1) if size == frame.shape[1] else frame[..., :size]
        for frame, size in zip(frames, kept, strict=True)
    )
    return first, second, third


class _Fit(NamedTuple):
    """Frames (batch, n, r) of the modes, the core (batch, r_out, m) and the output factor, or None where it is full."""

    frames: Frames
    core: Tensor
    outer: Tensor | None
    captured: Tensor  # output power that is explained, for each of the batch


@dataclass(frozen=True, eq=False)
class _Regression:
    """A weight and the covariance under which it is approximated, with what all sweeps need of both."""

    weight: Tensor  # (batch, out, n)
    covariance: Covariance | None
    product: Tensor  # weight · covariance
    power: Tensor  # tr(W C Wᵀ): (batch,)
    modes: Shape

    @classmethod
    def of(cls, weight: Tensor, covariance: Covariance | None, modes: Shape) -> Self:
        product = weight if covariance is None else weight @ covariance
        return cls(weight, covariance, product, (product * weight).sum((1, 2)), modes)

    def step(self, frames: Frames, rank: int) -> _Fit:
        """Return the best core and output factor given the frames."""
        right = _through(self.product.mT, frames, self.modes).mT
        square = None if self.covariance is None else _sandwiched(self.covariance, frames, self.modes)
        core = right if square is None else solve_spd(square, right.mT).mT
        explained = core @ right.mT
        if rank == self.weight.shape[1]:
            return _Fit(frames, core, None, explained.diagonal(dim1=-2, dim2=-1).sum(-1))
        values, vectors = torch.linalg.eigh(symmetrize_(explained))
        outer = vectors[..., -rank:].flip(-1)
        return _Fit(frames, outer.mT @ core, outer, values[..., -rank:].sum(-1))

    def improved(self, found: _Fit, at: int, steps: int) -> Frames:
        """Return the frames with that of one mode nearer to its least-squares solution, given all others."""
        product = self.product if found.outer is None else found.outer.mT @ self.product
        tensor = found.core.unflatten(2, [frame.shape[-1] for frame in found.frames])
        for other, frame in enumerate(found.frames):
            if other != at:  # what the core is in the frames of all other modes
                tensor = torch.einsum("bnr,b...r->b...n", frame, tensor.movedim(other + 2, -1)).movedim(-1, other + 2)
        expanded = tensor.movedim(at + 2, 2).flatten(3)  # (batch, r_out, r, all other modes)

        def seen(rows: Tensor) -> Tensor:
            moved = rows.unflatten(2, self.modes).movedim(at + 2, 2).flatten(3)
            return torch.einsum("bano,baro->bnr", moved, expanded)

        def normal(frame: Tensor) -> Tensor:
            others = [n for k, n in enumerate(self.modes) if k != at]
            dense = torch.einsum("bnr,baro->bano", frame, expanded).unflatten(3, others).movedim(2, at + 2).flatten(2)
            return seen(dense if self.covariance is None else dense @ self.covariance)

        weights = preconditioner(torch.einsum("baro,baso->brs", expanded, expanded), 1e-6)
        inputs = None if self.covariance is None else preconditioner(marginal(self.covariance, self.modes, at), 1e-6)

        def precondition(frame: Tensor) -> Tensor:
            scaled = frame if inputs is None else torch.cholesky_solve(frame, inputs)
            return torch.cholesky_solve(scaled.mT, weights).mT

        start = found.frames[at]
        moved, _ = conjugate_gradients(normal, seen(product), start, steps=steps, precondition=precondition)
        new = list(found.frames)
        new[at] = torch.linalg.qr(moved).Q
        first, second, third = new
        return first, second, third


def _through(columns: Tensor, frames: Frames, modes: Shape) -> Tensor:
    """Return (U₁ ⊗ U₂ ⊗ U₃)ᵀ times columns (batch, n, m)."""
    tensor = columns.unflatten(1, modes)
    return torch.einsum("bcr,bhs,bwt,bchwm->brstm", *frames, tensor).flatten(1, 3)


def _sandwiched(covariance: Covariance, frames: Frames, modes: Shape) -> Tensor:
    """Return (U₁ ⊗ U₂ ⊗ U₃)ᵀ C (U₁ ⊗ U₂ ⊗ U₃), exactly symmetric."""
    if isinstance(covariance, Sketch):
        rows = _through(covariance.rows.mT, frames, modes)
        first, second, third = ((frame.unsqueeze(-1) * frame.unsqueeze(-2)).flatten(2) for frame in frames)
        rest = _through(covariance.rest.unsqueeze(-1), (first, second, third), modes)
        sizes = [n for frame in frames for n in (frame.shape[-1],) * 2]
        diagonal = rest.reshape(len(rest), *sizes).permute(0, 1, 3, 5, 2, 4, 6).reshape(*rows.shape[:2], -1)
        return rows @ rows.mT + diagonal
    half = _through(covariance, frames, modes)
    square = _through(half.mT, frames, modes)
    return symmetrize_(square)


def _inside(modes: Shape, kept: Sequence[int]) -> Tensor:
    """Return the places, among those of the flattened modes, whose index in each mode is below a number."""
    places = torch.arange(prod(modes)).reshape(modes)
    first, second, third = kept
    return places[:first, :second, :third].flatten()
