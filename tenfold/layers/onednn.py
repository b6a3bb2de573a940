"""Convolutions that torch keeps from oneDNN although they are faster there: on one thread, on AMD's processors.

On one thread torch runs 1×1 convolutions of fewer than 16 samples, and small ones of one sample, as matrix products of
MKL (``Slow2d``). Those use AVX-512 on Intel's processors only. On AMD's the same products take twice the time of
oneDNN's, in which the dense layers around them run. Elsewhere, and where oneDNN would first have to turn more memory
than it saves time, torch's own choice stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

# Shapes of inputs whose choices are kept.
_REMEMBERED = 64

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class StageChoice:
    """Runs the stages of one layer, and remembers by the shape of the input which of them go to oneDNN."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, bool], tuple[bool, ...]] = {}

    def run(self, stages: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Return what the stages make of ``x``, one after the other, each in the library that is the faster for it."""
        taken = () if torch.compiler.is_compiling() or is_tracing() else self.taken(stages, x)
        if taken and _unwatched(x):
            for stage, by_onednn in zip(stages, taken, strict=True):
                x = _convolve(stage, x) if by_onednn else stage(x)
            return x
        for stage in stages:
            x = stage(x)
        return x

    def taken(self, stages: Iterable[nn.Module], x: Tensor) -> tuple[bool, ...]:
        """Return of each stage whether it goes to oneDNN; nothing if none does.

        It depends on the shape of the input, its layout in memory, the number of threads and the maker of the processor
        alone.
        """
        if not slow_products() or torch.get_num_threads() != 1:
            return ()
        if type(x) is not Tensor or is_functorch_wrapped_tensor(x):
            return ()
        last = not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        key = (x.shape, last)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            each = tuple(_each(stages, tuple(x.shape), last=last))
            found = self._known[key] = each if any(each) else ()
        return found


def _each(stages: Iterable[nn.Module], shape: tuple[int, ...], *, last: bool) -> Iterator[bool]:
    """Yield of each stage whether it goes to oneDNN; none does after a stage that is no convolution of images."""
    plain = len(shape) == 4
    for stage in stages:
        plain = plain and type(stage) is nn.Conv2d and stage.padding_mode == "zeros"
        if not plain or not isinstance(stage, nn.Conv2d) or isinstance(stage.padding, str):
            plain = False
            yield False
            continue
        batch, _, height, width = shape
        after = (batch, stage.out_channels, _outputs(stage, 0, height), _outputs(stage, 1, width))
        yield faster(stage, shape, after, last=last)
        shape = after


def faster(conv: nn.Conv2d, before: tuple[int, ...], after: tuple[int, ...], *, last: bool) -> bool:
    """Return whether a convolution had better be given to oneDNN than where torch would, on one thread.

    Args:
        conv: the layer.
        before: shape of its input (n, channels, height, width).
        after: shape of its output.
        last: whether channels are last in the memory of both.
    """
    batch, channels = before[:2]
    macs = prod(after) * channels * prod(conv.kernel_size)
    if conv.groups > 1 or macs < _SPATIAL:
        return False
    if prod(conv.kernel_size) > 1 or prod(conv.stride) > 1:
        return batch == 1 and prod(before) <= _SMALL_INPUT
    if batch >= _FEW_SAMPLES:
        return False
    if last:
        return macs >= _CHANNELS_LAST
    numbers, largest = prod(before) + prod(after), max(prod(before), prod(after))
    return macs >= max(_POINTWISE, _PER_NUMBER * numbers) and largest <= _LARGEST


@lru_cache(maxsize=1)
def slow_products() -> bool:
    """Return whether torch's matrix products use fewer of the processor's instructions than oneDNN does."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_f")) and "AMD" in str(known.get("cpu_name", ""))


def _unwatched(x: Tensor) -> bool:
    """Return whether these are operations of float32 on a processor, without gradients, that nothing has to see."""
    library: Any = torch.backends.mkldnn
    return (
        not torch.is_grad_enabled()
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


def _convolve(conv: Any, x: Tensor) -> Tensor:
    """Return the convolution by oneDNN, where nothing but plain tensors and torch's own forward are involved."""
    own = vars(conv)
    weight = conv.weight
    plain = type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device
    if not plain or "forward" in own or any(own[name] for name in _HOOKS):
        result: Tensor = conv(x)
        return result
    return torch.mkldnn_convolution(x, weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
