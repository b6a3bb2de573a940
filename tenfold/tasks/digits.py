"""The built-in task: a small network on scikit-learn's digits, trained in seconds, nothing to fetch."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from tenfold.errors import require
from tenfold.tasks.base import TASKS, seeded
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.training import TuneConfig, finetune

WIDTHS = (32, 128, 128)  # wide enough that a third of the multiplications is also measurably faster
TEST_SHARE = 0.2
TRAINING = TuneConfig(
    epochs=4,
    batch_size=64,
    optimizer="adamw",
    lr=0.01,
    weight_decay=0.01,
    warmup=0.3,
    label_smoothing=0.05,
    autocast="off",  # the same numbers with and without bf16 hardware
)

logger = logging.getLogger("tenfold")


@TASKS.register("digits")
class Digits(InMemoryTask):
    """Handwritten digits of 8×8 pixels from scikit-learn, and a small CNN that is trained on the spot in seconds.

    1,797 pictures (Alpaydin and Kaynak 1998, UCI), a fixed fifth of them for testing.
    """

    name: ClassVar[str] = "digits"
    extra: ClassVar[str] = "demo"
    input_shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    transform: ClassVar[Transform] = ImageTransform(mean=(0.305,), std=(0.376,))
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 3,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 0.003,
        "label_smoothing": 0.05,
    }

    def architecture(self) -> nn.Module:
        """Return three 3×3 convolutions with batch norm, a global average and a linear head."""
        return DigitsNet()

    def pretrained(self) -> nn.Module:
        """Return a network trained here, the same each time for one seed, machine and number of threads."""
        model = self.build()
        logger.info("training the digits network for %d epochs", TRAINING.epochs)
        batches = partial(self.train_batches, batch_size=TRAINING.batch_size, seed=self.seed)
        finetune(model, batches, TRAINING.replace(seed=self.seed))
        return model

    def read(self, split: Split) -> TensorSet:
        """Return the pictures as uint8 (samples, 1, 8, 8) and their labels 0..9."""
        datasets: Any = require("sklearn.datasets", "demo")
        bunch = datasets.load_digits()
        pictures = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]  # stored as 0..16
        labels = torch.from_numpy(bunch.target).long()
        order = torch.randperm(len(labels), generator=seeded(0))  # a constant: the split never moves
        held = round(len(labels) * TEST_SHARE)
        chosen = order[:held] if split == "test" else order[held:]
        return TensorSet(pictures[chosen], labels[chosen])


class DigitsNet(nn.Module):
    """Three 3×3 convolutions at full resolution, a global average, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((1, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the class scores (batch, 10) of pictures (batch, 1, 8, 8)."""
        scores: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return scores
