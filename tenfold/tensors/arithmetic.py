"""Arithmetic that does not depend on what surrounds the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    peek_interpreter_stack,
)

# Between these, squares of float32 numbers, and the sums of many of them, stay far from overflow and underflow.
_SAFE = (1e-15, 1e15)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Compute in the dtypes of the tensors: without autocast, graphs, inference mode or transforms of ``torch.func``.

    Tensors that are made from nothing are on the CPU, whatever the default device.

    Tenfold's own numbers are made under it, so that they do not change with the code they are made from: a script that
    runs under autocast, a forward that does. It also serves as a decorator.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), plain_arithmetic():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    with ExitStack() as stack:
        stack.enter_context(normal_tensors())
        stack.enter_context(torch.no_grad())
        for device in {"cpu", _accelerator()}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # random numbers are drawn on the CPU, and moved
            stack.enter_context(torch.device("cpu"))
        if _transformed():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        yield


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Make tensors that can be trained and written to, even within ``torch.inference_mode``; also a decorator."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            grad = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.set_grad_enabled(grad))  # leaving inference mode turns gradients on
        yield


def untransformed(tensor: Tensor) -> Tensor:
    """Return the values behind a tensor of ``torch.func``, the axes of ``vmap`` first; any other as it is.

    Example:
        >>> seen = []
        >>> _ = torch.func.vmap(lambda x: seen.append(untransformed(x).shape) or x)(torch.zeros(5, 3))
        >>> seen
        [torch.Size([5, 3])]
    """
    while is_functorch_wrapped_tensor(tensor):
        axis = maybe_get_bdim(tensor)
        tensor = get_unwrapped(tensor)
        if axis > 0:
            tensor = tensor.movedim(axis, 0)
    return tensor


def squarable(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is, or if sums of its squares could leave float32.

    Example:
        >>> [squarable(torch.tensor([x])).dtype for x in (1.0, 1e20, 1e-20, 0.0)]
        [torch.float32, torch.float64, torch.float64, torch.float32]
    """
    if tensor.dtype == torch.float64 or not tensor.numel():
        return tensor
    tensor = tensor.float()
    low, high = (float(bound) for bound in torch.aminmax(tensor))  # many times faster than a norm; NaN stays NaN
    largest = max(-low, high)
    low, high = _SAFE
    return tensor if low < largest < high or not 0 < largest < torch.inf else tensor.double()


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is running."""
    return peek_interpreter_stack() is not None
