"""CP one component at a time: the best rank-one tensor by power iteration, subtracted, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS
from tenfold.decompositions.cp.als import CPALS, fit_cp
from tenfold.decompositions.cp.base import KruskalDecomposition, KruskalFit
from tenfold.tensors import kruskal


@DECOMPOSITIONS.register("cp_power")
@dataclass(frozen=True)
class CPPower(KruskalDecomposition):
    """Tensor power method with deflation: stable and greedy; for comparison with what fits all components at once.

    Each component is the best rank-one tensor that power iterations find in what the ones before left (Astrid & Lee
    2017, arXiv 1701.07148). Components never cancel much, but unlike with matrices deflation finds no best
    approximation, nor the components of a tensor that has them: ``sweeps`` of least squares over all of them follow.

    Attributes:
        n_iter: power iterations for a component at most.
        tol: stop when its norm grows by less than this share.
        sweeps: of alternating least squares at the end, at most; 0 for the method as published.
        sweep_tol: stop those when the relative error falls by less than this in one.
    """

    n_iter: int = 50
    tol: float = 1e-6
    sweeps: int = 200
    sweep_tol: float = 1e-5

    slow = True
    supports_start = False

    def fit_tensor(self, tensor: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> KruskalFit:
        """Return balanced factors; deflation does not use a start."""
        del start
        factors: Sequence[Tensor]
        factors, iterations, converged = self.deflate(tensor, rank)
        if self.sweeps:
            settings = CPALS(n_iter=self.sweeps, tol=self.sweep_tol, seed=self.seed)
            joint = fit_cp(tensor, rank, settings, start=factors)
            factors, iterations, converged = joint.factors, iterations + joint.n_iter, joint.converged
        return KruskalFit(kruskal.balance([f.double() for f in factors]), iterations, converged)

    def deflate(self, tensor: Tensor, rank: int) -> tuple[list[Tensor], int, bool]:
        """Return ``rank`` components (batch, n, rank) of tensors (batch, n_1, …), iterations, and if all converged."""
        rest, columns, iterations, converged = tensor.double(), [], 0, True
        for _ in range(rank):
            component, used, calm = self._strongest(rest)
            rest = rest - kruskal.to_tensor(component)
            columns.append(component)
            iterations, converged = iterations + used, converged and calm
        return [torch.cat(mode, dim=-1) for mode in zip(*columns, strict=True)], iterations, converged

    def _strongest(self, tensor: Tensor) -> tuple[list[Tensor], int, bool]:
        """Return a rank-one tensor (batch, n, 1) near the tensor, the norm of it in the first factor."""
        unit = _leading(tensor)
        size, calm, used = tensor.new_zeros(len(tensor)), False, 0
        while not calm and used < self.n_iter:
            before = size
            for mode in range(len(unit)):
                unit[mode] = kruskal.mttkrp(tensor, unit, mode)
                size = torch.linalg.vector_norm(unit[mode], dim=1, keepdim=True)
                unit[mode] = unit[mode] / torch.where(size > 0, size, 1.0)
            size = size.flatten()
            used += 1
            calm = bool((size - before <= self.tol * size).all())
        return [unit[0] * size[:, None, None], *unit[1:]], used, calm


def _leading(tensor: Tensor) -> list[Tensor]:
    """Return the leading left singular vector (batch, n, 1) of every unfolding."""
    sides = [tensor.movedim(mode + 1, 1).flatten(2) for mode in range(tensor.dim() - 1)]
    return [torch.linalg.eigh(side @ side.mT)[1][..., -1:] for side in sides]
