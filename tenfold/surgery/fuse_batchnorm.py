"""Batch norm merged into the layer before it: the same outputs, for inference, with fewer operations."""

from __future__ import annotations

import copy
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
from tenfold.surgery.fused_pairs import AFTER, Folds, find_folds, last_spec, plain
from tenfold.surgery.modules import find, put


class FoldedNorm(nn.Sequential):
    """What stands where a batch norm was: nothing, or what the batch norm did besides (an activation).

    Attributes:
        into: path of the layer that it was merged into.
    """

    def __init__(self, into: str, after: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(OrderedDict(after or {}))
        self.into = into

    def extra_repr(self) -> str:
        """Return where the batch norm went."""
        return f"into {self.into!r}"


def fold(model: nn.Module, inputs: Any) -> nn.Module:
    """Return a new model for inference in which batch norms are merged into the layers before them.

    In evaluation mode a batch norm multiplies each channel and adds to it, so the layer before it can do both at no
    cost: W ← γ/√(var+ε)·W and b ← γ/√(var+ε)·(b − mean) + β (Jacob et al. 2018, arXiv 1712.05877, section 3.2). The
    outputs are the same but for rounding. A factorized layer takes it in its last stage. Which ones go is seen while
    the model runs once; ``find_folds`` tells, with the reason for each that stays. Train before you fold: a folded
    batch norm has no statistics to adapt any more.

    Args:
        model: in evaluation mode; stays as it is.
        inputs: example inputs as ``call_model`` takes them. What runs must not depend on the inputs.

    Raises:
        PlanError: the model is in training mode.
        ProfileError: it does not run on these inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> slim = fold(net, torch.zeros(1, 3, 8, 8))
        >>> slim[1], slim[0].bias.shape
        (FoldedNorm(into '0'), torch.Size([4]))
    """
    folded = copy.deepcopy(model)
    fold_(folded, inputs)
    return folded


def fold_(model: nn.Module, inputs: Any) -> Folds:
    """Merge batch norms into the layers before them, in place; return which went where, and why others stay.

    See ``fold``.
    """
    found = find_folds(model, inputs)
    sound, kept = {}, dict(found.kept)
    for norm, layer in found.pairs.items():
        if all(bool(torch.isfinite(t).all()) for t in _merged(find(model, layer), find(model, norm))):
            sound[norm] = layer
        else:
            kept[norm] = f"merged into layer {layer!r} it does not fit into the dtype of that"
    fold_pairs_(model, sound)
    return Folds(sound, kept)


def fold_pairs_(model: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """Merge the batch norms at the given paths into the layers named with them, in place; return the model.

    Nothing is run, and values do not matter: this is how the structure of a folded model is rebuilt. Those that are
    merged already stay so.

    Args:
        model: any module.
        pairs: path of the layer by path of the batch norm, as in ``Folds.pairs``.

    Raises:
        PlanError: a path leads nowhere or to something else, or layer and batch norm do not fit; nothing was changed.
    """
    for norm, layer in check_pairs(model, pairs).items():
        old: Any = find(model, norm)
        _take(find(model, layer), *_merged(find(model, layer), old))
        after = {} if plain(old) else {name: old.get_submodule(name) for name in AFTER}
        put(model, {norm: FoldedNorm(layer, after)})
    return model


def check_pairs(model: nn.Module, pairs: Mapping[str, str]) -> dict[str, str]:
    """Return those of the pairs that are still to be merged; raise PlanError if one of them cannot be."""
    left = {norm: layer for norm, layer in pairs.items() if not isinstance(find(model, norm), FoldedNorm)}
    for norm, layer in left.items():
        _check(find(model, norm), find(model, layer), norm, layer)
    return left


def folds_of(model: nn.Module) -> dict[str, str]:
    """Return the paths of the batch norms that were merged, each with the path of the layer that took it."""
    return {path: module.into for path, module in model.named_modules() if isinstance(module, FoldedNorm)}


def _check(norm: nn.Module, layer: nn.Module, norm_path: str, path: str) -> None:
    if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None:
        msg = f"{norm_path!r} is {type(norm).__name__}, not a batch norm with statistics: it cannot be folded"
        raise PlanError(msg)
    spec, reason = (layer.spec, "") if isinstance(layer, FactorizedLayer) else spec_of(layer)
    if spec is None or spec.kind == "embedding":
        msg = f"batch norm {norm_path!r} cannot be folded into {path!r}: {reason or 'an embedding has no bias'}"
        raise PlanError(msg)
    _last(layer)
    if spec.out_channels != norm.num_features:
        msg = f"batch norm {norm_path!r} has {norm.num_features} channels, {path!r} has {spec.out_channels} outputs"
        raise PlanError(msg)


def _last(layer: nn.Module) -> tuple[Any, LayerSpec]:
    """Return the torch layer that makes the outputs, and its geometry."""
    if not isinstance(layer, FactorizedLayer):
        spec, reason = spec_of(layer)
        if spec is None:
            raise PlanError(reason)
        return layer, spec
    last = last_spec(layer)
    if not isinstance(last, LayerSpec):
        msg = f"a {layer.format} layer does not end with a plain torch layer: no batch norm can be folded into it"
        raise PlanError(msg)
    return layer.stages[-1], last


def _merged(layer: nn.Module, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the layer's last stage with the batch norm in them."""
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


def _take(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give the layer another last weight and bias, in place."""
    stage, _ = _last(layer)
    grads = stage.weight.requires_grad
    stage.weight = nn.Parameter(
        torch.empty_like(stage.weight, requires_grad=False).copy_(weight), grads
    )  # laid out as it was
    stage.bias = nn.Parameter(bias, grads if stage.bias is None else stage.bias.requires_grad)
    if isinstance(layer, FactorizedLayer):
        layer.spec = layer.spec.replace(bias=True)
        layer.fit = None  # told of another weight
