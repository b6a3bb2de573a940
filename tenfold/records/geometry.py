"""Geometry of a layer and of its sub-layers once it is factorized: shapes and costs, no weights.

``LayerSpec`` holds every hyper-parameter of a linear-like layer, so that nothing is lost when the layer is rebuilt. A
sub-layer of a factorized layer is again a ``LayerSpec`` (one plain torch layer), a ``ContractSpec`` (one einsum) or one
of those in ``tenfold/records/chains.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from tenfold.records.base import Spec

LayerKind = Literal["linear", "conv", "conv_transpose", "embedding"]
Shape = tuple[int, ...]

_MIDDLE = "...abc,db->...adc"
_NEUTRAL = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec(Spec):
    """Everything that defines a layer except its weights.

    Use it to ask a format what a layer of some geometry would become and cost, without any weights.

    ``kernel`` has one entry per spatial axis and is empty for linear and embedding layers, whose ``in_channels`` are
    the input features or the number of rows. ``padding`` is one int per spatial axis, ``"same"`` or ``"valid"``.
    Options per axis that are left out take their neutral value. ``in_modes`` is the shape (channels, *size) of the
    feature map whose flattened form a linear layer takes, where that is known: nothing that runs depends on it.

    Raises:
        ValueError: options that do not fit together, such as a linear layer with a kernel.

    Example:
        >>> LayerSpec(kind="conv", in_channels=3, out_channels=8, kernel=(3, 3)).weight_shape
        (8, 3, 3, 3)
    """

    type: Literal["layer"] = "layer"
    kind: LayerKind
    in_channels: PositiveInt
    out_channels: PositiveInt
    kernel: tuple[PositiveInt, ...] = ()
    stride: tuple[PositiveInt, ...] = ()
    padding: tuple[NonNegativeInt, ...] | Literal["same", "valid"] = ()
    output_padding: tuple[NonNegativeInt, ...] = ()
    dilation: tuple[PositiveInt, ...] = ()
    groups: PositiveInt = 1
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    bias: bool = False
    padding_idx: int | None = None
    sparse: bool = False
    in_modes: tuple[PositiveInt, ...] = ()

    def __post_init__(self) -> None:
        axes = len(self.kernel)
        if self.in_modes and (self.kind != "linear" or prod(self.in_modes) != self.in_channels):
            msg = f"in_modes={self.in_modes} are for a linear layer with as many inputs as their product"
            raise ValueError(msg)
        if (axes > 0) != (self.kind in ("conv", "conv_transpose")):
            msg = f"a {self.kind} layer cannot have the kernel {self.kernel}"
            raise ValueError(msg)
        for field, neutral in _NEUTRAL.items():
            value = getattr(self, field)
            if axes and not value:
                object.__setattr__(self, field, (neutral,) * axes)
            elif len(value) != axes and not isinstance(value, str):
                msg = f"{field}={value} needs one entry for each of the {axes} spatial axes"
                raise ValueError(msg)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            msg = f"groups={self.groups} must divide {self.in_channels} and {self.out_channels} channels"
            raise ValueError(msg)

    @property
    def axes(self) -> int:
        """Number of spatial axes: 0 for linear and embedding, 1 to 3 for convolutions."""
        return len(self.kernel)

    @property
    def group_shape(self) -> Shape:
        """Shape (groups, out/groups, in/groups, *kernel) of the weight with its groups apart."""
        g = self.groups
        return (g, self.out_channels // g, self.in_channels // g, *self.kernel)

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight in torch's own layout for this kind of layer."""
        o, i, g = self.out_channels, self.in_channels, self.groups
        match self.kind:
            case "conv_transpose":
                return (i, o // g, *self.kernel)
            case "embedding":
                return (i, o)
            case _:
                return (o, i // g, *self.kernel)

    @property
    def num_params(self) -> int:
        """Number of weights, the bias included."""
        return prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def pointwise(self) -> bool:
        """Whether every output position sees one input position only."""
        return all(k == 1 for k in self.kernel)

    def out_shape(self, in_shape: Shape) -> Shape:
        """Return the output shape for an input of shape ``in_shape`` (batched or not)."""
        match self.kind:
            case "linear":
                return (*in_shape[:-1], self.out_channels)
            case "embedding":
                return (*in_shape, self.out_channels)
            case _:
                lead = in_shape[: len(in_shape) - self.axes - 1]
                return (*lead, self.out_channels, *self._out_size(in_shape[len(in_shape) - self.axes :]))

    def positions(self, in_shape: Shape) -> tuple[int, int, int]:
        """Return how often a weight is used for one input: of a 1×1 before this layer, of itself, of a 1×1 after it.

        Samples and places count alike. A lookup uses its weights without multiplying: 0.
        """
        if self.kind == "embedding":
            return prod(in_shape), 0, prod(in_shape)
        before, after = prod(in_shape) // self.in_channels, prod(self.out_shape(in_shape)) // self.out_channels
        return before, before if self.kind == "conv_transpose" else after, after

    def macs(self, in_shape: Shape) -> int:
        """Return the multiply-accumulates for an input of shape ``in_shape``: half of torch's flop count."""
        return self.positions(in_shape)[1] * prod(self.weight_shape)

    def core(self, in_channels: int, out_channels: int, *, bias: bool = False) -> LayerSpec:
        """Return the same layer between other numbers of channels: it keeps kernel, stride, padding and groups."""
        return self.replace(in_channels=in_channels, out_channels=out_channels, bias=bias, in_modes=())

    def mix(self, in_channels: int, out_channels: int, *, bias: bool = False) -> LayerSpec:
        """Return the layer that only mixes channels at each position: linear, or a convolution with kernel 1."""
        if self.axes == 0:
            return LayerSpec(kind="linear", in_channels=in_channels, out_channels=out_channels, bias=bias)
        return LayerSpec(
            kind="conv",
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=(1,) * self.axes,
            groups=self.groups,
            bias=bias,
        )

    def along(self, axes: tuple[int, ...], in_channels: int, out_channels: int, *, bias: bool = False) -> LayerSpec:
        """Return the layer that acts along some spatial ``axes`` only, and passes the others through untouched."""

        def keep(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
            return tuple(v if a in axes else neutral for a, v in enumerate(values))

        return self.replace(
            in_channels=in_channels,
            out_channels=out_channels,
            bias=bias,
            kernel=keep(self.kernel, 1),
            stride=keep(self.stride, 1),
            dilation=keep(self.dilation, 1),
            padding=self.padding if isinstance(self.padding, str) else keep(self.padding, 0),
            output_padding=keep(self.output_padding, 0),
        )

    def _out_size(self, size: Shape) -> Shape:
        sizes = []
        for a, n in enumerate(size):
            reach = self.dilation[a] * (self.kernel[a] - 1)
            if self.padding == "same":
                pads = reach
            else:
                pads = 0 if isinstance(self.padding, str) else 2 * self.padding[a]
            if self.kind == "conv":
                sizes.append((n + pads - reach - 1) // self.stride[a] + 1)
            else:
                sizes.append((n - 1) * self.stride[a] - pads + reach + self.output_padding[a] + 1)
        return tuple(sizes)

    def __str__(self) -> str:
        name = self.kind.title().replace("_", "")
        if self.axes == 0:
            return f"{name} {self.in_channels}→{self.out_channels}"
        text = f"{name}{self.axes}d {self.in_channels}→{self.out_channels} {'×'.join(map(str, self.kernel))}"
        if any(s > 1 for s in self.stride):
            text += f" /{'×'.join(map(str, self.stride))}"
        return text + (f" g{self.groups}" if self.groups > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractSpec(Spec):
    """One einsum over the feature axis: unflatten it to ``modes``, contract with the weight, flatten again.

    ``equation`` names the feature modes with letters and everything else with the ellipsis, as in
    ``"...ab,cb->...ac"``. The feature axis is the last one, or has ``axes`` spatial axes behind it, as channels have.

    Example:
        >>> spec = ContractSpec(modes=(4, 6), equation="...ab,cb->...ac", weight_shape=(5, 6))
        >>> spec.out_shape((7, 24))
        (7, 20)
    """

    modes: Shape
    equation: str
    weight_shape: Shape
    bias: bool = False
    axes: int = 0

    @classmethod
    def middle(
        cls, before: int, in_modes: int, after: int, out_modes: int, *, axes: int = 0, bias: bool = False
    ) -> ContractSpec:
        """Return the product of a matrix (out_modes, in_modes) with the middle one of three feature modes.

        Every step of a tensor train is one of these: what stands before and after in the features is carried along.

        Example:
            >>> ContractSpec.middle(2, 5, 3, 4).out_shape((7, 30))
            (7, 24)
        """
        return cls(
            modes=(before, in_modes, after),
            equation=_MIDDLE,
            weight_shape=(out_modes, in_modes),
            bias=bias,
            axes=axes,
        )

    @property
    def is_middle(self) -> bool:
        """Whether this is a matrix product with the middle one of three feature modes."""
        return self.equation == _MIDDLE

    @property
    def _sizes(self) -> dict[str, int]:
        inputs, _ = self.equation.split("->")
        features, weight = inputs.split(",")
        return dict(zip(features.replace(".", ""), self.modes, strict=True)) | dict(
            zip(weight, self.weight_shape, strict=True)
        )

    @property
    def in_channels(self) -> int:
        """Number of input features."""
        return prod(self.modes)

    @property
    def out_channels(self) -> int:
        """Number of output features."""
        return prod(self._sizes[c] for c in self.equation.split("->")[1].replace(".", ""))

    @property
    def fan_in(self) -> int:
        """How many products are summed for one output."""
        _, output = self.equation.split("->")
        return prod(n for c, n in self._sizes.items() if c not in output)

    @property
    def num_params(self) -> int:
        """Number of weights, the bias included."""
        return prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    def out_shape(self, in_shape: Shape) -> Shape:
        """Return the output shape for an input of shape ``in_shape``."""
        place = len(in_shape) - 1 - self.axes
        return (*in_shape[:place], self.out_channels, *in_shape[place + 1 :])

    def macs(self, in_shape: Shape) -> int:
        """Return the multiply-accumulates for an input of shape ``in_shape``."""
        return prod(in_shape) // self.in_channels * prod(self._sizes.values())

    def __str__(self) -> str:
        return f"Contract {'×'.join(map(str, self.modes))}→{self.out_channels}"
