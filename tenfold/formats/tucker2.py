"""A convolution as a bottleneck: 1×1 into fewer channels, k×k between those, 1×1 out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

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
    join_groups,
    reason_without_channels,
    total_cost,
)
from tenfold.records import LayerSpec, Shape


@FORMATS.register("tucker2")
@dataclass(frozen=True, eq=False)
class Tucker2(Factorization):
    """Three convolutions: 1×1 in, a small k×k core, 1×1 out (the channel modes of the kernel are compressed).

    W = core ×_out ``out_factor`` ×_in ``in_factor`` (Tucker-2; Kim et al. 2016, arXiv 1511.06530). A rank equal to its
    mode drops that factor: partial Tucker on the other side, or at full rank the dense layer itself.
    Parameters in·r_in + r_in·r_out·K + out·r_out.
    """

    core: Tensor  # (groups, r_out, r_in, *kernel)
    out_factor: Tensor | None = None  # (groups, out/groups, r_out); None where r_out = out/groups
    in_factor: Tensor | None = None  # (groups, in/groups, r_in); None where r_in = in/groups

    rank_names: ClassVar[tuple[str, ...]] = ("out", "in")
    default_algorithm: ClassVar[str] = "hooi"
    data_aware_algorithm: ClassVar[str | None] = "weighted_als"

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers without a kernel, and for depthwise ones, which have no channels to drop."""
        return reason_without_channels("tucker2", spec, "drop")

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return the channel modes {out: out/groups, in: in/groups}."""
        _, out, inner, *_ = spec.group_shape
        return {"out": out, "in": inner}

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return up to three convolutions: those of full-rank sides are left out."""
        most, groups = cls.max_rank(spec), spec.groups
        r_out, r_in = rank["out"] * groups, rank["in"] * groups
        narrow_out = rank["out"] < most["out"]
        stages = [spec.core(r_in, r_out, bias=spec.bias and not narrow_out)]
        if rank["in"] < most["in"]:
            stages.insert(0, spec.mix(spec.in_channels, r_in))
        if narrow_out:
            stages.append(spec.mix(r_out, spec.out_channels, bias=spec.bias))
        return tuple(stages)

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates of in·r_in + r_in·r_out·K + out·r_out, less full-rank sides."""
        groups, out, inner, *kernel = spec.group_shape
        before, core, after = spec.positions(in_shape)
        r_out, r_in = ranks.T
        first, last = np.where(r_in < inner, inner * r_in, 0), np.where(r_out < out, out * r_out, 0)
        steps = ((groups * first, before), (groups * r_in * r_out * prod(kernel), core), (groups * last, after))
        return total_cost(spec, steps)

    @classmethod
    def channels(cls, spec: LayerSpec, ranks: Ints) -> tuple[tuple[Any, Any], ...]:
        """Return those of the core, and of the mixes beside it where their sides are not full."""
        most = cls.max_rank(spec)
        r_out, r_in = ranks.T * spec.groups
        first = ((spec.in_channels, r_in),) if ranks[0, 1] < most["in"] else ()
        last = ((r_out, spec.out_channels),) if ranks[0, 0] < most["out"] else ()
        return *first, (r_in, r_out), *last

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return (⌊β·r⌋, r) for r up to in, with β = max(0.8·out/in, 1) and both clamped to their modes.

        The constant-rate rule of MUSCO (Gusak et al. 2019, arXiv 1903.09973) with its clamps put right.
        """
        most = cls.max_rank(spec)
        out, inner = most["out"], most["in"]
        slope = max(0.8 * out / inner, 1.0)
        line = [{"out": min(int(slope * r + 1e-9), out), "in": r} for r in range(1, inner + 1)]
        top = line[-1]["out"]  # with few inputs the line ends early: the outputs alone go on
        return (*line, *({"out": r, "in": inner} for r in range(top + 1, out + 1)))

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the unfoldings along the output and the input channels."""
        del spec
        return {"out": weight.flatten(2), "in": weight.transpose(1, 2).flatten(2)}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the kernels of the convolutions that are there."""
        most, rest = cls.max_rank(spec), list(chain)
        in_factor = rest.pop(0).flatten(2).transpose(1, 2) if rank["in"] < most["in"] else None
        out_factor = rest.pop().flatten(2) if rank["out"] < most["out"] else None
        (core,) = rest
        return cls(spec, core=core, out_factor=out_factor, in_factor=in_factor)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the kernels of the convolutions that are there."""
        first = () if self.in_factor is None else (self.in_factor.transpose(1, 2),)
        last = () if self.out_factor is None else (self.out_factor,)
        return (*first, self.core, *last)

    @property
    def rank(self) -> Rank:
        """The channels of the core, per group."""
        return {"out": self.core.shape[1], "in": self.core.shape[2]}

    def to_grouped(self) -> Tensor:
        """Return core ×_out out_factor ×_in in_factor, per group."""
        weight = self.core
        if self.in_factor is not None:
            weight = torch.einsum("gabx,gib->gaix", weight.flatten(3), self.in_factor)
        if self.out_factor is not None:
            weight = torch.einsum("gax,goa->gox", weight.flatten(2), self.out_factor)
        groups, out = weight.shape[:2]
        inner = self.core.shape[2] if self.in_factor is None else self.in_factor.shape[1]
        return weight.reshape(groups, out, inner, *self.core.shape[3:])

    def reduced(self) -> Reduced | None:
        """Return the core in orthonormal frames of the factors, (r_out, r_in, *kernel); None without factors."""
        if self.in_factor is None and self.out_factor is None:
            return None
        framed = self.balanced()
        core, inner, outer = framed.core, framed.in_factor, framed.out_factor
        groups = self.spec.groups
        r_out, r_in = self.rank["out"] * groups, self.rank["in"] * groups
        spec = LayerSpec(kind="conv", in_channels=r_in, out_channels=r_out, kernel=self.spec.kernel, groups=groups)

        def lift(small: Factorization) -> Factorization:
            if not isinstance(small, Tucker2):
                msg = f"a Tucker-2 core is lifted, not {small.name()}"
                raise TypeError(msg)
            return Tucker2(self.spec, small.core, _absorbed(outer, small.out_factor), _absorbed(inner, small.in_factor))

        return Reduced(join_groups(core.reshape(spec.group_shape), spec), spec, "tucker2", lift)

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` times the weight: the core takes it, the factors stay orthonormal."""
        return self.map(core=self.core * factor)

    def balanced(self) -> Self:
        """Return orthonormal factors, with the core as it is seen through them."""
        core, inner, outer = self.core, self.in_factor, self.out_factor
        if inner is not None:
            inner, triangle = torch.linalg.qr(inner)
            core = torch.einsum("gaix,gbi->gabx", core.flatten(3), triangle)
        if outer is not None:
            outer, triangle = torch.linalg.qr(outer)
            core = torch.einsum("gba,gax->gbx", triangle, core.flatten(2))
        shape = (len(core), *self.rank.values(), *self.spec.kernel)
        return self.map(core=core.reshape(shape), in_factor=inner, out_factor=outer)


def _absorbed(frame: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """Return the factor in terms of the full channels; None where the side is at full rank."""
    if frame is None or factor is None:
        return factor if frame is None else frame
    return frame @ factor
