"""A linear layer that knows the feature map whose flattened form it takes."""

from __future__ import annotations

from math import prod
from typing import Self

from torch import nn

from tenfold.errors import WeightError
from tenfold.records import Shape


class MapLinear(nn.Linear):
    """``nn.Linear`` with the shape (channels, *size) of its inputs before they were flattened.

    It runs like any other, with the same parameters. Use it to let a plan factorize the modes of the map, as the format
    ``tensor_regression`` does; ``compress`` puts it in place by itself where a format wants it.

    Attributes:
        in_modes: shape of the map.

    Example:
        >>> import torch
        >>> layer = MapLinear.of(nn.Linear(8 * 3 * 3, 5), (8, 3, 3))
        >>> layer.in_modes, layer(torch.zeros(2, 72)).shape
        ((8, 3, 3), torch.Size([2, 5]))
    """

    in_modes: Shape

    @classmethod
    def of(cls, layer: nn.Linear, in_modes: Shape) -> Self:
        """Return a layer with the very parameters of a linear one.

        Raises:
            WeightError: the map has another number of entries than the layer has inputs.
        """
        if prod(in_modes) != layer.in_features:
            msg = (
                f"a map of shape {tuple(in_modes)} has {prod(in_modes)} entries, the layer takes {layer.in_features}: "
                "pass (channels, *size) of the map that is flattened"
            )
            raise WeightError(msg)
        own = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        own.weight, own.bias = layer.weight, layer.bias
        own.in_modes = tuple(in_modes)
        return own.train(layer.training)
