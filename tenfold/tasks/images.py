"""Normalisation, random crop and flip of batches of uint8 pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.tasks.in_memory import Transform


@dataclass(frozen=True)
class ImageTransform(Transform):
    """Normalise stored bytes; augment by random crops with a black border, and horizontal flips.

    The usual augmentation of CIFAR (He et al. 2016, section 4.2) is ``padding=4, flip=True``.

    Args:
        mean: of each channel, with pixels in 0..1.
        std: of each channel.
        padding: width of the black border for the random crop; 0 for no crop.
        flip: flip pictures left to right with probability ½.
        channels_last: return batches in that memory format, in which most convolutions run faster on a CPU. Models
            that call ``view`` on a feature map do not support it.

    Example:
        >>> transform = ImageTransform(mean=(0.5,), std=(0.25,), padding=1, flip=True)
        >>> pictures = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
        >>> transform.prepare(pictures).unique()
        tensor([2.])
        >>> transform.augment(pictures, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    channels_last: bool = False

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return (x/255 - mean)/std as float32; inputs are uint8 of shape (samples, channels, height, width)."""
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return inputs.float().div_(255).sub_(mean).div_(std)

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the pictures randomly cropped and flipped, as uint8 of the same shape."""
        if self.padding:
            inputs = _random_crop(inputs, self.padding, generator)
        if self.flip:
            mirrored = torch.rand(len(inputs), generator=generator) < 0.5
            inputs = torch.where(mirrored[:, None, None, None], inputs.flip(-1), inputs)
        return inputs


def _random_crop(inputs: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Crop windows of the original size at random positions of the padded pictures."""
    samples, _, height, width = inputs.shape
    windows = F.pad(inputs, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * padding + 1, (2, samples), generator=generator)
    return windows[torch.arange(samples), :, down, right]
