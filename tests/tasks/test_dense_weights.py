from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tenfold.errors import CheckpointError
from tenfold.tasks import load_weights


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))


def _file(path: Path, change: Callable[[dict[str, Tensor]], object] = lambda state: None) -> Path:
    state = _net(1).state_dict()
    change(state)
    save_file(state, path / "w.safetensors")
    return path / "w.safetensors"


def test_weights_arrive_bit_for_bit(tmp_path: Path) -> None:
    model = load_weights(_net(0), _file(tmp_path))
    for key, value in _net(1).state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_batch_counters_may_be_absent_and_other_dtypes_are_cast(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["1.num_batches_tracked"]
        state["0.weight"] = state["0.weight"].bfloat16()

    model = load_weights(_net(0), _file(tmp_path, change))
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, _net(1)[0].weight.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"it lacks 0\.weight$"),
        (lambda s: [s.pop("1.weight"), s.pop("1.bias")], r"it lacks 1\.weight and 1 more$"),
        (lambda s: s.update(extra=torch.ones(1)), "it has the unknown extra$"),
        (
            lambda s: s.update({"0.weight": torch.ones(4, 3, 1, 1)}),
            r"0\.weight has shape \(4, 3, 1, 1\), .* \(4, 3, 3, 3\)",
        ),
    ],
)
def test_a_file_for_another_model_is_refused_and_the_model_left_alone(tmp_path: Path, change, message: str) -> None:
    model = _net(0)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, _file(tmp_path, change))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), _net(0).state_dict().values(), strict=True)
    )


def test_missing_folder_truncated_and_pickled_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights file .*none.safetensors"):
        load_weights(_net(), tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_weights(_net(), tmp_path)
    path = _file(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"not a readable .safetensors"):
        load_weights(_net(), path)
    torch.save(_net(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds objects of .*Sequential, and reading"):
        load_weights(_net(), tmp_path / "w.pth")


def test_a_state_dict_of_torch_save_is_read(tmp_path: Path) -> None:
    torch.save(_net(1).state_dict(), tmp_path / "w.pth")
    model = load_weights(_net(0), tmp_path / "w.pth")
    assert all(torch.equal(value, _net(1).state_dict()[key]) for key, value in model.state_dict().items())
