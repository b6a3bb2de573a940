"""Batch norms that can be fused into the layer before them, found in one run of the model; a reason for every other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer, stage_specs
from tenfold.records import LayerSpec
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.surgery.modules import HOOKS
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.layers import Entry, entries
from tenfold.tracing.trace import Trace, Tracer

# Submodules that a batch norm may run after normalizing, in this order: timm's batch norms with an activation.
AFTER = ("drop", "act")


@dataclass(frozen=True)
class FusedPairs:
    """Batch norms of a model that are fused into a layer, and those that stay.

    Attributes:
        pairs: path of the layer by path of the batch norm.
        kept: reason by path of the batch norm.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def fusable_pairs(model: nn.Module, inputs: Any) -> FusedPairs:
    """Find the batch norms of a model that can be fused into the layer before them, and why the others cannot.

    The model runs once, in evaluation mode. A pair is a layer whose output is taken by the batch norm and by nothing
    else, both of which run once. What runs must not depend on the inputs.

    Args:
        model: in evaluation mode; not changed.
        inputs: example inputs as ``call_model`` takes them.

    Raises:
        PlanError: the model is in training mode.
        ProfileError: it does not run on these inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
        >>> fusable_pairs(net, torch.zeros(1, 3, 8, 8))
        FusedPairs(pairs={'1': '0'}, kept={'3': 'it follows ReLU, which cannot take it'})
    """
    if model.training:
        msg = "fusing batch norm is for inference, and the model is in training mode: call model.eval() first"
        raise PlanError(msg)
    layers = {entry.path: entry for entry in entries(model)}
    norms = {path: entry.module for path, entry in layers.items() if isinstance(entry.module, BATCH_NORMS)}
    if not norms:
        return FusedPairs()
    unfit = {path: _reason_of_norm(norm) for path, norm in norms.items()}  # before there are hooks of our own
    hooked = {path for path, entry in layers.items() if _has_hooks(entry.module)}
    odd: dict[str, str] = {}
    with evaluating(model), layer_by_layer(), Tracer(dict(model.named_modules())) as trace, ExitStack() as stack:
        for path, norm in norms.items():
            if not plain(norm):
                check = _checking(path, odd)  # runs within the norm for the tracer, since prepended later
                stack.enter_context(norm.register_forward_hook(check, prepend=True, with_kwargs=True))
        call_model(model, inputs)
    result = FusedPairs()
    for path, norm in norms.items():
        maker, reason = _maker(trace, path, layers)
        reason = unfit[path] or reason or odd.get(path, "") or _reason_of_layer(maker, norm, hooked)
        if reason or maker is None:
            result.kept[path] = reason
        else:
            result.pairs[path] = maker.path
    return result


def _maker(trace: Trace, norm: str, layers: dict[str, Entry]) -> tuple[Entry | None, str]:
    """Return the layer whose output a batch norm takes, and why the data flow keeps both apart, or an empty string."""
    if not trace.calls[norm]:
        return None, "the forward never calls it"
    value = trace.taken_by(norm)
    changed = False
    while value is not None and not value.makers:
        value, changed = value.changed_from, True
    maker = next((path for path in value.makers if path in layers), None) if value is not None else None
    if value is None or maker is None:
        return None, "what it takes is not the output of a layer"
    layer = layers[maker]
    if trace.calls[norm] > 1 or trace.calls[maker] > 1:
        return layer, f"it or {maker!r} runs several times: one fused layer cannot stand for all"
    if changed or any(use.by != norm for use in value.uses):
        return layer, f"the output of {maker!r} is used elsewhere as well, or changed before"
    if layer.spec is not None and len(value.shape) != layer.spec.axes + 2:  # batch norm has its channels on axis 1
        return layer, f"it normalizes another axis than that of the outputs of {maker!r}"
    return layer, ""


def _reason_of_norm(norm: Any) -> str:
    """Return why a batch norm cannot be fused into any layer, or an empty string."""
    if norm.training:
        return "it is in training mode: its statistics change with every batch"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics: what it does depends on the batch"
    if parametrize.is_parametrized(norm):
        return "its parameters are parametrized"
    if _has_hooks(norm):
        return "it has hooks, which would no longer see its input"
    if not plain(norm) and {name for name, _ in norm.named_children()} != set(AFTER):
        return f"{type(norm).__name__} is a batch norm with a forward of its own"
    return ""


def plain(norm: nn.Module) -> bool:
    """Whether a batch norm does what torch's own do, and nothing after it."""
    return any(type(norm).forward is base.forward for base in BATCH_NORMS)


def _reason_of_layer(layer: Entry | None, norm: Any, hooked: set[str]) -> str:
    """Return why a layer cannot take the batch norm after it, or an empty string."""
    if layer is None:
        return "what it takes is not the output of a layer"
    if layer.spec is None:
        own = not any(True for _ in layer.module.parameters())
        return f"it follows {type(layer.module).__name__}, which cannot take it" if own else layer.reason
    if layer.spec.kind == "embedding":
        return "it follows an embedding, which has no bias"
    if layer.tied:
        return f"layer {layer.path!r} shares a parameter with {', '.join(layer.tied)}"
    if layer.path in hooked:
        return f"layer {layer.path!r} has hooks, which would see another output"
    if layer.spec.out_channels != norm.num_features:
        return f"layer {layer.path!r} has {layer.spec.out_channels} outputs, it has {norm.num_features} channels"
    if isinstance(layer.module, FactorizedLayer) and not isinstance(last_spec(layer.module), LayerSpec):
        return f"layer {layer.path!r} does not end with a plain torch layer"
    return ""


def last_spec(layer: FactorizedLayer) -> Any:
    """Return the geometry of the last stage of a factorized layer."""
    return stage_specs(layer)[-1]


def _has_hooks(module: nn.Module) -> bool:
    parts = module.modules() if isinstance(module, FactorizedLayer) else (module,)
    return any(bool(part.__dict__.get(name)) for part in parts for name in HOOKS)


def _checking(path: str, odd: dict[str, str]) -> Callable[..., None]:
    """Return a hook that notes in ``odd`` if a batch norm does not compute what its parts say."""

    def check(norm: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        x = next(tensors_in((args, kwargs)))
        value = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        for name in AFTER:
            value = norm.get_submodule(name)(value)
        if not torch.allclose(value, output, rtol=1e-4, atol=1e-5, equal_nan=True):
            odd[path] = f"{type(norm).__name__} does more than normalize, drop and activate"

    return check
