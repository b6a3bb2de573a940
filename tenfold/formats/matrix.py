"""Formats whose weight, suitably reshaped, is the product of two matrices: one SVD serves them all."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tenfold.formats.base import Factorization, Ints, Rank, Reduced, join_groups, proportional_cost
from tenfold.records import LayerSpec, Shape


@dataclass(frozen=True, eq=False)
class MatrixFormat(Factorization):
    """A weight whose one unfolding (groups, m, n) is ``left`` (groups, m, R) @ ``right`` (groups, R, n).

    The unfolding must be a permutation of the weight's entries: then the truncated SVD is the best factorization.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("rank",)
    default_algorithm: ClassVar[str] = "svd"

    @classmethod
    def matrix_shape(cls, spec: LayerSpec) -> tuple[int, int]:
        """Return (m, n), per group: (out, in·kernel), unless the format says otherwise."""
        _, out, *rest = spec.group_shape
        return out, prod(rest)

    @classmethod
    def unfold(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return the matrix (groups, m, n) of a weight split by groups: (out, in·kernel) of each."""
        del spec
        return weight.flatten(2)

    @classmethod
    @abc.abstractmethod
    def from_matrices(cls, left: Tensor, right: Tensor, spec: LayerSpec) -> Mapping[str, Tensor | None]:
        """Return the tensors of the format, by field name, whose unfolding is ``left`` @ ``right``."""

    @abc.abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return two matrices (groups, m, R) and (groups, R, n) whose product is the unfolding."""

    def reduced(self) -> Reduced | None:
        """Return the R×R product of the triangles of both matrices; None where the short side is no larger than that.

        With left = Q₁R₁ and rightᵀ = Q₂R₂ the weight is Q₁ (R₁R₂ᵀ) Q₂ᵀ.
        """
        left, right = self.matrices()
        size = right.shape[1]
        if size >= min(self.matrix_shape(self.spec)):
            return None
        frame, first = torch.linalg.qr(left)
        across, second = torch.linalg.qr(right.mT)
        channels, groups = size * self.spec.groups, self.spec.groups
        spec = LayerSpec(kind="linear", in_channels=channels, out_channels=channels, groups=groups)

        def lift(small: Factorization) -> Factorization:
            if not isinstance(small, MatrixFormat):
                msg = f"a product of two matrices is lifted, not {small.name()}"
                raise TypeError(msg)
            u, v = small.matrices()
            return type(self)(self.spec, **self.from_matrices(frame @ u, v @ across.mT, self.spec))

        return Reduced(join_groups(first @ second.mT, spec), spec, "low_rank", lift)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason where a matrix of one row or column leaves nothing to drop."""
        if min(cls.matrix_shape(spec)) == 1:
            return "the weight has rank 1 already: there is nothing to drop"
        return None

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return {rank: min(m, n)}."""
        return {"rank": min(cls.matrix_shape(spec))}

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates, which grow in proportion to the rank."""
        return proportional_cost(cls.structure(spec, {"rank": 1}), ranks[:, 0], in_shape)

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the one matrix (groups, m, n)."""
        return {"rank": cls.unfold(weight, spec)}
