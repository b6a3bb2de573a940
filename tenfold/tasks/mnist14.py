"""MNIST at 14×14 pixels as paths through the image, and a matrix product state over them."""

from __future__ import annotations

from math import pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.networks import MPSClassifier, snake
from tenfold.tasks.base import TASKS
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images

SIDE = 14
BONDS = {"mps": 50, "mps-20": 20, "mps-10": 10}


class Paths(Transform):
    """Images of 28×28 bytes as 196 numbers in 0..1: means of 2×2 pixels, rows in turn from left and from right.

    Augmentation rotates by up to 10°, scales and shears by up to a tenth and moves by up to 1.5 pixels of 28.
    """

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return paths (samples, 196) of images (samples, 1, 28, 28)."""
        return snake(F.avg_pool2d(inputs.float() / 255, 2)).flatten(1)

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return distorted images (samples, 1, 28, 28), as float32 in 0..255."""
        turn, scale, shear, right, down = torch.rand(5, len(inputs), generator=generator) * 2 - 1
        turn, scale, shear = turn * 10 * pi / 180, 1 + 0.1 * scale, 0.1 * shear
        move = 1.5 * 2 / inputs.shape[-1]
        upper = torch.stack([scale * turn.cos(), scale * (shear - turn.sin()), move * right], -1)
        lower = torch.stack([scale * turn.sin(), scale * turn.cos(), move * down], -1)
        grid = F.affine_grid(torch.stack([upper, lower], 1), list(inputs.shape), align_corners=False)
        return F.grid_sample(inputs.float(), grid, align_corners=False)


@TASKS.register("mnist14")
class Mnist14(InMemoryTask):
    """MNIST at 14×14 pixels and a matrix product state over its 196 sites, with bonds 50 (``mps``), 20 or 10.

    The setting of Stoudenmire and Schwab 2016 (arXiv 1605.05775), but for the features 1 − x and x and the distorted
    images of the training. The data is looked for as by ``mnist``.
    """

    name: ClassVar[str] = "mnist14"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = tuple(BONDS)
    input_shape: ClassVar[tuple[int, ...]] = (SIDE**2,)
    transform: ClassVar[Transform] = Paths()
    weights_hint: ClassVar[str] = "Train them: tenfold train --method plain. "
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 16,
        "batch_size": 200,
        "optimizer": "adamw",
        "lr": 0.002,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "autocast": "off",
    }

    def architecture(self) -> nn.Module:
        """Return the matrix product state that the variant names."""
        return MPSClassifier(SIDE**2, 10, BONDS[str(self.variant)])

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """Return seeded numbers in 0..1, as of pixels."""
        return super().example_inputs(batch_size).sigmoid()

    def read(self, split: Split) -> TensorSet:
        """Return the pictures as uint8 (samples, 1, 28, 28) and their labels 0..9."""
        shape, source = (1, 28, 28), "ylecun/mnist"
        return load_images("mnist", split, data=self.data, shape=shape, classes=10, source=source)
