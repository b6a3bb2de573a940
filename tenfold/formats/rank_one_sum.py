"""Formats whose weight is a sum of rank-one tensors: one factor for each mode, and one rank."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tenfold.formats.base import (
    Factorization,
    Ints,
    Rank,
    Reduced,
    join_groups,
    proportional_cost,
    reason_without_channels,
)
from tenfold.records import LayerSpec, Shape
from tenfold.tensors import kruskal
from tenfold.tensors.kruskal import Stability, stability

# A rule that walks along all ranks walks at most about so many steps.
_STEPS = 512


@dataclass(frozen=True, eq=False)
class Kruskal(Factorization):
    """A weight that is Σ_r u_r⁽¹⁾ ∘ u_r⁽²⁾ ∘ … (CP, PARAFAC), the weights of the components absorbed in the factors.

    The modes are the output channels, the input channels and what a subclass makes of the kernel. A best approximation
    of a given rank need not exist (de Silva & Lim 2008), nor is it bounded by what the unfoldings drop.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("rank",)
    default_algorithm: ClassVar[str] = "cp_als"
    data_aware_algorithm: ClassVar[str | None] = "weighted_cp"
    svd_bounds_error: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def shape(cls, spec: LayerSpec) -> Shape:
        """Return the sizes of the modes, the groups left out: (out/groups, in/groups, ...)."""

    @classmethod
    @abc.abstractmethod
    def of(cls, spec: LayerSpec, factors: Sequence[Tensor]) -> Self:
        """Return the factorization that has these factors, each (groups, n, R), in the order of ``shape``."""

    @abc.abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """Return one factor (groups, n, R) for each mode, in the order of ``shape``; the inverse of ``of``."""

    def balanced(self) -> Self:
        """Return the factors of the same terms with the least sensitivity to noise in them."""
        return self.of(self.spec, kruskal.balance(self.factors()))

    @classmethod
    def tensorize(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return the tensor (groups, *shape) of a weight split by groups."""
        return weight.reshape(len(weight), *cls.shape(spec))

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers without a kernel, and for depthwise ones, which have no channels to mix."""
        return reason_without_channels("a sum of rank-one tensors", spec, "mix")

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return the least product of all modes but one: from there on, fibers and unit vectors are exact."""
        shape = cls.shape(spec)
        return {"rank": prod(shape) // max(shape)}

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates, which grow in proportion to the rank."""
        return proportional_cost(cls.structure(spec, {"rank": 1}), ranks[:, 0], in_shape)

    @classmethod
    def channels(cls, spec: LayerSpec, ranks: Ints) -> tuple[tuple[Any, Any], ...]:
        """Return those of the two mixes, and of the depthwise convolutions in between."""
        inner = ranks[:, 0] * spec.groups
        depthwise = len(cls.structure(spec, {"rank": 1})) - 2
        return (spec.in_channels, inner), *((inner, inner),) * depthwise, (inner, spec.out_channels)

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return ranks in equal steps up to where the factors outgrow the dense weight, and full rank."""
        shape = cls.shape(spec)
        full = cls.max_rank(spec)["rank"]
        useful = min(max(prod(shape) // sum(shape), 1), full)
        step = -(-useful // _STEPS)
        return tuple({"rank": r} for r in dict.fromkeys([*range(step, useful + 1, step), full]))

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the unfolding along the output channels: its rank is at most that of the tensor."""
        del spec
        return {"rank": weight.flatten(2)}

    @property
    def rank(self) -> Rank:
        """The one rank R."""
        return {"rank": self.factors()[0].shape[-1]}

    def to_grouped(self) -> Tensor:
        """Return the sum of the rank-one tensors, per group."""
        first, *others = self.factors()
        rest = others[-1]
        for factor in reversed(others[:-1]):  # a Khatri-Rao product, the earlier modes slower
            rest = (factor.unsqueeze(2) * rest.unsqueeze(1)).flatten(1, 2)
        flat = first @ rest.mT
        return flat.reshape(len(first), *self.spec.group_shape[1:])

    def terms(self) -> tuple[Tensor, ...]:
        """Return the factors."""
        return self.factors()

    def stability(self) -> Stability:
        """Return how far the rank-one tensors cancel."""
        return stability(self.factors())

    def reduced(self) -> Reduced | None:
        """Return the tensor in orthonormal frames of its channel factors; None where neither side is above the rank."""
        outer, inner, *taps = self.factors()
        size = self.rank["rank"]
        if size >= max(outer.shape[1], inner.shape[1]):
            return None
        (out_frame, outer), (in_frame, inner) = _framed(outer), _framed(inner)
        groups = self.spec.groups
        spec = LayerSpec(
            kind="conv",
            in_channels=inner.shape[1] * groups,
            out_channels=outer.shape[1] * groups,
            kernel=self.spec.kernel,
            groups=groups,
        )
        if type(self).unsupported_reason(spec) is not None:
            return None
        small = type(self).of(spec, (outer, inner, *taps))

        def lift(found: Factorization) -> Factorization:
            if not isinstance(found, Kruskal):
                msg = f"a sum of rank-one tensors is lifted, not {found.name()}"
                raise TypeError(msg)
            first, second, *rest = found.factors()
            first = first if out_frame is None else out_frame @ first
            second = second if in_frame is None else in_frame @ second
            return type(self).of(self.spec, (first, second, *rest))

        return Reduced(join_groups(small.to_grouped(), spec), spec, type(self).name(), lift, start=small)


def _framed(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return an orthonormal frame of the columns and the factor seen in it; (None, factor) where it is no smaller."""
    if factor.shape[-1] >= factor.shape[-2]:
        return None, factor
    frame, triangle = torch.linalg.qr(factor)
    return frame, triangle
