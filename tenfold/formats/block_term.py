"""A convolution as a sum of Tucker-2 blocks: 1×1, a grouped k×k with a group for each block, 1×1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tenfold.formats.base import (
    FORMATS,
    Factorization,
    Ints,
    Rank,
    Reduced,
    Structure,
    distinct,
    join_groups,
    total_cost,
)
from tenfold.records import LayerSpec, Shape

# The numbers of blocks that plans try, and the one that rules with a single knob take. One block is Tucker-2.
_BLOCKS = (2, 4, 8, 16, 32)
_USUAL = 2

# A rule that walks along all ranks walks at most about so many steps.
_STEPS = 256


@FORMATS.register("block_term")
@dataclass(frozen=True, eq=False)
class BlockTerm(Factorization):
    """Three convolutions, 1×1, grouped k×k, 1×1: a sum of blocks, each a small Tucker-2 (a ResNeXt unit, linear).

    W = Σ_c ``core``_c ×_out ``out_factor``_c ×_in ``in_factor``_c, c = 1..blocks (block term decomposition:
    De Lathauwer 2008; Li et al. 2017, arXiv 1712.05689; its link to ResNeXt: Chen et al. 2018, arXiv 1703.02180). With
    one block it is Tucker-2, with blocks of one channel CP of order 3. Parameters blocks·(in·r_in + r_in·r_out·K +
    out·r_out): those of Tucker-2 with as many channels in all, the core's divided by the number of blocks.
    """

    core: Tensor  # (groups, blocks, r_out, r_in, *kernel)
    out_factor: Tensor | None = None  # (groups, blocks, out/groups, r_out); None at full rank
    in_factor: Tensor | None = None  # (groups, blocks, in/groups, r_in); None at full rank

    rank_names: ClassVar[tuple[str, ...]] = ("blocks", "out", "in")
    default_algorithm: ClassVar[str] = "btd_als"
    svd_bounds_error: ClassVar[bool] = False

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers without a kernel, whose blocks would add up to one matrix, and narrow ones."""
        if spec.axes == 0 or spec.pointwise:
            return "a sum of blocks of a matrix is one product of two: low_rank serves this layer"
        _, out, inner, *_ = spec.group_shape
        if min(out, inner) == 1:
            return "there are no blocks of a layer with one channel on one side: tucker2 or spatial"
        return None

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return as many blocks as the smaller side has channels, and the channel modes for each.

        At full channels one block is exact and is the dense layer: so that is what full rank is.
        """
        _, out, inner, *_ = spec.group_shape
        return {"blocks": min(out, inner), "out": out, "in": inner}

    @classmethod
    def check_rank(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return ``rank`` complete (a name left out stands for full rank); with all channels it is the dense layer.

        Raises:
            RankError: a name that the format does not know, or a number outside 1..max_rank.
        """
        most, full = cls.max_rank(spec), super().check_rank(spec, rank)
        return most if full["out"] == most["out"] and full["in"] == most["in"] else full

    @classmethod
    def is_dense(cls, spec: LayerSpec, rank: Rank) -> bool:
        """Whether the ranks are full: there is only a core then, which is the dense weight."""
        return rank == cls.max_rank(spec)

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the mix into all blocks' channels, the grouped convolution, the mix of all blocks' outputs."""
        rank = cls.check_rank(spec, rank)
        if cls.is_dense(spec, rank):
            return (spec,)
        blocks = rank["blocks"] * spec.groups
        r_out, r_in = blocks * rank["out"], blocks * rank["in"]
        core = spec.replace(in_channels=r_in, out_channels=r_out, groups=blocks, bias=False)
        return spec.mix(spec.in_channels, r_in), core, spec.mix(r_out, spec.out_channels, bias=spec.bias)

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return two blocks of equal shares of the channels, up to where they outgrow the dense layer; full rank."""
        most = cls.max_rank(spec)
        return (*cls._line(spec, min(_USUAL, most["blocks"])), most)

    @classmethod
    def rank_grid(cls, spec: LayerSpec, axis: Callable[[int], Sequence[int]]) -> Ints:
        """Return for each of a few numbers of blocks the ranks whose channels between the stages are on the ``axis``.

        These numbers divide them, so that no block is wider than another one would be.
        """
        most = cls.max_rank(spec)
        steps = axis(max(most["out"], most["in"]))
        counts = [c for c in _BLOCKS if c <= max(most["blocks"] // 2, 2)]  # more blocks have one channel each: cp3
        found = [rank for c in counts for rank in cls._line(spec, c, [s for s in steps if s >= c])]
        return distinct(cls.rows((*found, most)))

    @classmethod
    def _line(cls, spec: LayerSpec, blocks: int, steps: Sequence[int] | None = None) -> list[Rank]:
        """Return rising ranks with so many blocks, without those that cost more parameters than the dense layer.

        ``steps`` are the numbers of channels between the stages, of all blocks of the larger side.
        """
        most = cls.max_rank(spec)
        top = max(most["out"], most["in"])
        widths = steps or range(1, blocks * top + 1, max(blocks * top // _STEPS, 1))
        line = [
            {"blocks": blocks} | {k: min(-(-most[k] * width // (top * blocks)), most[k]) for k in ("out", "in")}
            for width in widths
        ]
        line = [rank for rank in line if rank["out"] < most["out"] and rank["in"] < most["in"]]
        fewer = cls.params_at(spec, cls.rows(line)) < spec.num_params
        kept = [rank for rank, before, less in zip(line, [{}, *line], fewer, strict=False) if less and rank != before]
        return kept or [{"blocks": blocks, "out": 1, "in": 1}]

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates of blocks·(in·r_in + r_in·r_out·K + out·r_out), or all at full."""
        groups, out, inner, *kernel = spec.group_shape
        before, core, after = spec.positions(in_shape)
        blocks, r_out, r_in = ranks.T
        thin = groups * blocks * ((r_out < out) | (r_in < inner))
        middle = np.where(thin, thin * r_in * r_out, groups * inner * out) * prod(kernel)
        return total_cost(spec, ((thin * inner * r_in, before), (middle, core), (thin * out * r_out, after)))

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the unfoldings along outputs and inputs; the number of blocks limits that along the outputs."""
        del spec
        outer = weight.flatten(2)
        return {"blocks": outer, "out": outer, "in": weight.transpose(1, 2).flatten(2)}

    @classmethod
    def unfolding_ranks(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return the channels of all blocks together."""
        del spec
        outer, inner = rank["blocks"] * rank["out"], rank["blocks"] * rank["in"]
        return {"blocks": outer, "out": outer, "in": inner}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the blocks from the kernels of the convolutions."""
        rank, groups = cls.check_rank(spec, rank), spec.groups
        if cls.is_dense(spec, rank):
            return cls(spec, chain[0].reshape(groups, 1, *spec.group_shape[1:]))
        first, middle, last = chain
        _, out, inner, *kernel = spec.group_shape
        in_factor = first.reshape(groups, rank["blocks"], rank["in"], inner).mT
        core = middle.reshape(groups, rank["blocks"], rank["out"], rank["in"], *kernel)
        out_factor = last.reshape(groups, out, rank["blocks"], rank["out"]).transpose(1, 2)
        return cls(spec, core, out_factor, in_factor)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the kernels of the convolutions."""
        if self.in_factor is None or self.out_factor is None:
            return (self.core[:, 0],)
        return self.in_factor.mT.flatten(1, 2), self.core.flatten(0, 1), self.out_factor.transpose(1, 2).flatten(2)

    @property
    def rank(self) -> Rank:
        """The number of blocks, and the channels of each."""
        if self.in_factor is None:
            return self.max_rank(self.spec)
        return dict(zip(self.rank_names, self.core.shape[1:4], strict=True))

    def to_grouped(self) -> Tensor:
        """Return the sum of the blocks, per group."""
        if self.in_factor is None or self.out_factor is None:
            return self.core[:, 0]
        narrow = torch.einsum("gcabx,gcib->gcaix", self.core.flatten(4), self.in_factor)
        dense = torch.einsum("gcoa,gcaix->goix", self.out_factor, narrow)
        return dense.reshape(self.spec.group_shape)

    def reduced(self) -> Reduced | None:
        """Return the weight in orthonormal frames of all blocks' channels; None where these are as many as there are.

        The frames are of out_factor₁, out_factor₂, ... side by side, and of the inputs likewise.
        """
        if self.in_factor is None or self.out_factor is None:
            return None
        outer, inner = self.out_factor.transpose(1, 2).flatten(2), self.in_factor.transpose(1, 2).flatten(2)
        if outer.shape[2] >= outer.shape[1] or inner.shape[2] >= inner.shape[1]:
            return None
        (out_frame, outer), (in_frame, inner) = torch.linalg.qr(outer), torch.linalg.qr(inner)
        groups, blocks = self.spec.groups, self.rank["blocks"]
        small = self.map(
            spec=LayerSpec(
                kind="conv",
                in_channels=inner.shape[1] * groups,
                out_channels=outer.shape[1] * groups,
                kernel=self.spec.kernel,
                groups=groups,
            ),
            out_factor=outer.unflatten(2, (blocks, -1)).transpose(1, 2),
            in_factor=inner.unflatten(2, (blocks, -1)).transpose(1, 2),
        )
        if type(self).unsupported_reason(small.spec) is not None:
            return None

        def lift(found: Factorization) -> Factorization:
            if not isinstance(found, BlockTerm):
                msg = f"a sum of blocks is lifted, not {found.name()}"
                raise TypeError(msg)
            if found.out_factor is None or found.in_factor is None:  # the frames themselves
                return BlockTerm(self.spec, found.core, out_frame[:, None], in_frame[:, None])
            first, last = in_frame[:, None] @ found.in_factor, out_frame[:, None] @ found.out_factor
            return BlockTerm(self.spec, found.core, last, first)

        return Reduced(join_groups(small.to_grouped(), small.spec), small.spec, "block_term", lift)
