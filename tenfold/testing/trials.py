"""What the laws of algorithms are tried on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tenfold.decompositions import Decomposition, Fit, decompose
from tenfold.formats import Factorization, Rank
from tenfold.testing.geometries import Geometry
from tenfold.testing.weights import DTYPES, random_weight

# What an iterative algorithm may miss because it stops, as a share of the error.
SLACK = 2e-3

# What it may miss where it depends on the start which minimum it finds.
LOCAL_SLACK = 0.1


@dataclass(frozen=True)
class Trial:
    """An algorithm, a format that it serves, a geometry that the format serves, and dtypes to try there."""

    algorithm: Decomposition
    format: type[Factorization]
    at: Geometry
    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES, compare=False)

    def fit(self, weight: Tensor, rank: Rank) -> Fit:
        """Return what the algorithm finds at this rank."""
        return decompose(weight, self.format.name(), rank, self.algorithm, spec=self.at.spec)

    def random_fit(self, seed: int, rank: Rank) -> Fit:
        """Return what the algorithm finds for the random weight of a seed: once for all laws that ask."""
        return _random_fit(self, seed, tuple(rank.items()))

    def __str__(self) -> str:
        return f"{self.algorithm.name()} for {self.format.name()}, {self.at}"


@lru_cache(maxsize=512)
def _random_fit(trial: Trial, seed: int, rank: tuple[tuple[str, int], ...]) -> Fit:
    return trial.fit(random_weight(trial.at.spec, seed=seed), dict(rank))
