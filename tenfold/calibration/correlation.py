"""Sums over all patches of a 3×3 convolution without extracting them: shifted products of the map itself.

Two taps of a patch see the map at a fixed distance, so that of the 81 blocks of the Gram matrix of all patches only 25
differ, but for what the taps at the border miss: one line each. They are the gradient of a 5×5 convolution of the map
with itself, at a third of the multiply-accumulates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from tenfold.records import LayerSpec


def covers(x: Tensor, spec: LayerSpec, positions: int | None) -> bool:
    """Return whether all patches of x (batch, in, height, width) count, of a 3×3 convolution as handled here."""
    usual = spec.kind == "conv" and spec.groups == 1 and spec.padding_mode == "zeros"
    usual = usual and (spec.kernel, spec.stride, spec.dilation) == ((3, 3), (1, 1), (1, 1))
    usual = usual and spec.padding in {(1, 1), "same"} and x.dim() == 4 and min(x.shape[2:]) > 1
    return usual and (positions is None or positions >= x.shape[2] * x.shape[3])


def patch_square(x: Tensor) -> Tensor:
    """Return the Gram matrix (1, 9·in, 9·in) of the 3×3 patches around all positions of x (batch, in, height, width).

    Example:
        >>> patch_square(torch.ones(1, 1, 3, 3)).diagonal(dim1=1, dim2=2)
        tensor([[4., 6., 4., 6., 9., 6., 4., 6., 4.]])
    """
    channels = x.shape[1]
    taps = torch.arange(3, device=x.device)
    apart = taps - taps[:, None] + 2  # how far tap t' lies from tap t
    blocks = _products(x, 2, 2)[:, :, apart[:, None, :, None], apart[None, :, None, :]]  # (in, in, t, u, t', u')
    for tap, line in ((0, -1), (2, 0)):  # what the first tap along an axis never sees is the last line, and vice versa
        across, down = x[:, :, [line]], x[:, :, :, [line]]
        blocks[:, :, tap, :, tap] -= _products(across, 0, 2)[:, :, 0, apart]
        blocks[:, :, :, tap, :, tap] -= _products(down, 2, 0)[:, :, apart, 0]
        for other, end in ((0, -1), (2, 0)):
            corner = x[:, :, line, end]
            blocks[:, :, tap, other, tap, other] += corner.mT @ corner
    return blocks.permute(0, 2, 3, 1, 4, 5).reshape(1, 9 * channels, 9 * channels)


def patch_sum(x: Tensor) -> Tensor:
    """Return the sum (1, 9·in) of the same patches."""
    seen = (slice(None, -1), slice(None), slice(1, None))  # the lines that a tap sees
    summed = x.sum(0)
    total = torch.stack([summed[:, rows, columns].sum((1, 2)) for rows in seen for columns in seen], dim=1)
    return total.reshape(1, -1)


def patch_cross(y: Tensor, x: Tensor) -> Tensor:
    """Return the sum (1, out, 9·in) of y (batch, out, height, width) times the patch at the same position."""
    cross: Tensor = conv2d_weight(x, (y.shape[1], x.shape[1], 3, 3), y, padding=1)
    return cross.flatten(1)[None]


def _products(x: Tensor, high: int, wide: int) -> Tensor:
    """Return Σ x[i, q] x[j, q + d] (in, in, d, d') for all shifts up to (high, wide), at their index plus that."""
    size = (x.shape[1], x.shape[1], 2 * high + 1, 2 * wide + 1)
    products: Tensor = conv2d_weight(x, size, x, padding=(high, wide))
    return products
