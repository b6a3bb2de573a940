"""Convolutions that torch keeps from oneDNN although they are faster there: on one thread, on AMD's processors.

On one thread torch runs 1×1 convolutions of fewer than 16 samples, and small ones of one sample, as matrix products of
MKL (``Slow2d``). Those use AVX-512 on Intel's processors only. On AMD's the same products take twice the time of
oneDNN's, in which the dense layers around them run. Elsewhere, and where oneDNN would first have to turn more memory
than it saves time, torch's own choice stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# What torch's own rule goes by: inputs of one sample up to this size, and 1×1 kernels below so many samples.
_SMALL_INPUT, _FEW_SAMPLES = 20_480, 16

# From so many multiply-accumulates on oneDNN was faster on an AMD EPYC (Zen 5): 1×1 kernels, and others of one sample.
_POINTWISE, _SPATIAL, _CHANNELS_LAST = 8_000_000, 2_300_000, 3_000_000

# 1×1 kernels need so many multiply-accumulates for every number read or written, which oneDNN turns; larger arrays are
# memory that is new to the process.
_PER_NUMBER, _LARGEST = 20, 1 << 20

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def run_stages(stages: Iterable[nn.Module], x: Tensor, weights: int) -> Tensor:
    """Return what the stages make of ``x``, one after the other, each in the library that is the faster for it.

    Args:
        stages: layers of torch and others.
        x: of any shape.
        weights: how many numbers the weights of the stages have for each channel of ``x``: small inputs need no look.
    """
    if torch.compiler.is_compiling() or is_tracing() or not _worth_a_look(x, weights):
        for stage in stages:
            x = stage(x)
        return x
    for stage in stages:
        x = _convolve(stage, x) if type(stage) is nn.Conv2d and faster(stage, x) else stage(x)
    return x


def faster(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether this convolution of ``x`` (n, channels, height, width) had better be given to oneDNN.

    It goes by the shapes, the layout in memory, the number of threads and the maker of the processor alone.
    """
    if x.dim() != 4 or conv.padding_mode != "zeros" or conv.groups != 1 or isinstance(conv.padding, str):
        return False
    batch, channels, height, width = x.shape
    positions = batch * _outputs(conv, 0, height) * _outputs(conv, 1, width)
    macs = positions * conv.out_channels * channels * prod(conv.kernel_size)
    if macs < _SPATIAL or torch.get_num_threads() != 1 or not slow_products():
        return False
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if prod(conv.kernel_size) > 1 or prod(conv.stride) > 1:
        return batch == 1 and x.numel() <= _SMALL_INPUT
    if last:
        return macs >= _CHANNELS_LAST and batch < _FEW_SAMPLES
    numbers = positions * (channels + conv.out_channels)
    largest = positions * max(channels, conv.out_channels)
    worth = macs >= max(_POINTWISE, _PER_NUMBER * numbers) and largest <= _LARGEST
    return worth and batch < _FEW_SAMPLES


@lru_cache(maxsize=1)
def slow_products() -> bool:
    """Return whether torch's matrix products use fewer of the processor's instructions than oneDNN does."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_f")) and "AMD" in str(known.get("cpu_name", ""))


def _worth_a_look(x: Tensor, weights: int) -> bool:
    """Return whether a stage may be large enough, and nothing is about that has to see the operations of torch."""
    library: Any = torch.backends.mkldnn
    return (
        type(x) is Tensor
        and not is_functorch_wrapped_tensor(x)
        and x.numel() * weights >= _SPATIAL
        and slow_products()
        and not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and bool(library.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not _get_current_dispatch_mode_stack()
        and not _get_current_function_mode_stack()
        and forward_ad.unpack_dual(x).tangent is None
    )


def _outputs(conv: nn.Conv2d, axis: int, size: int) -> int:
    """Return how many positions there are along an axis of this size."""
    padding: Any = conv.padding
    reach: int = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    around: int = 2 * padding[axis]
    return max((size + around - reach) // conv.stride[axis] + 1, 0)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the convolution by oneDNN, where nothing but plain tensors and torch's own forward are involved."""
    own, padding = vars(conv), conv.padding
    weight = conv.weight
    plain = type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device
    if not plain or isinstance(padding, str) or "forward" in own or any(own[name] for name in _HOOKS):
        result: Tensor = conv(x)
        return result
    return torch.mkldnn_convolution(x, weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups)
