"""The sub-layers that a factorized layer runs: torch's own layers, one einsum, one layer for many slices, a gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.layers.tt_gather import Gather
from tenfold.records import ContractSpec, LayerSpec, SharedSliceSpec, SubLayerSpec, TTGatherSpec

# Products with fewer columns are run as one large one, which needs a turn of the memory.
_NARROW = 16


class Contract(nn.Module):
    """One einsum over the features of its input, with one weight; see ``ContractSpec``.

    A product with the middle one of three modes runs without a copy where the memory allows it: what stands before
    goes into the batch, what stands after into the positions, and the rest is a batch of products with one matrix. With
    the few channels of a train that is up to ten times faster than a 1×1 convolution on the same memory.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: ContractSpec, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.spec = spec
        self._outputs = spec.out_channels  # worked out from the equation: nothing that a compiler could trace
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the contraction, its feature modes flattened into one axis again."""
        spec = self.spec
        place = x.dim() - 1 - spec.axes
        if spec.is_middle:
            sides = x.shape[place + 1 :]
            out = self._middle(x, sides.numel()).reshape(*x.shape[:place], self._outputs, *sides)
        else:
            apart = x.unflatten(place, spec.modes)
            out = torch.einsum(_behind(spec.equation, spec.axes), apart, self.weight)
            out = out.flatten(place, out.dim() - 1 - spec.axes)
        return out if self.bias is None else out + self.bias.view(-1, *(1,) * spec.axes)

    def _middle(self, x: Tensor, positions: int) -> Tensor:
        """Return the product, as (whatever stands before, rows of the weight, whatever stands after)."""
        _, inner, after = self.spec.modes
        width = after * positions
        if width == 1:
            return functional.linear(x.reshape(-1, inner), self.weight)
        folded = x.reshape(-1, inner, width)
        if width < _NARROW:
            return functional.linear(folded.mT, self.weight).mT
        count = folded.shape[0]  # len() is a number, also where the size of the batch is to stay open
        return torch.bmm(self.weight.expand(count, -1, -1), folded)

    def extra_repr(self) -> str:
        """Return the modes and the equation."""
        return f"{self.spec.modes}, {self.spec.equation!r}"


class SharedSlices(nn.Module):
    """One layer that all slices of the channels go through alike, as if each were an input of its own."""

    def __init__(self, layer: nn.Module, copies: int) -> None:
        super().__init__()
        self.layer = layer
        self.copies = copies

    @property
    def weight(self) -> Tensor:
        """The weight of the layer, the same for all slices."""
        layer: Any = self.layer
        weight: Tensor = layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer for each slice, slice after slice."""
        layer: Any = self.layer
        place = x.dim() - 1 - len(layer.kernel_size)
        out = layer(x.unflatten(place, (self.copies, -1)).flatten(0, place))
        slices: Tensor = out.unflatten(0, (*x.shape[:place], self.copies)).flatten(place, place + 1)
        return slices


def _behind(equation: str, axes: int) -> str:
    """Return the equation with letters for the spatial axes, which stand behind the features."""
    inputs, out = equation.split("->")
    features, weight = inputs.split(",")
    sides = "XYZ"[:axes]
    return f"{features}{sides},{weight}->{out}{sides}"


def build(spec: SubLayerSpec, weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    """Return a plain torch layer with this geometry that holds just these parameters.

    Args:
        spec: the geometry.
        weight: in torch's own layout, of shape ``spec.weight_shape``.
        bias: of shape (out_channels,), present exactly when ``spec.bias``.
    """
    if isinstance(spec, ContractSpec):
        return Contract(spec, weight, bias)
    if isinstance(spec, TTGatherSpec):
        return Gather(spec, weight)
    if isinstance(spec, SharedSliceSpec):
        return SharedSlices(build(spec.layer, weight, bias), spec.copies)
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
    return layer


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
