"""Convolutions as sums of rank-one kernels: 1×1, depthwise stages, 1×1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

from torch import Tensor

from tenfold.formats.base import FORMATS, Rank, Structure
from tenfold.formats.rank_one_sum import Kruskal
from tenfold.records import LayerSpec, Shape


@FORMATS.register("cp3")
@dataclass(frozen=True, eq=False)
class CP3(Kruskal):
    """Three convolutions: 1×1 into R channels, a depthwise k×k, 1×1 out (all taps of the kernel are one mode).

    W[o, i, k] ≈ Σ_r ``out_factor``[o, r] · ``in_factor``[i, r] · ``taps``[k, r] (CP of order 3; Astrid & Lee 2017,
    arXiv 1701.07148; as a layer the inverted bottleneck of MobileNet-v2 without its nonlinearities). Parameters
    R·(in + K + out).
    """

    out_factor: Tensor  # (groups, out/groups, R)
    in_factor: Tensor  # (groups, in/groups, R)
    taps: Tensor  # (groups, K, R), K = prod(kernel)

    @classmethod
    def shape(cls, spec: LayerSpec) -> Shape:
        """Return (out, in, K), per group."""
        _, out, inner, *kernel = spec.group_shape
        return out, inner, prod(kernel)

    @classmethod
    def of(cls, spec: LayerSpec, factors: Sequence[Tensor]) -> Self:
        """Return the factorization from the factors of outputs, inputs and taps."""
        out_factor, in_factor, taps = factors
        return cls(spec, out_factor=out_factor, in_factor=in_factor, taps=taps)

    def factors(self) -> tuple[Tensor, ...]:
        """Return the factors of outputs, inputs and taps."""
        return self.out_factor, self.in_factor, self.taps

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the mix into R channels per group, the depthwise convolution and the mix into the outputs."""
        inner = rank["rank"] * spec.groups
        depthwise = spec.replace(in_channels=inner, out_channels=inner, groups=inner, bias=False)
        return (spec.mix(spec.in_channels, inner), depthwise, spec.mix(inner, spec.out_channels, bias=spec.bias))

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the kernels of the three convolutions."""
        first, depthwise, last = chain
        taps = depthwise.reshape(spec.groups, rank["rank"], -1).mT
        return cls(spec, out_factor=last.flatten(2), in_factor=first.flatten(2).mT, taps=taps)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the kernels of the three convolutions."""
        return self.in_factor.mT, _depthwise(self.taps, self.spec.kernel), self.out_factor


@FORMATS.register("cp4")
@dataclass(frozen=True, eq=False)
class CP4(Kruskal):
    """1×1 into R channels, one depthwise convolution along each axis (k×1, 1×k), 1×1 out: the fewest parameters.

    W[o, i, a, b] ≈ Σ_r ``out_factor``[o, r] · ``in_factor``[i, r] · ``first``[a, r] · ``second``[b, r] (CP of order 4;
    Lebedev et al. 2015, arXiv 1412.6553; N-D as in Kossaifi et al. 2020, arXiv 1906.06196). An axis along which the
    kernel has no extent has no stage. Parameters R·(in + k1 + k2 + out).
    """

    out_factor: Tensor  # (groups, out/groups, R)
    in_factor: Tensor  # (groups, in/groups, R)
    first: Tensor  # (groups, k, R): along the first axis with extent
    second: Tensor  # (groups, k, R): along the next
    third: Tensor | None = None  # (groups, k, R): along the last of three; else None

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason unless the kernel has extent along two axes, and as the base class does."""
        if spec.axes and not spec.pointwise and len(_extents(spec)) < 2:
            return "the kernel has extent along one axis only: cp3 serves it"
        return super().unsupported_reason(spec)

    @classmethod
    def shape(cls, spec: LayerSpec) -> Shape:
        """Return (out, in, k1, k2, ...), per group, without kernel axes of length 1."""
        _, out, inner, *_ = spec.group_shape
        return out, inner, *(spec.kernel[axis] for axis in _extents(spec))

    @classmethod
    def of(cls, spec: LayerSpec, factors: Sequence[Tensor]) -> Self:
        """Return the factorization from the factors of outputs, inputs and each axis."""
        out_factor, in_factor, first, second, *third = factors
        return cls(spec, out_factor, in_factor, first, second, third[0] if third else None)

    def factors(self) -> tuple[Tensor, ...]:
        """Return the factors of outputs, inputs and each axis."""
        known = (self.out_factor, self.in_factor, self.first, self.second)
        return known if self.third is None else (*known, self.third)

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the mix into R channels per group, a depthwise convolution for each axis, the mix into the outputs."""
        inner = rank["rank"] * spec.groups
        wide = spec.replace(in_channels=inner, out_channels=inner, groups=inner, bias=False)
        stages = (wide.along(axes, inner, inner) for axes in _acting(spec))
        return (spec.mix(spec.in_channels, inner), *stages, spec.mix(inner, spec.out_channels, bias=spec.bias))

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the kernels of the convolutions."""
        first, *stages, last = chain
        axes = (stage.reshape(spec.groups, rank["rank"], -1).mT for stage in stages)
        return cls.of(spec, (last.flatten(2), first.flatten(2).mT, *axes))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the kernels of the convolutions."""
        outer, inner, *along = self.factors()
        kernels = [
            tuple(k if axis in axes else 1 for axis, k in enumerate(self.spec.kernel)) for axes in _acting(self.spec)
        ]
        stages = (_depthwise(factor, kernel) for factor, kernel in zip(along, kernels, strict=True))
        return inner.mT, *stages, outer


def _depthwise(factor: Tensor, kernel: Shape) -> Tensor:
    """Return the kernel (groups·R, 1, 1, *kernel) of the depthwise stage that a factor (groups, K, R) makes."""
    return factor.mT.reshape(-1, 1, 1, *kernel)


def _extents(spec: LayerSpec) -> tuple[int, ...]:
    """Return the axes along which the kernel has extent."""
    return tuple(axis for axis, k in enumerate(spec.kernel) if k > 1)


def _acting(spec: LayerSpec) -> tuple[tuple[int, ...], ...]:
    """Return the axes that each depthwise stage acts along: one with extent; strides of the others go with the last."""
    *first, last = _extents(spec)
    others = tuple(axis for axis, k in enumerate(spec.kernel) if k == 1)
    return (*((axis,) for axis in first), tuple(sorted((last, *others))))
