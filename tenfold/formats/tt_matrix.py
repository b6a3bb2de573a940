"""A linear layer, or a 1×1 convolution, as a TT-matrix: pairs of an output and an input mode in one train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from torch import Tensor

from tenfold.formats.base import FORMATS, Rank, Structure, total_cost
from tenfold.formats.train import Runs, TrainFormat, balanced_pairs
from tenfold.records import ContractSpec, LayerSpec, Shape, SubLayerSpec
from tenfold.tensors import trains

_MODES = ("left", "out", "in", "right")


@FORMATS.register("tt_matrix")
class TTMatrix(TrainFormat):
    """Outputs and inputs split into four modes each, in pairs: small matrices on parts of the features, in turn.

    W (out, in) = (m₁n₁, m₂n₂, m₃n₃, m₄n₄) is a train with the ranks r1 to r3 (TT-layer: Novikov et al. 2015,
    arXiv 1509.06569). Parameters Σ r·mₖ·nₖ·r'. With r1 and r3 full this is a train of two pairs, with one of them full
    of three: fewer steps, each larger. The cores are contracted with the input in the order that multiplies least.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("r1", "r2", "r3")
    order: ClassVar[int] = 4

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for all but linear layers and plain 1×1 convolutions."""
        if spec.kind not in ("linear", "conv") or not spec.pointwise:
            return "tt_matrix serves linear layers and 1×1 convolutions"
        if spec.groups > 1 or any(s > 1 for s in spec.stride) or (spec.padding != "same" and any(_pads(spec))):
            return "tt_matrix needs a convolution without groups, stride and padding: low_rank serves this one"
        if min(spec.in_channels, spec.out_channels) == 1:
            return "the weight has rank 1 already: there is nothing to drop"
        return None

    @classmethod
    def pairs(cls, spec: LayerSpec) -> tuple[Shape, Shape]:
        """Return the output modes, ascending, and the input modes, descending: the most balanced factors of both."""
        return balanced_pairs(spec, cls.order)

    @classmethod
    def modes(cls, spec: LayerSpec) -> Shape:
        """Return (m₁n₁, m₂n₂, ...)."""
        return tuple(m * n for m, n in zip(*cls.pairs(spec), strict=True))

    @classmethod
    def input_modes(cls, spec: LayerSpec) -> Shape:
        """Return (n₁, n₂, ...)."""
        return cls.pairs(spec)[1]

    @classmethod
    def to_tensor(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights as (batch, m₁n₁, m₂n₂, ...)."""
        return trains.paired(weight.flatten(2), *cls.pairs(spec))

    @classmethod
    def from_tensor(cls, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights (batch, out, in, *kernel)."""
        return trains.unpaired(tensor, *cls.pairs(spec)).reshape(len(tensor), *spec.group_shape[1:])

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the steps in the order that multiplies least."""
        stages = [step.stage(spec) for _, step in cls._steps(spec, cls.check_rank(spec, rank))]
        return (*stages[:-1], stages[-1].replace(bias=spec.bias))

    @classmethod
    def cost_of_runs(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any], in_shape: Shape) -> tuple[Any, Any]:
        """Return parameters and the multiply-accumulates of the best order in which to contract the cores."""
        shapes = cls._core_shapes(spec, runs, sides)
        params, _ = total_cost(spec, ((prod(shape), 0) for shape in shapes))
        return params, least_macs(shapes) * spec.positions(in_shape)[1]

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the weights of the steps."""
        rank = cls.check_rank(spec, rank)
        cores: dict[int, Tensor] = {}
        for (at, step), weight in zip(cls._steps(spec, rank), chain, strict=True):
            sizes = dict(zip(_MODES, cls._core_shape(spec, rank, at), strict=True))
            order = _ROLES[step.role]
            core = weight.reshape([sizes[name] for name in order]).permute([order.index(name) for name in _MODES])
            cores[at] = cls._joined(spec, rank, at, core)
        return cls(spec, **cls.named_cores(spec, rank, [cores[at] for at in sorted(cores)]))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the steps."""
        weights = []
        for at, step in self._steps(self.spec, self.rank):
            apart = self._apart(self.spec, self.rank, at, self.cores[at])
            matrix = apart.permute([_MODES.index(name) for name in _ROLES[step.role]]).reshape(step.rows, step.cols)
            weights.append(matrix[None] if step.plain else matrix)
        return tuple(weights)

    @classmethod
    def _steps(cls, spec: LayerSpec, rank: Rank) -> tuple[tuple[int, Step], ...]:
        return cheapest(cls._core_shapes(spec, cls.runs(spec, rank), cls.sides(spec, rank)))

    @classmethod
    def _core_shapes(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any]) -> tuple[Shape, ...]:
        """Return (r, m, n, r') of each run."""
        outer, inner = cls.pairs(spec)
        widths = [(prod(outer[first : last + 1]), prod(inner[first : last + 1])) for first, last in runs]
        return tuple((sides[at], m, n, sides[at + 1]) for at, (m, n) in enumerate(widths))

    @classmethod
    def _core_shape(cls, spec: LayerSpec, rank: Rank, at: int) -> Shape:
        return cls._core_shapes(spec, cls.runs(spec, rank), cls.sides(spec, rank))[at]

    @classmethod
    def _apart(cls, spec: LayerSpec, rank: Rank, at: int, core: Tensor) -> Tensor:
        """Return the core (1, r, m₁n₁m₂n₂..., r') of a run as (r, m, n, r')."""
        (first, last), shape = cls.runs(spec, rank)[at], cls._core_shape(spec, rank, at)
        outer, inner = cls.pairs(spec)
        matrices = core[0].movedim(1, -1).unflatten(-1, [outer[k] * inner[k] for k in range(first, last + 1)])
        found = trains.unpaired(matrices, outer[first : last + 1], inner[first : last + 1])
        return found.permute(0, 2, 3, 1).reshape(shape)

    @classmethod
    def _joined(cls, spec: LayerSpec, rank: Rank, at: int, core: Tensor) -> Tensor:
        """Return the core (r, m, n, r') of a run as the train has it; undoes ``_apart``."""
        first, last = cls.runs(spec, rank)[at]
        outer, inner = cls.pairs(spec)
        tensor = trains.paired(core.permute(0, 3, 1, 2), outer[first : last + 1], inner[first : last + 1])
        return tensor.flatten(2).movedim(-1, 1)[None].contiguous()


