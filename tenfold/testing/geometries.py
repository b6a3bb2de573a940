"""The table of layer geometries over which the laws run: every option that torch's layers have, channels kept few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.records import LayerSpec, Shape


@dataclass(frozen=True)
class Geometry:
    """A layer by name, and the shape of an input that it takes."""

    name: str
    spec: LayerSpec
    in_shape: Shape

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Return random inputs of ``in_shape``: numbers, or row indices for an embedding."""
        generator = torch.Generator().manual_seed(seed)
        if self.spec.kind == "embedding":
            return torch.randint(self.spec.in_channels, self.in_shape, generator=generator)
        return torch.randn(self.in_shape, generator=generator, dtype=torch.float64).to(dtype)

    def __str__(self) -> str:
        return self.name


def _case(name: str, kind: str, channels: tuple[int, int], in_shape: Shape, **options: Any) -> Geometry:
    values = {"kind": kind, "in_channels": channels[0], "out_channels": channels[1], **options}
    return Geometry(name, LayerSpec(**values), in_shape)


def _conv(name: str, channels: tuple[int, int], kernel: Shape, size: Shape, **options: Any) -> Geometry:
    options.setdefault("padding", tuple(k // 2 for k in kernel))
    return _case(name, "conv", channels, (2, channels[0], *size), kernel=kernel, **options)


def _transposed(name: str, channels: tuple[int, int], kernel: Shape, size: Shape, **options: Any) -> Geometry:
    return _case(name, "conv_transpose", channels, (2, channels[0], *size), kernel=kernel, **options)


GEOMETRIES: tuple[Geometry, ...] = (
    _case("linear", "linear", (12, 8), (3, 12), bias=True),
    _case("linear without bias", "linear", (8, 12), (3, 8)),
    _case("linear of a sequence", "linear", (6, 9), (2, 5, 6), bias=True),
    _case("linear of one vector", "linear", (10, 4), (10,), bias=True),
    _case("linear with one output", "linear", (10, 1), (3, 10), bias=True),
    _case("linear behind a flattened map", "linear", (36, 7), (3, 36), bias=True, in_modes=(4, 3, 3)),
    _case("embedding", "embedding", (11, 6), (2, 5)),
    _case("embedding of twelve rows", "embedding", (12, 6), (7,)),
    _case("embedding with padding", "embedding", (7, 8), (3, 4), padding_idx=2),
    _case("embedding with sparse gradients", "embedding", (9, 4), (6,), sparse=True),
    _conv("conv1d", (6, 8), (3,), (9,), bias=True),
    _conv("conv1d, strided and dilated", (5, 4), (3,), (13,), stride=(2,), dilation=(2,), padding=(3,)),
    _conv("conv1d, grouped, same", (6, 4), (4,), (8,), groups=2, padding="same", bias=True),
    _conv("conv2d", (6, 8), (3, 3), (7, 6), bias=True),
    _conv("conv2d without bias", (8, 6), (3, 3), (5, 7)),
    _case("conv2d of one picture", "conv", (4, 6), (4, 5, 6), kernel=(3, 3), padding=(1, 1), bias=True),
    _conv("conv2d, oblong", (5, 7), (3, 5), (6, 9), bias=True),
    _conv("conv2d, strides differ", (6, 4), (3, 3), (7, 8), stride=(2, 1), bias=True),
    _conv("conv2d, dilations differ", (4, 6), (3, 3), (8, 9), dilation=(1, 2), padding=(1, 2), bias=True),
    _conv("conv2d, paddings differ", (4, 5), (3, 3), (5, 6), padding=(0, 2), bias=True),
    _conv("conv2d, same", (4, 6), (3, 3), (6, 5), padding="same", dilation=(2, 1), bias=True),
    _conv("conv2d, same with an even kernel", (4, 6), (2, 4), (6, 7), padding="same", bias=True),
    _conv("conv2d, valid", (6, 4), (3, 3), (6, 5), padding="valid", bias=True),
    _conv("conv2d, reflect", (4, 6), (3, 3), (6, 7), padding_mode="reflect", bias=True),
    _conv("conv2d, replicate", (6, 4), (3, 5), (5, 6), padding_mode="replicate", bias=True),
    _conv("conv2d, circular", (4, 4), (3, 3), (5, 6), padding_mode="circular", stride=(2, 2)),
    _conv("conv2d, reflect and same", (4, 6), (3, 4), (6, 7), padding="same", padding_mode="reflect", bias=True),
    _conv("conv2d, grouped", (8, 6), (3, 3), (5, 6), groups=2, bias=True),
    _conv("conv2d, grouped and strided", (6, 12), (3, 2), (7, 6), groups=3, stride=(1, 2), bias=True),
    _conv("conv2d, depthwise", (6, 6), (3, 3), (5, 5), groups=6, bias=True),
    _conv("conv2d, depthwise with multiplier", (4, 12), (3, 5), (6, 6), groups=4, bias=True),
    _conv("conv2d, pointwise", (8, 6), (1, 1), (4, 5), stride=(2, 1), bias=True),
    _conv("conv2d, along one axis", (6, 4), (1, 3), (5, 6), bias=True),
    _conv("conv2d, along the other axis", (4, 6), (5, 1), (7, 4), bias=True),
    _conv("conv2d with one input", (1, 8), (3, 3), (6, 6), bias=True),
    _conv("conv2d with one output", (6, 1), (3, 3), (5, 6), bias=True),
    _conv("conv2d, many to few", (12, 3), (3, 3), (5, 5)),
    _conv("conv2d, few to many", (3, 12), (3, 3), (5, 5), bias=True),
    _conv("conv3d", (4, 5), (3, 3, 3), (4, 5, 4), bias=True),
    _conv("conv3d, grouped", (4, 6), (2, 3, 1), (4, 5, 3), groups=2, stride=(1, 2, 1), bias=True),
    _transposed("transposed conv1d", (6, 4), (4,), (5,), stride=(2,), padding=(1,), bias=True),
    _transposed("transposed conv2d", (6, 4), (3, 3), (4, 5), bias=True),
    _transposed(
        "transposed conv2d, output padding",
        (4, 6),
        (3, 4),
        (4, 3),
        stride=(2, 3),
        padding=(1, 2),
        output_padding=(1, 2),
        bias=True,
    ),
    _transposed("transposed conv2d, grouped and dilated", (6, 8), (3, 2), (4, 4), groups=2, dilation=(2, 1), bias=True),
    _transposed("transposed conv3d", (4, 3), (2, 3, 2), (3, 3, 2), stride=(2, 1, 1)),
)


def served(format: type[Any], geometries: tuple[Geometry, ...] = GEOMETRIES) -> tuple[Geometry, ...]:
    """Return the geometries that a format does not refuse."""
    return tuple(g for g in geometries if format.unsupported_reason(g.spec) is None)
