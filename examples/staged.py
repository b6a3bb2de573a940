"""Compression in stages, with a training loop of one's own in between.

    python examples/staged.py

Instead of one large step, compress a little and train, and again: each stage starts from the factors as they were
trained in the one before. The run is kept in the folder ``stages``: kill the script, start it again, and it continues.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

import tenfold
from tenfold import Recipe, Runtime, Schedule

CLASSES = 6
SHARE = 0.2  # of the MACs


def make_data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points, classified by a fixed random network."""
    generator = torch.Generator().manual_seed(17)
    first, second = torch.randn(20, 40, generator=generator), torch.randn(40, CLASSES, generator=generator)
    x = torch.randn(samples, 20, generator=torch.Generator().manual_seed(seed))
    return x, ((x @ first).relu() @ second).argmax(1)


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float = 2e-3) -> None:
    """Train in place by a plain loop: nothing in it knows of tenfold."""
    x, y = data
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(128):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of the points whose class the model finds."""
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    data, test = make_data(4000, 1), make_data(2000, 2)
    dense = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    train(dense, data, 15)
    print(f"dense: {accuracy(dense, test):.1%} right")

    unlabeled = list(data[0].split(500))
    recipe, schedule = Recipe(budget={"macs": SHARE}, keep_ends=False), Schedule(rounds=3, epochs=4)
    print(recipe.to_yaml(), schedule.to_yaml(), sep="\n")
    for stage in tenfold.stages(dense, data[0][:1], recipe, schedule, data=unlabeled, runtime=Runtime(folder="stages")):
        before = accuracy(stage.model.eval(), test)
        train(stage.model, data, stage.epochs)
        macs, after = stage.record.after.macs, accuracy(stage.model, test)
        print(f"stage {stage.index}: {macs:,} MACs, {before:.1%} right, then {after:.1%}")

    loaded, plan = tenfold.load(dense, "stages/stage-0003")  # each stage is a checkpoint
    assert plan.after.macs <= SHARE * tenfold.profile(dense, data[0][:1]).macs
    assert accuracy(loaded.eval(), test) == after


if __name__ == "__main__":
    main()
