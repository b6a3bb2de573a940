"""Contexts to run a model in without side effects, and its device and dtype."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from tenfold.tracing.inputs import tensors_in


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own train or eval mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # setting an attribute of a module takes longer than comparing it
                module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients, and restore the mode of every module afterwards."""
    # Flags are set directly: an overridden ``eval()`` may do more (merge adapters, freeze layers) that is not undone.
    # No inference mode: tensors that a model caches in its forward must remain trainable.
    with kept_modes(model), torch.no_grad():
        for module in [module for module in model.modules() if module.training]:
            module.training = False
        yield


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the state of the random number generators of torch, Python and numpy afterwards."""
    kind = device.type if device.type not in ("cpu", "meta") else "cuda"
    devices = [] if device.type in ("cpu", "meta") else [device.index or 0]
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - that of other people's code
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Disable what bypasses modules: the fused kernel of transformer layers, and compiled code."""
    # The fused kernel is one operation that is opaque to the flop counter and never calls the linear layers; compiled
    # code runs no hooks.
    with ExitStack() as stack:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def device_of(model: nn.Module, inputs: Any = ()) -> torch.device:
    """Return the device of the first parameter or buffer, else of the first input, else the CPU."""
    for tensor in chain(model.parameters(), model.buffers(), tensors_in(inputs)):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module, inputs: Any = ()) -> torch.dtype:
    """Return the dtype of the first floating point parameter, else of the first such input, else the default."""
    for tensor in chain(model.parameters(), tensors_in(inputs)):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
