"""The last figure of the product of two MNIST digits: a task whose answer neither of its inputs has a part of."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.networks import PolynomialFusion
from tenfold.tasks.base import TASKS, seeded
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images

PIXELS = 784
ENCODED = 32
RANK = 48


class Pixels(Transform):
    """Bytes as numbers of mean 0 and variance 1, as in MNIST's training set."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return float32 of the same shape."""
        return inputs.float().div_(255).sub_(0.1307).div_(0.3081)

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the inputs."""
        del generator
        return inputs


@TASKS.register("digit_products")
class DigitProducts(InMemoryTask):
    """The last figure of the product of two MNIST digits, from their images, by four ways to join what is seen of them.

    Each image is encoded by the same small network. Encodings are multiplied in a polynomial of order two (``fusion``),
    or of order three in which each may occur twice (``fusion3``); concatenated and put through a hidden layer
    (``concat``); or added (``add``: a linear layer of low rank on their concatenation): all with equally many
    parameters, but for biases. 60,000 pairs of MNIST's training set and 10,000 of its test set, drawn once. The data is
    looked for as by ``mnist``.
    """

    name: ClassVar[str] = "digit_products"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = ("fusion", "fusion3", "concat", "add")
    input_shape: ClassVar[tuple[int, ...]] = (2, PIXELS)
    transform: ClassVar[Transform] = Pixels()
    weights_hint: ClassVar[str] = "Train them: tenfold train --method plain. "
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 8,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.002,
        "autocast": "off",
    }

    def architecture(self) -> nn.Module:
        """Return encoder and fusion as the variant names it."""
        return DigitFusion(str(self.variant))

    def read(self, split: Split) -> TensorSet:
        """Return the digits as uint8 (samples, 2, 784) and the last figures of their products."""
        shape, source = (1, 28, 28), "ylecun/mnist"
        every = load_images("mnist", split, data=self.data, shape=shape, classes=10, source=source)
        generator = seeded(0, len(split))  # a constant: the pairs never change
        orders = [torch.randperm(len(every), generator=generator) for _ in range(2)]
        chosen = torch.stack(orders, 1)
        return TensorSet(every.inputs.flatten(1)[chosen], every.labels[chosen].prod(1) % 10)


class DigitFusion(nn.Module):
    """An encoder that both digits share, and what makes ten scores of their encodings.

    Args:
        kind: ``fusion``, ``fusion3``, ``concat`` or ``add``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, ENCODED), nn.Tanh())
        sizes = (ENCODED, ENCODED)
        self.fusion: nn.Module
        if kind == "concat":
            self.fusion = nn.Sequential(nn.Linear(sum(sizes), RANK), nn.ReLU(), nn.Linear(RANK, 10))
        else:
            order = {"add": 1, "fusion": 2, "fusion3": 3}[kind]
            self.fusion = PolynomialFusion(sizes, 10, RANK, order=order, repeats=order == 3)

    def forward(self, digits: Tensor) -> Tensor:
        """Return the scores (samples, 10) of digits (samples, 2, 784)."""
        encoded = self.encoder(digits)
        if isinstance(self.fusion, PolynomialFusion):
            scores: Tensor = self.fusion(*encoded.unbind(1))
        else:
            scores = self.fusion(encoded.flatten(1))
        return scores
