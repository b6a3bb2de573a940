"""A convolution as a tensor train in the order of HODEC: input cores, k×k convolution, output cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from tenfold.formats.base import FORMATS, Rank, Structure, total_cost
from tenfold.formats.train import Runs, TrainFormat
from tenfold.records import ContractSpec, LayerSpec, Shape, SubLayerSpec
from tenfold.tensors import mode_factors


@FORMATS.register("tensor_train")
class TensorTrain(TrainFormat):
    """Channels split into two modes on each side of the kernel, all in one train: 1×1 steps, a small k×k, 1×1 steps.

    W (out, K, in) = (o₁, o₂, K, i₁, i₂) is a train with the ranks r1 to r4. All inputs are contracted before the kernel
    and all outputs made after it, so that the costs of both sides add up and do not multiply (HODEC: Yin et al. 2022,
    CVPR, section 4; TT-SVD: Yin et al. 2021, arXiv 2107.12422). Parameters o₁r₁ + r₁o₂r₂ + r₂Kr₃ + r₃i₁r₄ + r₄i₂; with
    r1 and r4 full those of Tucker-2 with the ranks r2 and r3.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("r1", "r2", "r3", "r4")
    tucker2_ranks: ClassVar[tuple[str, str] | None] = ("r2", "r3")
    out_order: ClassVar[int] = 2
    in_order: ClassVar[int] = 2

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for layers without a kernel, and for grouped ones."""
        if spec.axes == 0 or spec.pointwise:
            return "tensor_train needs a convolution with a kernel larger than 1: tt_matrix or low_rank serves this one"
        if spec.groups > 1:
            return "tensor_train needs a convolution without groups: tucker2 serves this one"
        if spec.in_channels == spec.out_channels == 1:
            return "there are no channels to drop"
        return None

    @classmethod
    def channel_modes(cls, spec: LayerSpec) -> tuple[Shape, Shape]:
        """Return the modes of the output and of the input channels: the most balanced factors, ascending."""
        outer = mode_factors(spec.out_channels, cls.out_order, pad=False).modes
        inner = mode_factors(spec.in_channels, cls.in_order, pad=False).modes
        return outer, inner

    @classmethod
    def rank_family(cls, spec: LayerSpec) -> tuple[Rank, ...]:
        """Return equal shares of r2 and r3, and twice as much of the others: cutting these saves little and costs much.

        They split the channels of one side, whose matrices are small and have flat spectra. Where r1 and r4 are full,
        the train is Tucker-2.
        """
        most = cls.max_rank(spec)
        steps = max(most.values())
        shares = {"r1": 2, "r2": 1, "r3": 1, "r4": 2}
        line = [{k: min(-(-v * shares[k] * at // steps), v) for k, v in most.items()} for at in range(1, steps + 1)]
        return cls.undominated(spec, (cls.check_rank(spec, rank) for rank in line))

    @classmethod
    def modes(cls, spec: LayerSpec) -> Shape:
        """Return (o₁, ..., K, i₁, ...)."""
        outer, inner = cls.channel_modes(spec)
        return (*outer, prod(spec.kernel), *inner)

    @classmethod
    def input_modes(cls, spec: LayerSpec) -> Shape:
        """Return (i₁, ..., K)."""
        return (*cls.channel_modes(spec)[1], prod(spec.kernel))

    @classmethod
    def to_tensor(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights as (batch, o₁, ..., K, i₁, ...)."""
        return weight.flatten(3).transpose(2, 3).reshape(len(weight), *cls.modes(spec))

    @classmethod
    def from_tensor(cls, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return weights (batch, out, in, *kernel)."""
        flat = tensor.reshape(len(tensor), spec.out_channels, prod(spec.kernel), spec.in_channels)
        return flat.transpose(2, 3).reshape(len(tensor), *spec.group_shape[1:])

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the input steps, the convolution, the output steps."""
        rank = cls.check_rank(spec, rank)
        stages = [step.stage(spec) for step in cls.steps(spec, cls.runs(spec, rank), cls.sides(spec, rank))]
        return (*stages[:-1], stages[-1].replace(bias=spec.bias))

    @classmethod
    def cost_of_runs(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any], in_shape: Shape) -> tuple[Any, Any]:
        """Return parameters and multiply-accumulates of the input steps, the convolution, the output steps."""
        before, core, after = spec.positions(in_shape)
        places, costs = before, []
        for step in cls.steps(spec, runs, sides):
            weights = step.rows * step.cols * (prod(spec.kernel) if step.kernel else 1)
            costs.append((weights, core if step.kernel else places * step.before * step.after))
            places = after if step.kernel else places
        return total_cost(spec, costs)

    @classmethod
    def steps(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any]) -> Iterator[Step]:
        """Iterate over what a layer does for a division of the train into runs, in the order in which it runs."""
        outer, inner = cls.channel_modes(spec)
        modes = (*outer, 1, *inner)  # the kernel's own mode apart
        for at, (first, last) in reversed(list(enumerate(runs))):
            left, right, width = sides[at], sides[at + 1], prod(modes[first : last + 1])
            if first > cls.out_order:
                yield Step(left, width * right, before=prod(modes[cls.out_order : first]))
            elif last < cls.out_order:
                yield Step(left * width, right, after=prod(modes[last + 1 : cls.out_order]))
            else:
                made, taken = prod(modes[first : cls.out_order]), prod(modes[cls.out_order : last + 1])
                yield Step(left * made, taken * right, kernel=True)

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the weights of the steps."""
        rank = cls.check_rank(spec, rank)
        runs, (sizes, _), sides = cls.runs(spec, rank), cls.merged(spec, rank), cls.sides(spec, rank)
        cores = []
        for k, at in enumerate(cls._order(runs)):
            shape = (1, sides[at], sizes[at], sides[at + 1])
            cores.append((at, cls._as_core(chain[k], spec, runs[at], shape)))
        return cls(spec, **cls.named_cores(spec, rank, [core for _, core in sorted(cores, key=lambda pair: pair[0])]))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the steps."""
        runs = self.runs(self.spec, self.rank)
        steps = self.steps(self.spec, runs, self.sides(self.spec, self.rank))
        cores = self.cores
        return tuple(
            self._as_weight(cores[at], runs[at], step) for at, step in zip(self._order(runs), steps, strict=True)
        )

    @classmethod
    def _order(cls, runs: Runs) -> list[int]:
        """Return which run each step is of: from the last input run down to the first, kernel, outputs likewise."""
        return list(reversed(range(len(runs))))

    def _as_weight(self, core: Tensor, run: tuple[int, int], step: Step) -> Tensor:
        """Return the weight of a step: of the convolution (1, out, in, *kernel), of a matrix as its stage has it."""
        if step.kernel:
            taps = prod(self.spec.kernel)
            made = prod(self.modes(self.spec)[run[0] : self.out_order])
            parts = core.reshape(1, core.shape[1] * made, taps, -1)  # (1, r·o, K, i·r')
            return parts.transpose(2, 3).reshape(1, step.rows, step.cols, *self.spec.kernel)
        matrix = core.reshape(1, step.rows, step.cols)
        return matrix if step.before == step.after == 1 else matrix[0]

    @classmethod
    def _as_core(cls, weight: Tensor, spec: LayerSpec, run: tuple[int, int], shape: Shape) -> Tensor:
        if run[0] <= cls.out_order <= run[1]:
            taps = prod(spec.kernel)
            made = shape[1] * prod(cls.modes(spec)[run[0] : cls.out_order])
            weight = weight.reshape(1, made, -1, taps).transpose(2, 3)
        return weight.reshape(shape)


class Step(NamedTuple):
    """A matrix (rows, cols) on some of the channels, those before and after carried along; or the convolution."""

    rows: int
    cols: int
    before: int = 1
    after: int = 1
    kernel: bool = False

    def stage(self, spec: LayerSpec) -> SubLayerSpec:
        """Return the layer or the contraction that does it, without bias."""
        if self.kernel:
            return spec.core(self.cols, self.rows)
        if self.before == self.after == 1:
            return spec.mix(self.cols, self.rows)
        return ContractSpec.middle(self.before, self.cols, self.after, self.rows, axes=spec.axes)
