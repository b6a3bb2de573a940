"""A tiny network, and scores of it whose right answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tenfold.layers import FactorizedLayer
from tenfold.profiling import profile
from tenfold.records import Profile

BASELINE = 0.9


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 2),
    ).eval()


def inputs(seed: int = 0, samples: int = 6) -> torch.Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def costs(model: nn.Module) -> Profile:
    return profile(model, inputs())


@dataclass
class Scorer:
    """Scores by the share of rank that each layer keeps: the layer at ``path`` alone costs weight · (1 − share).

    Counts how often it was asked, and stops with KeyboardInterrupt after ``stop`` times.
    """

    weights: Mapping[str, float]
    noise: Mapping[tuple[str, int], float] = field(default_factory=dict)
    stop: int | None = None
    calls: list[dict[str, int]] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> float:
        if self.stop is not None and len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        found = {p: m for p, m in model.named_modules() if isinstance(m, FactorizedLayer)}
        assert len(found) <= 1, "one layer at a time"
        self.calls.append({path: layer.rank.get("in", layer.rank.get("rank", 0)) for path, layer in found.items()})
        score = BASELINE
        for path, layer in found.items():
            rank = layer.rank.get("in", layer.rank.get("rank", 0))
            most = min(layer.spec.in_channels, layer.spec.out_channels)
            score -= self.weights.get(path, 0.0) * (1 - rank / most) + self.noise.get((path, rank), 0.0)
        return score
