"""Tucker-CP: a Tucker-2 kernel whose small core is a sum of rank-one kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tenfold.formats.base import FORMATS, Factorization, Ints, Rank, Structure, reason_without_channels, total_cost
from tenfold.records import LayerSpec, Shape
from tenfold.tensors.kruskal import Stability, stability


@FORMATS.register("tucker_cp")
@dataclass(frozen=True, eq=False)
class TuckerCP(Factorization):
    """Five convolutions: 1×1 into r_in channels, 1×1 into R, a depthwise k×k, 1×1 into r_out, 1×1 out.

    W = [[``out_factor``, ``in_factor``, ``taps``]] ×_out ``out_frame`` ×_in ``in_frame`` (TKD-CPD; Phan et al. 2020,
    arXiv 2008.05441, section 4). Where two adjacent 1×1 convolutions cost no less than one from end to end, which is
    R·(in − r_in) ≤ in·r_in, there is one, and the rank of that side is full: the frame would only cost accuracy.
    Parameters in·r_in + R·(r_in + K + r_out) + out·r_out.
    """

    out_factor: Tensor  # (groups, r_out, R); r_out = out/groups where there is no frame
    in_factor: Tensor  # (groups, r_in, R); r_in = in/groups where there is no frame
    taps: Tensor  # (groups, K, R), K = prod(kernel)
    out_frame: Tensor | None = None  # (groups, out/groups, r_out)
    in_frame: Tensor | None = None  # (groups, in/groups, r_in)

    rank_names: ClassVar[tuple[str, ...]] = ("out", "in", "rank")
    default_algorithm: ClassVar[str] = "tucker_cp"
    svd_bounds_error: ClassVar[bool] = False

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers without a kernel, and for depthwise ones, which have no channels to drop."""
        return reason_without_channels("tucker_cp", spec, "drop")

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return the channel modes, and the least product of all modes of the kernel but one."""
        _, out, inner, *kernel = spec.group_shape
        modes = (out, inner, prod(kernel))
        return {"out": out, "in": inner, "rank": prod(modes) // max(modes)}

    @classmethod
    def check_rank(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return ``rank`` complete, the rank of a side full where its frame would save nothing."""
        return _merged(super().check_rank(spec, rank), cls.max_rank(spec))

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return three to five convolutions: a side at full rank has one 1×1."""
        most = cls.max_rank(spec)
        rank = _merged(rank, most)
        r_out, r_in, inner = (rank[name] * spec.groups for name in cls.rank_names)
        narrow_out, narrow_in = rank["out"] < most["out"], rank["in"] < most["in"]
        first = (spec.mix(spec.in_channels, r_in),) if narrow_in else ()
        last = (spec.mix(r_out, spec.out_channels, bias=spec.bias),) if narrow_out else ()
        return (
            *first,
            spec.mix(r_in, inner),
            spec.replace(in_channels=inner, out_channels=inner, groups=inner, bias=False),
            spec.mix(inner, r_out, bias=spec.bias and not narrow_out),
            *last,
        )

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates of in·r_in + R·(r_in + K + r_out) + out·r_out, less frames."""
        groups, out, inner, *kernel = spec.group_shape
        before, core, after = spec.positions(in_shape)
        r_out, r_in, rank = ranks.T
        framed_out, framed_in = out * rank > r_out * (out + rank), inner * rank > r_in * (inner + rank)
        r_out, r_in = np.where(framed_out, r_out, out), np.where(framed_in, r_in, inner)
        steps = (
            (groups * np.where(framed_in, inner * r_in, 0), before),
            (groups * rank * r_in, before),
            (groups * rank * prod(kernel), core),
            (groups * rank * r_out, after),
            (groups * np.where(framed_out, out * r_out, 0), after),
        )
        return total_cost(spec, steps)

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return equal shares of both channel modes with R twice the larger one, then R alone up to full.

        The second part has no frames and ends, but for full rank, where the factors outgrow the dense weight.
        """
        most = cls.max_rank(spec)
        out, inner, full = most["out"], most["in"], most["rank"]
        top = max(out, inner)
        ranks: list[Rank] = []
        for step in range(1, top + 1):
            share = {"out": -(-out * step // top), "in": -(-inner * step // top), "rank": min(2 * step, full)}
            ranks.append(_merged(_not_below(share, ranks[-1] if ranks else share, most), most))
            if ranks[-1]["out"] == out and ranks[-1]["in"] == inner:
                break
        taps = prod(spec.kernel)
        useful = max(out * inner * taps // (out + inner + taps), 1)
        step = -(-useful // _STEPS)
        ranks += [most | {"rank": r} for r in range(ranks[-1]["rank"] + step, min(useful, full) + 1, step)]
        ranks.append(most)
        return tuple(rank for i, rank in enumerate(ranks) if i == 0 or rank != ranks[i - 1])

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the unfoldings along outputs and inputs; that along the outputs has at most rank R, too."""
        del spec
        return {"out": weight.flatten(2), "in": weight.transpose(1, 2).flatten(2), "rank": weight.flatten(2)}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the kernels of the convolutions that are there."""
        most, rest = cls.max_rank(spec), list(chain)
        rank = _merged(rank, most)
        in_frame = rest.pop(0).flatten(2).mT if rank["in"] < most["in"] else None
        out_frame = rest.pop().flatten(2) if rank["out"] < most["out"] else None
        first, depthwise, last = rest
        taps = depthwise.reshape(spec.groups, rank["rank"], -1).mT
        return cls(spec, last.flatten(2), first.flatten(2).mT, taps, out_frame, in_frame)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the kernels of the convolutions that are there."""
        first = () if self.in_frame is None else (self.in_frame.mT,)
        last = () if self.out_frame is None else (self.out_frame,)
        depthwise = self.taps.mT.reshape(-1, 1, 1, *self.spec.kernel)
        return (*first, self.in_factor.mT, depthwise, self.out_factor, *last)

    @property
    def rank(self) -> Rank:
        """The channels between the stages, per group."""
        return {"out": self.out_factor.shape[1], "in": self.in_factor.shape[1], "rank": self.taps.shape[2]}

    def to_grouped(self) -> Tensor:
        """Return the sum of the rank-one kernels, framed on both sides, per group."""
        outer = self.out_factor if self.out_frame is None else self.out_frame @ self.out_factor
        inner = self.in_factor if self.in_frame is None else self.in_frame @ self.in_factor
        weight = torch.einsum("gor,gir,gkr->goik", outer, inner, self.taps)
        return weight.reshape(self.spec.group_shape)

    def terms(self) -> tuple[Tensor, ...]:
        """Return the factors of the core."""
        return self.out_factor, self.in_factor, self.taps

    def stability(self) -> Stability:
        """Return how far the rank-one kernels of the core cancel; orthonormal frames change none of it."""
        return stability(self.terms())

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` times the weight: the frames stay orthonormal."""
        share = factor ** (1 / 3)
        names = ("out_factor", "in_factor", "taps")
        return self.map(**{name: getattr(self, name) * share for name in names})


# A rule that walks along all ranks walks at most about so many steps in each part of the family.
_STEPS = 256


def _merged(rank: Rank, most: Rank) -> Rank:
    """Return the rank with those sides full where one 1×1 convolution costs no more than two."""
    inner = rank["rank"]
    full = {k: most[k] for k in ("out", "in") if most[k] * inner <= rank[k] * (most[k] + inner)}
    return rank | full


def _not_below(rank: Rank, last: Rank, most: Rank) -> Rank:
    """Return the rank with those sides full that were so before: along the family nothing falls."""
    return rank | {k: most[k] for k in ("out", "in") if last[k] == most[k]}
