"""A task that takes a fraction of a second: points in 16 dimensions, told apart by a small network."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from tenfold.tasks import InMemoryTask, TensorSet


class Points(InMemoryTask):
    """Points of three classes."""

    name: ClassVar[str] = "points"
    tune_settings: ClassVar = {"epochs": 12, "batch_size": 40, "lr": 0.05}
    variants: ClassVar[tuple[str, ...]] = ("plain",)
    input_shape: ClassVar[tuple[int, ...]] = (16,)

    def architecture(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
        )

    def pretrained(self) -> nn.Module:
        return self.build()

    def read(self, split: str) -> TensorSet:
        inputs = torch.randn(
            {"train": 4000, "test": 200}[split], 16, generator=torch.Generator().manual_seed(len(split))
        )
        return TensorSet(inputs, inputs[:, :3].argmax(1))
