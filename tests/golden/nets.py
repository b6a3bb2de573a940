"""Six small networks, each with inputs, layers of other kinds and other formats to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut, as residual networks have them."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = stride == 1 and inside == out
        self.down = nn.Identity() if same else nn.Conv2d(inside, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inside + self.down(x)).relu()


class Attention(nn.Module):
    """One head of attention and a feed-forward part, made of linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = (self.query(h) @ self.key(h).transpose(-1, -2)).softmax(-1)
        x = x + self.out(scores @ self.value(h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Text(nn.Module):
    """Ids through an embedding, a convolution over time and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(120, 32)
        self.conv = nn.Conv1d(32, 48, 5, padding=2)
        self.fc = nn.Linear(48, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).transpose(1, 2)).relu().mean(-1)
        return self.head(self.fc(h).relu())


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 40, (3, 5), padding=(1, 2)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40 * 16, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 48, 1),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)
    )


def _attention() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), Attention(32), Attention(32), nn.Linear(32, 12))


@dataclass(frozen=True)
class Net:
    """How to make a network, a sample of its inputs for some seed, and the formats that its layers may get."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Tensor]
    formats: tuple[str, ...]
    untimed: tuple[str, ...] = ()  # further formats, for plans without a clock

    def build(self) -> nn.Module:
        """Return the network with weights whose spectra fall, so that ranks differ between layers."""
        torch.manual_seed(0)
        model = self.make().eval()
        for number, weight in enumerate(p for p in model.parameters() if p.dim() > 1):
            u, s, v = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
            fall = torch.arange(1, len(s) + 1).double() ** -(0.4 + 0.15 * (number % 4))
            with torch.no_grad():
                weight.copy_((u @ torch.diag(s[0] * fall) @ v).view_as(weight))
        return model

    def sample(self, seed: int = 0, size: int = 4) -> Tensor:
        """Return a batch of inputs."""
        return self.inputs(torch.Generator().manual_seed(seed), size)


def _images(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, 3, 8, 8, generator=generator)


NETS = {
    "plain": Net(_plain, _images, ("tucker2", "cp3", "low_rank", "spatial"), ("tensor_ring",)),
    "residual": Net(_residual, _images, ("tucker2", "low_rank", "spatial")),
    "mobile": Net(_mobile, _images, ("tucker_cp", "cp4", "tt_conv", "low_rank"), ("block_term",)),
    "mlp": Net(_mlp, lambda g, n: torch.randn(n, 64, generator=g), ("low_rank", "tt_matrix")),
    "attention": Net(_attention, lambda g, n: torch.randn(n, 6, 20, generator=g), ("low_rank",)),
    "text": Net(
        Text,
        lambda g, n: torch.randint(120, (n, 12), generator=g),
        ("tensor_train", "tt_embedding", "low_rank"),
    ),
}
