"""Tasks of networks that are tensors from the start: what their data are, and that their networks fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenfold.networks import snake
from tenfold.tasks import load_task
from tenfold.tasks.forecast import FALLS, PAST, Forecast, genz, lorenz
from tenfold.tasks.mnist14 import Paths


@pytest.fixture
def mnist(home: Path, write_shard: Callable[..., Path]) -> Path:
    """Twenty grey pictures of each split, in the default place."""
    folder = home / ".cache" / "tenfold" / "datasets" / "mnist"
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for split in ("train", "test"):
        write_shard(folder / f"{split}-00000-of-00001.parquet", pictures, [k % 10 for k in range(20)], "image")
    return folder


@pytest.mark.parametrize(
    "name", ["mnist14:mps-10", "digit_products:fusion3", "digit_products:concat", "omniglot", "forecast:genz-hot-lstm"]
)
def test_networks_take_the_example_inputs(name: str) -> None:
    task: Any = load_task(name)
    inputs = task.example_inputs(2)
    out = task.build()(*inputs) if isinstance(inputs, tuple) else task.build()(inputs)
    assert len(out) == 2
    assert bool(out.isfinite().all())


def test_paths_are_means_of_four_pixels_along_the_rows() -> None:
    images = torch.arange(784, dtype=torch.uint8).view(1, 1, 28, 28)
    paths = Paths().prepare(images)
    assert paths.shape == (1, 196)
    assert float(paths[0, 0]) == pytest.approx(float(images[0, 0, :2, :2].float().mean()) / 255)
    small = images.float().view(14, 2, 14, 2).mean((1, 3)) / 255
    torch.testing.assert_close(paths[0], snake(small))


def test_distortions_are_seeded_and_small() -> None:
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 8:20] = 255
    seen = [Paths().augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    ratio = seen[0].sum((1, 2, 3)) / images.float().sum((1, 2, 3))
    assert bool(((ratio > 0.7) & (ratio < 1.4)).all())


def test_products_are_of_the_digits_that_are_shown(mnist: Path) -> None:
    task: Any = load_task("digit_products")
    source: Any = load_task("mnist")
    rows = source.train_set.inputs.flatten(1)
    assert task.train_set.inputs.shape == (20, 2, 784)
    for pair, label in zip(task.train_set.inputs, task.train_set.labels, strict=True):
        shown = [int((rows == digit).all(1).nonzero()[0]) for digit in pair]
        assert int(label) == int(source.train_set.labels[shown].prod()) % 10
    count = {v: sum(p.numel() for p in load_task(f"digit_products:{v}").build().parameters()) for v in task.variants}
    assert max(count.values()) - min(count.values()) <= 48  # but for the biases of a hidden layer


def test_lorenz_follows_its_equations() -> None:
    x = lorenz(50, 100, torch.Generator().manual_seed(0)).double()
    assert x.shape == (50, 100, 3)
    assert float(x.std()) == pytest.approx(1, abs=0.1)
    p = x * torch.tensor([7.9, 9.0, 8.6]) + torch.tensor([0.0, 0.0, 23.5])
    slope = torch.stack([10 * (p[..., 1] - p[..., 0]), p[..., 0] * (28 - p[..., 2]) - p[..., 1]], -1)
    far, near = p[:, 4:, :2] - p[:, :-4, :2], p[:, 3:-1, :2] - p[:, 1:-3, :2]
    central = (8 * near - far) / (12 * 0.05)  # of fourth order in the step
    assert float((central - slope[:, 2:-2]).norm() / slope.norm()) < 0.05


def test_genz_has_six_families_of_at_most_one() -> None:
    x = genz(12, 50, torch.Generator().manual_seed(0))[..., 0]
    assert float(x.abs().max()) <= 1
    gone = (x[5] == 0).nonzero()
    assert len(gone) in range(50)
    assert bool((x[5, : len(x[5]) - len(gone)] > 0).all())  # discontinuous: rises, then nothing
    assert bool((x[2, 1:] <= x[2, :-1]).all())  # the corner peak falls


def test_taught_steps_fall_with_epochs_and_tests_are_free() -> None:
    task = Forecast("lorenz-lstm")
    shares = []
    for epoch in (0, 10):
        (past, truth, taught), wanted = next(iter(task.train_batches(epoch, batch_size=500, seed=0)))
        assert past.shape == (500, PAST, 3)
        assert truth is wanted
        shares.append(float(taught.mean()))
    assert shares == pytest.approx([1.0, FALLS**10], abs=0.02)
    past, truth = next(iter(task.test_batches(7, batch_size=4)))
    assert past.shape == (4, PAST, 3)
    assert truth.shape == (4, 40, 3)


class Repeats(torch.nn.Module):
    """Forecasts the last step."""

    def forward(self, past: torch.Tensor) -> torch.Tensor:
        return past[:, -1:].expand(-1, 40, -1)


def test_the_score_is_the_root_of_the_mean_squared_error() -> None:
    task = Forecast("lorenz-lstm")
    series = task.test_set.inputs
    wanted = (series[:, PAST:] - series[:, PAST - 1 : PAST]).double().square().mean().sqrt()
    assert task.evaluate(Repeats()) == pytest.approx(float(wanted))
    assert task.errors(Repeats()).shape == (40,)
    assert task.loss()(torch.nn.Identity(), torch.zeros(2, 3), torch.ones(2, 3)) == 1
