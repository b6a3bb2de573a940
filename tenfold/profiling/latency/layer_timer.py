"""Timer of a single sub-layer: constant weights, and a constant input of its real shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor, nn

from tenfold.layers import build
from tenfold.profiling.latency.memory_format import LAYOUTS
from tenfold.records import LayerSpec, Shape, SubLayerSpec, TTGatherSpec
from tenfold.tracing.contexts import synchronize

Timer = Callable[[SubLayerSpec, Shape], float]

_BLOCK_MS = 3.0
_WARM_MS = 0.5


class LayerTimer:
    """Milliseconds of one run of a sub-layer, measured now, as the mean over a block of runs.

    Weights and inputs are constants: values do not change the time of a kernel, unless they are denormal.

    Example:
        >>> timer = LayerTimer("cpu", torch.float32, "contiguous")
        >>> timer(LayerSpec(kind="linear", in_channels=8, out_channels=4), (2, 8)) > 0
        True
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, memory_format: str) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.memory_format = memory_format

    def __call__(self, spec: SubLayerSpec, in_shape: Shape) -> float:
        """Return milliseconds per run for an input of shape ``in_shape``, batch included."""
        layer = constant_layer(spec, self.device, self.dtype)
        x = constant_input(spec, in_shape, self.device, self.dtype)
        for tensor in (*layer.parameters(), x):
            tensor.data = _laid_out(tensor.data, self.memory_format)
        with torch.no_grad():
            once = self._block(layer, x, 1)  # fresh memory and compiled kernels: thrown away
            if once < _WARM_MS:
                once = self._block(layer, x, 3)
            return self._block(layer, x, max(1, ceil(_BLOCK_MS / max(once, 1e-4))))

    def _block(self, layer: nn.Module, x: Tensor, number: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(number):
            layer(x)
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - start) / number


def constant_layer(spec: SubLayerSpec, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a layer of this geometry whose every weight is small and the same, in evaluation mode."""

    def parameter(shape: Shape) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, 0.01, device=device, dtype=dtype), requires_grad=False)

    bias = parameter((spec.out_channels,)) if spec.bias else None
    return build(spec, parameter(spec.weight_shape), bias).eval()


def constant_input(spec: SubLayerSpec, in_shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an input of this shape for a layer of this geometry: ones, or the indices of an embedding, spread out."""
    if isinstance(spec, TTGatherSpec) or (isinstance(spec, LayerSpec) and spec.kind == "embedding"):
        count = int(torch.Size(in_shape).numel())
        return (torch.arange(count, device=device) * 7919 % spec.in_channels).reshape(in_shape)
    return torch.ones(in_shape, device=device, dtype=dtype)


def _laid_out(tensor: Tensor, memory_format: str) -> Tensor:
    axes, layout = LAYOUTS[memory_format]
    return tensor.contiguous(memory_format=layout) if tensor.dim() in axes else tensor
