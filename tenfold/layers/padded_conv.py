"""A convolution behind a padding that its own arguments cannot express, so that it can be factorized on its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

SAME = "same"


class PaddedConv(nn.Module):
    """Zeros around the input, and a plain convolution of that.

    It takes the place of a convolution of a class of its own whose forward pads first, such as ``Conv2dSame`` of timm,
    and answers for its weight, kernel and stride.

    Args:
        conv: the convolution; what it pads itself comes on top.
        pads: zeros before and behind each spatial axis, the last axis first, as ``functional.pad`` takes them; or
            ``"same"``: as many as make the output as large as the input divided by the stride, rounded up, the odd one
            behind (TensorFlow's ``SAME``).

    Example:
        >>> import torch
        >>> PaddedConv(nn.Conv2d(3, 8, 3, stride=2), "same")(torch.zeros(1, 3, 7, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, conv: nn.Module, pads: tuple[int, ...] | str) -> None:
        super().__init__()
        self.conv = conv
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the padded input."""
        conv: Any = self.conv
        size = tuple(x.shape[-len(conv.kernel_size) :])
        pads = self.pads if isinstance(self.pads, tuple) else same_pads(conv, size)
        out: Tensor = conv(functional.pad(x, pads) if any(pads) else x)
        return out

    def __getattr__(self, name: str) -> Any:
        """Return what the convolution has under this name."""
        modules = self.__dict__.get("_modules", {})
        if name in ("conv", "pads") or "conv" not in modules:
            return super().__getattr__(name)
        return getattr(modules["conv"], name)

    def extra_repr(self) -> str:
        """Return the padding."""
        return f"pads={self.pads}"


def same_pads(conv: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the zeros around an input of this size, as ``functional.pad`` takes them, for TensorFlow's ``SAME``.

    Example:
        >>> same_pads(nn.Conv2d(1, 1, 3, stride=2), (7, 8))
        (0, 1, 1, 1)
    """
    pads: list[int] = []
    for n, k, s, d in zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True):
        missing = ((n + s - 1) // s - 1) * s + d * (k - 1) + 1 - n
        missing = max(missing, 0)
        pads = [missing // 2, missing - missing // 2, *pads]
    return tuple(pads)
