"""Make layers of the projections that an attention computes at once, so that plans reach each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tenfold.errors import PlanError
from tenfold.layers import JoinedProjections, SeparateAttention, dense_weight, spec_of
from tenfold.surgery.modules import find, put
from tenfold.tracing.layers import entries

_ATTENTION = "MultiheadAttention"
_JOINED = re.compile(r"c_attn|w?qkv(_proj)?|to_qkv|in_proj(_qkv)?|qkv_lin(ear)?|query_key_value", re.IGNORECASE)


def joined_projections(model: nn.Module) -> dict[str, str]:
    """Return the modules, by path, that compute queries, keys and values at once, with their kind.

    That is ``nn.MultiheadAttention``, and linear layers called ``qkv``, ``c_attn`` and the like of which a third are
    the queries: their kind is the numbers of outputs. To take them apart changes no output, so nothing is tried here.
    Modules that share a parameter with others are left out, and so are attentions with ``bias_k`` or
    ``add_zero_attn``.

    Example:
        >>> joined_projections(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "qkv": nn.Linear(8, 24)}))
        {'attention': 'MultiheadAttention', 'qkv': '8+8+8'}
    """
    tied = {entry.path for entry in entries(model) if entry.tied}
    found = {}
    for path, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            if not {path, f"{path}.out_proj"} & tied and module.bias_k is None and not module.add_zero_attn:
                found[path] = _ATTENTION
        elif _JOINED.fullmatch(path.rpartition(".")[2]) and path not in tied:
            spec = spec_of(module)[0]
            if spec is not None and spec.kind == "linear" and spec.out_channels % 3 == 0:
                found[path] = "+".join([str(spec.out_channels // 3)] * 3)
    return found


def separated_projections(model: nn.Module) -> dict[str, str]:
    """Return path and kind of the modules that are taken apart already."""
    found = {path: module.kind for path, module in model.named_modules() if isinstance(module, JoinedProjections)}
    return found | {path: _ATTENTION for path, m in model.named_modules() if isinstance(m, SeparateAttention)}


def is_projections(kind: str) -> bool:
    """Whether the kind of a module that was taken apart is one of these.

    Example:
        >>> is_projections("8+8+8"), is_projections("LSTM")
        (True, False)
    """
    return kind == _ATTENTION or re.fullmatch(r"\d+(\+\d+)+", kind) is not None


def separate_projections_(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Put modules whose projections are layers in place, and return the model; what is so already stays.

    Args:
        model: is changed.
        kinds: as ``joined_projections`` returns it.

    Raises:
        PlanError: no such module, or one of another kind.
    """
    new = {}
    for path, kind in kinds.items():
        module = find(model, path)
        if not isinstance(module, SeparateAttention | JoinedProjections):
            new[path] = _apart(module, path, kind)
    model = put(model, new)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _holds(module.modules()):
            module.use_nested_tensor = False  # nested tensors are for the fused kernel alone
    return model


def _apart(module: nn.Module, path: str, kind: str) -> nn.Module:
    if kind == _ATTENTION and isinstance(module, nn.MultiheadAttention):
        return SeparateAttention.of(module)
    sizes = [int(size) for size in kind.split("+")] if kind != _ATTENTION else []
    if spec_of(module)[0] is None or not sizes or sum(sizes) != len(dense_weight(module)):
        msg = f"{path!r} is no module that computes the projections {kind} of an attention: another model's plan"
        raise PlanError(msg)
    return JoinedProjections.of(module, sizes)


def _holds(modules: Iterable[Any]) -> bool:
    return any(isinstance(module, SeparateAttention) for module in modules)
