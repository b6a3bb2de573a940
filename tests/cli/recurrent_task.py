"""A task with a recurrent network, scored in a fraction of a second."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tenfold.tasks import InMemoryTask, TensorSet


class Net(nn.Module):
    """An LSTM and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Series(InMemoryTask):
    """Series of five steps, told apart by their sum."""

    name: ClassVar[str] = "series"
    tune_settings: ClassVar = {"epochs": 1, "batch_size": 40, "lr": 0.05}
    input_shape: ClassVar[tuple[int, ...]] = (5, 12)

    def architecture(self) -> nn.Module:
        return Net()

    def pretrained(self) -> nn.Module:
        return self.build()

    def read(self, split: str) -> TensorSet:
        inputs = torch.randn({"train": 120, "test": 40}[split], 5, 12, generator=torch.Generator().manual_seed(1))
        return TensorSet(inputs, inputs.sum(1)[:, :3].argmax(1))
