"""CIFAR-10 with a network of one bit a weight, and what couples the bits in training."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn

from tenfold.networks import BinaryNet
from tenfold.networks.binary import LatentKind
from tenfold.tasks.base import TASKS
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images


@TASKS.register("cifar10_binary")
class Cifar10Binary(InMemoryTask):
    """CIFAR-10 and a small residual network of binary convolutions, whose bits have latent weights of four kinds.

    ``independent`` numbers, a ``matrix`` product or a ``tucker`` tensor for each layer, one Tucker tensor for the whole
    ``network``. The data is looked for in ``data``, else in $TENFOLD_DATA, else in ~/.cache/tenfold/datasets:
    ``train-*.parquet`` and ``test-*.parquet`` in the Hub layout, there or in a folder ``cifar10`` within.
    """

    name: ClassVar[str] = "cifar10_binary"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = ("independent", "matrix", "tucker", "network")
    input_shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    transform: ClassVar[Transform] = ImageTransform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), padding=4, flip=True)
    weights_hint: ClassVar[str] = "Train them: tenfold train --method plain. "
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 0.003,
        "weight_decay": 0.0,
        "autocast": "off",
        "channels_last": False,
    }

    def architecture(self) -> nn.Module:
        """Return the network with the latent weights that the variant names."""
        return BinaryNet(24, 6, cast("LatentKind", self.variant))

    def read(self, split: Split) -> TensorSet:
        """Return the pictures as uint8 (samples, 3, 32, 32) and their labels 0..9."""
        shape, source = self.input_shape, "uoft-cs/cifar10"
        return load_images("cifar10", split, data=self.data, shape=shape, classes=10, source=source)
