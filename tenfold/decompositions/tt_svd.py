"""TT-SVD: tensor trains by one truncated SVD for each bond."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors
from tenfold.formats import Factorization, Rank
from tenfold.formats.train import TrainFormat
from tenfold.records import LayerSpec
from tenfold.tensors import trains


@DECOMPOSITIONS.register("tt_svd")
@dataclass(frozen=True)
class TTSVD(Decomposition):
    """Truncated SVDs from the first bond to the last: at most √(bonds) from the optimum, and exact at full rank.

    Oseledets 2011 (SIAM J. Sci. Comput. 33), algorithm 1. The cores get equal norms.
    """

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is a tensor train."""
        return issubclass(format, TrainFormat)

    def fit(self, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank) -> Factors:
        """Return the cores of the runs."""
        if not issubclass(format, TrainFormat):
            msg = f"tt_svd finds tensor trains, not {format.name()}"
            raise TypeError(msg)
        sizes, bonds = format.merged(spec, rank)
        tensor = format.to_tensor(weight, spec).reshape(len(weight), *sizes)
        cores = trains.tt_balance(trains.tt_svd(tensor, bonds, batch_dims=1))
        tensors: dict[str, Tensor | None] = {**format.named_cores(spec, rank, cores), **format.beside(weight, spec)}
        return Factors(tensors)
