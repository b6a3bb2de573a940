"""Base class of all formats: small tensors with a dense meaning, and the chain of sub-layers that runs them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tenfold.errors import RankError, WeightError
from tenfold.records import (
    ContractSpec,
    FoldSpec,
    LayerSpec,
    ReorderSpec,
    Shape,
    SharedSliceSpec,
    SubLayerSpec,
    TTGatherSpec,
    chain_macs,
    chain_params,
)
from tenfold.records.families import FAMILIES, meaning
from tenfold.registry import Registry
from tenfold.tensors.kruskal import Stability

Rank = dict[str, int]
Structure = tuple[SubLayerSpec, ...]
Ints = NDArray[np.int64]

_ALL_PAIRS = 2
_WHOLE = ContractSpec | TTGatherSpec | ReorderSpec  # whose weights have no groups apart


@dataclass(frozen=True)
class SubLayer:
    """One step of a factorized layer: its geometry, and its weight in torch's own layout."""

    spec: SubLayerSpec
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Reduced:
    """The weight of a factorization in orthonormal bases of its own factors: small, and as good to decompose.

    Orthonormal bases change no norm, and a best factorization never leaves the range of the weight. So the best one of
    the small weight, mapped back by ``lift``, is the best one of the large weight, with the same relative error.

    Attributes:
        weight: the small weight, in torch's own layout for ``spec``.
        spec: its geometry.
        format: name of the format in which to decompose it, with ranks of the same names.
        lift: maps a factorization of the small weight to one of the large weight.
        start: the factors themselves in these bases, to warm-start algorithms; None where none of the format needs it.
    """

    weight: Tensor
    spec: LayerSpec
    format: str
    lift: Callable[[Factorization], Factorization]
    start: Factorization | None = None


