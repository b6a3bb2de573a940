"""A matrix as the product of two: linear layers, embeddings, and convolutions as k×k → R followed by 1×1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tenfold.formats.base import FORMATS, Ints, Rank, Structure
from tenfold.formats.matrix import MatrixFormat
from tenfold.records import LayerSpec


@FORMATS.register("low_rank")
@dataclass(frozen=True, eq=False)
class LowRank(MatrixFormat):
    """Two factors: the layer into R channels, then a mix of channels (k×k then 1×1 for convolutions).

    W reshaped to (out, in·kernel) ≈ ``left`` @ ``right`` (papers: SVD scheme 1, "channel decomposition";
    Zhang et al. 2015, arXiv 1505.06798). Parameters R·(in·K + out).
    """

    data_aware_algorithm: ClassVar[str | None] = "whitened_svd"

    left: Tensor  # (groups, out/groups, R)
    right: Tensor  # (groups, R, in/groups, *kernel)

    @classmethod
    def largest_rank(cls, spec: LayerSpec) -> Rank:
        """Return the longer side of linear layers: a factor with a structure, such as blocks, may need more than full.

        The heads of attention together may be wider than what they read and write.
        """
        return {"rank": max(cls.matrix_shape(spec))} if spec.kind == "linear" else cls.max_rank(spec)

    @classmethod
    def from_matrices(cls, left: Tensor, right: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the factors whose product is ``left`` @ ``right``."""
        return {"left": left, "right": right.reshape(*right.shape[:2], *spec.group_shape[2:])}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (out, R) and (R, in·kernel) of each group."""
        return self.left, self.right.flatten(2)

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the layer into R channels per group, and the mix of those into the outputs."""
        inner = rank["rank"] * spec.groups
        return (spec.core(spec.in_channels, inner), spec.mix(inner, spec.out_channels, bias=spec.bias))

    @classmethod
    def channels(cls, spec: LayerSpec, ranks: Ints) -> tuple[tuple[Any, Any], ...]:
        """Return those of the two layers: R for each group in between."""
        inner = ranks[:, 0] * spec.groups
        return (spec.in_channels, inner), (inner, spec.out_channels)

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

    def balanced(self) -> Self:
        """Return the factors with equal norms of the two vectors of every component; one that is zero stays trainable.

        That is, its other vector is left as it is, so that the zero one has a gradient.
        """
        left, right = (torch.linalg.vector_norm(t, dim=d) for t, d in zip(self.matrices(), (-2, -1), strict=True))
        share = torch.where((left > 0) & (right > 0), right / left, 1.0).sqrt()
        wide = share.view(*share.shape, *[1] * (self.right.dim() - 2))
        return self.map(left=self.left * share.unsqueeze(-2), right=self.right / wide)
