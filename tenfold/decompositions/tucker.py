"""Tucker-2 of convolution kernels: HOSVD (one pass) and HOOI (alternating)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors, FitProblem
from tenfold.formats import Rank, Tucker2
from tenfold.records import LayerSpec
from tenfold.tensors import gram, leading_eigenpairs, leading_eigenvectors


@DECOMPOSITIONS.register("hosvd")
@dataclass(frozen=True)
class HOSVD(Decomposition):
    """Higher-order SVD: each channel factor from its own unfolding (De Lathauwer, De Moor & Vandewalle 2000).

    The squared error is at most the sum of the two unfoldings' tails, and at most twice the optimum.
    """

    formats = (Tucker2,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return core and orthonormal factors; a full-rank side has no factor."""
        sides = _Sides.of(problem.weight)
        return Factors(sides.finish(*sides.start(problem.rank), problem.spec))


@DECOMPOSITIONS.register("hooi")
@dataclass(frozen=True)
class HOOI(Decomposition):
    """Higher-order orthogonal iteration: alternate between the two channel factors until the core's norm stops growing.

    De Lathauwer, De Moor & Vandewalle 2000; Tucker-2 of Kim et al. 2016. Starts from the HOSVD. Each half sweep takes
    the leading eigenvectors of the Gram matrix of the projected unfolding: (out × out) instead of (out × r_in·K), which
    is several times cheaper than an SVD and as exact as a subspace needs to be.

    Attributes:
        n_iter: sweeps at most.
        tol: stop when ‖core‖² grows by less than this share of ‖W‖².
    """

    n_iter: int = 20
    tol: float = 5e-4

    formats = (Tucker2,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return core and orthonormal factors; a full-rank side has no factor."""
        weight, spec, rank = problem.weight, problem.spec, problem.rank
        sides = _Sides.of(weight)
        if rank["out"] == weight.shape[1] or rank["in"] == weight.shape[2]:  # one side alone: its own eigenvectors
            return Factors(sides.finish(*sides.start(rank), spec))
        total = weight.flatten(1).square().sum(-1)
        inner = leading_eigenvectors(gram(sides.by_in.flatten(2)), rank["in"])
        out = half = inner  # set by the first sweep, as is what the core has captured
        captured = total
        sweeps, converged = 0, False
        while not converged and sweeps < self.n_iter:
            out, before = leading_eigenpairs(gram(sides.project_inputs(inner)), rank["out"])
            half = sides.project_outputs(out)
            inner, values = leading_eigenpairs(gram(half), rank["in"])
            now = values.sum(-1)  # ‖core‖² is what the leading eigenvalues add up to
            sweeps += 1
            # The first sweep is held against its first half, which has grown already since the HOSVD: twice as strict.
            gain = 2 * (now - before.sum(-1)) if sweeps == 1 else now - captured
            converged = bool((gain <= self.tol * total).all())
            captured = now
        core = (inner.mT @ half).unflatten(2, (-1, rank["out"])).permute(0, 3, 1, 2)
        core = core.reshape(*core.shape[:3], *spec.kernel)
        return Factors({"core": core, "out_factor": out, "in_factor": inner}, sweeps, converged)


@dataclass(frozen=True)
class _Sides:
    """A batch of kernels laid out twice, so that projecting either channel mode is one product without a copy."""

    by_out: Tensor  # (batch, out, K, in)
    by_in: Tensor  # (batch, in, K, out)

    @classmethod
    def of(cls, weight: Tensor) -> _Sides:
        flat = weight.flatten(3)
        return cls(flat.transpose(2, 3).contiguous(), flat.permute(0, 2, 3, 1).contiguous())

    def start(self, rank: Rank) -> tuple[Tensor | None, Tensor | None]:
        """Return the leading left singular vectors of both unfoldings; None where a side keeps full rank."""
        out, inner = (
            None if size == side.shape[1] else leading_eigenvectors(gram(side.flatten(2)), size)
            for side, size in ((self.by_out, rank["out"]), (self.by_in, rank["in"]))
        )
        return out, inner

    def project_inputs(self, inner: Tensor) -> Tensor:
        """Return the kernels seen through the input factor: (batch, out, K·r_in)."""
        return _project(self.by_out, inner).flatten(2)

    def project_outputs(self, out: Tensor) -> Tensor:
        """Return the kernels seen through the output factor: (batch, in, K·r_out)."""
        return _project(self.by_in, out).flatten(2)

    def finish(self, out: Tensor | None, inner: Tensor | None, spec: LayerSpec) -> dict[str, Tensor | None]:
        """Return the fields of the format: the core is what both factors leave of the kernels."""
        core = self.by_out if inner is None else _project(self.by_out, inner)  # (batch, out, K, r_in)
        if out is not None:
            core = (out.mT @ core.flatten(2)).reshape(len(core), -1, *core.shape[2:])
        core = core.transpose(2, 3).reshape(len(core), core.shape[1], core.shape[3], *spec.kernel)
        return {"core": core, "out_factor": out, "in_factor": inner}


def _project(side: Tensor, factor: Tensor) -> Tensor:
    batch, rows, taps, _ = side.shape
    return (side.flatten(1, 2) @ factor).reshape(batch, rows, taps, -1)
