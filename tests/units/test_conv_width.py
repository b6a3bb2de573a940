"""Channels between two convolutions of a block: norms, activations and depthwise layers between them come along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.profiling import profile
from tenfold.records import Unit
from tenfold.runtime import Runtime
from tenfold.surgery import recognise_units
from tenfold.surgery.model_outputs import outputs_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, between: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.between = between
        self.conv2, self.bn2 = nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(self.between(self.bn1(self.conv1(x))))))


class SqueezeExcite(nn.Module):
    """Every channel is scaled by a mix of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


def net(between: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(between), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(0.5 + torch.rand(tensor.shape))  # type: ignore[union-attr]
    return made.eval()


def found(model: nn.Module) -> dict[str, Unit]:
    return {unit.pivot: unit for unit in recognise_units(model, profile(model, X), X, ["conv_width"])}


def depthwise() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())


def test_a_block_is_a_unit_with_its_batch_norm() -> None:
    unit = found(net(nn.ReLU()))["1.conv2"]
    assert (unit.feeders, unit.full, unit.keep_reason) == (("1.conv1", "1.bn1"), {"width": 24}, None)


def test_a_depthwise_convolution_in_between_is_narrowed_too() -> None:
    unit = found(net(depthwise()))["1.conv2"]
    assert unit.keep_reason is None
    assert unit.feeders == ("1.conv1", "1.bn1", "1.between.1", "1.between.2")


@pytest.mark.parametrize("between", [SqueezeExcite(), nn.GroupNorm(2, 24), nn.Softmax(dim=1)], ids=type)
def test_what_mixes_channels_in_between_is_no_unit(between: nn.Module) -> None:
    assert not [unit for unit in found(net(between)).values() if unit.keep_reason is None and unit.path]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("make", [nn.ReLU, depthwise], ids=["plain", "depthwise"])
def test_it_is_planned_carried_out_saved_and_loaded(make: type[nn.Module], fuse: bool, tmp_path: Path) -> None:
    model, data = net(make()), torch.randn(60, 3, 8, 8)
    recipe = {"budget": {"macs": 0.7}, "units": "conv_width", "formats": "tucker2", "fuse_batchnorm": fuse}
    small = tenfold.compress(model, X[:1], recipe, data=data, runtime=Runtime(measure=False))
    (unit,) = small.plan.narrowed
    width = unit.size["width"] if unit.size else 0
    block = small.model.get_submodule("1")
    assert (block.conv1.out_channels, block.conv2.in_channels) == (width, width)  # type: ignore[union-attr]
    if not fuse:  # which adds biases and takes norms away
        assert small.record.after.params == small.plan.after.params
    assert small.record.after.macs == small.plan.after.macs <= 0.7 * small.plan.before.macs
    small.save(tmp_path / "saved")
    loaded, _ = tenfold.load(net(make()), tmp_path / "saved")
    assert torch.equal(outputs_of(loaded, X)[0], outputs_of(small.model, X)[0])


def test_it_is_used_when_it_is_named_only() -> None:
    model, data = net(nn.ReLU()), torch.randn(40, 3, 8, 8)
    plan = tenfold.compress(model, X[:1], {"budget": {"macs": 0.8}}, data=data, runtime=Runtime(measure=False)).plan
    assert not [unit for unit in plan.units if unit.kind == "conv_width"]
