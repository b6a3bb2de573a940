"""A small VGG on CIFAR-10, whose head flattens a map of 64 × 8 × 8 into a linear layer: most of its parameters."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from tenfold.tasks.cifar10 import Cifar10


class SmallVGG(Cifar10):
    """CIFAR-10 with a VGG of four convolutions and a head of two linear layers behind a flattened map."""

    variants: ClassVar[tuple[str, ...]] = ("vgg",)

    def architecture(self) -> nn.Module:
        """Return features (64, 8, 8) and the head: flatten, 4,096 to 128, ReLU, 128 to 10."""
        layers: list[nn.Module] = []
        for into, out, pool in ((3, 32, True), (32, 64, True), (64, 64, False), (64, 64, False)):
            layers += [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if pool else []
        head = [nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(inplace=True), nn.Linear(128, 10)]
        return nn.Sequential(nn.Sequential(*layers), nn.Sequential(*head))
