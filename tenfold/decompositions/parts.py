"""Weights that are linear in each of a few parts: sweeps from part to part, extrapolated, that never end worse.

Tensor rings and block terms are such weights. With all parts but one held, the best one is a linear least-squares
problem. Sweep after sweep this converges, at times slowly; each sweep therefore starts ahead of the last one, by the
step that was made times Nesterov's factor, which starts anew where a sweep ends worse (Ang, Cohen, Gillis & Hien 2019).

A best sum of such terms need not exist: errors then fall for ever while terms grow and cancel (de Silva & Lim 2008, for
rank-one terms). So the squares of the terms are minimised too, with a weight that vanishes with the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tenfold.tensors.conjugate_gradients import conjugate_gradients, dot, each

Parts = tuple[Tensor, ...]

# A solution stays this close to the part so far where that does not matter, as a share of the mean eigenvalue.
_HOLD, _FIRMER = 1e-12, 1e5

# Squared relative errors below this are rounding: they are found as differences of squares.
_ROUNDING = 1e-15

# Systems of more unknowns than this are not factorized, but take some steps of conjugate gradients.
DIRECT = 512
_CG_STEPS = 12

# Tensors with at most so many entries are begun several times, at once; of larger ones all starts end alike.
_SMALL = 1 << 12
_SHORT = 20

# So many sweeps in turn that hardly lower the error are rest.
_CALM = 2


class Problem(Protocol):
    """A batch of tensors to meet by parts."""

    @property
    def power(self) -> Tensor:
        """The squared norms (batch,) of the tensors."""

    def sweep(self, parts: Parts, ridge: Tensor) -> tuple[Parts, Tensor, Tensor]:
        """Return each part in turn as the best one with all others held; the squared errors then, and Σ‖term‖².

        Best is what has the least error² + ridge·Σ‖term‖², with a ``ridge`` (batch,) for each tensor.
        """


class SweepSettings(Protocol):
    """What ``descend_from`` must know."""

    @property
    def n_iter(self) -> int:
        """Sweeps at most."""

    @property
    def tol(self) -> float:
        """Stop when twice in turn a sweep lowers the relative error by less than this share of it."""

    @property
    def penalty(self) -> float:
        """Weight of the squares of the terms, times the relative squared error so far."""

    @property
    def starts(self) -> int:
        """From how many starts small tensors are tried, the first of them known."""

    @property
    def seed(self) -> int:
        """Of the random starts."""


@dataclass(frozen=True, eq=False)
class Found:
    """Parts, their squared relative errors (batch,), the sweeps that it took, and whether all came to rest."""

    parts: Parts
    errors: Tensor
    sweeps: int
    converged: bool


def descend(problem: Problem, start: Parts, *, n_iter: int, tol: float, penalty: float = 0.0) -> Found:
    """Return parts that are nearer to the tensors than ``start``; from sweep to sweep the objective never rises.

    Args:
        problem: what to meet.
        start: one part after the other, each with the batch first.
        n_iter: sweeps at most.
        tol: stop when twice in turn a sweep lowers the root of the objective by less than this share of it.
        penalty: the objective is error² + ridge·Σ‖term‖², with ``penalty`` times the relative error² so far as ridge.
            Without it, it is the error.
    """
    total = torch.where(problem.power > 0, problem.power, torch.ones_like(problem.power))
    ridge = penalty * torch.ones_like(total)
    now, square, terms = problem.sweep(start, ridge)
    before, errors, spread = now, square / total, terms / total
    ahead, calm, sweeps = torch.ones_like(errors), torch.zeros_like(errors), 1
    while sweeps < n_iter and not at_rest(calm, errors):
        ridge = torch.minimum(ridge, penalty * errors)
        goal = errors + ridge * spread
        tried, square, terms = problem.sweep(_beyond(before, now, (ahead - 1) / (ahead + 2)), ridge)
        found = (square + ridge * terms) / total
        better = found < goal
        slow = goal.sqrt() - found.sqrt() <= tol * goal.sqrt()
        stuck = ~better & (ahead == 1)  # a sweep without extrapolation: what is left is rounding
        calm = torch.where(better, torch.where(slow, calm + 1, 0.0), torch.where(stuck, float(_CALM), calm))
        before, now = now, chosen(better, tried, now)
        errors, spread = torch.where(better, square / total, errors), torch.where(better, terms / total, spread)
        ahead = torch.where(better, ahead + 1, torch.ones_like(ahead))
        sweeps += 1
    return Found(now, errors, sweeps, at_rest(calm, errors))


def descend_from(
    problem: Callable[[Tensor], Problem],
    tensor: Tensor,
    start: Parts,
    shapes: Sequence[Sequence[int]],
    settings: SweepSettings,
) -> Found:
    """Return what is found from a start, and for small tensors from random ones too, the best after some sweeps.

    Args:
        problem: returns the problem for tensors (batch, *modes).
        tensor: what to meet, (batch, *modes).
        start: parts, each with the batch first.
        shapes: of the parts without the batch.
        settings: how many starts and sweeps, and when to stop.
    """
    if settings.starts > 1 and tensor[0].numel() <= _SMALL:
        drawn = _random(shapes, settings.starts - 1, seed=settings.seed, like=tensor)
        begun = tuple(torch.cat([a[:, None], b], 1).flatten(0, 1) for a, b in zip(start, drawn, strict=True))
        together = problem(tensor.repeat_interleave(settings.starts, 0))
        tried = descend(together, begun, n_iter=min(_SHORT, settings.n_iter), tol=0, penalty=settings.penalty)
        start = _best_of(tried.parts, tried.errors, settings.starts)
    return descend(problem(tensor), start, n_iter=settings.n_iter, tol=settings.tol, penalty=settings.penalty)


def at_rest(calm: Tensor, errors: Tensor) -> bool:
    """Whether every problem of the batch has hardly changed for a while, or is solved."""
    return bool(((calm >= _CALM) | (errors <= _ROUNDING)).all())


def chosen(which: Tensor, there: Parts, here: Parts) -> Parts:
    """Return for each of a batch the parts ``there`` where ``which`` (batch,) says so, else those ``here``."""
    return tuple(torch.where(each(which, b), b, a) for a, b in zip(here, there, strict=True))


def solve(gram: Tensor, right: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (batch, n, m) with the least xᵀGx − 2·rightᵀx, near ``held`` where that does not tell, and this number.

    ``gram`` is (batch, n, n), positive semidefinite.
    """
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    hold = torch.where(level > 0, level * _HOLD, torch.ones_like(level))
    lower, failed = torch.linalg.cholesky_ex(raised(gram, hold))
    if bool(failed.any()):
        hold = torch.where(failed > 0, hold * _FIRMER, hold)
        lower = torch.linalg.cholesky(raised(gram, hold))
    x = torch.cholesky_solve(right + each(hold, held) * held, lower)
    return x, value(gram @ x, right, x)


