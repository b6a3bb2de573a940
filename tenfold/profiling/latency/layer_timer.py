"""Timer of a single sub-layer: constant weights, and a constant input of its real shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil, prod

import torch
from torch import Tensor, nn

from tenfold.layers import build, empty_weight, held
from tenfold.profiling.latency.memory_format import LAYOUTS
from tenfold.records import (
    ContractSpec,
    FoldSpec,
    LayerSpec,
    ReorderSpec,
    Shape,
    SharedSliceSpec,
    SubLayerSpec,
    TTGatherSpec,
)
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
        block = layer_block((spec,), in_shape, self.device, self.dtype, self.memory_format)
        once = 1e3 * block(1)  # fresh memory and compiled kernels: thrown away
        if once < _WARM_MS:
            once = 1e3 * block(3)
        return 1e3 * block(max(1, ceil(_BLOCK_MS / max(once, 1e-4))))


def layer_block(
    layers: Sequence[SubLayerSpec], in_shape: Shape, device: torch.device, dtype: torch.dtype, memory_format: str
) -> Callable[[int], float]:
    """Return a function that runs layers one after the other so many times and returns the seconds of one run."""
    chain = nn.Sequential(*(neutral_layer(spec, torch.empty(0, device=device, dtype=dtype)) for spec in layers))
    x = constant_input(layers[0], in_shape, device, dtype)
    for tensor in (*chain.parameters(), x):
        tensor.data = _laid_out(tensor.data, memory_format)

    def run(number: int) -> float:
        with torch.no_grad():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(number):
                chain(x)
            synchronize(device)
            return (time.perf_counter() - start) / number

    return run


def neutral_layer(spec: SubLayerSpec, like: Tensor) -> nn.Module:
    """Return a layer that averages its inputs: through any number of these, values neither vanish nor overflow."""
    weight = empty_weight(spec, like)
    fill_neutral_(weight, spec)
    bias = nn.Parameter(like.new_zeros(spec.out_channels)) if spec.bias else None
    return build(spec, held(weight), bias).eval()


def fill_neutral_(weight: Tensor, spec: SubLayerSpec) -> None:
    """Set all entries of a weight to one over the number of inputs that an output sees, in place."""
    if isinstance(spec, ReorderSpec):
        return  # any order will do
    if isinstance(spec, SharedSliceSpec | FoldSpec):
        spec = spec.layer
    seen: float
    if isinstance(spec, ContractSpec):
        seen = spec.fan_in
    elif isinstance(spec, TTGatherSpec):
        seen = prod(spec.shape.ranks) ** (1 / len(spec.shape.row_modes))
    else:
        seen = 1 if spec.kind == "embedding" else spec.in_channels // spec.groups * prod(spec.kernel)
    with torch.no_grad():
        weight.fill_(1.0 / seen)


def constant_input(spec: SubLayerSpec, in_shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an input of this shape for a layer of this geometry: ones, or the indices of an embedding, spread out."""
    if isinstance(spec, TTGatherSpec) or (isinstance(spec, LayerSpec) and spec.kind == "embedding"):
        count = int(torch.Size(in_shape).numel())
        return (torch.arange(count, device=device) * 7919 % spec.in_channels).reshape(in_shape)
    return torch.ones(in_shape, device=device, dtype=dtype)


def _laid_out(tensor: Tensor, memory_format: str) -> Tensor:
    axes, layout = LAYOUTS[memory_format]
    return tensor.contiguous(memory_format=layout) if tensor.dim() in axes else tensor
