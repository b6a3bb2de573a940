"""Damped Gauss-Newton for sums of rank-one tensors: all factors move at once, which gets out of swamps.

The normal equations (JᵀJ + μI)·p = −g have Σ n_m·R unknowns. JᵀJ is never formed: it multiplies a step by way of R×R
Gram matrices, at a cost that does not depend on the size of the tensor, so that conjugate gradients find the step
(Sorber, Van Barel & De Lathauwer 2013, SIAM J. Optim. 23(2); block-diagonal preconditioner as there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tenfold.tensors import kruskal

Steps = list[Tensor]

# Damping starts at this share of the mean diagonal of JᵀJ, and never falls below the other one.
_DAMPED, _LEAST = 0.1, 1e-12

# A step is found when the residual of its equations has fallen to this share.
_SOLVED = 1e-3


@dataclass(frozen=True, eq=False)
class Descended:
    """Factors, their squared errors (batch,), the steps that were tried, and whether all came to rest."""

    factors: list[Tensor]
    squares: Tensor
    n_iter: int
    converged: bool


def descend(tensor: Tensor, factors: Sequence[Tensor], *, n_iter: int, tol: float, n_cg: int = 20) -> Descended:
    """Return factors with a lower squared error, by Levenberg-Marquardt; the error never rises.

    Args:
        tensor: (batch, n_1, …), float64.
        factors: where to start, (batch, n_m, R) of each mode.
        n_iter: steps to try at most.
        tol: stop when a step lowers the relative error ‖T − T̂‖/‖T‖ by less than this.
        n_cg: conjugate gradient iterations for a step at most.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> true, start = ([torch.randn(1, 4, 2, generator=generator).double() for _ in range(3)] for _ in range(2))
        >>> bool(descend(kruskal.to_tensor(true), start, n_iter=100, tol=1e-12).squares < 1e-18)
        True
    """
    best = kruskal.equalize(factors)
    total = tensor.flatten(1).square().sum(-1)
    scale = torch.where(total > 0, total, 1.0)
    squares = _squares(tensor, best)
    unit = torch.stack([_blocks(best, m).diagonal(dim1=-2, dim2=-1).mean(-1) for m in range(len(best))]).amax(0)
    unit = torch.where(unit > 0, unit, 1.0)
    damping, growth = _DAMPED * unit, torch.full_like(unit, 2.0)
    gradient, calm, done = _gradient(tensor, best), torch.zeros_like(unit), 0
    while done < n_iter and not bool((calm >= _CALM).all()):
        step = _solve(best, gradient, damping, n_cg)
        there = [f + p for f, p in zip(best, step, strict=True)]
        now = _squares(tensor, there)
        promised = -2 * _dot(gradient, step) - _dot(step, _gauss_newton(best, step))
        gain = (squares - now) / torch.where(promised > 0, promised, torch.inf)
        taken = (now < squares) & (gain > 0)
        fall = ((squares / scale).sqrt() - (now / scale).sqrt()).clamp_min(0)
        calm = torch.where(taken & (fall > tol), 0.0, calm + taken.double() + (growth > _STUCK).double())
        # Nielsen's rule: less damping the better the quadratic model was, more and more of it while steps fail.
        eased = damping * (1 - (2 * gain - 1).pow(3)).clamp_min(1 / 3)
        damping = torch.where(taken, eased, damping * growth).clamp_min(_LEAST * unit)
        growth = torch.where(taken, 2.0, growth * 2)
        if bool(taken.any()):
            here = taken[:, None, None]
            best = kruskal.equalize([torch.where(here, b, a) for a, b in zip(best, there, strict=True)])
            squares = torch.where(taken, now, squares)
            gradient = _gradient(tensor, best)
        done += 1
    return Descended(best, squares, done, bool((calm >= _CALM).all()))


_CALM, _STUCK = 2, 2.0**8


def _squares(tensor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return (tensor - kruskal.to_tensor(factors)).flatten(1).square().sum(-1)


def _blocks(factors: Sequence[Tensor], mode: int) -> Tensor:
    return kruskal.gram_product(factors, skip=mode)


def _gradient(tensor: Tensor, factors: Sequence[Tensor]) -> Steps:
    """Return the gradient of half the squared error with respect to each factor."""
    return [f @ _blocks(factors, m) - kruskal.mttkrp(tensor, factors, m) for m, f in enumerate(factors)]


def _gauss_newton(factors: Sequence[Tensor], step: Steps) -> Steps:
    """Return JᵀJ times a step, from R×R matrices only."""
    grams = [f.mT @ f for f in factors]
    across = [f.mT @ p for f, p in zip(factors, step, strict=True)]
    modes = range(len(factors))
    products = []
    for m in modes:
        diagonal = step[m] @ reduce(torch.mul, [grams[k] for k in modes if k != m])
        mixed = [
            reduce(torch.mul, [across[k].mT, *(grams[j] for j in modes if j not in (m, k))]) for k in modes if k != m
        ]
        products.append(diagonal + factors[m] @ torch.stack(mixed).sum(0))
    return products


def _solve(factors: Sequence[Tensor], gradient: Steps, damping: Tensor, n_cg: int) -> Steps:
    """Return the step p with (JᵀJ + μI)·p ≈ −g, by conjugate gradients with the diagonal blocks as preconditioner."""
    mu = damping[:, None, None]
    eye = torch.eye(factors[0].shape[-1], dtype=mu.dtype, device=mu.device)
    lower = [torch.linalg.cholesky(_blocks(factors, m) + mu * eye) for m in range(len(factors))]

    def eased(residual: Steps) -> Steps:
        return [torch.cholesky_solve(r.mT, c).mT for r, c in zip(residual, lower, strict=True)]

    step, residual = [torch.zeros_like(f) for f in factors], [-g for g in gradient]
    first = _dot(residual, residual)
    turned = eased(residual)
    along, power = turned, _dot(residual, turned)
    for _ in range(n_cg):
        image = [a + mu * p for a, p in zip(_gauss_newton(factors, along), along, strict=True)]
        far = _ratio(power, _dot(along, image))[:, None, None]
        step = [s + far * p for s, p in zip(step, along, strict=True)]
        residual = [r - far * a for r, a in zip(residual, image, strict=True)]
        if bool((_dot(residual, residual) <= _SOLVED**2 * first).all()):
            break
        turned = eased(residual)
        last, power = power, _dot(residual, turned)
        share = _ratio(power, last)[:, None, None]
        along = [t + share * p for t, p in zip(turned, along, strict=True)]
    return step


def _dot(these: Steps, those: Steps) -> Tensor:
    return torch.stack([(a * b).sum((-2, -1)) for a, b in zip(these, those, strict=True)]).sum(0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)
