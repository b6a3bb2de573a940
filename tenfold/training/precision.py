"""Faster training of the same model: bf16 autocast and the channels-last layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold.errors import ProfileError
from tenfold.tracing.contexts import device_of, evaluating, same_random_numbers
from tenfold.tracing.inputs import arguments, call_model, map_tensors, tensors_in, to_device


def uses_bf16(model: nn.Module, device: torch.device, choice: Literal["auto", "bf16", "off"]) -> bool:
    """Return whether to train under bf16 autocast.

    "auto": for float32 models on hardware with bf16 arithmetic, which is CUDA from compute capability 8, and CPUs with
    AVX512-BF16 or AMX. Emulated bf16 is slower than float32.
    """
    if choice != "auto":
        return choice == "bf16"
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Private in torch: a version that lacks them trains in float32.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def uses_channels_last(model: nn.Module, inputs: Any, choice: bool | Literal["auto"]) -> bool:  # noqa: FBT001
    """Return whether to train in channels-last layout.

    "auto": for models with 2-d convolutions that run on images in this layout. They are tried once, because some models
    flatten with ``view``, which it does not allow.

    Args:
        model: in any mode.
        inputs: one batch, on the device of the model.
        choice: the setting.
    """
    if choice != "auto":
        return choice
    images = any(t.dim() == 4 and t.is_floating_point() for t in tensors_in(arguments(inputs)))
    if not images or not _image_weights(model):
        return False
    with evaluating(model), channels_last_weights(model), same_random_numbers(device_of(model)):
        try:
            call_model(model, to_channels_last(inputs))
        except ProfileError:
            return False
    return True


def to_channels_last(inputs: Any) -> Any:
    """Return the inputs with 4-d floating point tensors in channels-last layout."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.is_floating_point():
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    return map_tensors(inputs, change)


def place(inputs: Any, device: torch.device, *, channels_last: bool) -> Any:
    """Return the inputs on ``device``, images in channels-last layout if asked for."""
    inputs = to_device(inputs, device)
    return to_channels_last(inputs) if channels_last else inputs


@contextmanager
def channels_last_weights(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Temporarily hold the weights of 2-d convolutions in channels-last layout."""
    weights = _image_weights(model) if enabled else []
    strides = [weight.stride() for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, stride in zip(weights, strides, strict=True):
            if weight.stride() != stride:
                weight.data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device).copy_(
                    weight.data
                )


def _image_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all 2-d convolutions, each once."""
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))
    return list({id(w): w for conv in convs for w in conv.parameters(recurse=False) if w.dim() == 4}.values())