@dataclass(frozen=True, eq=False)
class Factorization(abc.ABC):
    """A weight written as a product of small tensors.

    A subclass is final and adds its tensors as fields. The first axis of every tensor is the groups of the layer (of
    length 1 when there are none), so that a grouped convolution is nothing but a batch of small ones.

    Laws: ``to_dense`` is the meaning that everything is tested against; running ``stages`` equals running the dense
    layer; ``structure`` alone determines parameters and MACs; ``from_stages`` inverts ``stages``.

    Attributes:
        spec: geometry of the dense layer.
        rank_names: names of the ranks, in the order in which arrays of ranks have them.
        default_algorithm: name of the algorithm that finds the factors.
        data_aware_algorithm: the one to use where the covariance of the inputs is known; None for the same.
        svd_bounds_error: whether any rank can be met with an error of at most the tails of the unfoldings' spectra, as
            truncated SVDs do. Otherwise (sums of rank-one tensors, of which a best one need not exist) the tails are a
            lower bound only, and what an algorithm finds depends on its start.
        reads_map: whether it needs to know the feature map whose flattened form a linear layer takes.
    """

    spec: LayerSpec

    rank_names: ClassVar[tuple[str, ...]]
    default_algorithm: ClassVar[str]
    data_aware_algorithm: ClassVar[str | None] = None
    svd_bounds_error: ClassVar[bool] = True
    reads_map: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return None if the format supports such a layer, else why not, in words for the plan."""

    @classmethod
    @abc.abstractmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return the smallest ranks at which every weight of this geometry is represented exactly."""

    @classmethod
    def largest_rank(cls, spec: LayerSpec) -> Rank:
        """Return the largest ranks that are accepted: by default the full ones."""
        return cls.max_rank(spec)

    @classmethod
    @abc.abstractmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the sub-layers without weights. The last has the bias: before it, padding would not commute."""

    @classmethod
    @abc.abstractmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return for each rank name the matrices (groups, m, n) whose trailing singular values that rank drops.

        ``weight`` is split by groups: (groups, out/groups, in/groups, *kernel).
        """

    @classmethod
    @abc.abstractmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Build the factorization from its ``chain``."""

    @abc.abstractmethod
    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the sub-layers in the order of ``structure``, split by groups.

        That of a layer is (groups, out/groups, in/groups, *kernel), where trailing kernel axes of length 1 may be left
        out; that of a contraction or of an order of channels has exactly its ``weight_shape``.
        """

    @abc.abstractmethod
    def to_grouped(self) -> Tensor:
        """Return the dense weight, split by groups: (groups, out/groups, in/groups, *kernel)."""

    @property
    @abc.abstractmethod
    def rank(self) -> Rank:
        """The ranks by name."""

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return ranks from small to full, for rules with a single threshold: equal shares of every rank."""
        most = cls.max_rank(spec)
        steps = max(most.values())
        return tuple({k: -(-v * step // steps) for k, v in most.items()} for step in range(1, steps + 1))

    @classmethod
    def rank_grid(cls, spec: LayerSpec, axis: Callable[[int], Sequence[int]]) -> Ints:
        """Return the candidate ranks (n, names) for rules that compare many.

        All combinations of one or two ranks; formats with more follow their family, unless they override this.

        Args:
            spec: geometry of the layer.
            axis: maps n to those of the numbers 1 to n to try, ascending and ending with n.
        """
        most = cls.max_rank(spec)
        if len(most) <= _ALL_PAIRS:
            return combinations([axis(top) for top in most.values()])
        family = cls.rows(cls.rank_family(spec))
        stride = min(axis(max(most.values()))[0], len(family))
        return family[stride - 1 :: stride]

    @classmethod
    def rows(cls, ranks: Iterable[Rank]) -> Ints:
        """Return ranks as (n, names), the names in the order of ``rank_names``."""
        rows = [[rank[name] for name in cls.rank_names] for rank in ranks]
        return np.array(rows, dtype=np.int64).reshape(-1, len(cls.rank_names))

    @classmethod
    def unfolding_ranks(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return the largest rank that each of the ``unfoldings`` can have: by default that of its name."""
        del spec
        return rank

    @classmethod
    def covering(cls, spec: LayerSpec, unfolded: Rank) -> Rank:
        """Return the smallest ranks of the family whose unfoldings can reach these ranks; for most formats the same."""
        most = cls.max_rank(spec)
        if cls.unfolding_ranks(spec, most) == most:
            return unfolded

        def enough(rank: Rank) -> bool:
            reached = cls.unfolding_ranks(spec, rank)
            return all(reached[name] >= needed for name, needed in unfolded.items())

        return next((rank for rank in cls.rank_family(spec) if enough(rank)), most)

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates at many ranks at once.

        This evaluates ``structure`` rank by rank. Formats with many ranks override it with a closed form, which the
        laws hold equal to ``structure``.

        Args:
            spec: geometry of the layer.
            ranks: (n, names) within 1..max_rank, in the order of ``rank_names``.
            in_shape: shape of one input, batch included.

        Returns:
            Parameters (n,), the bias included, and multiply-accumulates (n,).
        """
        rows = [dict(zip(cls.rank_names, row, strict=True)) for row in ranks.tolist()]
        costs = [(cls.num_params(spec, rank), cls.macs(spec, rank, in_shape)) for rank in rows]
        params, macs = np.array(costs, dtype=np.int64).reshape(-1, 2).T
        return params, macs

    @classmethod
    def params_at(cls, spec: LayerSpec, ranks: Ints) -> Ints:
        """Return the parameters (n,) at many ranks (n, names)."""
        params, _ = cls.cost(spec, ranks, (spec.in_channels, *(1,) * spec.axes))
        return params

    @classmethod
    def channels(cls, spec: LayerSpec, ranks: Ints) -> tuple[tuple[Any, Any], ...] | None:
        """Return input and output channels of each sub-layer at many ranks (n, names), the same of which are full.

        None, unless nothing else of the sub-layers changes with the ranks: then ``structure`` is to be asked for each.
        """
        del spec, ranks
        return None

    @classmethod
    def num_params(cls, spec: LayerSpec, rank: Rank) -> int:
        """Return the number of parameters at ``rank``, bias included."""
        return chain_params(cls.structure(spec, cls.check_rank(spec, rank)))

    @classmethod
    def macs(cls, spec: LayerSpec, rank: Rank, in_shape: Shape) -> int:
        """Return the multiply-accumulates at ``rank`` for an input of shape ``in_shape``."""
        return chain_macs(cls.structure(spec, cls.check_rank(spec, rank)), in_shape)

    @classmethod
    def check_rank(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return ``rank`` with omitted names set to full rank.

        Raises:
            RankError: an unknown name, or a number outside 1..largest_rank.
        """
        most, largest = cls.max_rank(spec), cls.largest_rank(spec)
        unknown = sorted(set(rank) - set(most))
        if unknown:
            msg = f"{cls.name()} has the ranks {', '.join(most)}, not {', '.join(unknown)}"
            raise RankError(msg)
        for key, value in rank.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest[key]:
                msg = (
                    f"{cls.name()} rank {key}={value} is outside 1..{largest[key]} for a weight of shape "
                    f"{spec.weight_shape}. Pass at most max_rank(spec) or use a rank rule."
                )
                raise RankError(msg)
        return most | rank

    @classmethod
    def name(cls) -> str:
        """Return the name under which the format is registered."""
        return next((n for n, c in FORMATS.loaded() if c is cls), cls.__name__)

    def to_dense(self) -> Tensor:
        """Return the dense weight in torch's own layout for this kind of layer."""
        return join_groups(self.to_grouped(), self.spec)

    def stages(self) -> tuple[SubLayer, ...]:
        """Return the sub-layers with their weights, in the order in which a layer runs them."""
        structure = type(self).structure(self.spec, self.rank)
        return tuple(SubLayer(s, join_groups(w, s)) for s, w in zip(structure, self.chain(), strict=True))

    @classmethod
    def from_stages(cls, spec: LayerSpec, rank: Rank, weights: Sequence[Tensor]) -> Self:
        """Build the factorization from the weights of its ``stages``, in torch's own layout."""
        structure = cls.structure(spec, rank)
        return cls.from_chain(spec, rank, [split_groups(w, s) for w, s in zip(weights, structure, strict=True)])

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors by field name, without those that are absent at this rank."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spec"}
        return {k: v for k, v in values.items() if v is not None}

    def terms(self) -> tuple[Tensor, ...] | None:
        """Return the factors (groups, n, R) whose rank-one terms add up to the weight, or to its core; else None."""
        return None

    def stability(self) -> Stability | None:
        """Measure how far the terms of the weight cancel; None for formats whose factors cannot diverge."""
        return None

    def reduced(self) -> Reduced | None:
        """Return a smaller weight to decompose instead of the dense one, or None. Needs float32 or float64 factors."""
        return None

    def map(self, **changes: Any) -> Self:
        """Return a copy with some fields replaced."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` (≥ 0) times the weight, the scale spread evenly over all tensors."""
        tensors = self.tensors()
        share = factor ** (1 / len(tensors))
        return self.map(**{k: v * share for k, v in tensors.items()})

    def balanced(self) -> Self:
        """Return factors of the same weight whose scales suit one learning rate.

        Algorithms return their factors balanced; call this where factors were changed afterwards.
        """
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the factorization with every factor passed through ``Tensor.to``; whole numbers stay what they are."""
        moved = {k: (v, v.to(*args, **kwargs)) for k, v in self.tensors().items()}
        return self.map(**{k: new if v.is_floating_point() else v.to(new.device) for k, (v, new) in moved.items()})


def combinations(axes: Sequence[Sequence[int]]) -> Ints:
    """Return all combinations (n, axes) of one number of each axis, the last axis the fastest."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes)).astype(np.int64)


