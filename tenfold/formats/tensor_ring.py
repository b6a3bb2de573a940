"""A convolution or a linear layer as a tensor ring: a train whose ends are joined, so that its middle is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tenfold.formats.base import FORMATS, Factorization, Ints, Rank, Structure, distinct, total_cost
from tenfold.records import ContractSpec, LayerSpec, Shape, SharedSliceSpec, SubLayerSpec
from tenfold.tensors import mode_factors, rings, trains

# The closing bonds that plans try, and the one that rules with a single knob take. With 1 it is Tucker-2, or a train.
_CLOSING = (2, 4, 8)
_USUAL = 2

# A rule that walks along all ranks walks at most about so many steps.
_STEPS = 256


@FORMATS.register("tensor_ring")
@dataclass(frozen=True, eq=False)
class TensorRing(Factorization):
    """Three convolutions, 1×1, k×k and 1×1, the middle one small and the same for all of r1 slices of its channels.

    W[o, k, i] = Tr(``core1``[o] · ``core2``[k] · ``core3``[i]) with slices of the cores (r1, out, r2), (r2, K, r3) and
    (r3, in, r1) (tensor-ring nets: Wang et al. 2018, arXiv 1802.09052; Zhao et al. 2016, arXiv 1606.05535). It is
    Tucker-2 with r1·r2 outputs and r1·r3 inputs whose core is r1 times the same block on the diagonal, so that it costs
    an r1-th of the multiplications and an r1²-th of the parameters; with r1 = 1 it is Tucker-2. Parameters
    out·r1·r2 + K·r2·r3 + in·r3·r1.

    A ring of two cores is a product of two matrices. So those of a linear layer are four: outputs (p, q) and inputs
    (i₁, i₂) are split, W = Tr(``core1``[q] · ``core2``[p] · ``core3``[i₁] · ``core4``[i₂]), with r1 and r3 the bonds
    between outputs and inputs and r2 those within each. Its rank as a matrix is r1·r3, its parameters
    r2·(r1·q + r3·p + r3·i₁ + r1·i₂).
    """

    core1: Tensor  # (1, r, n, r'); at full rank the only one, (1, 1, ∏ modes, 1), which is the dense weight
    core2: Tensor | None = None
    core3: Tensor | None = None
    core4: Tensor | None = None  # of linear layers

    rank_names: ClassVar[tuple[str, ...]] = ("r1", "r2", "r3")
    default_algorithm: ClassVar[str] = "tr_als"
    svd_bounds_error: ClassVar[bool] = False

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers that no ring makes smaller, or whose stages would not be a ring's."""
        if spec.kind not in ("linear", "conv"):
            return "tensor_ring serves linear layers and convolutions that are not transposed"
        if spec.groups > 1:
            return "tensor_ring needs a layer without groups: tucker2 or low_rank serves this one"
        if min(spec.in_channels, spec.out_channels) == 1:
            return "a ring needs channels on both sides: there is but one on one of them"
        if not spec.pointwise:
            return None
        if any(s > 1 for s in spec.stride) or (not isinstance(spec.padding, str) and any(spec.padding)):
            return "tensor_ring needs a 1×1 convolution without stride and padding: low_rank serves this one"
        if min(min(pair) for pair in cls.channel_modes(spec)) == 1:
            return "a ring of two cores is a product of two matrices, and prime numbers cannot be split: low_rank"
        return None

    @classmethod
    def channel_modes(cls, spec: LayerSpec) -> tuple[Shape, Shape]:
        """Return the modes (p, q) of the outputs and (i₁, i₂) of the inputs of a linear layer, ascending."""
        outer = mode_factors(spec.out_channels, 2, pad=False).modes
        inner = mode_factors(spec.in_channels, 2, pad=False).modes
        return outer, inner

    @classmethod
    def modes(cls, spec: LayerSpec) -> Shape:
        """Return the modes around the ring: (out, K, in), or (q, p, i₁, i₂) of a linear layer."""
        if not spec.pointwise:
            return spec.out_channels, prod(spec.kernel), spec.in_channels
        (p, q), inner = cls.channel_modes(spec)
        return q, p, *inner

    @classmethod
    def input_modes(cls, spec: LayerSpec) -> Shape:
        """Return into which modes the inputs in·prod(kernel) are split, in the order of the flattened weight."""
        return cls.channel_modes(spec)[1] if spec.pointwise else (spec.in_channels, prod(spec.kernel))

    @classmethod
    def to_tensor(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights (batch, out, in, *kernel) as (batch, *modes)."""
        if not spec.pointwise:
            return weight.flatten(3).transpose(2, 3)
        (p, q), inner = cls.channel_modes(spec)
        return weight.reshape(len(weight), p, q, *inner).transpose(1, 2)

    @classmethod
    def from_tensor(cls, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights (batch, out, in, *kernel) from (batch, *modes); undoes ``to_tensor``."""
        turned = tensor.transpose(1, 2) if spec.pointwise else tensor.transpose(2, 3)
        return turned.reshape(len(tensor), *spec.group_shape[1:])

    @classmethod
    def bonds(cls, spec: LayerSpec, rank: Rank) -> Shape:
        """Return the rank of the bond on the left of each core."""
        ring = tuple(rank[name] for name in cls.rank_names)
        return (*ring, ring[1]) if spec.pointwise else ring

    @classmethod
    def is_dense(cls, spec: LayerSpec, rank: Rank) -> bool:
        """Whether the ranks are full: there is one core then, which is the dense weight."""
        return rank == cls.max_rank(spec)

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return how much each bond can carry where the others do not limit it.

        At full r2 and r3 the ring is exact whatever r1 is, and the dense layer costs less: so that is what it is.
        """
        both = min(spec.in_channels, spec.out_channels)
        if spec.pointwise:
            q, _, _, inner = cls.modes(spec)
            return {"r1": both, "r2": max(q, inner), "r3": both}
        most = rings.fit_ring_ranks(cls.modes(spec), (both, spec.out_channels, spec.in_channels))
        return dict(zip(cls.rank_names, most, strict=True))

    @classmethod
    def check_rank(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return ``rank`` complete (a name left out stands for full rank), lowered to what the ring can use.

        Where r2 and r3 are full, so is r1: the ring is the dense layer.

        Raises:
            RankError: a name that the format does not know, or a number outside 1..max_rank.
        """
        most = cls.max_rank(spec)
        bonds = cls.bonds(spec, super().check_rank(spec, rank))
        opened = trains.max_ranks(cls.modes(spec))
        if all(r >= enough for r, enough in zip(bonds[1:], opened, strict=True)):
            return most
        fitted = rings.fit_ring_ranks(cls.modes(spec), bonds)
        return {"r1": fitted[0], "r2": max(fitted[1::2]) if spec.pointwise else fitted[1], "r3": fitted[2]}

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return rings that are closed by a bond of 2, up to where they outgrow the dense layer, and full rank.

        The others are equal shares of the channels; of a linear layer all bonds are equal.
        """
        most = cls.max_rank(spec)
        return (*cls._line(spec, min(_USUAL, most["r1"])), most)

    @classmethod
    def rank_grid(cls, spec: LayerSpec, axis: Callable[[int], Sequence[int]]) -> Ints:
        """Return for each of a few closing bonds the ranks whose channels between the stages are on the ``axis``."""
        most = cls.max_rank(spec)
        closing = [r for r in _CLOSING if r <= max(most["r1"] // 2, 2)]
        top = max(spec.in_channels, spec.out_channels)
        steps = range(1, most["r2"] + 1) if spec.pointwise else axis(top)
        found = [rank for r in closing for rank in cls._line(spec, r, steps)]
        return distinct(cls.rows((*found, most)))

    @classmethod
    def _line(cls, spec: LayerSpec, closing: int, steps: Sequence[int] | None = None) -> list[Rank]:
        """Return rising ranks with one closing bond, without those that cost more parameters than the dense layer.

        ``steps`` are numbers of channels between the stages, or, of a linear layer, the ranks of the other bonds.
        """
        most, top = cls.max_rank(spec), max(spec.in_channels, spec.out_channels)
        if spec.pointwise:
            line = [{"r1": closing, "r2": r, "r3": r} for r in steps or range(1, most["r2"] + 1)]
            line = [{k: min(v, most[k]) for k, v in rank.items()} for rank in line]
        else:
            widths = steps or range(1, closing * top + 1, max(closing * top // _STEPS, 1))
            sides = {"r2": spec.out_channels, "r3": spec.in_channels}
            line = [
                {"r1": closing, **{k: min(-(-n * width // (top * closing)), most[k]) for k, n in sides.items()}}
                for width in widths
            ]
        rows = cls.rows(line)
        *usable, dense = cls._usable(spec, rows)
        fewer = ~dense & (cls.params_at(spec, rows) < spec.num_params)
        kept: list[Rank] = []
        for values in np.stack(usable, axis=1)[fewer].tolist():
            rank = dict(zip(cls.rank_names, values, strict=True))
            if not kept or (rank != kept[-1] and all(rank[k] >= kept[-1][k] for k in rank)):
                kept.append(rank)
        return kept or [dict.fromkeys(cls.rank_names, 1)]

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates of the three convolutions, the four products, or the layer."""
        before, core, after = spec.positions(in_shape)
        r1, r2, r3, dense = cls._usable(spec, ranks)
        steps: tuple[tuple[Any, Any], ...]
        if spec.pointwise:
            q, p, first, second = cls.modes(spec)
            steps = (
                (second * r2 * r1, after * first),
                (first * r2 * r3, after * r1),
                (r3 * p * r2, after * r1),
                (r2 * r1 * q, after * p),
            )
        else:
            out, taps, inner = cls.modes(spec)
            steps = ((inner * r3 * r1, before), (taps * r2 * r3, core * r1), (out * r1 * r2, after))
        params, macs = total_cost(spec, steps)
        return np.where(dense, spec.num_params, params), np.where(dense, spec.macs(in_shape), macs)

    @classmethod
    def _usable(cls, spec: LayerSpec, ranks: Ints) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
        """Return columns of what ``check_rank`` makes of many ranks, and where that is the dense layer."""
        most, modes = tuple(cls.max_rank(spec).values()), cls.modes(spec)
        bonds = list(ranks.T[[0, 1, 2, 1]] if spec.pointwise else ranks.T)
        opened = zip(bonds[1:], trains.max_ranks(modes), strict=True)
        dense = np.logical_and.reduce([bond >= enough for bond, enough in opened])
        for _ in modes:  # so often at most until nothing changes any more
            for k, n in enumerate(modes):
                after = (k + 1) % len(bonds)
                bonds[k] = np.minimum(bonds[k], n * bonds[after])
                bonds[after] = np.minimum(bonds[after], n * bonds[k])
        r1, r2, r3 = bonds[0], np.maximum.reduce(bonds[1::2]), bonds[2]
        return r1, r2, r3, dense | ((r1 == most[0]) & (r2 == most[1]) & (r3 == most[2]))

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the input step, the kernel on r1 slices, the output step; four products of a linear layer."""
        rank = cls.check_rank(spec, rank)
        if cls.is_dense(spec, rank):
            return (spec,)
        stages = tuple(cls._products(spec, rank) if spec.pointwise else cls._convolutions(spec, rank))
        return (*stages[:-1], stages[-1].replace(bias=spec.bias))

    @classmethod
    def _convolutions(cls, spec: LayerSpec, rank: Rank) -> Iterator[SubLayerSpec]:
        r1, r2, r3 = cls.bonds(spec, rank)
        middle = spec.core(r3, r2)
        yield spec.mix(spec.in_channels, r1 * r3)
        yield middle if r1 == 1 else SharedSliceSpec(layer=middle, copies=r1)
        yield spec.mix(r1 * r2, spec.out_channels)

    @classmethod
    def _products(cls, spec: LayerSpec, rank: Rank) -> Iterator[SubLayerSpec]:
        """Iterate over the products: the features (i₁, i₂), (i₁, r, r1), (r3, r1), (p, r2, r1) and (p, q)."""
        r1, r2, r3, inside = cls.bonds(spec, rank)
        q, p, first, second = cls.modes(spec)
        yield ContractSpec.middle(first, second, 1, inside * r1, axes=spec.axes)
        for cols, rows in ((first * inside, r3), (r3, p * r2)):
            plain = r1 == 1
            yield spec.mix(cols, rows) if plain else ContractSpec.middle(1, cols, r1, rows, axes=spec.axes)
        yield ContractSpec.middle(p, r2 * r1, 1, q, axes=spec.axes)

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return what two bonds cut off: the inputs, the outputs and the kernel; of a linear layer one mode or two."""
        tensor = cls.to_tensor(weight, spec)
        if spec.pointwise:
            matrices = tensor.flatten(3).flatten(1, 2), tensor.flatten(2), tensor.transpose(1, 2).flatten(2)
        else:
            matrices = tensor.movedim(3, 1).flatten(2), tensor.flatten(2), tensor.movedim(2, 1).flatten(2)
        return dict(zip(cls.rank_names, matrices, strict=True))

    @classmethod
    def unfolding_ranks(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return the products of the ranks of the two bonds that are cut."""
        del spec
        r1, r2, r3 = (rank[name] for name in cls.rank_names)
        return {"r1": r3 * r1, "r2": r1 * r2, "r3": r2 * r3}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the ring from the weights of the stages."""
        rank = cls.check_rank(spec, rank)
        if cls.is_dense(spec, rank):
            weight = chain[0].reshape(spec.group_shape)
            return cls(spec, cls.to_tensor(weight, spec).reshape(1, 1, -1, 1))
        if spec.pointwise:
            return cls(spec, *cls._cores_of_products(spec, rank, chain))
        r1, r2, r3 = cls.bonds(spec, rank)
        first, kernel, last = chain
        inner = first.reshape(r1, r3, spec.in_channels).permute(1, 2, 0)
        middle = kernel.reshape(r2, r3, -1).transpose(1, 2)
        outer = last.reshape(spec.out_channels, r1, r2).transpose(0, 1)
        return cls(spec, outer[None], middle[None], inner[None])

    @classmethod
    def _cores_of_products(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> tuple[Tensor, ...]:
        r1, r2, r3, inside = cls.bonds(spec, rank)
        q, p, first, second = cls.modes(spec)
        return (
            chain[3].reshape(q, r2, r1).permute(2, 0, 1)[None],
            chain[2].reshape(p, r2, r3).transpose(0, 1)[None],
            chain[1].reshape(1, r3, first, inside),
            chain[0].reshape(inside, r1, second).transpose(1, 2)[None],
        )

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the stages."""
        spec, rank = self.spec, self.rank
        if self.is_dense(spec, rank):
            return (self.to_grouped(),)
        if spec.pointwise:
            return self._weights_of_products()
        outer, middle, inner = (core[0] for core in self.cores)
        r1, r2, r3 = self.bonds(spec, rank)
        first = inner.permute(2, 0, 1).reshape(1, r1 * r3, -1)
        kernel = middle.transpose(1, 2).reshape(1, r2, r3, *spec.kernel)
        last = outer.transpose(0, 1).reshape(1, -1, r1 * r2)
        return first, kernel, last

    def _weights_of_products(self) -> tuple[Tensor, ...]:
        r1, r2, r3, inside = self.bonds(self.spec, self.rank)
        outer, half, inner, end = (core[0] for core in self.cores)
        lead = (1,) if r1 == 1 else ()  # plain layers have a group axis, contractions have none
        return (
            end.transpose(1, 2).reshape(inside * r1, -1),
            inner.reshape(*lead, r3, -1),
            half.transpose(0, 1).reshape(*lead, -1, r3),
            outer.permute(1, 2, 0).reshape(-1, r2 * r1),
        )

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The cores (1, r, n, r') around the ring."""
        return tuple(self.tensors().values())

    @property
    def rank(self) -> Rank:
        """The ranks of the bonds."""
        if self.core2 is None:
            return self.max_rank(self.spec)
        return dict(zip(self.rank_names, rings.tr_ranks(self.cores), strict=False))

    def to_grouped(self) -> Tensor:
        """Return the traces of the products of the slices, in the order of the weight."""
        dense = rings.tr_to_dense(self.cores)
        return self.from_tensor(dense.reshape(1, *self.modes(self.spec)), self.spec)