class Step(NamedTuple):
    """A core that becomes a matrix (rows, cols) on some of the features; those before and after are carried along."""

    rows: int
    cols: int
    before: int
    after: int
    role: str  # how the core lies: the first one, or one to the left or the right of those that are done

    @property
    def plain(self) -> bool:
        """Whether it acts on all of the features."""
        return self.before == self.after == 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one position."""
        return self.rows * self.cols * self.before * self.after

    def stage(self, spec: LayerSpec) -> SubLayerSpec:
        """Return the layer or the contraction that does it, without bias."""
        if self.plain:
            return spec.mix(self.cols, self.rows)
        return ContractSpec.middle(self.before, self.cols, self.after, self.rows, axes=spec.axes)


_ROLES: dict[str, tuple[str, ...]] = {
    "first": ("left", "out", "right", "in"),
    "left": ("left", "out", "in", "right"),
    "right": ("out", "right", "left", "in"),
}


@lru_cache(maxsize=4096)
def cheapest(shapes: tuple[Shape, ...]) -> tuple[tuple[int, Step], ...]:
    """Return the order, as (which core, step), of least multiplications to contract a TT-matrix with a vector.

    The cores that are done always stand side by side: the next is the one to their left or to their right. So the best
    way to every such stretch follows from those to the stretches one shorter (dynamic programming).

    Args:
        shapes: (r, m, n, r') of the cores.

    Example:
        >>> [at for at, _ in cheapest(((1, 2, 64, 4), (4, 64, 2, 1)))]  # the wide input is made narrow first
        [0, 1]
    """
    d = len(shapes)
    best: dict[tuple[int, int], tuple[tuple[int, Step], ...]] = {(k, k): ((k, _first(shapes, k)),) for k in range(d)}
    for length in range(1, d):
        for i in range(d - length):
            j = i + length
            ways = (
                (*best[i, j - 1], (j, _right(shapes, i, j))),
                (*best[i + 1, j], (i, _left(shapes, i, j))),
            )
            best[i, j] = min(ways, key=lambda way: sum(step.macs for _, step in way))
    return best[0, d - 1]


def least_macs(shapes: Sequence[tuple[Any, ...]]) -> Any:
    """Return the multiply-accumulates for one position of the order that ``cheapest`` finds; ranks may be arrays."""
    d = len(shapes)
    best: dict[tuple[int, int], Any] = {(k, k): _first(shapes, k).macs for k in range(d)}
    for length in range(1, d):
        for i in range(d - length):
            j = i + length
            to_right, to_left = _right(shapes, i, j).macs, _left(shapes, i, j).macs
            best[i, j] = np.minimum(best[i, j - 1] + to_right, best[i + 1, j] + to_left)
    return best[0, d - 1]


def _inputs(shapes: Sequence[Shape]) -> int:
    return prod(n for _, _, n, _ in shapes)


def _outputs(shapes: Sequence[Shape]) -> int:
    return prod(m for _, m, _, _ in shapes)


def _first(shapes: Sequence[Shape], k: int) -> Step:
    left, m, n, right = shapes[k]
    return Step(left * m * right, n, _inputs(shapes[:k]), _inputs(shapes[k + 1 :]), "first")


def _right(shapes: Sequence[Shape], i: int, j: int) -> Step:
    """Return the step of core j once those from i to j - 1 are done."""
    left, m, n, right = shapes[j]
    before = _inputs(shapes[:i]) * shapes[i][0] * _outputs(shapes[i:j])
    return Step(m * right, left * n, before, _inputs(shapes[j + 1 :]), "right")


def _left(shapes: Sequence[Shape], i: int, j: int) -> Step:
    """Return the step of core i once those from i + 1 to j are done."""
    left, m, n, right = shapes[i]
    after = _outputs(shapes[i + 1 : j + 1]) * shapes[j][3] * _inputs(shapes[j + 1 :])
    return Step(left * m, n * right, _inputs(shapes[:i]), after, "left")


def _pads(spec: LayerSpec) -> Iterator[int]:
    yield from (p for p in spec.padding if not isinstance(p, str))
