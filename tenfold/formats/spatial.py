"""A convolution as two separable ones: k×1 into R channels, then 1×k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

from torch import Tensor

from tenfold.formats.base import FORMATS, Ints, Rank, Structure
from tenfold.formats.matrix import MatrixFormat
from tenfold.records import LayerSpec


@FORMATS.register("spatial")
@dataclass(frozen=True, eq=False)
class Spatial(MatrixFormat):
    """Two convolutions, along the first spatial axis (k×1) and along the others (1×k).

    W[o, i, a, b] ≈ Σ_r ``second``[o, r, b] · ``first``[r, i, a] (papers: SVD scheme 2; Jaderberg et al. 2014,
    arXiv 1405.3866). Parameters R·(in·k1 + out·k2). For 3-D kernels the second convolution is 1×k2×k3.
    """

    data_aware_algorithm: ClassVar[str | None] = "weighted_als"

    first: Tensor  # (groups, R, in/groups, k1)
    second: Tensor  # (groups, out/groups, R, k2, ...)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason unless the kernel has extent along the first axis and along another."""
        if spec.axes < 2:
            return "spatial needs a kernel with at least two axes"
        if spec.kernel[0] == 1 or prod(spec.kernel[1:]) == 1:
            return "the kernel has extent along one axis only: low_rank serves it"
        return super().unsupported_reason(spec)

    @classmethod
    def matrix_shape(cls, spec: LayerSpec) -> tuple[int, int]:
        """Return (out·k2, in·k1), per group."""
        _, out, inner, first, *others = spec.group_shape
        return out * prod(others), inner * first

    @classmethod
    def from_matrices(cls, left: Tensor, right: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the kernels of the two convolutions whose product is ``left`` @ ``right``."""
        _, out, inner, first, *others = spec.group_shape
        groups, rank = right.shape[:2]
        second = left.reshape(groups, out, *others, rank).movedim(-1, 2)
        return {"first": right.reshape(groups, rank, inner, first), "second": second}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (out·k2, R) and (R, in·k1) of each group."""
        return self.second.movedim(2, -1).flatten(1, -2), self.first.flatten(2)

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the convolution along the first axis and the one along the others."""
        inner, others = rank["rank"] * spec.groups, tuple(range(1, spec.axes))
        return (
            spec.along((0,), spec.in_channels, inner),
            spec.along(others, inner, spec.out_channels, bias=spec.bias),
        )

    @classmethod
    def unfold(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return the matrix (out·k2, in·k1) of each group."""
        del spec
        rows = weight.movedim(2, -1).movedim(2, -1)  # (groups, out, k2, ..., in, k1)
        return rows.flatten(-2).flatten(1, -2)

    @classmethod
    def channels(cls, spec: LayerSpec, ranks: Ints) -> tuple[tuple[Any, Any], ...]:
        """Return those of the two layers: R for each group in between."""
        inner = ranks[:, 0] * spec.groups
        return (spec.in_channels, inner), (inner, spec.out_channels)

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the two convolution kernels."""
        del rank
        first, second = chain
        return cls(spec, first=first.flatten(3), second=second.squeeze(3))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the two convolution kernels."""
        return self.first, self.second.unsqueeze(3)

    @property
    def rank(self) -> Rank:
        """The one rank R."""
        return {"rank": self.first.shape[1]}

    def to_grouped(self) -> Tensor:
        """Return Σ_r second ⊗ first, per group."""
        groups, _, inner, size = self.first.shape
        out, others = self.second.shape[1], self.second.shape[3:]
        left, right = self.matrices()
        flat = left @ right  # (groups, out·k2, in·k1)
        return flat.reshape(groups, out, *others, inner, size).movedim(-1, 2).movedim(-1, 2)
