"""Modules by path: where they sit, which are shared, and how one takes the place of another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tenfold.errors import PlanError
from tenfold.registry import did_you_mean
from tenfold.tracing.references import redirect_

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def find(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path.

    Raises:
        PlanError: there is none, and the message names the nearest paths; or the model is scripted.
    """
    if isinstance(model, torch.jit.ScriptModule):
        msg = "a scripted or traced model takes no other layers: compress the model itself, then script or trace it"
        raise PlanError(msg)
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        msg = f"the model has no layer {path!r}. {did_you_mean(path, [n for n, _ in model.named_modules() if n])}"
        raise PlanError(msg) from error


def paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Return every path at which this very module sits; more than one when it is shared."""
    return [path for path, m in model.named_modules(remove_duplicate=False) if m is module]


def put(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules in place of those at the given paths, wherever the model holds these; return the model.

    Lists, functions and whatever else refers to a module is followed too: see ``tenfold.tracing.references``. A
    replacement takes over training mode and hooks. An empty path replaces the model itself.
    """
    places = [(path, find(model, path), new) for path, new in replacements.items()]
    for _, old, new in places:
        new.train(old.training)
        for name in HOOKS:
            if name in old.__dict__:
                new.__dict__[name] = old.__dict__[name]
    for path, old, new in places:
        if path == "":
            return new
        for place in paths_of(model, old):
            name, _, child = place.rpartition(".")
            parent = model.get_submodule(name)
            setattr(parent, child, new)
            _leave_fused_path(parent)
    redirect_(model, {id(old): new for _, old, new in places})
    return model


def _leave_fused_path(parent: nn.Module) -> None:
    """Make a transformer layer call its linear layers, instead of a fused kernel that reads their ``weight``.

    The fused path of torch multiplies dense weights, so every call would rebuild them; zero is torch's own mark for
    "the activation has no fused kernel".
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0
