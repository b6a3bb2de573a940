"""A convolution as the classical TT-convolution: one small kernel for all channels, then pairs of channel modes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from tenfold.formats.base import FORMATS, Rank, Structure, total_cost
from tenfold.formats.train import Runs, TrainFormat, balanced_pairs
from tenfold.records import ContractSpec, LayerSpec, Shape, SharedSliceSpec, SubLayerSpec
from tenfold.tensors import trains


@FORMATS.register("tt_conv")
class TTConv(TrainFormat):
    """Output and input channels in pairs of modes: few parameters, but often more multiplications than the dense layer.

    W (out, K, in) = (o₁i₁, o₂i₂, o₃i₃, K) is a train with the ranks r1 to r3 (Garipov et al. 2016, arXiv 1611.03214,
    their cores from the last to the first), executed core by core: the kernel makes r3 maps of each input channel, then
    one pair of modes after the other is contracted, so that input and output channels mix in between. Parameters
    K·r3 + Σ r·oₖ·iₖ·r'. Its multiplications are why HODEC exists: see ``tensor_train``.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("r1", "r2", "r3")
    order: ClassVar[int] = 3

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers without a kernel, and for grouped ones."""
        if spec.kind != "conv" or spec.pointwise:
            return "tt_conv needs a convolution with a kernel larger than 1"
        if spec.groups > 1:
            return "tt_conv needs a convolution without groups: tucker2 serves this one"
        if spec.in_channels == spec.out_channels == 1:
            return "there are no channels to drop"
        return None

    @classmethod
    def pairs(cls, spec: LayerSpec) -> tuple[Shape, Shape]:
        """Return the output modes, ascending, and the input modes, descending: the most balanced factors of both."""
        return balanced_pairs(spec, cls.order)

    @classmethod
    def modes(cls, spec: LayerSpec) -> Shape:
        """Return (o₁i₁, o₂i₂, o₃i₃, K)."""
        return (*(m * n for m, n in zip(*cls.pairs(spec), strict=True)), prod(spec.kernel))

    @classmethod
    def input_modes(cls, spec: LayerSpec) -> Shape:
        """Return (i₁, i₂, i₃, K)."""
        return (*cls.pairs(spec)[1], prod(spec.kernel))

    @classmethod
    def to_tensor(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights as (batch, o₁i₁, ..., K)."""
        return trains.paired(weight.flatten(3).movedim(-1, 1), *cls.pairs(spec)).movedim(1, -1)

    @classmethod
    def from_tensor(cls, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights (batch, out, in, *kernel)."""
        weight = trains.unpaired(tensor.movedim(-1, 1), *cls.pairs(spec)).movedim(1, -1)
        return weight.reshape(len(tensor), *spec.group_shape[1:])

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the convolution of every slice of the channels alike, then the pairs from the last to the first."""
        rank = cls.check_rank(spec, rank)
        stages = [step.stage(spec) for step in cls._steps(spec, cls.runs(spec, rank), cls.sides(spec, rank))]
        return (*stages[:-1], stages[-1].replace(bias=spec.bias))

    @classmethod
    def cost_of_runs(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any], in_shape: Shape) -> tuple[Any, Any]:
        """Return parameters and multiply-accumulates of the convolution of all slices, then the pairs."""
        _, core, after = spec.positions(in_shape)
        steps = cls._steps(spec, runs, sides)
        return total_cost(spec, ((s.weights, s.before * s.after * (core if s.taps > 1 else after)) for s in steps))

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the weights of the steps."""
        rank = cls.check_rank(spec, rank)
        cores = []
        steps = cls._steps(spec, cls.runs(spec, rank), cls.sides(spec, rank))
        for step, weight in zip(steps, chain, strict=True):
            apart = weight.reshape(step.left, step.made, step.taken, step.right * step.taps)
            cores.append(cls._joined(spec, step, apart))
        return cls(spec, **cls.named_cores(spec, rank, list(reversed(cores))))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the steps."""
        weights = []
        spec, rank = self.spec, self.rank
        steps = self._steps(spec, self.runs(spec, rank), self.sides(spec, rank))
        for step, core in zip(steps, reversed(self.cores), strict=True):
            apart = self._apart(self.spec, step, core)  # (r, m, n, r' or K)
            if step.taps > 1:
                weights.append(apart.reshape(1, step.left * step.made, step.taken, *self.spec.kernel))
            else:
                matrix = apart.reshape(step.left * step.made, step.taken * step.right)
                weights.append(matrix[None] if step.before == step.after == 1 else matrix)
        return tuple(weights)

    @classmethod
    def _steps(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any]) -> Iterator[Step]:
        """Iterate over the runs from the last, which holds the kernel, to the first."""
        outer, inner = cls.pairs(spec)
        for at in reversed(range(len(runs))):
            first, last = runs[at]
            yield Step(
                pair=(first, min(last + 1, cls.order)),
                left=sides[at],
                right=sides[at + 1],
                made=prod(outer[first : last + 1]),
                taken=prod(inner[first : last + 1]),
                before=prod(inner[:first]),
                after=prod(outer[last + 1 :]),
                taps=prod(spec.kernel) if last == cls.order else 1,
            )

    @classmethod
    def _apart(cls, spec: LayerSpec, step: Step, core: Tensor) -> Tensor:
        """Return the core (1, r, m₁n₁m₂n₂...K, r') of a run as (r, m, n, r'·K)."""
        outer, inner = cls.pairs(spec)
        part = slice(*step.pair)
        pairs = [m * n for m, n in zip(outer[part], inner[part], strict=True)]
        tensor = core[0].reshape(step.left, -1, step.taps * step.right).movedim(1, -1).unflatten(-1, [*pairs, 1])
        matrices = trains.unpaired(tensor.squeeze(-1) if pairs else tensor, outer[part] or (1,), inner[part] or (1,))
        return matrices.permute(0, 2, 3, 1)

    @classmethod
    def _joined(cls, spec: LayerSpec, step: Step, apart: Tensor) -> Tensor:
        """Return the core of a run from (r, m, n, r'·K) as the train has it; undoes ``_apart``."""
        outer, inner = cls.pairs(spec)
        part = slice(*step.pair)
        tensor = trains.paired(apart.permute(0, 3, 1, 2), outer[part] or (1,), inner[part] or (1,))
        core = tensor.flatten(2).movedim(-1, 1)  # (r, mn, r'·K)
        return core.reshape(1, step.left, -1, step.right).contiguous()


class Step(NamedTuple):
    """A run of cores: (r, m, n, r') on the last input modes that are left, or with the kernel on slices of them."""

    pair: tuple[int, int]
    left: int
    right: int
    made: int
    taken: int
    before: int
    after: int
    taps: int

    @property
    def weights(self) -> int:
        """How many entries the core has."""
        return self.left * self.made * self.taken * self.right * self.taps

    def stage(self, spec: LayerSpec) -> SubLayerSpec:
        """Return the layer or the contraction that does it, without bias."""
        rows, cols = self.left * self.made, self.taken * self.right
        if self.taps > 1:
            own = spec.core(cols, rows)
            return own if self.before == 1 else SharedSliceSpec(layer=own, copies=self.before)
        if self.before == self.after == 1:
            return spec.mix(cols, rows)
        return ContractSpec.middle(self.before, cols, self.after, rows, axes=spec.axes)
