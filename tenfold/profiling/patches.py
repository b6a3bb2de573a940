"""Input patches: the vectors that a layer multiplies with its weight, for every kind of layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.records import LayerSpec

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def input_patches(x: Tensor, spec: LayerSpec, *, positions: int | None = None, seed: int = 0) -> Tensor:
    """Return the patches (groups, n, rows) that a linear layer or convolution multiplies with its weight.

    n = in/groups · prod(kernel), in the order (channel, tap) of the flattened weight with its groups apart; rows are
    all output positions of all samples, sample by sample.

    Args:
        x: input of the layer: (..., in) for linear, (batch, in, *space) or (in, *space) for convolutions.
        spec: geometry of the layer. Embeddings have no patches.
        positions: take this many output positions, drawn at random and the same for all samples; None for all.
        seed: of that draw.

    Example:
        >>> spec = LayerSpec(kind="conv", in_channels=3, out_channels=8, kernel=(3, 3), padding=(1, 1))
        >>> input_patches(torch.ones(2, 3, 4, 4), spec).shape
        torch.Size([1, 27, 32])
    """
    if spec.kind == "linear":
        rows = x.reshape(-1, spec.in_channels)
        return rows.t()[None]
    if x.dim() == spec.axes + 1:
        x = x[None]
    windows = _windows(_padded(x, spec), spec)  # (batch, in, *kernel, *out)
    windows = windows.unflatten(1, (spec.groups, -1)).movedim(0, -spec.axes - 1)  # (groups, in, *kernel, batch, *out)
    if positions is not None:
        windows = windows[(..., *_drawn(tuple(windows.shape[-spec.axes :]), positions, seed, x.device))]
    taken = 1 if positions is not None else spec.axes
    patches: Tensor = windows.reshape(spec.groups, -1, windows.shape[-taken - 1 :].numel())
    return patches


def output_rows(y: Tensor, spec: LayerSpec, *, positions: int | None = None, seed: int = 0) -> Tensor:
    """Return the outputs (groups, out/groups, rows) of a layer in the order of the rows of its input patches."""
    if spec.kind == "linear":
        return y.reshape(-1, spec.out_channels).t()[None]
    if y.dim() == spec.axes + 1:
        y = y[None]
    values: Tensor = y.unflatten(1, (spec.groups, -1)).movedim(0, 2)
    if positions is not None:
        drawn: Any = (..., *_drawn(tuple(values.shape[3:]), positions, seed, y.device))
        values = values[drawn]
    return values.flatten(2)


def _drawn(size: tuple[int, ...], positions: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return coordinates, one tensor for each spatial axis, of distinct positions in a map of this size."""
    total = torch.Size(size).numel()
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: min(positions, total)]
    return torch.unravel_index(order.to(device), size)


def _padded(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return the input with its border; that of a transposed convolution with its strides filled with zeros."""
    reach = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]
    if spec.kind == "conv_transpose":
        own = [int(p) for p in spec.padding]
        pads = [(r - p, r - p + e) for r, p, e in zip(reach, own, spec.output_padding, strict=True)]
        x = _spread(x, spec.stride)
    elif isinstance(spec.padding, str):
        pads = [(r // 2, r - r // 2) if spec.padding == "same" else (0, 0) for r in reach]
    else:
        pads = [(p, p) for p in spec.padding]
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, mode=_PAD_MODES[spec.padding_mode]) if any(flat) else x


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *size)
    every: list[slice] = [slice(None, None, s) for s in stride]
    wide[(slice(None), slice(None), *every)] = x
    return wide


def _windows(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return a view (batch, in, *kernel, *out): what each tap sees at each output position."""
    turned = spec.kind == "conv_transpose"
    for axis, (kernel, stride, dilation) in enumerate(zip(spec.kernel, spec.stride, spec.dilation, strict=True)):
        reach = dilation * (kernel - 1) + 1
        x = x.unfold(2 + axis, reach, 1 if turned else stride)[..., ::dilation]
    taps = range(2 + spec.axes, 2 + 2 * spec.axes)
    x = x.permute(0, 1, *taps, *range(2, 2 + spec.axes))
    return x.flip(tuple(range(2, 2 + spec.axes))) if turned else x
