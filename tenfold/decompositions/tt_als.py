"""Tensor trains under the data: alternating least squares on the output error, one core at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, CovarianceDecomposition, Factors, FitProblem
from tenfold.decompositions.curves import CurveProblem, ErrorCurve
from tenfold.decompositions.roots import Whitening
from tenfold.decompositions.tt_svd import train_curve
from tenfold.formats import Factorization
from tenfold.formats.train import TrainFormat
from tenfold.tensors import trains
from tenfold.tensors.conjugate_gradients import Map, conjugate_gradients, dot
from tenfold.tensors.trains import Cores

# Squared residuals below this share of the square of what is sought are rounding.
_ROUNDING = 1e-28


@DECOMPOSITIONS.register("tt_als")
@dataclass(frozen=True)
class TTALS(CovarianceDecomposition):
    """Alternating least squares on the output error, for tensor trains of any kind; the error never grows.

    The inputs are whitened mode by mode, by the covariance that each mode has on its own: that keeps a train a train.
    TT-SVD of the whitened weight is the start. Then core after core, to the right and back, solves its least-squares
    problem tr(Δ C Δᵀ) by a few steps of conjugate gradients in orthonormal frames of the other cores (ALS: Holtz,
    Rohwedder & Schneider 2012, SIAM J. Sci. Comput. 34). Without a covariance this is ALS on the weight.

    Attributes:
        n_iter: sweeps at most, each to the right and back.
        tol: stop when a sweep lowers the error by less than this share of E‖y−ȳ‖².
        cg_steps: steps of conjugate gradients for each core.
        ridge: added to the covariance, as a share of the mean variance.
    """

    n_iter: int = 8
    tol: float = 1e-4
    cg_steps: int = 3

    @classmethod
    def supports(cls, format: type[Factorization]) -> bool:
        """Whether the format is a tensor train, and splits the inputs as they are."""
        return issubclass(format, TrainFormat) and format.splits_inputs

    def fit(self, problem: FitProblem) -> Factors:
        """Return the cores of the runs, of equal norms."""
        format, spec, rank, weight = problem.format_as(TrainFormat), problem.spec, problem.rank, problem.weight
        sizes, bonds = format.merged(spec, rank)

        def to_train(kernel: Tensor) -> Tensor:
            return format.to_tensor(kernel, spec).reshape(len(kernel), *sizes)

        def to_weight(tensor: Tensor) -> Tensor:
            return format.from_tensor(tensor.reshape(len(tensor), *format.modes(spec)), spec)

        if problem.covariance is None:
            target = to_train(weight)
            cores, sweeps, converged = alternate(target, trains.tt_svd(target, bonds, batch_dims=1), lambda t: t, self)
        else:
            covariance = self.regularized(problem)
            whitening = Whitening.of(covariance, format.input_modes(spec))

            def metric(tensor: Tensor) -> Tensor:
                unwhitened = whitening.unwhiten(to_weight(tensor))
                return to_train(whitening.unwhiten((unwhitened.flatten(2) @ covariance).view_as(unwhitened)))

            target = to_train(whitening.whiten(weight))
            cores, sweeps, converged = alternate(target, trains.tt_svd(target, bonds, batch_dims=1), metric, self)
            unwhitened = to_train(whitening.unwhiten(to_weight(trains.tt_to_dense(cores))))
            cores = trains.tt_svd(unwhitened, bonds, batch_dims=1)  # of just the same ranks
        return Factors(format.named_cores(spec, rank, trains.tt_balance(cores)), sweeps, converged)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the curve of trains: see ``train_curve``."""
        return train_curve(problem, self)


