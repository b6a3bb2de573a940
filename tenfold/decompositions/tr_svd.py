"""TR-SVD: tensor rings by one truncated SVD for each bond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors
from tenfold.formats import Factorization, Rank
from tenfold.formats.tensor_ring import TensorRing
from tenfold.records import LayerSpec
from tenfold.tensors import rings
from tenfold.tensors.rings import Cores


@DECOMPOSITIONS.register("tr_svd")
@dataclass(frozen=True)
class TRSVD(Decomposition):
    """Truncated SVDs around the ring, begun at each core that can be the first, the best kept; fast, and no optimum.

    Zhao et al. 2016 (arXiv 1606.05535), algorithm 1 at given ranks: the first SVD keeps r·r' values, split between the
    bonds on both sides of its core, and the others one bond each. How the values are split is arbitrary, so that not
    even a weight that is such a ring is found again; ``tr_als`` starts from here. The cores get equal norms.
    """

    rough: ClassVar[bool] = True

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is a tensor ring."""
        return format is TensorRing

    def fit(self, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank) -> Factors:
        """Return the cores."""
        del format
        tensor = TensorRing.to_tensor(weight, spec)
        if TensorRing.is_dense(spec, rank):
            return Factors(named(dense_core(tensor)))
        found = ways_around(tensor, TensorRing.bonds(spec, rank))
        return Factors(named(rings.tr_balance(nearest(found, tensor))))


def ways_around(tensor: Tensor, ranks: Sequence[int]) -> list[Cores]:
    """Return the TR-SVDs of tensors (batch, *modes) that begin at the cores whose mode is no less than r·r'.

    Others would be filled up with zeros. Where there are none it is begun at the one that lacks the least.
    """
    needed = [r * ranks[(k + 1) % len(ranks)] / n for k, (r, n) in enumerate(zip(ranks, tensor.shape[1:], strict=True))]
    found = []
    for first in [k for k, share in enumerate(needed) if share <= max(1.0, min(needed))]:
        order = [*range(first, len(ranks)), *range(first)]
        turned = rings.tr_svd(tensor.permute(0, *(k + 1 for k in order)), [ranks[k] for k in order], batch_dims=1)
        found.append(rings.tr_rotate(turned, -first))
    return found


def nearest(found: Sequence[Cores], tensor: Tensor) -> Cores:
    """Return of some rings for each tensor of a batch the nearest one."""
    errors = torch.stack([(tensor - rings.tr_to_dense(cores)).flatten(1).square().sum(-1) for cores in found])
    least = errors.argmin(0)
    rows = torch.arange(len(least), device=least.device)
    return tuple(torch.stack(same)[least, rows] for same in zip(*found, strict=True))


def dense_core(tensor: Tensor) -> Cores:
    """Return the one core that is the whole tensor."""
    return (tensor.reshape(len(tensor), 1, -1, 1),)


def named(cores: Cores) -> dict[str, Tensor | None]:
    """Return the cores by the names of the format's fields."""
    return {f"core{k}": core for k, core in enumerate(cores, start=1)}
