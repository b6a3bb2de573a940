from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenfold.tasks import load_task

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'tenfold[demo]'")


def test_data_is_all_of_the_digits_split_once() -> None:
    task, other = load_task("digits"), load_task("digits", seed=5)
    assert (len(task.train_set), len(task.test_set)) == (1438, 359)
    assert torch.equal(task.test_set.inputs, other.test_set.inputs)
    assert set(task.test_set.labels.tolist()) == set(range(10))
    train = {bytes(x.numpy().tobytes()) for x in task.train_set.inputs}
    assert not any(x.numpy().tobytes() in train for x in task.test_set.inputs)


def test_normalisation_is_that_of_the_data() -> None:
    (inputs, _), *_ = load_task("digits").train_batches(0, batch_size=2000, seed=0)
    assert inputs.shape == (1438, 1, 8, 8)
    assert abs(float(inputs.mean())) < 0.02
    assert abs(float(inputs.std()) - 1) < 0.02


def test_network_is_trained_to_97_percent(trained_digits: Path) -> None:
    task = load_task("digits")
    model = task.dense(trained_digits)
    assert not model.training
    assert task.evaluate(model) >= 0.97
    assert task.evaluate(task.build()) < 0.3