def alternate(target: Tensor, start: Cores, metric: Map, config: TTALS) -> tuple[Cores, int, bool]:
    """Return a train nearer to ``target`` (batch, *modes) than ``start``, how many sweeps it took, and if it settled.

    Args:
        target: what to approximate.
        start: cores (batch, r, n, r') of the ranks to keep.
        metric: the symmetric map M of ⟨Δ, M Δ⟩, batch by batch.
        config: sweeps, tolerance and steps.
    """
    if len(start) == 1:
        return start, 1, True
    image = metric(target)
    total = dot(target, image)
    total = torch.where(total > 0, total, torch.ones_like(total))
    best, least = start, _error(start, target, metric) / total
    cores, sweeps, converged = list(_right_orthonormal(start)), 0, False
    while not converged and sweeps < config.n_iter:
        for at in range(len(cores) - 1):
            cores[at] = _improved(cores, at, image, metric, config.cg_steps)
            cores[at], cores[at + 1] = _shift_right(cores[at], cores[at + 1])
        for at in range(len(cores) - 1, 0, -1):
            cores[at] = _improved(cores, at, image, metric, config.cg_steps)
            cores[at - 1], cores[at] = _shift_left(cores[at - 1], cores[at])
        now = _error(tuple(cores), target, metric) / total
        sweeps += 1
        converged = bool((least - now <= config.tol).all())
        better = now < least
        best = tuple(torch.where(better[:, None, None, None], new, old) for new, old in zip(cores, best, strict=True))
        least = torch.where(better, now, least)
    return best, sweeps, converged


def _improved(cores: Sequence[Tensor], at: int, image: Tensor, metric: Map, steps: int) -> Tensor:
    """Return the core ``at`` nearer to its best, given all others, whose frames are orthonormal."""
    batch, modes = len(image), image.shape[1:]
    left = _before(cores[:at], batch, image)
    right = _before(tuple(core.transpose(-3, -1) for core in reversed(cores[at + 1 :])), batch, image)
    right = right.unflatten(1, (*reversed(modes[at + 1 :]), 1)).permute(0, *range(len(modes) - at, 0, -1), -1)
    right = right.reshape(batch, -1, right.shape[-1])

    def project(tensor: Tensor) -> Tensor:
        """Return what a tensor is in the frames: (batch, r, n, r')."""
        flat = left.mT @ tensor.reshape(batch, left.shape[1], -1)
        core: Tensor = flat.unflatten(-1, (modes[at], -1)) @ right.unsqueeze(1)
        return core

    def expand(core: Tensor) -> Tensor:
        """Return the tensor (batch, *modes) of a core in the frames."""
        flat = (core @ right.mT.unsqueeze(1)).flatten(2)
        tensor: Tensor = left @ flat
        return tensor.reshape(batch, *modes)

    def normal(core: Tensor) -> Tensor:
        return project(metric(expand(core)))

    enough = _ROUNDING * dot(image, image)
    core, _ = conjugate_gradients(normal, project(image), cores[at], steps=steps, enough=enough)
    return core


def _before(cores: Sequence[Tensor], batch: int, like: Tensor) -> Tensor:
    """Return what cores (batch, r, n, r') from the end of a train on multiply to: (batch, ∏n, r')."""
    chain = like.new_ones(batch, 1, 1)
    for core in cores:
        chain = (chain @ core.flatten(2)).reshape(batch, -1, core.shape[-1])
    return chain


def _shift_right(core: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal core (r·n, r') and the next one with what that leaves."""
    frame, rest = torch.linalg.qr(core.flatten(1, 2))
    return frame.view_as(core), (rest @ after.flatten(2)).view_as(after)


def _shift_left(before: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Return the core before with what an orthonormal core (r, n·r') leaves, and that core."""
    frame, rest = torch.linalg.qr(core.flatten(2).mT)
    return before @ rest.mT.unsqueeze(1), frame.mT.reshape(core.shape)


def _right_orthonormal(cores: Cores) -> Cores:
    framed = list(cores)
    for at in range(len(framed) - 1, 0, -1):
        framed[at - 1], framed[at] = _shift_left(framed[at - 1], framed[at])
    return tuple(framed)


def _error(cores: Cores, target: Tensor, metric: Map) -> Tensor:
    missed = target - trains.tt_to_dense(cores)
    return dot(missed, metric(missed))
