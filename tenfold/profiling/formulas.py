"""FLOP formulas of fused kernels that torch's flop counter lacks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of scores and weighted sum, for shapes (batch, heads, length, width), without masking.

    Key and value may have fewer heads, which the kernel repeats. The flop counter has the same formula for the kernel
    on CUDA, and finds the same number on the CPU for attention written as two products.
    """
    batch_heads_queries = prod(query.shape[:-1])
    keys, width, value_width = key.shape[-2], query.shape[-1], value.shape[-1]
    return 2 * batch_heads_queries * keys * (width + value_width)


def onednn_rnn_flops(x: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of one direction of one recurrent layer: both matrices at every step of every sequence."""
    return 2 * (x.numel() // x.shape[-1]) * (w_ih.numel() + w_hh.numel())


def cudnn_rnn_flops(x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """Return the FLOPs of a whole recurrent network: every matrix at every step of every sequence."""
    return 2 * (x.numel() // x.shape[-1]) * sum(w.numel() for w in weights if w.dim() == 2)


def grouped_flops(left: Tensor, right: Tensor, *rest: Any, **options: Any) -> int:
    """Return the FLOPs of grouped products: groups are a third axis, or lie one after the other along one of two.

    The only integers among what else the kernels take are where the groups end; what lies beyond is not computed with.
    """
    tensors = [t for t in (*rest, *options.values()) if isinstance(t, Tensor)]
    ends = next((t for t in tensors if not t.is_floating_point()), None)
    if ends is None:
        return 2 * left.numel() * right.shape[-1]
    shared = left.dim() == right.dim() == 2  # the groups divide what is summed over
    whole = right.shape[-1] if left.dim() == 3 else left.shape[-1] if shared else left.shape[0]
    used = whole if ends.is_meta else int(ends[-1])
    if left.dim() == 3:
        return 2 * left.shape[-2] * left.shape[-1] * used
    return 2 * used * (left.shape[0] if shared else left.shape[-1]) * right.shape[-1]


def fused_kernels() -> dict[Any, Callable[..., int]]:
    """Return formulas of fused kernels that the flop counter lacks although it counts their unfused form.

    With these, a model costs the same on every device and with every kernel that torch picks: half of what the flop
    counter finds with fused kernels disabled.
    """
    formulas: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
        "mkldnn_rnn_layer": onednn_rnn_flops,
        "_cudnn_rnn": cudnn_rnn_flops,
        "_grouped_mm": grouped_flops,
        "_scaled_grouped_mm": grouped_flops,
        "_scaled_grouped_mm_v2": grouped_flops,
    }
    known = FlopCounterMode(display=False).flop_registry
    available = {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}
    registered = torch.ops.transformers  # what this library computes with where torch has no grouped kernel
    if hasattr(registered, "grouped_mm_fallback"):
        available[registered.grouped_mm_fallback] = grouped_flops
    return {packet: _raw(formula) for packet, formula in available.items() if packet not in known}


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark the formula as one that takes tensors; the counter would pass their shapes otherwise."""

    def count(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **{k: v for k, v in kwargs.items() if k != "out_val"})

    count.__dict__["_get_raw"] = True
    return count
