"""A matrix as the product of two: linear layers, embeddings, and convolutions as k×k → R followed by 1×1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from tenfold.formats.base import FORMATS, Factorization, Rank, Structure
from tenfold.records import LayerSpec


@FORMATS.register("low_rank")
@dataclass(frozen=True, eq=False)
class LowRank(Factorization):
    """Two factors: the layer into R channels, then a mix of channels (k×k then 1×1 for convolutions).

    W reshaped to (out, in·kernel) ≈ ``left`` @ ``right`` (papers: SVD scheme 1, "channel decomposition";
    Zhang et al. 2015, arXiv 1505.06798). Parameters R·(in·K + out).
    """

    left: Tensor  # (groups, out/groups, R)
    right: Tensor  # (groups, R, in/groups, *kernel)

    rank_names: ClassVar[tuple[str, ...]] = ("rank",)
    default_algorithm: ClassVar[str] = "svd"

    @classmethod
    def refuses(cls, spec: LayerSpec) -> str | None:
        """Return a reason where a matrix of one row or column leaves nothing to drop."""
        if cls.max_rank(spec)["rank"] == 1:
            return "the weight has rank 1 already: there is nothing to drop"
        return None

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return {rank: min(out, in·kernel)}, per group."""
        _, out, *rest = spec.group_shape
        columns = 1
        for n in rest:
            columns *= n
        return {"rank": min(out, columns)}

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the layer into R channels per group, and the mix of those into the outputs."""
        inner = rank["rank"] * spec.groups
        return (spec.core(spec.in_channels, inner), spec.mix(inner, spec.out_channels, bias=spec.bias))

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the matrix (out, in·kernel) of each group."""
        del spec
        return {"rank": weight.flatten(2)}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the inner weight and the mix."""
        del rank
        right, left = chain
        return cls(spec, left=left.flatten(2), right=right)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the inner weight, then the mix."""
        return self.right, self.left

    @property
    def rank(self) -> Rank:
        """The one rank R."""
        return {"rank": self.left.shape[-1]}

    def to_grouped(self) -> Tensor:
        """Return left @ right, per group."""
        flat = self.left @ self.right.flatten(2)
        return flat.reshape(*flat.shape[:2], *self.right.shape[2:])
