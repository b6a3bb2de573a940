"""Contiguous and channels-last memory formats: convert models and inputs, and find the faster one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import ProfileError
from tenfold.profiling.latency.measure import Comparison, compare_latency
from tenfold.registry import did_you_mean
from tenfold.tracing.held_tensors import copied
from tenfold.tracing.inputs import map_tensors, tensors_in

# Name -> (numbers of axes that it applies to, torch's name).
LAYOUTS: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "contiguous": ((4, 5), torch.contiguous_format),
    "channels_last": ((4,), torch.channels_last),
    "channels_last_3d": ((5,), torch.channels_last_3d),
}


def to_memory_format(model: nn.Module, inputs: Any, name: str) -> tuple[nn.Module, Any]:
    """Return copies of model and inputs in the memory format ``name``.

    Raises:
        ProfileError: no such memory format.

    Example:
        >>> net, x = to_memory_format(nn.Conv2d(4, 4, 3), torch.zeros(2, 4, 8, 8), "channels_last")
        >>> x.is_contiguous(memory_format=torch.channels_last)
        True
    """
    if name not in LAYOUTS:
        msg = f"unknown memory format {name!r}. {did_you_mean(name, LAYOUTS)}"
        raise ProfileError(msg)
    axes, layout = LAYOUTS[name]

    def lay_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=layout) if tensor.dim() in axes else tensor

    changed = copied(model)
    with torch.no_grad():
        for tensor in (*changed.parameters(), *changed.buffers()):
            tensor.data = lay_out(tensor.data)
    return changed, map_tensors(inputs, lay_out)


def memory_formats_for(inputs: Any) -> tuple[str, ...]:
    """Return the memory formats that apply to inputs of these numbers of axes, contiguous first.

    Example:
        >>> memory_formats_for(torch.zeros(1, 3, 8, 8))
        ('contiguous', 'channels_last')
    """
    axes = {tensor.dim() for tensor in tensors_in(inputs) if tensor.is_floating_point()}
    others = [n for n, (applies_to, _) in LAYOUTS.items() if n != "contiguous" and axes & set(applies_to)]
    return ("contiguous", *others)


def best_memory_format(
    model: nn.Module, inputs: Any, *, seconds: float = 4.0, threads: int | None = None
) -> tuple[str, Comparison]:
    """Return the memory format in which the model runs fastest, and the interleaved measurement behind it.

    Example:
        >>> name, _ = best_memory_format(nn.Linear(8, 8), torch.zeros(2, 8), seconds=0.05)
        >>> name
        'contiguous'
    """
    variants = {name: to_memory_format(model, inputs, name) for name in memory_formats_for(inputs)}
    result = compare_latency(variants, seconds=seconds, threads=threads)
    return min(result.latencies, key=lambda n: result.latencies[n].median_ms), result
