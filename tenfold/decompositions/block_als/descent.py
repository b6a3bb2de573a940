"""Block coordinate descent for weights that are linear in each of a few blocks of unknowns; it never ends worse.

Tensor rings and block terms are such weights. With all blocks but one held, the best one is a linear least-squares
problem. Sweep after sweep this converges, at times slowly; each sweep therefore starts ahead of the last one, by the
last step times Nesterov's factor, which restarts where a sweep ends worse (Ang, Cohen, Gillis & Hien 2019).

A best sum of such terms need not exist: errors then fall for ever while terms grow and cancel (de Silva & Lim 2008, for
rank-one terms). So the squares of the terms are minimised too, with a weight that vanishes with the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tenfold.tensors.conjugate_gradients import conjugate_gradients, dot, each

Blocks = tuple[Tensor, ...]

# A solution stays this close to the block so far where that does not matter, as a share of the mean eigenvalue.
_HOLD, _FIRMER = 1e-12, 1e5

# Squared relative errors below this are rounding: they are found as differences of squares.
_ROUNDING = 1e-15

# Systems of more unknowns than this are not factorized, but take some steps of conjugate gradients.
DIRECT = 512
_CG_STEPS = 12

# So many sweeps in turn that hardly lower the error are rest.
_CALM = 2


class LeastSquares(Protocol):
    """A batch of tensors to approximate by blocks."""

    @property
    def power(self) -> Tensor:
        """The squared norms (batch,) of the tensors."""

    def sweep(self, blocks: Blocks, ridge: Tensor) -> tuple[Blocks, Tensor, Tensor]:
        """Return each block in turn as the best one with all others held; the squared errors then, and Σ‖term‖².

        Best is what has the least error² + ridge·Σ‖term‖², with a ``ridge`` (batch,) for each tensor.
        """


@dataclass(frozen=True, eq=False)
class Descent:
    """Blocks, their squared relative errors (batch,), the sweeps used, and whether all came to rest."""

    blocks: Blocks
    errors: Tensor
    sweeps: int
    converged: bool


def descend(problem: LeastSquares, start: Blocks, *, n_iter: int, tol: float, penalty: float = 0.0) -> Descent:
    """Return blocks that are nearer to the tensors than ``start``; from sweep to sweep the objective never rises.

    Args:
        problem: what to approximate.
        start: one block after the other, each with the batch first.
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
    while sweeps < n_iter and not _at_rest(calm, errors):
        ridge = torch.minimum(ridge, penalty * errors)
        objective = errors + ridge * spread
        tried, square, terms = problem.sweep(_beyond(before, now, (ahead - 1) / (ahead + 2)), ridge)
        lower = (square + ridge * terms) / total
        better = lower < objective
        slow = objective.sqrt() - lower.sqrt() <= tol * objective.sqrt()
        stuck = ~better & (ahead == 1)  # a sweep without extrapolation: what is left is rounding
        calm = torch.where(better, torch.where(slow, calm + 1, 0.0), torch.where(stuck, float(_CALM), calm))
        before, now = now, _select(better, tried, now)
        errors, spread = torch.where(better, square / total, errors), torch.where(better, terms / total, spread)
        ahead = torch.where(better, ahead + 1, torch.ones_like(ahead))
        sweeps += 1
    return Descent(now, errors, sweeps, _at_rest(calm, errors))


def _at_rest(calm: Tensor, errors: Tensor) -> bool:
    """Whether every problem of the batch has hardly changed for a while, or is solved."""
    return bool(((calm >= _CALM) | (errors <= _ROUNDING)).all())


def _select(which: Tensor, new: Blocks, old: Blocks) -> Blocks:
    return tuple(torch.where(each(which, b), b, a) for a, b in zip(old, new, strict=True))


def solve(gram: Tensor, right: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (batch, n, m) with the least xᵀGx − 2·rightᵀx, near ``held`` where that does not tell, and this number.

    ``gram`` is (batch, n, n), positive semidefinite.
    """
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    hold = torch.where(level > 0, level * _HOLD, torch.ones_like(level))
    lower, failed = torch.linalg.cholesky_ex(add_diagonal(gram, hold))
    while bool(failed.any()) and float(hold.max()) < torch.inf:
        hold = torch.where(failed > 0, hold * _FIRMER, hold)
        lower, failed = torch.linalg.cholesky_ex(add_diagonal(gram, hold))
    x = torch.cholesky_solve(right + each(hold, held) * held, lower)
    return x, quadratic_value(gram @ x, right, x)


def solve_by_steps(gram: Callable[[Tensor], Tensor], right: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for a map G that is too large to be written down: some conjugate gradients from ``held``."""
    x, residual = conjugate_gradients(gram, right, held, steps=_CG_STEPS)
    return x, quadratic_value(right - residual, right, x)


def quadratic_value(image: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Return xᵀGx − 2·rightᵀx (batch,), ``image`` being Gx."""
    return dot(x, image) - 2 * dot(x, right)


def add_diagonal(square: Tensor, by: Tensor) -> Tensor:
    """Return matrices (batch, n, n) plus one number for each of the batch on the diagonal."""
    return square + torch.diag_embed(by[:, None].expand(square.shape[:-1]))


def _beyond(before: Blocks, now: Blocks, share: Tensor) -> Blocks:
    return tuple(b + each(share, b) * (b - a) for a, b in zip(before, now, strict=True))
