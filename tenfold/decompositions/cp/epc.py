"""CP whose components do not cancel: alternating least squares, then the least sensitivity at nearly the same error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS
from tenfold.decompositions.cp.als import CPALS, fit_cp
from tenfold.decompositions.cp.base import KruskalDecomposition, KruskalFit
from tenfold.decompositions.cp.correction import Objective, correct, objective_of, refine
from tenfold.decompositions.cp.gauss_newton import descend
from tenfold.errors import TenfoldError
from tenfold.tensors import kruskal


@DECOMPOSITIONS.register("cp_epc")
@dataclass(frozen=True)
class CPEPC(KruskalDecomposition):
    """Error preserving correction: least squares first, then the least sensitivity (or norms) within an error bound.

    Least squares alone drive components to large norms that cancel: each sweep buys a little error with them, and the
    layer can hardly be trained. A small share of the error given back buys most of that stability (Phan et al. 2020,
    arXiv 2008.05441; Phan, Tichavsky & Cichocki 2019, arXiv 1709.08349). Computes in float64.

    Attributes:
        slack: the squared error may be this many times that of the start. At 1 nothing can move after a start that
            has converged.
        bound: instead, the relative error ‖W − Ŵ‖/‖W‖ that is allowed; where the start misses it, ``slack`` holds.
        objective: ``sensitivity`` to noise in the factors, or Σ of the squared ``norms`` of the components.
        sweeps: of each correction, at most.
        tol: stop a correction when a sweep lowers the objective by less than this share.
        rounds: after the correction go back to least squares for a few sweeps and correct again, at most this often
            and while it helps by more than 1 %.
    """

    slack: float = 1.02
    bound: float | None = None
    objective: Objective = "sensitivity"
    sweeps: int = 200
    tol: float = 1e-3
    rounds: int = 1

    def __post_init__(self) -> None:
        """Refuse bounds that no factors can meet, and an objective that is not known."""
        if not self.slack >= 1:
            msg = f"slack={self.slack} must be at least 1: it multiplies the squared error of the start"
            raise TenfoldError(msg)
        if self.bound is not None and not 0 < self.bound < 1:
            msg = f"bound={self.bound} must lie between 0 and 1: it is a relative error"
            raise TenfoldError(msg)
        if self.objective not in ("sensitivity", "norms"):
            msg = f"objective={self.objective!r} is not known: it is 'sensitivity' or 'norms'"
            raise TenfoldError(msg)

    slow = True

    def fit_tensor(self, tensor: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> KruskalFit:
        """Return the factors (batch, n, rank) of tensors (batch, n_1, …), in their dtype."""
        wide = tensor.double()
        known = None if start is None else [f.double() for f in start]
        first = fit_cp(wide, rank, CPALS(seed=self.seed), start=known)
        factors, sweeps = list(first.factors), first.n_iter
        near = (first.rel_errors > _ROUNDED.get(tensor.dtype, 1e-6)) & (first.rel_errors < _NEARLY)
        if bool(near.any()):
            accurate = descend(wide, factors, n_iter=_STEPS, tol=_STEP_TOL)
            factors, sweeps = accurate.factors, sweeps + accurate.n_iter
        stable = self.stabilise(wide, factors, tensor.dtype)
        stored = [f.to(tensor.dtype) for f in stable.factors]
        return KruskalFit(stored, sweeps + stable.n_iter, first.converged and stable.converged, stable.note)

    def stabilise(self, tensor: Tensor, factors: Sequence[Tensor], stored: torch.dtype = torch.float64) -> KruskalFit:
        """Return the factors corrected: an error within the bound, the objective far lower.

        Args:
            tensor: (batch, n_1, …), float64.
            factors: (batch, n_m, R) of each mode, float64.
            stored: the dtype in which factors will be stored; errors below its rounding are the same.
        """
        limit, exact = self._limit(tensor, factors, stored)
        if exact:
            return KruskalFit(kruskal.balance(factors), 0, converged=True, note="exact: nothing to give back")
        before = objective_of(kruskal.balance(factors), self.objective)
        best = correct(tensor, factors, limit, self.objective, sweeps=self.sweeps, tol=self.tol)
        stable, value, sweeps = best.factors, best.objective, best.sweeps
        for _ in range(self.rounds):
            fitted = refine(tensor, stable, _REFINED)
            again = correct(tensor, fitted, limit, self.objective, sweeps=self.sweeps, tol=self.tol)
            sweeps += _REFINED + again.sweeps
            lower = again.objective < value
            enough = bool((again.objective < 0.99 * value).any())
            stable = [torch.where(lower[:, None, None], a, b) for a, b in zip(again.factors, stable, strict=True)]
            value = torch.where(lower, again.objective, value)
            if not enough:
                break
        tiny = torch.finfo(value.dtype).tiny
        times = float((before.clamp_min(tiny) / value.clamp_min(tiny)).log().mean().exp())
        return KruskalFit(
            stable, sweeps, best.converged, f"{self.objective} {times:.3g} times lower than after least squares"
        )

    def _limit(self, tensor: Tensor, factors: Sequence[Tensor], stored: torch.dtype) -> tuple[Tensor, bool]:
        """Return the squared error (batch,) that is allowed, and whether all errors are rounding and may stay that.

        At most the share ``slack`` − 1 of the fit is given up, too: of a poor one, little is left to give.
        """
        total = tensor.flatten(1).square().sum(-1)
        reached = (tensor - kruskal.to_tensor(factors)).flatten(1).square().sum(-1)
        limit = torch.minimum(self.slack * reached, reached + (self.slack - 1) * (total - reached).clamp_min(0))
        if self.bound is not None:
            allowed = self.bound**2 * total
            limit = torch.where(reached <= allowed, allowed, limit)
        floor = _ROUNDED.get(stored, _ROUNDED[torch.float32]) ** 2 * total
        exact = self.bound is None and bool((reached <= floor).all())
        return torch.maximum(limit, floor).clamp_min(torch.finfo(limit.dtype).tiny), exact


# Errors as small say that the tensor has such a rank, or nearly: then Gauss-Newton is there in a few steps.
_NEARLY = 1e-2

# Of Gauss-Newton.
_STEPS, _STEP_TOL = 100, 1e-7

# Sweeps of least squares between two corrections.
_REFINED = 20

# Relative errors below these are rounding.
_ROUNDED = {torch.float64: 1e-7, torch.float32: 1e-6}