def distinct(rows: Ints) -> Ints:
    """Return each row once, in the order in which they came first."""
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]


def total_cost(spec: LayerSpec, steps: Iterable[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return parameters and MACs of steps (weights, how often each is used) and the bias; or arrays, one for a rank."""
    params, macs = (spec.out_channels if spec.bias else 0), 0
    for weights, uses in steps:
        params, macs = params + weights, macs + weights * uses
    return params, macs


def proportional_cost(smallest: Structure, rank: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
    """Return the costs of sub-layers that all grow with one rank, from those at rank 1; the bias does not grow."""
    bias = sum(stage.out_channels for stage in smallest if stage.bias)
    return (chain_params(smallest) - bias) * rank + bias, chain_macs(smallest, in_shape) * rank


def reason_without_channels(what: str, spec: LayerSpec, verb: str) -> str | None:
    """Return a reason for layers without a kernel, and for depthwise ones, which have no channels to drop or mix."""
    if spec.axes == 0 or spec.pointwise:
        return f"{what} needs a convolution with a kernel larger than 1: low_rank serves this layer"
    _, out, inner, *_ = spec.group_shape
    return f"a depthwise convolution has no channels to {verb}" if out == inner == 1 else None


def split_groups(weight: Tensor, spec: SubLayerSpec) -> Tensor:
    """Split a weight in torch's layout by groups: (groups, out/groups, in/groups, *kernel).

    Raises:
        WeightError: the shape of the weight is not that of ``spec``.
    """
    if tuple(weight.shape) != spec.weight_shape:
        msg = f"the weight has shape {tuple(weight.shape)}, the layer {spec} needs {spec.weight_shape}"
        raise WeightError(msg)
    if isinstance(spec, _WHOLE):
        return weight
    if isinstance(spec, SharedSliceSpec | FoldSpec):
        spec = spec.layer
    g, o, i, *kernel = spec.group_shape
    match spec.kind:
        case "conv_transpose":
            return weight.reshape(g, i, o, *kernel).transpose(1, 2)
        case "embedding":
            return weight.t()[None]
        case _:
            return weight.reshape(g, o, i, *kernel)


def join_groups(weight: Tensor, spec: SubLayerSpec) -> Tensor:
    """Join a weight (groups, out/groups, in/groups, *kernel) to torch's layout; inverse of ``split_groups``."""
    if isinstance(spec, _WHOLE):
        return weight.reshape(spec.weight_shape)
    if isinstance(spec, SharedSliceSpec | FoldSpec):
        spec = spec.layer
    match spec.kind:
        case "conv_transpose":
            return weight.reshape(spec.group_shape).transpose(1, 2).reshape(spec.weight_shape)
        case "embedding":
            return weight[0].t()
        case _:
            return weight.reshape(spec.weight_shape)


def _family(name: str) -> str:
    return f"{meaning(name)}: name one of these." if name in FAMILIES else ""


FORMATS: Registry[Factorization] = Registry("format", hint=_family)
