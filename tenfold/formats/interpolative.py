"""A matrix as some of its columns, and the others as mixes of these: a pair of factors with an identity block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Self

import torch
from torch import Tensor

from tenfold.formats.base import FORMATS, Ints, Rank, Structure, total_cost
from tenfold.formats.matrix import MatrixFormat
from tenfold.records import FoldSpec, LayerSpec, ReorderSpec, Shape
from tenfold.tensors import dominant_rows

_TOGETHER = 8


@FORMATS.register("interpolative")
@dataclass(frozen=True, eq=False)
class Interpolative(MatrixFormat):
    """The product of low_rank with an identity block in it: R inputs pass through, the others are folded into them.

    W ≈ ``columns`` @ [I ``fold``] Pᵀ: R columns of the approximation and, as mixes of these, all others (interpolative
    decomposition: Cheng, Gimbutas, Martinsson & Rokhlin 2005, doi 10.1137/030602678; block-identity junction:
    LatentLLM 2025, arXiv 2505.18413). Any product of two matrices of rank R can be written so: the weight is the one
    that low_rank has, with R² fewer numbers, R·(in + out) − R² instead of R·(in + out), and is cheaper than the dense
    one up to full rank. The columns are chosen so that entries of ``fold`` are a few units at most; where R and the
    inputs allow, eight neighbours are taken together, which are gathered several times as fast.
    """

    data_aware_algorithm: ClassVar[str | None] = "whitened_svd"

    columns: Tensor  # (groups, out/groups, R)
    fold: Tensor | None = None  # (groups, R, in/groups - R); None where all columns are kept
    order: Tensor | None = (
        None  # (groups, blocks) whole numbers: blocks of inputs within their group, those that pass first
    )

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for embeddings and kernels, where an identity block saves little, and for padding."""
        if spec.kind == "embedding":
            return "an identity block saves next to nothing of a table: low_rank serves it"
        if spec.kind == "conv_transpose" or not spec.pointwise:
            return "an identity block saves little beside a kernel: low_rank serves this layer"
        if not isinstance(spec.padding, str) and any(spec.padding):
            return "a 1×1 convolution with padding: low_rank serves this layer"
        return super().unsupported_reason(spec)

    @classmethod
    def from_matrices(cls, left: Tensor, right: Tensor, spec: LayerSpec) -> dict[str, Tensor | None]:
        """Return the factors whose product is ``left`` @ ``right``: an R×R matrix goes from one into the other."""
        del spec
        rank, width = right.shape[1:]
        if rank == width:
            return {"columns": left @ right, "fold": None, "order": None}
        # The choice of columns depends on what the rows of ``right`` span alone; an orthonormal basis shows it best.
        block = _block(rank, width)
        order, mixes = dominant_rows(torch.linalg.qr(right.mT).Q, block)
        chosen = right.gather(-1, _inputs(order, block)[:, None, :rank].expand(-1, rank, -1))
        return {"columns": left @ chosen, "fold": mixes.mT, "order": order}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (out, R) and (R, in) of each group."""
        rank = self.columns.shape[-1]
        eye = torch.eye(rank).to(self.columns).expand(len(self.columns), -1, -1)
        if self.fold is None or self.order is None:
            return self.columns, eye
        return self.columns, self._in_place(torch.cat([eye, self.fold], dim=-1), self.order)

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the order of the inputs, the fold into R of them for each group, and the layer from these."""
        inner = rank["rank"] * spec.groups
        if inner == spec.in_channels:
            return (spec,)
        last = spec.mix(inner, spec.out_channels, bias=spec.bias)
        block = _block(rank["rank"], spec.in_channels // spec.groups)
        return (
            ReorderSpec(channels=spec.in_channels, groups=spec.groups, stride=spec.stride, block=block),
            FoldSpec(layer=spec.mix(spec.in_channels - inner, inner)),
            last,
        )

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates: R·(in + out) − R² for each group and position."""
        groups, out, inner, *_ = spec.group_shape
        rank = ranks[:, 0]
        return total_cost(spec, [(groups * rank * (inner + out - rank), spec.positions(in_shape)[2])])

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the order, the fold and the columns; from these alone where all are kept."""
        del rank
        *first, columns = chain
        if not first:
            return cls(spec, columns=columns.flatten(2), fold=None, order=None)
        order, fold = first
        inside = order.view(spec.groups, -1)
        return cls(spec, columns=columns.flatten(2), fold=fold.flatten(2), order=inside - _firsts(inside))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the order, the fold and the columns."""
        if self.fold is None or self.order is None:
            return (self.columns.reshape(self.spec.group_shape),)
        return (self.order + _firsts(self.order)).flatten(), self.fold, self.columns

    @property
    def rank(self) -> Rank:
        """The one rank R: how many inputs of each group pass."""
        return {"rank": self.columns.shape[-1]}

    def to_grouped(self) -> Tensor:
        """Return the columns and their mixes, each at its place."""
        weight = self.columns
        if self.fold is not None and self.order is not None:
            weight = self._in_place(torch.cat([weight, weight @ self.fold], dim=-1), self.order)
        return weight.reshape(self.spec.group_shape)

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` times the weight: the columns alone have a scale."""
        return self.map(columns=self.columns * factor)

    @staticmethod
    def _in_place(matrix: Tensor, order: Tensor) -> Tensor:
        """Return columns (groups, m, n) that are in this order where they belong."""
        inputs = _inputs(order, matrix.shape[-1] // order.shape[-1])
        return matrix.gather(-1, inputs.argsort(-1)[:, None].expand(-1, matrix.shape[1], -1))


def _block(rank: int, inputs: int) -> int:
    """Return how many neighbouring inputs are taken together: as many as divide both, up to eight."""
    return gcd(rank, inputs, _TOGETHER)


def _inputs(order: Tensor, block: int) -> Tensor:
    """Return the inputs (groups, n) of blocks in an order (groups, n/block)."""
    return (order.unsqueeze(-1) * block + torch.arange(block, device=order.device)).flatten(1)


def _firsts(order: Tensor) -> Tensor:
    """Return how many blocks there are before each group (groups, 1)."""
    return torch.arange(len(order), device=order.device)[:, None] * order.shape[1]
