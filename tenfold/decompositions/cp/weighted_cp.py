"""CP decomposition that knows the data: alternating least squares on the error of the layer's output.

With the output factor A and Z, the Khatri-Rao product of all the others, the weight is A·Zᵀ and the error under the
covariance C is tr((W − A Zᵀ) C (W − A Zᵀ)ᵀ) (the CPD of Kalle et al. 2025, arXiv 2511.04494). A comes in closed form;
each other factor by conjugate gradients on its normal equations, which are never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, CovarianceDecomposition, Factors, FitProblem
from tenfold.decompositions.covariance import Covariance, add_ridge, channel_blocks, sandwich
from tenfold.decompositions.cp.als import CPALS, fit_cp
from tenfold.decompositions.roots import preconditioner, solve_spd, sqrt_and_inverse_sqrt
from tenfold.formats import Kruskal
from tenfold.tensors import khatri_rao, kruskal, symmetrize_
from tenfold.tensors.conjugate_gradients import conjugate_gradients


@DECOMPOSITIONS.register("weighted_cp")
@dataclass(frozen=True)
class WeightedCP(CovarianceDecomposition):
    """Alternating least squares for CP on the output error, which never grows; starts from the channel-whitened kernel.

    The start is a fit of the kernel whose input channels are whitened (``cp_als`` in these coordinates), which would be
    the optimum if all taps saw uncorrelated inputs. Without a covariance it is all there is to do.

    Attributes:
        n_iter: sweeps under the full covariance at most.
        tol: stop when the error falls by less than this share of E‖y−ȳ‖² in a sweep.
        cg_steps: steps of conjugate gradients for each factor in each sweep.
        start_iter: sweeps of the start at most.
        penalty: weight of Σ λ_r², as ``ridge`` of ``cp_als``.
        ridge: added to the covariance, as a share of the mean variance.
    """

    n_iter: int = 10
    tol: float = 1e-4
    cg_steps: int = 5
    start_iter: int = 100
    penalty: float = 3e-3

    formats = (Kruskal,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return one factor for each mode."""
        format, spec, rank = problem.format_as(Kruskal), problem.spec, problem.rank["rank"]
        tensor = format.tensorize(problem.weight, spec)
        settings = CPALS(n_iter=self.start_iter, ridge=self.penalty, seed=self.seed)
        if problem.covariance is None or rank == format.max_rank(spec)["rank"]:
            result = fit_cp(tensor, rank, settings)
            return Factors(format.of(spec, result.factors).tensors(), result.n_iter, result.converged, result.note)
        covariance = self.regularized(problem)
        root, inverse = sqrt_and_inverse_sqrt(add_ridge(channel_blocks(covariance, prod(spec.kernel)), _ENOUGH))
        start = fit_cp(torch.einsum("boi...,bij->boj...", tensor, root), rank, settings)
        outer, inner, *rest = start.factors
        state = _Weighted(tensor, covariance, [outer, inverse @ inner, *rest], self.penalty)
        sweeps, converged = 0, False
        while not converged and sweeps < self.n_iter:
            before = state.errors
            state.sweep(self.cg_steps)
            sweeps += 1
            converged = bool((before - state.errors <= self.tol * state.total).all())
        balanced = kruskal.balance(state.factors)
        return Factors(format.of(spec, balanced).tensors(), start.n_iter + sweeps, converged, start.note)


# Whitening divides by the spread of each direction: by no less than about this share of the mean variance.
_ENOUGH = 1e-4


class _Weighted:
    """A weight under a covariance and the current factors (batch, n, R); output channels are the first mode."""

    def __init__(self, tensor: Tensor, square: Covariance, factors: list[Tensor], penalty: float) -> None:
        self.factors = factors
        self._sizes = tuple(tensor.shape[2:])
        self._square = square
        weight = tensor.flatten(2)
        self._product = weight @ square  # W·C (batch, out, n)
        self._blocks = channel_blocks(square, prod(self._sizes[1:]))
        power = (self._product * weight).flatten(1).sum(-1)
        self.total = torch.where(power > 0, power, 1.0)
        self._power, self._penalty = power, penalty
        self._ridge = torch.zeros_like(power)
        self._solve_outputs()
        self._ridge = penalty * self.errors / self.total

    def sweep(self, cg_steps: int) -> None:
        """Update every factor once."""
        for mode in range(1, len(self.factors)):
            self._step(mode, cg_steps)
        self._solve_outputs()
        self._ridge = torch.minimum(self._ridge, self._penalty * self.errors / self.total)

    def _columns(self) -> Tensor:
        """Return Z (batch, n, R)."""
        return reduce(khatri_rao, self.factors[1:])

    def _solve_outputs(self) -> None:
        """Set A to (W C Z)(Zᵀ C Z + ridge·diag)⁻¹ and the errors tr(Δ C Δᵀ) to what is left then."""
        columns = self._columns()
        right = self._product @ columns  # (batch, out, R)
        inner = symmetrize_(sandwich(columns.mT, self._square))
        held = inner + torch.diag_embed(inner.diagonal(dim1=1, dim2=2) * (self._ridge[:, None] + _HOLD))
        outer = solve_spd(held, right.mT).mT
        self.factors[0] = outer
        missed = self._power - 2 * (right * outer).sum((1, 2)) + (inner * (outer.mT @ outer)).sum((1, 2))
        self.errors = missed.clamp_min(0)

    def _step(self, mode: int, steps: int) -> None:
        """Move one factor nearer to its least-squares solution, all others given, by conjugate gradients."""
        weights = self.factors[0].mT @ self.factors[0]  # AᵀA (batch, R, R)
        others = [m for m in range(1, len(self.factors)) if m != mode]
        gram = reduce(torch.mul, (self.factors[m].mT @ self.factors[m] for m in others), weights)
        level = self._blocks.diagonal(dim1=1, dim2=2).mean(-1)
        diagonal = gram.diagonal(dim1=1, dim2=2) * (level * self._ridge)[:, None]
        lower_r = preconditioner(gram + torch.diag_embed(gram.diagonal(dim1=1, dim2=2).clamp_min(_TINY) * 1e-6), 0.0)
        lower_n = preconditioner(self._blocks, 1e-6) if mode == 1 else None

        def normal(x: Tensor) -> Tensor:
            dense = self._spread(x, mode)  # (batch, n, R)
            moved = (dense.mT @ self._square).mT @ weights
            return self._collect(moved, mode) + x * diagonal[:, None]

        def precondition(x: Tensor) -> Tensor:
            x = torch.cholesky_solve(x.mT, lower_r).mT
            return x if lower_n is None else torch.cholesky_solve(x, lower_n)

        right = self._collect((self._product.mT @ self.factors[0]), mode)
        factor, _ = conjugate_gradients(normal, right, self.factors[mode], steps=steps, precondition=precondition)
        self.factors[mode] = factor

    def _spread(self, x: Tensor, mode: int) -> Tensor:
        """Return Z with ``x`` in the place of one factor."""
        return reduce(khatri_rao, (x if m == mode else self.factors[m] for m in range(1, len(self.factors))))

    def _collect(self, moved: Tensor, mode: int) -> Tensor:
        """Return (batch, n_mode, R): a tensor (batch, n, R) summed with the columns of the other factors."""
        modes = list(range(1, len(self.factors)))
        return kruskal.contract_rest(moved.unflatten(1, self._sizes), self.factors, modes, mode)


_HOLD, _TINY = 1e-12, 1e-300
