"""Contexts to run a model in without side effects, and its device and dtype."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import checkpoint

from tenfold.tracing.inputs import tensors_in


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own train or eval mode back at the end; frozen scripted ones have none."""
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # setting an attribute of a module takes longer than comparing it
                module.training = training


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """Give every parameter its gradient back at the end: a forward may call ``backward`` itself."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.is_leaf]
    try:
        for parameter, gradient in gradients:
            if gradient is not None:
                parameter.grad = None  # it would be added to in place
        yield
    finally:
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; restore modes of modules and gradients of parameters afterwards."""
    # Flags are set directly: an overridden ``eval()`` may do more (merge adapters, freeze layers) that is not undone.
    # No inference mode: tensors that a model caches in its forward must remain trainable.
    with kept_modes(model), _kept_gradients(model), torch.no_grad():
        for module in [module for module in model.modules() if getattr(module, "training", False)]:
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
    """Let every module run, and once: no fused kernel of transformer layers, compiled code or checkpoints."""
    # The fused kernel is one operation that is opaque to the flop counter and never calls the linear layers; compiled
    # code runs no hooks; what is checkpointed runs again in the backward pass.
    with ExitStack() as stack:
        stack.enter_context(_without_checkpoints())
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` call its function and keep what the backward pass needs."""
    stand_ins = {"CheckpointFunction": _Direct, "_checkpoint_without_reentrant_generator": _nothing_around}
    kept = {name: getattr(checkpoint, name) for name in stand_ins}
    try:
        for name, value in stand_ins.items():
            setattr(checkpoint, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)


class _Direct:
    """Stands in for the function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:  # noqa: FBT001 - as torch calls it
        return function(*args)


def _nothing_around(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Stand in for what runs before and after the function of other checkpoints."""
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
