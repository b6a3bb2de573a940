"""Sub-layers of a factorized layer that are no plain torch layer and no einsum; what a chain of sub-layers costs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from tenfold.records.base import Spec
from tenfold.records.geometry import ContractSpec, LayerSpec, Shape
from tenfold.records.train_shape import TTGatherSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ReorderSpec(Spec):
    """Channels in another order, within each group of them; of each spatial axis every ``stride``-th place.

    ``block`` channels stay together, because runtimes move runs of memory much faster than single numbers. The weight
    are whole numbers, the block (of all) that comes at each place: neither trained nor counted among the parameters.

    Example:
        >>> ReorderSpec(channels=6, stride=(2, 1)).out_shape((2, 6, 5, 5))
        (2, 6, 3, 5)
    """

    channels: int
    groups: int = 1
    stride: Shape = ()
    block: int = 1
    bias: ClassVar[bool] = False
    num_params: ClassVar[int] = 0

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.channels

    @property
    def out_channels(self) -> int:
        """Number of channels, which are as many."""
        return self.channels

    @property
    def weight_shape(self) -> Shape:
        """Shape of the order."""
        return (self.channels // self.block,)

    def out_shape(self, in_shape: Shape) -> Shape:
        """Return the output shape for an input of shape ``in_shape`` (batched or not)."""
        place = len(in_shape) - self.axes
        return (*in_shape[:place], *(-(-n // s) for n, s in zip(in_shape[place:], self.stride, strict=True)))

    def macs(self, in_shape: Shape) -> int:
        """Return 0: nothing is multiplied."""
        del in_shape
        return 0

    def __str__(self) -> str:
        return f"Reorder {self.channels}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _AroundLayer(Spec):
    """What runs a ``layer`` on a part of its channels, and has no weight but that of the layer."""

    layer: LayerSpec

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return self.layer.axes

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight of the layer."""
        return self.layer.weight_shape

    @property
    def num_params(self) -> int:
        """Number of weights."""
        return self.layer.num_params


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSpec(_AroundLayer):
    """The last channels of each group, through a layer, added to the first ones, of which there are as many as outputs.

    It is the product with [I T], where T is the weight of the ``layer``.

    Example:
        >>> rest = LayerSpec(kind="linear", in_channels=5, out_channels=3)
        >>> fold = FoldSpec(layer=rest)
        >>> fold.in_channels, fold.out_shape((7, 8)), fold.num_params
        (8, (7, 3), 15)
    """

    bias: ClassVar[bool] = False

    @property
    def in_channels(self) -> int:
        """Number of inputs: those that stay and those that go through the layer."""
        return self.layer.in_channels + self.layer.out_channels

    @property
    def out_channels(self) -> int:
        """Number of outputs."""
        return self.layer.out_channels

    def out_shape(self, in_shape: Shape) -> Shape:
        """Return the output shape for an input of shape ``in_shape`` (batched or not)."""
        place = len(in_shape) - self.axes - 1
        return (*in_shape[:place], self.out_channels, *in_shape[place + 1 :])

    def macs(self, in_shape: Shape) -> int:
        """Return the multiply-accumulates for an input of shape ``in_shape``."""
        return prod(in_shape) // self.in_channels * prod(self.weight_shape)

    def __str__(self) -> str:
        return f"Fold {self.layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSliceSpec(_AroundLayer):
    """One layer that every slice of the channels goes through alike: ``copies`` slices, folded into the batch.

    Slice c of the output is what the ``layer`` makes of slice c of the input, with the same weight for all.

    Example:
        >>> one = LayerSpec(kind="conv", in_channels=1, out_channels=4, kernel=(3, 3), padding=(1, 1))
        >>> SharedSliceSpec(layer=one, copies=16).out_shape((2, 16, 8, 8))
        (2, 64, 8, 8)
    """

    copies: int

    @property
    def bias(self) -> bool:
        """Whether there is a bias: the same for all slices, which no layer wants."""
        return self.layer.bias

    @property
    def in_channels(self) -> int:
        """Number of input channels, of all slices."""
        return self.copies * self.layer.in_channels

    @property
    def out_channels(self) -> int:
        """Number of output channels, of all slices."""
        return self.copies * self.layer.out_channels

    def out_shape(self, in_shape: Shape) -> Shape:
        """Return the output shape for an input of shape ``in_shape`` (batched or not)."""
        lead = in_shape[: len(in_shape) - self.axes - 1]
        return (*lead, self.out_channels, *self.layer.out_shape(self._folded(in_shape))[2:])

    def macs(self, in_shape: Shape) -> int:
        """Return the multiply-accumulates for an input of shape ``in_shape``."""
        return self.layer.macs(self._folded(in_shape))

    def _folded(self, in_shape: Shape) -> Shape:
        place = len(in_shape) - self.axes - 1
        return (prod(in_shape[:place]) * self.copies, self.layer.in_channels, *in_shape[place + 1 :])

    def __str__(self) -> str:
        return f"{self.copies} × {self.layer}"


SubLayerSpec = LayerSpec | ContractSpec | SharedSliceSpec | TTGatherSpec | ReorderSpec | FoldSpec


def chain_params(stages: tuple[SubLayerSpec, ...]) -> int:
    """Return the number of parameters of stages run one after another."""
    return sum(s.num_params for s in stages)


def chain_buffer_bytes(stages: tuple[SubLayerSpec, ...]) -> int:
    """Return the bytes that stages store beside their parameters: the orders of channels, eight for each block."""
    return sum(8 * s.channels // s.block for s in stages if isinstance(s, ReorderSpec))


def chain_macs(stages: tuple[SubLayerSpec, ...], in_shape: Shape) -> int:
    """Return the multiply-accumulates of stages run one after another on an input of shape ``in_shape``."""
    total, shape = 0, in_shape
    for stage in stages:
        total += stage.macs(shape)
        shape = stage.out_shape(shape)
    return total
