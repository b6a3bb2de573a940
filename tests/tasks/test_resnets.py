from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tenfold.tasks.cifar10 import BasicBlock, CifarResNet


@pytest.mark.parametrize(
    ("depth", "params"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameters_are_the_published_ones(depth: int, params: int) -> None:
    with torch.device("meta"):
        model = CifarResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(("depth", "macs"), [(20, 40_551_040), (32, 68_862_592), (56, 125_485_696)])
def test_macs_by_torchs_flop_counter(depth: int, macs: int) -> None:
    with torch.device("meta"):
        model, inputs = CifarResNet(depth).eval(), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(inputs).shape == (1, 10)
    assert counter.get_total_flops() == 2 * macs


def test_keys_are_those_of_the_published_weights() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{n}" for n in norm)}
    for block in (f"layer{i}.{b}" for i in (1, 2, 3) for b in range(3)):
        for i in (1, 2):
            keys |= {f"{block}.conv{i}.weight", *(f"{block}.bn{i}.{n}" for n in norm)}
    assert set(CifarResNet(20).state_dict()) == keys


def test_shortcut_subsamples_and_pads_half_before_and_half_after() -> None:
    x = torch.randn(2, 4, 6, 6)
    out = BasicBlock(4, 8, stride=2).shortcut(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() == out[:, 6:].abs().sum() == 0
    assert BasicBlock(4, 4, stride=1).shortcut(x) is x


@pytest.mark.parametrize("depth", [2, 18, 52])
def test_impossible_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"6n\\+2 .*not {depth}"):
        CifarResNet(depth)
