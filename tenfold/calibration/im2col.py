"""Input patches of layers (im2col): the vectors that a layer multiplies with its weight."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.records import LayerSpec

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def input_patches(x: Tensor, spec: LayerSpec, *, positions: int | None = None, seed: int = 0) -> Tensor:
    """Extract the patches (groups, n, rows) that a linear layer or convolution multiplies with its weight.

    n = in/groups · prod(kernel), in the order (channel, tap) of the flattened weight with its groups apart; rows are
    all output positions of all samples, sample by sample.

    Args:
        x: input of the layer: (..., in) for linear, (batch, in, *space) or (in, *space) for convolutions.
        spec: geometry of the layer. Embeddings have no patches.
        positions: number of output positions, drawn at random and the same for all samples; None for all.
        seed: of the positions.

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
    wide = _padded(x, spec)
    size = _places(tuple(wide.shape[2:]), spec)
    drawn = _drawn(size, positions, seed)
    if drawn is None:
        windows = _windows(wide, spec)  # (batch, in, *kernel, *out)
        windows = windows.unflatten(1, (spec.groups, -1)).movedim(0, -spec.axes - 1)
        everywhere: Tensor = windows.reshape(spec.groups, -1, x.shape[0] * prod(size))
        return everywhere
    rows = _read(wide, spec, drawn)
    patches: Tensor = rows.unflatten(2, (spec.groups, -1)).permute(2, 3, 1, 0).reshape(spec.groups, -1, len(rows))
    return patches


def drawn_patches(x: Tensor, spec: LayerSpec, *, positions: int | None, seed: int = 0) -> Tensor | None:
    """Extract the same patches at drawn positions as rows (rows, taps, in), which takes one copy instead of two.

    Returns:
        None where all positions count.
    """
    wide = _padded(x[None] if x.dim() == spec.axes + 1 else x, spec)
    drawn = _drawn(_places(tuple(wide.shape[2:]), spec), positions, seed)
    return None if drawn is None else _read(wide, spec, drawn)


def _read(wide: Tensor, spec: LayerSpec, places: Tensor) -> Tensor:
    """Return what the taps read of a padded map at these output positions (batch·places, taps, in)."""
    size = tuple(wide.shape[2:])
    index = _sources(size, spec, places).t().to(wide.device)  # (places, taps)
    # All channels of a position lie together in maps that are channels_last, and are copied at once.
    taken = wide.movedim(1, -1).flatten(1, -2).index_select(1, index.flatten())
    rows: Tensor = taken.view(-1, index.shape[1], wide.shape[1])
    return rows


def output_rows(y: Tensor, spec: LayerSpec, *, positions: int | None = None, seed: int = 0) -> Tensor:
    """Return the outputs (groups, out/groups, rows) of a layer in the order of the rows of its input patches."""
    if spec.kind == "linear":
        return y.reshape(-1, spec.out_channels).t()[None]
    if y.dim() == spec.axes + 1:
        y = y[None]
    size = tuple(y.shape[2:])
    drawn = _drawn(size, positions, seed)
    if drawn is not None:
        taken: Tensor = y.movedim(1, -1).flatten(1, -2).index_select(1, _flat(drawn, size).to(y.device))
        drawn_rows: Tensor = taken.flatten(0, 1).t().unflatten(0, (spec.groups, -1))
        return drawn_rows
    rows: Tensor = y.unflatten(1, (spec.groups, -1)).movedim(0, 2).flatten(2)
    return rows


def _drawn(size: tuple[int, ...], positions: int | None, seed: int) -> Tensor | None:
    """Return the coordinates (places, axes) of distinct positions in a map of this size; None for all of them."""
    total = prod(size)
    if positions is None or positions >= total:
        return None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:positions]
    return torch.stack(torch.unravel_index(order, size), dim=1)


def _flat(coordinates: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the index of coordinates (..., axes) in the flattened map of this size."""
    index = torch.zeros(coordinates.shape[:-1], dtype=torch.long)
    for axis, length in enumerate(size):
        index = index * length + coordinates[..., axis]
    return index


def _sources(size: tuple[int, ...], spec: LayerSpec, places: Tensor) -> Tensor:
    """Return the index (taps, places) into the flattened padded map that each tap reads at some output positions."""
    taps = torch.cartesian_prod(*(torch.arange(k) for k in spec.kernel)).reshape(-1, spec.axes)
    stride, dilation = torch.tensor(spec.stride), torch.tensor(spec.dilation)
    if spec.kind == "conv_transpose":
        taps, stride = torch.tensor(spec.kernel) - 1 - taps, torch.ones_like(stride)
    return _flat((taps * dilation)[:, None] + places * stride, size)


def _places(size: tuple[int, ...], spec: LayerSpec) -> tuple[int, ...]:
    """Return the size of the output map for a padded input map."""
    strides = (1,) * spec.axes if spec.kind == "conv_transpose" else spec.stride
    axes = zip(size, spec.kernel, strides, spec.dilation, strict=True)
    return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in axes)


def _padded(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return the padded input; for a transposed convolution with zeros between its elements, as its stride asks."""
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
    """Return a view (batch, in, *kernel, *out): what each tap reads at each output position."""
    turned = spec.kind == "conv_transpose"
    for axis, (kernel, stride, dilation) in enumerate(zip(spec.kernel, spec.stride, spec.dilation, strict=True)):
        reach = dilation * (kernel - 1) + 1
        x = x.unfold(2 + axis, reach, 1 if turned else stride)[..., ::dilation]
    taps = range(2 + spec.axes, 2 + 2 * spec.axes)
    x = x.permute(0, 1, *taps, *range(2, 2 + spec.axes))
    return x.flip(tuple(range(2, 2 + spec.axes))) if turned else x
