"""Fuse batch norm into the layer before it, for inference: the same outputs with fewer operations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.formats import join_groups, split_groups
from tenfold.layers import FactorizedLayer, dense_weight, own_layout, spec_of
from tenfold.records import LayerSpec
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.surgery.batchnorm_pairs import AFTER, FusedPairs, fusable_pairs, last_spec, plain
from tenfold.surgery.modules import find, put
from tenfold.tracing import copied


class FusedNorm(nn.Sequential):
    """Placeholder for a fused batch norm: empty, or what the batch norm did besides (an activation).

    Attributes:
        into: path of the layer that it was fused into.
    """

    def __init__(self, into: str, after: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(OrderedDict(after or {}))
        self.into = into

    def extra_repr(self) -> str:
        """Return where the batch norm went."""
        return f"into {self.into!r}"


def fuse_batchnorm(model: nn.Module, inputs: Any) -> nn.Module:
    """Return a new model for inference in which batch norms are fused into the layers before them.

    Use it last, on a model that is only run from then on.

    In evaluation mode a batch norm multiplies each channel and adds to it, so the layer before it can do both at no
    cost: W ← γ/√(var+ε)·W and b ← γ/√(var+ε)·(b − mean) + β (Jacob et al. 2018, arXiv 1712.05877, section 3.2). The
    outputs are the same but for rounding. A factorized layer takes it in its last stage. Which ones can be fused is
    found in one run; ``fusable_pairs`` gives the reason for each that stays. Fuse after training: a fused batch norm
    has no statistics left to adapt.

    Args:
        model: in evaluation mode; not changed.
        inputs: example inputs as ``call_model`` takes them. What runs must not depend on the inputs.

    Raises:
        PlanError: the model is in training mode.
        ProfileError: it does not run on these inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> fused = fuse_batchnorm(net, torch.zeros(1, 3, 8, 8))
        >>> fused[1], fused[0].bias.shape
        (FusedNorm(into '0'), torch.Size([4]))
    """
    fused = copied(model)
    fuse_batchnorm_(fused, inputs)
    return fused


def fuse_batchnorm_(model: nn.Module, inputs: Any) -> FusedPairs:
    """Fuse batch norms into the layers before them, in place; return which went where, and why others stay.

    Use it where memory is too small for a second model.

    See ``fuse_batchnorm``.
    """
    fusable = fusable_pairs(model, inputs)
    sound, kept = {}, dict(fusable.kept)
    for norm, layer in fusable.pairs.items():
        if all(bool(torch.isfinite(t).all()) for t in _fused(find(model, layer), find(model, norm))):
            sound[norm] = layer
        else:
            kept[norm] = f"fused into layer {layer!r} it does not fit into the dtype of that"
    fuse_pairs_(model, sound)
    return FusedPairs(sound, kept)


def fuse_pairs_(model: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """Fuse the batch norms at the given paths into the layers named with them, in place; return the model.

    Nothing is run, and values do not matter: this is how the structure of a fused model is rebuilt. Those that are
    fused already stay so.

    Args:
        model: any module.
        pairs: path of the layer by path of the batch norm, as in ``FusedPairs.pairs``.

    Raises:
        PlanError: a path leads nowhere or to something else, or layer and batch norm do not fit; nothing was changed.
    """
    for norm, layer in check_pairs(model, pairs).items():
        old: Any = find(model, norm)
        _replace_last(find(model, layer), *_fused(find(model, layer), old))
        after = {} if plain(old) else {name: old.get_submodule(name) for name in AFTER}
        put(model, {norm: FusedNorm(layer, after)})
    return model


def check_pairs(model: nn.Module, pairs: Mapping[str, str]) -> dict[str, str]:
    """Return the pairs that are not fused yet; raise PlanError if one of them cannot be."""
    left = {norm: layer for norm, layer in pairs.items() if not isinstance(find(model, norm), FusedNorm)}
    for norm, layer in left.items():
        _check(find(model, norm), find(model, layer), norm, layer)
    return left


def fused_pairs(model: nn.Module) -> dict[str, str]:
    """Return the paths of the fused batch norms, each with the path of the layer that took it."""
    return {path: module.into for path, module in model.named_modules() if isinstance(module, FusedNorm)}


def _check(norm: nn.Module, layer: nn.Module, norm_path: str, path: str) -> None:
    if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None:
        msg = f"{norm_path!r} is {type(norm).__name__}, not a batch norm with statistics: it cannot be fused"
        raise PlanError(msg)
    spec, reason = (layer.spec, "") if isinstance(layer, FactorizedLayer) else spec_of(layer)
    if spec is None or spec.kind == "embedding":
        msg = f"batch norm {norm_path!r} cannot be fused into {path!r}: {reason or 'an embedding has no bias'}"
        raise PlanError(msg)
    _last(layer)
    if spec.out_channels != norm.num_features:
        msg = f"batch norm {norm_path!r} has {norm.num_features} channels, {path!r} has {spec.out_channels} outputs"
        raise PlanError(msg)


def _last(layer: nn.Module) -> tuple[Any, LayerSpec]:
    """Return the torch layer that computes the outputs, and its geometry."""
    if not isinstance(layer, FactorizedLayer):
        spec, reason = spec_of(layer)
        if spec is None:
            raise PlanError(reason)
        return layer, spec
    last = last_spec(layer)
    if not isinstance(last, LayerSpec):
        msg = f"a {layer.format} layer does not end with a plain torch layer: no batch norm can be fused into it"
        raise PlanError(msg)
    return layer.stages[-1], last


def _fused(layer: nn.Module, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the layer's last sub-layer with the batch norm fused into them."""
    stage, spec = _last(layer)
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        weight = split_groups(dense_weight(stage), spec).double()
        weight = weight * scale.view(spec.groups, -1, *[1] * (weight.dim() - 2))
        bias = -norm.running_mean.double() if stage.bias is None else stage.bias.double() - norm.running_mean.double()
        bias = scale * bias
        bias = bias if norm.bias is None else bias + norm.bias.double()
        return own_layout(stage, join_groups(weight, spec)).to(stage.weight), bias.to(stage.weight)


def _replace_last(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Replace the last weight and bias of the layer, in place."""
    stage, _ = _last(layer)
    grads = stage.weight.requires_grad
    stage.weight = nn.Parameter(
        torch.empty_like(stage.weight, requires_grad=False).copy_(weight), grads
    )  # in its memory format
    stage.bias = nn.Parameter(bias, grads if stage.bias is None else stage.bias.requires_grad)
    if isinstance(layer, FactorizedLayer):
        layer.spec = layer.spec.replace(bias=True)
        layer.fit = None  # of another weight