def solve_by_steps(gram: Callable[[Tensor], Tensor], right: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for a map G that is too large to be written down: some conjugate gradients from ``held``."""
    x, residual = conjugate_gradients(gram, right, held, steps=_CG_STEPS)
    return x, value(right - residual, right, x)


def value(image: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Return xᵀGx − 2·rightᵀx (batch,), ``image`` being Gx."""
    return dot(x, image) - 2 * dot(x, right)


def raised(square: Tensor, by: Tensor) -> Tensor:
    """Return matrices (batch, n, n) plus one number for each of the batch on the diagonal."""
    return square + torch.diag_embed(by[:, None].expand(square.shape[:-1]))


def _beyond(before: Parts, now: Parts, share: Tensor) -> Parts:
    return tuple(b + each(share, b) * (b - a) for a, b in zip(before, now, strict=True))


def _random(shapes: Sequence[Sequence[int]], starts: int, *, seed: int, like: Tensor) -> Parts:
    """Return parts (batch, starts, ...) of normal numbers, the same starts for each of the batch of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(starts, *shape, generator=generator, dtype=torch.float64).to(like) for shape in shapes)
    return tuple(part.expand(len(like), *part.shape) for part in drawn)


def _best_of(parts: Parts, errors: Tensor, starts: int) -> Parts:
    """Return the parts (batch, ...) of the least error among those of several starts (batch·starts, ...)."""
    least = errors.unflatten(0, (-1, starts)).argmin(1)
    rows = torch.arange(len(least), device=least.device) * starts + least
    return tuple(part[rows] for part in parts)
