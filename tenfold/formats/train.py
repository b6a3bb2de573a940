"""Formats whose weight, its entries put in another order, is a tensor train: one TT-SVD serves them all."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from tenfold.formats.base import Factorization, Ints, Rank, combinations, distinct
from tenfold.records import LayerSpec, Shape
from tenfold.tensors import trains
from tenfold.tensors.modes import mode_factors

Runs = tuple[tuple[int, int], ...]


class TrainFormat(Factorization):
    """A weight that is a tensor train of ``modes``: the cores core1, core2, ... (groups, r, n, r') by name.

    The ranks r1, r2, ... are those of the bonds. A rank that a train cannot use is lowered to what it can
    (``check_rank``): neither neighbour lets a bond carry more than their own other rank times their mode.

    **Where a bond carries all that a neighbour lets it, the two cores are one.** The neighbour is a square matrix then,
    which costs parameters and multiplications and adds nothing. So such cores are merged: the name of the merged one is
    that of the first, its mode their modes' product. At full rank a single core is left, which is the dense weight.
    """

    default_algorithm: ClassVar[str] = "tt_svd"
    data_aware_algorithm: ClassVar[str | None] = "tt_als"
    splits_inputs: ClassVar[bool] = True  # into modes whose product is their number
    tucker2_ranks: ClassVar[tuple[str, str] | None] = (
        None  # which ranks are those of Tucker-2, where all others are full
    )

    def __init__(self, spec: LayerSpec, **cores: Tensor) -> None:
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "_cores", dict(sorted(cores.items())))

    @classmethod
    @abc.abstractmethod
    def modes(cls, spec: LayerSpec) -> Shape:
        """Return the modes of the train, from the first core to the last."""

    @classmethod
    @abc.abstractmethod
    def to_tensor(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return the tensor (groups, *modes) with the entries of a weight that is split by groups."""

    @classmethod
    @abc.abstractmethod
    def from_tensor(cls, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return the weight, split by groups, with the entries of a tensor (groups, *modes); undoes ``to_tensor``."""

    @classmethod
    @abc.abstractmethod
    def input_modes(cls, spec: LayerSpec) -> Shape:
        """Return into which modes the inputs in·prod(kernel) are split, in the order of the flattened weight."""

    @classmethod
    def beside(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return what the format keeps of a weight as it is, by field name: nothing, unless it says otherwise."""
        del weight, spec
        return {}

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return for each bond the smaller one of what the modes on its two sides multiply to."""
        return cls._named(trains.max_ranks(cls.modes(spec)))

    @classmethod
    def check_rank(cls, spec: LayerSpec, rank: Rank) -> Rank:
        """Return ``rank`` complete (a name left out stands for full rank), lowered to what the train can use.

        Raises:
            RankError: a name that the format does not know, or a number outside 1..max_rank.
        """
        full = super().check_rank(spec, rank)
        return cls._named(trains.fit_ranks(cls.modes(spec), [full[name] for name in cls.rank_names]))

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return equal shares of every rank, from small to full, without those that a larger rank undercuts."""
        return cls.undominated(spec, (cls.check_rank(spec, rank) for rank in super().rank_family(spec)))

    @classmethod
    def rank_grid(cls, spec: LayerSpec, axis: Callable[[int], Sequence[int]]) -> Ints:
        """Return all combinations of the largest ranks with quarters of the small ones: those count little, or much.

        At full small ranks cores merge, and the train is one of fewer and larger steps (Tucker-2, for one).
        """
        most = cls.max_rank(spec)
        large = max(most.values()) / 2
        axes = [axis(top) if top >= large else quarters(top) for top in most.values()]
        return distinct(np.stack(cls._usable(spec, combinations(axes)), axis=1))

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates: a closed form for each way in which cores are merged."""
        modes, columns = cls.modes(spec), cls._usable(spec, ranks)
        costs = np.zeros((2, len(ranks)), dtype=np.int64)
        for runs, rows in _by_runs(modes, columns):
            sides = [1, *(columns[last][rows] for _, last in runs[:-1]), 1]
            costs[0, rows], costs[1, rows] = cls.cost_of_runs(spec, runs, sides, in_shape)
        return costs[0], costs[1]

    @classmethod
    @abc.abstractmethod
    def cost_of_runs(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any], in_shape: Shape) -> tuple[Any, Any]:
        """Return parameters and multiply-accumulates of a division of the train into runs, at many ranks.

        ``sides`` are the ranks at the sides of the runs, an array for each: 1 at both ends.
        """

    @classmethod
    def _usable(cls, spec: LayerSpec, ranks: Ints) -> list[Ints]:
        """Return columns of what ``check_rank`` makes of many ranks."""
        modes, columns = cls.modes(spec), list(ranks.T)
        size: Any = 1
        for k in range(len(columns)):
            size = columns[k] = np.minimum(columns[k], size * modes[k])
        size = 1
        for k in reversed(range(len(columns))):
            size = columns[k] = np.minimum(columns[k], size * modes[k + 1])
        return columns

    @classmethod
    def undominated(cls, spec: LayerSpec, ranks: Any) -> tuple[Rank, ...]:
        """Return those of some rising ranks that have fewer parameters than all that follow, and the full rank."""
        rising = [*ranks, cls.max_rank(spec)]
        kept: list[Rank] = []
        least = 0
        for rank, params in zip(reversed(rising), cls.params_at(spec, cls.rows(rising))[::-1], strict=True):
            if not kept or (params < least and rank != kept[-1]):
                kept.append(rank)
                least = params
        return tuple(reversed(kept))

    @classmethod
    def runs(cls, spec: LayerSpec, rank: Rank) -> Runs:
        """Return which cores are one at this rank, as (first, last) of each run, counted from 0."""
        modes, ranks = cls.modes(spec), [rank[name] for name in cls.rank_names]
        found = [(0, 0)]
        left, size = 1, modes[0]  # of the run so far
        for k, r in enumerate(ranks):
            after = ranks[k + 1] if k + 1 < len(ranks) else 1
            if r >= min(left * size, modes[k + 1] * after):
                found[-1] = (found[-1][0], k + 1)
                size *= modes[k + 1]
            else:
                found.append((k + 1, k + 1))
                left, size = r, modes[k + 1]
        return tuple(found)

    @classmethod
    def merged(cls, spec: LayerSpec, rank: Rank) -> tuple[Shape, Shape]:
        """Return the modes of the runs and the ranks between them."""
        runs, modes, ranks = cls.runs(spec, rank), cls.modes(spec), [rank[name] for name in cls.rank_names]
        sizes = tuple(prod(modes[first : last + 1]) for first, last in runs)
        return sizes, tuple(ranks[last] for _, last in runs[:-1])

    @classmethod
    def sides(cls, spec: LayerSpec, rank: Rank) -> Shape:
        """Return the ranks at the sides of the runs, 1 at both ends."""
        return (1, *cls.merged(spec, rank)[1], 1)

    @classmethod
    def named_cores(cls, spec: LayerSpec, rank: Rank, cores: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the cores (groups, r, n, r') of the runs by the names that they have in the format."""
        return {f"core{first + 1}": core for (first, _), core in zip(cls.runs(spec, rank), cores, strict=True)}

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return for each bond the matrix of what stands before it by what stands after it."""
        tensor = cls.to_tensor(weight, spec)
        return {name: tensor.flatten(1, k + 1).flatten(2) for k, name in enumerate(cls.rank_names)}

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The cores (groups, r, n, r') of the runs, in order."""
        return tuple(self.tensors().values())

    @property
    def rank(self) -> Rank:
        """The ranks of all bonds; of those inside a run what the run lets them carry."""
        return self.rank_of(self.tensors())

    def rank_of(self, cores: dict[str, Tensor]) -> Rank:
        """Return the ranks of all bonds of the cores of the runs, by their names."""
        starts = [int(name.removeprefix("core")) - 1 for name in cores]
        wanted = list(self.max_rank(self.spec).values())
        for (_, first), core in zip(pairwise(starts), cores.values(), strict=False):
            wanted[first - 1] = core.shape[-1]
        return self._named(trains.fit_ranks(self.modes(self.spec), wanted))

    def to_grouped(self) -> Tensor:
        """Return the tensor of the train, its entries in the order of the weight."""
        dense = trains.tt_to_dense(self.cores)
        return self.from_tensor(dense.reshape(len(dense), *self.modes(self.spec)), self.spec)

    def tensors(self) -> dict[str, Tensor]:
        """Return the cores by name."""
        found: dict[str, Tensor] = vars(self)["_cores"]
        return dict(found)

    def map(self, **changes: Any) -> Self:
        """Return the same factorization with some cores, or the spec, replaced."""
        return type(self)(**{"spec": self.spec, **self.tensors(), **changes})

    @classmethod
    def _named(cls, ranks: Sequence[int]) -> Rank:
        return dict(zip(cls.rank_names, ranks, strict=True))


def balanced_pairs(spec: LayerSpec, order: int) -> tuple[Shape, Shape]:
    """Return the output modes, ascending, and the input modes, descending: the most balanced factors of both."""
    outer, inner = (mode_factors(n, order, pad=False).modes for n in (spec.out_channels, spec.in_channels))
    return outer, tuple(reversed(inner))


def _by_runs(modes: Shape, columns: Sequence[Ints]) -> Iterator[tuple[Runs, Ints]]:
    """Iterate over the ways in which cores are merged, each with the rows of the ranks that lead to it.

    The same as ``TrainFormat.runs``, for many ranks.
    """
    cuts = np.ones((len(columns[0]), len(columns)), dtype=bool)
    left: Any = 1
    size: Any = modes[0]
    for k, rank in enumerate(columns):
        after = columns[k + 1] if k + 1 < len(columns) else 1
        cuts[:, k] = cut = rank < np.minimum(left * size, modes[k + 1] * after)
        left, size = np.where(cut, rank, left), np.where(cut, 1, size) * modes[k + 1]
    patterns, member = np.unique(cuts, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        starts = [0, *(np.flatnonzero(pattern) + 1).tolist(), len(modes)]
        runs = tuple((first, stop - 1) for first, stop in pairwise(starts))
        yield runs, np.flatnonzero(member.reshape(-1) == number)


def quarters(top: int) -> tuple[int, ...]:
    """Return a quarter, a half and three quarters of a number, rounded up, and the number itself.

    Example:
        >>> quarters(8), quarters(3)
        ((2, 4, 6, 8), (1, 2, 3))
    """
    return tuple(dict.fromkeys(-(-top * part // 4) for part in range(1, 5)))
