"""CIFAR-10 with the ResNets made for it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tenfold.errors import CheckpointError
from tenfold.tasks.base import TASKS
from tenfold.tasks.cifar_resnet import CifarResNet
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images


@TASKS.register("cifar10")
class Cifar10(InMemoryTask):
    """CIFAR-10 and its ResNets of depth 20 to 110; weights from a file, data from Parquet files in the Hub layout.

    The data is looked for in ``data``, else in $TENFOLD_DATA, else in ~/.cache/tenfold/datasets: ``train-*.parquet``
    and ``test-*.parquet`` there or in a folder ``cifar10`` within. Training crops out of a border of 4 pixels and
    mirrors. Batches are channels_last, which these networks run nearly twice as fast on a CPU.
    """

    name: ClassVar[str] = "cifar10"
    variants: ClassVar[tuple[str, ...]] = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
    input_shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    # The mean and spread of ImageNet, as the published weights were trained with.
    transform: ClassVar[Transform] = ImageTransform(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), padding=4, flip=True, channels_last=True
    )

    def architecture(self) -> nn.Module:
        """Return the ResNet that the variant names."""
        return CifarResNet(int(str(self.variant).removeprefix("resnet")))

    def pretrained(self) -> nn.Module:
        """Refuse: the weights come from a file."""
        msg = (
            f"{self.id} has no built-in weights. Pass a .safetensors file with the state dict "
            "(weights=FILE, or --weights FILE)."
        )
        raise CheckpointError(msg)

    def read(self, split: Split) -> TensorSet:
        """Return the pictures as uint8 (samples, 3, 32, 32) and their labels 0..9."""
        where, source = self.data, "uoft-cs/cifar10"
        return load_images("cifar10", split, data=where, shape=self.input_shape, classes=10, source=source)

    def recipe(self) -> dict[str, Any]:
        """Return settings for a few epochs of tuning after compression."""
        return {"epochs": 3, "batch_size": 128, "lr": 0.02}
