"""The sub-layers that a factorized layer runs: torch's own layers, one einsum, and a few that move channels."""

# Annotations are not postponed here: torch.jit.script reads those of attributes as they are.
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.layers.map_linear import MapLinear
from tenfold.layers.tt_gather import Gather
from tenfold.records import (
    ContractSpec,
    FoldSpec,
    LayerSpec,
    ReorderSpec,
    SharedSliceSpec,
    SubLayerSpec,
    TTGatherSpec,
)

# Products with fewer columns are run as one large one, which needs a turn of the memory.
_NARROW = 16


class Contract(nn.Module):
    """One einsum over the features of its input, with one weight; see ``ContractSpec``.

    A product with the middle one of three modes runs without a copy where the memory allows it: what stands before
    goes into the batch, what stands after into the positions, and the rest is a batch of products with one matrix. With
    the few channels of a train that is up to ten times faster than a 1×1 convolution on the same memory.
    """

    bias: Tensor | None

    def __init__(self, spec: ContractSpec, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.spec = spec
        # Worked out here: neither a compiler nor TorchScript could follow the spec.
        self._axes, self._middle_only, self._modes = spec.axes, spec.is_middle, list(spec.modes)
        self._outputs, self._equation = spec.out_channels, _behind(spec.equation, spec.axes)
        self._narrow = _NARROW
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the contraction, its feature modes flattened into one axis again."""
        place = x.dim() - 1 - self._axes
        if self._middle_only:
            before, sides = list(x.shape[:place]), list(x.shape[place + 1 :])
            positions = 1
            for size in sides:
                positions *= size
            out = self._middle(x, positions).reshape(before + [self._outputs] + sides)  # noqa: RUF005 - TorchScript has no stars
        else:
            apart = x.unflatten(place, self._modes)
            out = torch.einsum(self._equation, [apart, self.weight])
            out = out.flatten(place, out.dim() - 1 - self._axes)
        bias = self.bias
        return out if bias is None else out + bias.view([-1] + [1] * self._axes)

    def _middle(self, x: Tensor, positions: int) -> Tensor:
        """Return the product, as (whatever stands before, rows of the weight, whatever stands after)."""
        inner, after = self._modes[1], self._modes[2]
        width = after * positions
        if width == 1:
            return functional.linear(x.reshape(-1, inner), self.weight)
        folded = x.reshape(-1, inner, width)
        if width < self._narrow:
            return functional.linear(folded.mT, self.weight).mT
        count = folded.shape[0]  # len() is a number, also where the size of the batch is to stay open
        return torch.bmm(self.weight.expand(count, -1, -1), folded)

    def extra_repr(self) -> str:
        """Return the modes and the equation."""
        return f"{self.spec.modes}, {self.spec.equation!r}"


class SharedSlices(nn.Module):
    """One layer that all slices of the channels go through alike, as if each were an input of its own."""

    __jit_unused_properties__: ClassVar = ["weight"]  # of torch.jit.script

    def __init__(self, layer: nn.Module, copies: int, axes: int) -> None:
        super().__init__()
        self.layer = layer
        self.copies = copies
        self._axes = axes

    @property
    def weight(self) -> Tensor:
        """The weight of the layer, the same for all slices."""
        layer: Any = self.layer
        weight: Tensor = layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer for each slice, slice after slice."""
        place = x.dim() - 1 - self._axes
        out: Tensor = self.layer(x.unflatten(place, [self.copies, -1]).flatten(0, place))
        parts: Tensor = out.unflatten(0, list(x.shape[:place]) + [self.copies])  # noqa: RUF005
        return parts.flatten(place, place + 1)


class Reorder(nn.Module):
    """Channels in another order, of every ``stride``-th place; see ``ReorderSpec``. The order is a buffer."""

    weight: Tensor

    def __init__(self, spec: ReorderSpec, weight: Tensor) -> None:
        super().__init__()
        self._axes, self._block = spec.axes, spec.block
        strided = any(s > 1 for s in spec.stride)
        self._steps = len(spec.stride) if strided else 0  # single numbers, for torch.jit.script
        self._first, self._second, self._third = (*spec.stride, 1, 1, 1)[:3]
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels in their order."""
        place = x.dim() - 1 - self._axes
        if self._steps == 1:
            x = x[..., :: self._first]
        elif self._steps == 2:
            x = x[..., :: self._first, :: self._second]
        elif self._steps == 3:
            x = x[..., :: self._first, :: self._second, :: self._third]
        if self._block == 1:
            return x.index_select(place, self.weight)
        apart: Tensor = x.unflatten(place, [-1, self._block])
        return apart.index_select(place, self.weight).flatten(place, place + 1)

    def extra_repr(self) -> str:
        """Return the number of blocks, their size, and the stride where there is one."""
        stride = (self._first, self._second, self._third)[: self._steps]
        return f"{len(self.weight)} × {self._block}" + (f", stride={stride}" if stride else "")


class Fold(nn.Module):
    """The last channels of each group through a layer, added to the first ones; see ``FoldSpec``."""

    __jit_unused_properties__: ClassVar = ["weight"]  # of torch.jit.script

    def __init__(self, spec: FoldSpec, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._axes, self._groups, self._kept = spec.axes, spec.layer.groups, spec.out_channels // spec.layer.groups

    @property
    def weight(self) -> Tensor:
        """The weight of the layer."""
        layer: Any = self.layer
        weight: Tensor = layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums."""
        place = x.dim() - 1 - self._axes
        left = x.shape[place] // self._groups - self._kept
        if self._groups == 1:
            folded: Tensor = self.layer(x.narrow(place, self._kept, left))
            return folded + x.narrow(place, 0, self._kept)
        apart = x.unflatten(place, [self._groups, -1])
        folded = self.layer(apart.narrow(place + 1, self._kept, left).flatten(place, place + 1))
        kept: Tensor = apart.narrow(place + 1, 0, self._kept).flatten(place, place + 1)
        return folded + kept


def _behind(equation: str, axes: int) -> str:
    """Return the equation with letters for the spatial axes, which stand behind the features."""
    inputs, out = equation.split("->")
    features, weight = inputs.split(",")
    sides = "XYZ"[:axes]
    return f"{features}{sides},{weight}->{out}{sides}"


def held(weight: Tensor, *, requires_grad: bool = True) -> Tensor:
    """Return a weight as a layer holds it: a parameter, or as it is where it is whole numbers, which nothing trains."""
    return nn.Parameter(weight, requires_grad) if weight.is_floating_point() else weight


def empty_weight(spec: SubLayerSpec, like: Tensor) -> Tensor:
    """Return a weight for this geometry, not initialised, in the dtype of ``like``; of a reordering that of no change.

    Its numbers are places in memory: what happened to lie there must never be used.
    """
    if isinstance(spec, ReorderSpec):
        return torch.arange(len(range(0, spec.channels, spec.block)), device=like.device)
    return like.new_empty(spec.weight_shape)


def build(spec: SubLayerSpec, weight: Tensor, bias: nn.Parameter | None = None) -> nn.Module:
    """Return a plain torch layer with this geometry that holds just these parameters.

    Args:
        spec: the geometry.
        weight: in torch's own layout, of shape ``spec.weight_shape``: a parameter, see ``held``.
        bias: of shape (out_channels,), present exactly when ``spec.bias``.
    """
    if isinstance(spec, ReorderSpec):
        return Reorder(spec, weight)
    assert isinstance(weight, nn.Parameter)  # noqa: S101 - see ``held``
    if isinstance(spec, FoldSpec):
        return Fold(spec, build(spec.layer, weight))
    if isinstance(spec, ContractSpec):
        return Contract(spec, weight, bias)
    if isinstance(spec, TTGatherSpec):
        return Gather(spec, weight)
    if isinstance(spec, SharedSliceSpec):
        return SharedSlices(build(spec.layer, weight, bias), spec.copies, spec.axes)
    layer: nn.Module
    if spec.kind == "linear":
        layer = nn.Linear(spec.in_channels, spec.out_channels, bias=spec.bias, device="meta")
    elif spec.kind == "embedding":
        layer = nn.Embedding(
            spec.in_channels, spec.out_channels, padding_idx=spec.padding_idx, sparse=spec.sparse, device="meta"
        )
    else:
        layer = _build_convolution(spec)
    layer.register_parameter("weight", weight)
    if spec.bias:
        layer.register_parameter("bias", bias)
    return MapLinear.of(layer, spec.in_modes) if spec.in_modes and isinstance(layer, nn.Linear) else layer


def _build_convolution(spec: LayerSpec) -> nn.Module:
    options: dict[str, Any] = {
        "kernel_size": spec.kernel,
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "padding_mode": spec.padding_mode,
        "bias": spec.bias,
        "device": "meta",
    }
    if spec.kind == "conv_transpose":
        options["output_padding"] = spec.output_padding
    base: Any = getattr(nn, f"{'ConvTranspose' if spec.kind == 'conv_transpose' else 'Conv'}{spec.axes}d")
    layer: nn.Module = base(spec.in_channels, spec.out_channels, **options)
    return layer
