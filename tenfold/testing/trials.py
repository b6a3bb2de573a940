"""What the laws of algorithms are tried on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions import Decomposition, Fit, decompose
from tenfold.formats import Factorization, Rank
from tenfold.testing.geometries import Geometry

# What an iterative algorithm may miss because it stops, as a share of the error.
SLACK = 2e-3

# What it may miss where it depends on the start which minimum it finds.
LOCAL_SLACK = 0.1


@dataclass(frozen=True)
class Trial:
    """An algorithm, a format that it serves and a geometry that the format serves."""

    algorithm: Decomposition
    format: type[Factorization]
    at: Geometry

    def fit(self, weight: Tensor, rank: Rank) -> Fit:
        """Return what the algorithm finds at this rank."""
        return decompose(weight, self.format.name(), rank, self.algorithm, spec=self.at.spec)

    def __str__(self) -> str:
        return f"{self.algorithm.name()} for {self.format.name()}, {self.at}"
