from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenfold.errors import CheckpointError, DataError
from tenfold.tasks import load_task

REAL_DATA = Path.home() / ".cache" / "tenfold" / "datasets"


@pytest.mark.parametrize(("variant", "params"), [("mlp", 496_885), ("tt", 27_235)])
def test_variants_are_the_networks_of_the_source(variant: str, params: int) -> None:
    task = load_task(f"mnist:{variant}")
    model = task.build()
    assert sum(p.numel() for p in model.parameters()) == params
    with torch.inference_mode():
        assert model(task.example_inputs(2)).shape == (2, 10)


def test_without_weights_it_says_what_to_pass() -> None:
    with pytest.raises(CheckpointError, match=r"mnist:mlp has no built-in weights.*--weights FILE"):
        load_task("mnist").dense()


def test_missing_data_says_where_it_was_looked_for(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ylecun/mnist"):
        _ = load_task("mnist", data=tmp_path).test_set


def test_real_data_is_whole(home: Path) -> None:
    if not list(REAL_DATA.glob("mnist/test-*.parquet")):
        pytest.skip(f"no MNIST in {REAL_DATA}")
    task = load_task("mnist", data=REAL_DATA)
    assert task.test_set.inputs.shape == (10_000, 1, 28, 28)
    assert torch.bincount(task.test_set.labels)[:3].tolist() == [980, 1135, 1032]
