from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tenfold.errors import CheckpointError
from tenfold.tasks import load_task

REAL_DATA = Path.home() / ".cache" / "tenfold" / "datasets"
WEIGHTS = "TENFOLD_CIFAR10_WEIGHTS"  # a folder with resnet20.safetensors, resnet32.safetensors, ...


@pytest.mark.parametrize("variant", ["resnet20", "resnet110"])
def test_variants_build_and_run(variant: str) -> None:
    task = load_task(f"cifar10:{variant}")
    with torch.inference_mode():
        assert task.build()(task.example_inputs(2)).shape == (2, 10)


def test_without_weights_it_says_what_to_pass() -> None:
    with pytest.raises(CheckpointError, match=r"cifar10:resnet20 has no built-in weights.*--weights FILE"):
        load_task("cifar10").dense()


def test_real_data_is_whole(home: Path) -> None:
    if not list(REAL_DATA.glob("cifar10/test-*.parquet")):
        pytest.skip(f"no CIFAR-10 in {REAL_DATA}")
    task = load_task("cifar10", data=REAL_DATA)
    assert task.test_set.inputs.shape == (10_000, 3, 32, 32)
    assert torch.bincount(task.test_set.labels).tolist() == [1000] * 10


def test_real_weights_load_strictly_and_score() -> None:
    folder = Path(os.environ.get(WEIGHTS, "nowhere"))
    if not (folder / "resnet20.safetensors").is_file():
        pytest.skip(f"set {WEIGHTS} to a folder with resnet20.safetensors")
    if not list(REAL_DATA.glob("cifar10/test-*.parquet")):
        pytest.skip(f"no CIFAR-10 in {REAL_DATA}")
    task = load_task("cifar10:resnet20", data=REAL_DATA)
    assert task.evaluate(task.dense(folder / "resnet20.safetensors"), limit=500) > 0.89
