"""Base of the algorithms for sums of rank-one tensors: they see tensors and factors, not weights and formats."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions.base import Decomposition, Factors, FitProblem
from tenfold.formats import Kruskal


@dataclass(frozen=True, eq=False)
class KruskalFit:
    """Factors of a batch of tensors, and how they were found.

    Attributes:
        factors: for each mode (batch, n, R).
        n_iter: sweeps.
        converged: whether all fits came to rest before the sweeps ran out.
        note: what the reader of a plan should know, such as the start that won.
    """

    factors: Sequence[Tensor]
    n_iter: int
    converged: bool
    note: str = ""


@dataclass(frozen=True)
class KruskalDecomposition(Decomposition):
    """An algorithm for formats whose weight is a sum of rank-one tensors."""

    formats = (Kruskal,)
    supports_start = True

    @abc.abstractmethod
    def fit_tensor(self, tensor: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> KruskalFit:
        """Return the factors (batch, n, rank) of tensors (batch, n_1, …), continued from those of ``start`` if given.

        ``start`` may have any rank.
        """

    def fit(self, problem: FitProblem) -> Factors:
        """Return one factor for each mode."""
        format, weight, spec = problem.format_as(Kruskal), problem.weight, problem.spec
        start = problem.start.factors() if isinstance(problem.start, Kruskal) else None
        result = self.fit_tensor(format.tensorize(weight, spec), problem.rank["rank"], start)
        factors = [f.to(weight.dtype) for f in result.factors]
        return Factors(format.of(spec, factors).tensors(), result.n_iter, result.converged, result.note)
