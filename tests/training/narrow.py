"""A small task for trainings towards low rank: a network far wider than needed, and its data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.training import TuneConfig

CONFIG = TuneConfig(epochs=20, lr=0.02, optimizer="adamw", autocast="off", channels_last=False, train_as="factors")


def data() -> tuple[Tensor, Tensor]:
    """Points whose class a narrow network cannot tell without being trained for it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > x[:, 3] ** 2).long()


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).split(64)
    return [(x[i], y[i]) for i in order]


def accuracy(model: nn.Module) -> float:
    x, y = data()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    wide = [nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU()]
    return nn.Sequential(*wide, nn.Linear(48, 4)).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Cut(Exception):  # noqa: N818
    pass


def cut_in_epoch(cut: int) -> Any:
    def make(epoch: int) -> list[tuple[Tensor, Tensor]]:
        if epoch == cut - 1:
            raise Cut
        return batches(epoch)

    return make
