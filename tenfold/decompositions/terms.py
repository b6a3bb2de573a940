"""What the algorithms for sums of rank-one tensors share: they see tensors and factors, not weights and formats."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions.base import Decomposition, Factors
from tenfold.formats import Factorization, Kruskal, Rank
from tenfold.records import LayerSpec


@dataclass(frozen=True, eq=False)
class Terms:
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
class OfTerms(Decomposition):
    """An algorithm for formats whose weight is a sum of rank-one tensors."""

    @abc.abstractmethod
    def fit_terms(self, tensor: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> Terms:
        """Return the factors (batch, n, rank) of tensors (batch, n_1, …), found from those of ``start`` if given."""

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is a sum of rank-one tensors."""
        return issubclass(format, Kruskal)

    def fit(self, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank) -> Factors:
        """Return one factor for each mode."""
        return self.fit_from(None, weight, spec, format, rank)

    def fit_from(
        self, start: Factorization | None, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank
    ) -> Factors:
        """Return one factor for each mode, found from those of ``start``, of any rank."""
        if not issubclass(format, Kruskal):
            msg = f"{self.name()} finds factors of sums of rank-one tensors, not of {format.name()}"
            raise TypeError(msg)
        begun = start.factors() if isinstance(start, Kruskal) else None
        found = self.fit_terms(format.tensorize(weight, spec), rank["rank"], begun)
        factors = [f.to(weight.dtype) for f in found.factors]
        return Factors(dict(format.of(spec, factors).tensors()), found.n_iter, found.converged, found.note)
