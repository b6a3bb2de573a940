"""A network of pictures becomes one of clips that begins as itself on each frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tenfold
from tenfold.decompositions import decompose
from tenfold.errors import PlanError, WeightError
from tenfold.layers import FactorizedLayer
from tenfold.networks import TemporalFactor, VideoNet, inflated
from tenfold.records import LayerSpec
from tenfold.training import TuneConfig, finetune


class Residual(nn.Module):
    """What no table of modules would know: a sum, a view, a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv, self.point, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.conv(x).relu()
        return self.head(self.point(x).mean((2, 3)).view(len(x), -1))


@pytest.fixture
def pictures() -> nn.Module:
    recipe = {"rule": {"name": "fixed", "ranks": {"conv": 6, "point": 5}}, "formats": ["cp3", "low_rank"]}
    quiet = tenfold.Runtime(measure=False)
    return tenfold.compress(Residual(), torch.zeros(1, 3, 6, 6), recipe, runtime=quiet).model.eval()


@pytest.mark.parametrize("taps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_at_first_it_is_the_network_on_each_frame(pictures: nn.Module, taps: int, frames: int) -> None:
    clips = torch.randn(3, 3, frames, 6, 6)
    alone = torch.stack([pictures(clips[:, :, t]) for t in range(frames)], dim=1)
    each = VideoNet(pictures, taps, average=False).eval()(clips)
    torch.testing.assert_close(each, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(VideoNet(pictures, taps).eval()(clips), each.mean(1))


def test_the_factors_make_the_convolution_of_one_axis_more() -> None:
    """In time and space, with factors along time that are not those of the start."""
    flat = FactorizedLayer.of(decompose(torch.randn(5, 4, 3, 3), "cp4", {"rank": 6}).value)
    clip, clips = inflated(flat, 3), torch.randn(2, 4, 5, 7, 7)
    net = VideoNet(flat, 3, average=False)
    along = torch.randn(6, 3)
    with torch.no_grad():
        next(net.temporal()).copy_(along)
        weight: Any = clip.stages[1].weight
        weight.copy_(along.view(weight.shape))
    torch.testing.assert_close(net(clips).transpose(1, 2), clip(clips), rtol=1e-4, atol=1e-5)
    dense = nn.functional.conv3d(clips, clip.weight, padding=(1, 0, 0))
    torch.testing.assert_close(clip(clips), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        (1, {}),
        (1, {"stride": (2,), "padding": (1,)}),
        (2, {}),
        (2, {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
        (2, {"padding": "same"}),
        (2, {"padding": "valid", "groups": 2}),
    ],
)
def test_a_layer_with_one_axis_more_is_itself_on_each_slice(axes: int, settings: dict[str, Any]) -> None:
    spec = LayerSpec(kind="conv", in_channels=4, out_channels=6, kernel=(3,) * axes, bias=True, **settings)
    weight = torch.randn(spec.weight_shape, dtype=torch.float64)
    value = decompose(weight, "cp3" if axes == 1 else "cp4", {"rank": 5}, spec=spec).value
    layer = FactorizedLayer.of(value, torch.randn(6, dtype=torch.float64))
    x = torch.randn(2, 4, 5, *(9,) * axes, dtype=torch.float64)
    wider = inflated(layer, 5)
    slices = torch.stack([layer(x[:, :, t]) for t in range(5)], dim=2)
    torch.testing.assert_close(wider(x), slices, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in wider.parameters()) == sum(p.numel() for p in layer.parameters()) + 5 * 5 * (
        spec.groups
    )


def test_what_it_costs_is_what_runs() -> None:
    layer = inflated(FactorizedLayer.of(decompose(torch.randn(8, 4, 3, 3), "cp4", {"rank": 5}).value))
    x = torch.randn(1, 4, 4, 6, 6)
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert tenfold.profile(layer, x).macs == counted.get_total_flops() / 2


def test_time_is_trained_alone_then_all(pictures: nn.Module) -> None:
    net, clips = VideoNet(pictures), torch.randn(16, 3, 4, 6, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    config = TuneConfig(epochs=1, lr=0.1, freeze_norms=True, autocast="off")
    batches = [(clips, torch.randint(0, 4, (16,)))]
    finetune(net.train_temporal_only_(), batches, config)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"network.conv.temporal.weight", "network.point.temporal.weight"}
    finetune(net.train_temporal_only_(False), batches, config)
    assert not torch.equal(net.state_dict()["network.stem.weight"], before["network.stem.weight"])
    again = VideoNet(pictures)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(clips), net.eval()(clips))


def test_it_is_a_copy_and_layers_of_two_names_stay_one(pictures: nn.Module) -> None:
    twice = nn.Sequential(pictures.conv, nn.ReLU(), pictures.conv)
    net = VideoNet(twice)
    assert len(list(net.temporal())) == 1
    assert net.network[0] is net.network[2]
    assert isinstance(twice[0], FactorizedLayer)


def test_it_exports_with_the_frames_of_the_example(pictures: nn.Module) -> None:
    net, clips = VideoNet(pictures).eval(), torch.randn(2, 3, 4, 6, 6)
    with torch.no_grad():
        for factor in net.temporal():
            factor.copy_(torch.randn_like(factor))
    exported = torch.export.export(net, (clips,)).module()
    torch.testing.assert_close(exported(clips), net(clips), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(PlanError, match="compress the network with formats=cp3 first"):
        VideoNet(Residual())
    layer = FactorizedLayer.of(decompose(torch.randn(8, 4, 3, 3), "cp3", {"rank": 5}).value)
    with pytest.raises(PlanError, match="in the format cp3 cannot have one axis more"):
        inflated(layer)
    with pytest.raises(PlanError, match="taps=0"):
        VideoNet(layer, 0)
    flat = FactorizedLayer.of(decompose(torch.randn(8, 4, 3, 3), "cp4", {"rank": 5}).value)
    with pytest.raises(PlanError, match="taps=4 is no odd number"):
        inflated(flat, 4)
    spec = LayerSpec(kind="conv", in_channels=4, out_channels=8, kernel=(3, 3), padding=(1, 1), padding_mode="circular")
    round_it = FactorizedLayer.of(decompose(torch.randn(8, 4, 3, 3), "cp4", {"rank": 5}, spec=spec).value)
    with pytest.raises(PlanError, match="pads by circular"):
        inflated(round_it)
    factor = TemporalFactor(4, 3)
    factor.frames = 3
    with pytest.raises(WeightError, match="4 frames in the batch are no clips of 3"):
        factor(torch.zeros(4, 4, 2, 2))
