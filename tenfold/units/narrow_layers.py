"""Plain layers of smaller sizes: the same class as before, with some of its channels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.layers import dense_weight
from tenfold.layers.dense_layers import own_layout

# What layers of torch and ``Conv1D`` of transformers call their numbers of channels.
_INPUTS = ("in_features", "in_channels", "nx")
_OUTPUTS = ("out_features", "out_channels", "nf")


def narrowed_layer(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer of the same class and options with another weight and bias, and numbers of channels to match.

    Use it for whatever a unit makes of a linear layer, a convolution or a ``Conv1D`` of transformers.

    Args:
        layer: stays as it is.
        weight: (out, in) or (out, in, *kernel), in torch's layout, without groups.
        bias: (out,), or None where the layer has none.

    Example:
        >>> narrowed_layer(nn.Linear(4, 3), torch.zeros(2, 4), torch.zeros(2))
        Linear(in_features=4, out_features=2, bias=True)
    """
    old: Any = layer
    new = _without_tensors(layer)
    with torch.no_grad():
        for name, value in (("weight", own_layout(layer, weight)), ("bias", bias)):
            held = getattr(old, name, None)
            if held is None or value is None:
                new.register_parameter(name, None)
                continue
            stored = value.detach().to(held).clone(memory_format=torch.contiguous_format)
            new.register_parameter(name, nn.Parameter(stored, held.requires_grad))
    out, inner = dense_weight(new).shape[:2]
    for names, channels in ((_INPUTS, inner), (_OUTPUTS, out)):
        for name in names:
            if name in vars(layer):
                setattr(new, name, channels)
    return new


def kept_outputs(layer: nn.Module, mix: Tensor) -> nn.Module:
    """Return a layer whose outputs are mixed by a matrix (k, out): the weight B W and the bias B b.

    A choice of outputs is exact to the bit; products are computed in float64.
    """
    weight, bias = dense_weight(layer).detach(), getattr(layer, "bias", None)
    chosen = choice_of(mix)
    if chosen is not None:
        return narrowed_layer(layer, weight[chosen], None if bias is None else bias[chosen])
    wide = mix.double()
    mixed = (wide @ weight.double().flatten(1)).view(-1, *weight.shape[1:])
    return narrowed_layer(layer, mixed, None if bias is None else wide @ bias.detach().double())


def kept_channels(layer: nn.Module, chosen: Tensor) -> nn.Module:
    """Return a module that treats every channel alone with some of the channels: a batch norm, a depthwise convolution.

    Its parameters and buffers have the channels first; numbers of channels and groups are adjusted.
    """
    old: Any = layer
    new = _without_tensors(layer)
    for table in ("_parameters", "_buffers"):
        for name, tensor in layer.__dict__[table].items():
            if tensor is not None and tensor.dim():
                kept = tensor.detach()[chosen.to(tensor.device)].clone()
                own = nn.Parameter(kept, tensor.requires_grad) if table == "_parameters" else kept
                new.__dict__[table][name] = own
    for name in ("num_features", "in_channels", "out_channels", "groups"):
        if name in vars(old):
            setattr(new, name, len(chosen))
    return new


def choice_of(mix: Tensor) -> Tensor | None:
    """Return which columns (k,) a matrix (k, n) chooses, if each of its rows is one of the identity; else None.

    Example:
        >>> choice_of(torch.eye(3)[[2, 0]]).tolist()
        [2, 0]
    """
    chosen = mix.argmax(1)
    rest = mix.clone()
    rest[torch.arange(len(mix), device=mix.device), chosen] -= 1
    return None if bool(rest.any()) else chosen


def _without_tensors(layer: nn.Module) -> nn.Module:
    """Return a shallow copy of a module, with tables of its own for parameters; hooks are those of the original."""
    new = copy.copy(layer)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(layer.__dict__[table])
    return new
