"""A network that is trained and compressed in no time, with a little of all that has state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.iterative import Schedule
from tenfold.records import Recipe

Batch = tuple[Tensor, Tensor]


def both(**fields: Any) -> tuple[Recipe, Schedule]:
    """Return a recipe and a schedule, each with its own of the fields."""
    scheduled = {name: fields.pop(name) for name in Schedule.model_fields if name in fields}
    return Recipe.of(fields), Schedule.of(scheduled)


def cnn() -> nn.Sequential:
    """Return convolutions with batch norm, dropout and a head; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        ).eval()


def images() -> Batch:
    """Return 48 images and their classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 3, 6, 6, generator=generator), torch.randint(0, 4, (48,), generator=generator)


def batches(epoch: int) -> list[Batch]:
    """Return three batches, shuffled and disturbed anew in each epoch."""
    x, y = images()
    noise = torch.randn(x.shape)  # an augmentation that draws from the global generator
    order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch)).split(16)
    return [(x[i] + 0.1 * noise[i], y[i]) for i in order]


def unlabeled() -> list[Tensor]:
    """Return batches without labels."""
    return list(images()[0].split(16))


def accuracy(model: nn.Module) -> float:
    """Return the share of the images whose class the model finds."""
    x, y = images()
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())
