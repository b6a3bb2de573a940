"""Sums over all patches of a 3×3 convolution without extracting them: shifted products of the map itself.

Two taps of a patch see the map at a fixed distance, so that of the 81 blocks of the Gram matrix of all patches only 25
differ, but for what the taps at the border miss: one line each. They are the gradient of a 5×5 convolution of the map
with itself, at a third of the multiply-accumulates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight

from tenfold.records import LayerSpec


def covers(x: Tensor, spec: LayerSpec, positions: int | None) -> bool:
    """Return whether all patches of x (batch, in, height, width) count, of a 3×3 convolution as handled here."""
    usual = spec.kind == "conv" and spec.groups == 1 and spec.padding_mode == "zeros"
    usual = usual and (spec.kernel, spec.stride, spec.dilation) == ((3, 3), (1, 1), (1, 1))
    usual = usual and spec.padding in {(1, 1), "same"} and x.dim() == 4 and min(x.shape[2:]) > 1
    return usual and (positions is None or positions >= x.shape[2] * x.shape[3])


class PatchGram:
    """The Gram matrix (1, 9·in, 9·in) of the 3×3 patches around all positions of maps, summed map by map.

    Example:
        >>> gram = PatchGram()
        >>> gram.add(torch.ones(1, 1, 3, 3))
        >>> gram.value().diagonal(dim1=1, dim2=2)
        tensor([[4., 6., 4., 6., 9., 6., 4., 6., 4.]], dtype=torch.float64)
    """

    def __init__(self, sums: dict[str, Tensor] | None = None) -> None:
        self.sums: dict[str, Tensor] = sums or {}

    def add(self, x: Tensor) -> None:
        """Add maps (batch, in, height, width)."""
        # Σ x[i, q] x[j, q + d] at −d is that at d with i and j exchanged: half of the shifts along an axis do.
        self._sum("map", conv2d_weight(F.pad(x, (0, 0, 0, 2)), (x.shape[1], x.shape[1], 3, 5), x, padding=(0, 2)))
        for line in (0, -1):
            self._sum(f"row {line}", _line_products(x[:, :, line]))
            self._sum(f"column {line}", _line_products(x[:, :, :, line]))
            for end in (0, -1):
                corner = x[:, :, line, end]
                self._sum(f"corner {line} {end}", corner.mT @ corner)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value.double()

    def value(self) -> Tensor:
        """Return the matrix of all maps so far, in float64."""
        half = self.sums["map"]
        products = torch.cat([half[:, :, 1:].flip(2, 3).transpose(0, 1), half], dim=2)  # shifts −2..2 along both axes
        channels = len(half)
        taps = torch.arange(3, device=half.device)
        apart = taps - taps[:, None] + 2  # how far tap t' lies from tap t
        blocks = products[:, :, apart[:, None, :, None], apart[None, :, None, :]]  # (in, in, t, u, t', u')
        for tap, line in ((0, -1), (2, 0)):  # what the first tap along an axis never sees is the last line, and back
            blocks[:, :, tap, :, tap] -= self.sums[f"row {line}"][:, :, apart]
            blocks[:, :, :, tap, :, tap] -= self.sums[f"column {line}"][:, :, apart]
            for other, end in ((0, -1), (2, 0)):
                blocks[:, :, tap, other, tap, other] += self.sums[f"corner {line} {end}"]
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


def _line_products(x: Tensor) -> Tensor:
    """Return Σ x[i, q] x[j, q + d] (in, in, 5) of lines x (batch, in, length) for shifts d of −2..2."""
    products: Tensor = conv1d_weight(x, (x.shape[1], x.shape[1], 5), x, padding=2)
    return products
