"""MNIST with two fully connected layers, dense or as tensor trains."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tenfold.layers import TTLinear
from tenfold.tasks.base import TASKS
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images

HIDDEN = 625
RANK = 20  # of every bond to begin with


@TASKS.register("mnist")
class Mnist(InMemoryTask):
    """MNIST and a network of two linear layers, 784 → 625 → 10: dense (``mlp``) or both tensor trains (``tt``).

    The network of Hawkins and Zhang 2019 (arXiv 1905.10478): 496,885 parameters dense, 27,235 as trains of rank 20. The
    data is looked for in ``data``, else in $TENFOLD_DATA, else in ~/.cache/tenfold/datasets: ``train-*.parquet`` and
    ``test-*.parquet`` in the Hub layout, there or in a folder ``mnist`` within.
    """

    name: ClassVar[str] = "mnist"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = ("mlp", "tt")
    input_shape: ClassVar[tuple[int, ...]] = (1, 28, 28)
    transform: ClassVar[Transform] = ImageTransform(mean=(0.1307,), std=(0.3081,))
    tune_settings: ClassVar[dict[str, Any]] = {"epochs": 3, "batch_size": 128, "optimizer": "adamw", "lr": 0.001}

    def architecture(self) -> nn.Module:
        """Return the two layers that the variant names, with a ReLU between them."""
        return TwoLayers(train=self.variant == "tt")

    def read(self, split: Split) -> TensorSet:
        """Return the pictures as uint8 (samples, 1, 28, 28) and their labels 0..9."""
        where, source = self.data, "ylecun/mnist"
        return load_images("mnist", split, data=where, shape=self.input_shape, classes=10, source=source)


class TwoLayers(nn.Module):
    """784 → 625 → 10 with a ReLU between.

    Args:
        train: whether the weights are trains, of modes 7·4·7·4 by 5·5·5·5 and 25·25 by 5·2.
        ranks: of all their bonds.

    Example:
        >>> sum(p.numel() for p in TwoLayers(train=True).parameters())
        27235
    """

    def __init__(self, *, train: bool, ranks: int = RANK) -> None:
        super().__init__()
        self.hidden: nn.Module
        self.head: nn.Module
        if train:
            self.hidden = TTLinear(784, HIDDEN, ranks, in_modes=(7, 4, 7, 4), out_modes=(5, 5, 5, 5))
            self.head = TTLinear(HIDDEN, 10, ranks, in_modes=(25, 25), out_modes=(5, 2))
        else:
            self.hidden, self.head = nn.Linear(784, HIDDEN), nn.Linear(HIDDEN, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the class scores (samples, 10) of pictures (samples, 1, 28, 28)."""
        scores: Tensor = self.head(self.hidden(pictures.flatten(1)).relu())
        return scores
