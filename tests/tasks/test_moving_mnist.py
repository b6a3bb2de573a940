from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold.layers import TTGRU
from tenfold.tasks import load_task
from tenfold.tasks.moving_mnist import FRAMES, ROOM, SIDE, MovingMnist, places, render, with_motion


def test_a_digit_is_drawn_whole_where_it_is() -> None:
    digit = torch.arange(784, dtype=torch.uint8).remainder(255).add(1).view(1, 28, 28)
    where = torch.tensor([[[0, 0], [36, 36], [5, 9]]])
    films = render(digit, where).view(1, 3, SIDE, SIDE)
    for frame, (row, column) in enumerate(where[0].tolist()):
        assert torch.equal(films[0, frame, row : row + 28, column : column + 28], digit[0].float() / 255)
        assert torch.isclose(films[0, frame].sum(), digit.float().sum() / 255)


def test_digits_bounce_and_never_leave() -> None:
    motion = with_motion(torch.zeros(500, 784, dtype=torch.uint8), torch.Generator().manual_seed(0))[:, 784:].long()
    found = places(motion)
    assert found.shape == (500, FRAMES, 2)
    assert (int(found.min()), int(found.max())) == (0, ROOM)
    assert torch.equal(found[:, 0], motion[:, :2])
    assert int((found[:, 1:] - found[:, :-1]).abs().max()) == 6


@pytest.fixture
def mnist(home: Path, write_shard: Callable[..., Path]) -> Path:
    """Twenty grey pictures of each split, in the default place."""
    folder = home / ".cache" / "tenfold" / "datasets" / "mnist"
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for split in ("train", "test"):
        write_shard(folder / f"{split}-00000-of-00001.parquet", pictures, [k % 10 for k in range(20)], "image")
    return folder


def test_tests_never_change_and_training_films_do(mnist: Path) -> None:
    task, other = MovingMnist(), MovingMnist("tt-gru", seed=3)
    assert torch.equal(task.test_set.inputs, other.test_set.inputs)
    ((films, _),) = task.test_batches(batch_size=50)
    assert films.shape == (20, FRAMES, SIDE**2)
    assert 0 <= float(films.min()) < float(films.max()) <= 1
    (first, _), *_ = task.train_batches(0, batch_size=20, seed=0)
    (same, _), *_ = task.train_batches(0, batch_size=20, seed=0)
    assert torch.equal(first, same)
    stored = task.transform.prepare(task.train_set.inputs[task.train_batches(0, batch_size=20, seed=0).order])
    assert not torch.equal(first, stored)


def test_the_train_has_a_thousand_times_fewer_input_weights() -> None:
    dense, small = (load_task(f"moving_mnist:{v}").build() for v in ("gru", "tt-gru"))
    rnn = small.get_submodule("rnn")
    assert isinstance(rnn, TTGRU)
    count = sum(core.numel() for core in rnn.matrices()[0].cores)
    assert dense.get_parameter("rnn.weight_ih_l0").numel() / count > 1000
    films = load_task("moving_mnist").example_inputs(2)
    assert dense(films).shape == small(films).shape == (2, 10)
