"""Linear layers of attention whose heads are narrower than the forward around them expects."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.layers.dense_layers import dense_weight


class PaddedHeads(nn.Linear):
    """A projection to narrow heads that are filled up with zeros: what the forward of an attention is used to.

    The weight is (heads·size, in), and so are the costs; the outputs are (..., heads·full). Zeros add nothing to scores
    nor to the outputs of heads. For forwards that want one size for queries, keys and values, where these differ.

    Attributes:
        heads: number of heads.
        full: size of a head that others see.
    """

    def __init__(self, in_features: int, heads: int, size: int, full: int, *, bias: bool = True) -> None:
        super().__init__(in_features, heads * size, bias)
        self.heads, self.full = heads, full

    @classmethod
    def of(cls, layer: nn.Module, heads: int, full: int) -> Self:
        """Return the layer with weight and bias of a linear layer to narrow heads."""
        width, inner = dense_weight(layer).shape
        with torch.device("meta"):
            new = cls(inner, heads, width // heads, full, bias=layer.bias is not None)
        _take_(new, layer)
        return new

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return (..., heads·full) for inputs (..., in)."""
        narrow = super().forward(input).unflatten(-1, (self.heads, -1))
        return functional.pad(narrow, (0, self.full - narrow.shape[-1])).flatten(-2)

    def extra_repr(self) -> str:
        """Return what there is to say of a linear layer, and of its heads."""
        return f"{super().extra_repr()}, {_heads(self)}"


class UnpaddedHeads(nn.Linear):
    """A projection of heads that reads their first entries alone: the counterpart of ``PaddedHeads``.

    The weight is (out, heads·size); the inputs are (..., heads·full).

    Attributes:
        heads: number of heads.
        full: size of a head in the inputs.
    """

    def __init__(self, heads: int, size: int, full: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(heads * size, out_features, bias)
        self.heads, self.full = heads, full

    @classmethod
    def of(cls, layer: nn.Module, heads: int, full: int) -> Self:
        """Return the layer with weight and bias of a linear layer of narrow heads."""
        out, width = dense_weight(layer).shape
        with torch.device("meta"):
            new = cls(heads, width // heads, full, out, bias=layer.bias is not None)
        _take_(new, layer)
        return new

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return (..., out) for inputs (..., heads·full)."""
        size = self.in_features // self.heads
        return super().forward(input.unflatten(-1, (self.heads, self.full))[..., :size].flatten(-2))

    def extra_repr(self) -> str:
        """Return what there is to say of a linear layer, and of its heads."""
        return f"{super().extra_repr()}, {_heads(self)}"


def _take_(new: PaddedHeads | UnpaddedHeads, layer: nn.Module) -> None:
    """Give a layer the parameters of a linear layer, and its mode."""
    held: Any = layer
    new.weight = nn.Parameter(dense_weight(layer).detach().contiguous(), held.weight.requires_grad)
    if held.bias is not None:
        new.bias = held.bias
    new.train(layer.training)


def _heads(layer: PaddedHeads | UnpaddedHeads) -> str:
    narrow = layer.out_features if isinstance(layer, PaddedHeads) else layer.in_features
    return f"heads={layer.heads} of {narrow // layer.heads} in {layer.full}"
