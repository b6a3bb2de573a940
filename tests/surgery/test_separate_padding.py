"""Convolutions of a class of their own are served where they only pad first, and kept with a reason otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tenfold
from tenfold.layers import FactorizedLayer, PaddedConv, same_pads
from tenfold.planning.unroll import unroll_for_plan
from tenfold.profiling import profile
from tenfold.runtime import Runtime
from tenfold.surgery import apply, separate, separated
from tenfold.surgery.separate_padding import confirmed, padded_convs

QUIET = Runtime(measure=False)


class Same(nn.Conv2d):
    """TensorFlow's SAME, from the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, same_pads(self, tuple(x.shape[2:])))
        return functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Static(nn.Conv2d):
    """A padding of its own module, other on each side."""

    def __init__(self, *sizes: int, **options: int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type]
        self.static_padding = nn.ZeroPad2d((0, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.static_padding(x))


class Causal(nn.Conv1d):
    """Zeros before the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class CutOff(nn.Conv1d):
    """Zeros on both sides, and what saw those behind is cut off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


class OwnButPlain(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class Volume(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 0, 1, 2, 0)))


class Standardized(nn.Conv2d):
    """Another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Activated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Reflecting(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1), mode="reflect"))


class NoisyInTraining(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.randn_like(out) if self.training else out


class Gained(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class BySize(nn.Conv2d):
    """Pads large inputs only, which no small one shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1)) if x.shape[-1] >= 16 else x)


SERVED = {
    "same": (Same(6, 8, 3, stride=2), "padding same"),
    "same of a large step": (Same(6, 8, 5, stride=3, bias=False), "padding same"),
    "same in groups": (Same(6, 6, 3, stride=2, groups=3), "padding same"),
    "same of step 1 is plain": (Same(6, 8, 3, dilation=2), "padding 2 2 2 2"),
    "static": (Static(6, 8, 4, stride=2), "padding 0 1 1 2"),
    "causal": (Causal(6, 8, 3, dilation=2), "padding 4 0"),
    "cut off": (CutOff(6, 8, 4, padding=3), "padding 3 0"),
    "plain": (OwnButPlain(6, 8, 3, padding=(1, 0)), "padding 0 0 1 1"),
    "volume": (Volume(4, 4, 3, stride=(1, 2, 2)), "padding 1 1 0 1 2 0"),
}
REFUSED = [Standardized, Activated, Reflecting, NoisyInTraining, Gained]


@pytest.mark.parametrize("name", SERVED)
def test_opening_keeps_the_outputs_of_every_size(name: str) -> None:
    conv, kind = SERVED[name]
    net = nn.Sequential(conv).eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert padded_convs(net) == {"0": kind}
    x = torch.randn(2, conv.in_channels, *[19] * len(conv.kernel_size))
    assert confirmed(net, {"0": kind}, x) == {"0": kind}
    made = separate(net, {"0": kind})
    assert separated(made) == {"0": kind}
    assert isinstance(made[0], PaddedConv)
    assert made[0].weight is made[0].conv.weight
    assert (made[0].stride, made[0].out_channels) == (conv.stride, conv.out_channels)
    for size in (12, 13, 14, 15, 31):
        x = torch.randn(2, conv.in_channels, *[size] * len(conv.kernel_size))
        torch.testing.assert_close(made(x), net(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert type(net[0]) is type(conv)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_more_than_padding_is_kept_with_the_reason(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)).eval()
    assert padded_convs(net) == {}
    small = tenfold.compress(net, torch.randn(1, 16, 12, 12), "macs=0.8", runtime=QUIET)
    assert small.plan.unrolled == {}
    assert small.plan.layer("0").action == "keep"
    assert kind.__name__ in small.plan.layer("0").reason


def test_what_other_inputs_contradict_is_kept() -> None:
    net = nn.Sequential(BySize(6, 8, 3))
    kinds = padded_convs(net)
    assert confirmed(net, kinds, torch.randn(1, 6, 8, 8)) == kinds
    assert confirmed(net, kinds, torch.randn(1, 6, 20, 20)) == {}
    assert not net[0]._forward_hooks


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            Same(3, 32, 3, stride=2), nn.ReLU(), Same(32, 32, 3, stride=2), nn.ReLU(), Static(32, 32, 4, stride=2)
        )


@pytest.mark.parametrize("with_data", [False, True])
def test_a_network_of_them_is_compressed_saved_and_loaded(with_data: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(64, 3, 33, 35)
    before = net(x).detach()
    small = tenfold.compress(net, x[:1], "macs=0.5", data=[x] if with_data else None, runtime=QUIET)
    assert small.record.after.macs <= 0.5 * small.record.before.macs
    assert small.record.before.macs == profile(net, x[:1]).macs
    assert set(small.plan.unrolled) == {layer.path.removesuffix(".conv") for layer in small.plan.factorized}
    assert any(isinstance(m.conv, FactorizedLayer) for m in small.model if isinstance(m, PaddedConv))
    small.save(tmp_path / "small")
    again, plan = tenfold.load(Net(), tmp_path / "small")
    assert plan.unrolled == small.plan.unrolled
    with torch.no_grad():
        after = small.model(x)
        assert torch.equal(again.eval()(x), after)
        assert torch.equal(net(x), before)
        if with_data:
            assert float((after - before).norm() / before.norm()) < 0.6
    applied = apply(net, small.plan)
    assert applied(x).shape == before.shape


def test_a_layer_that_is_kept_by_name_stays_closed() -> None:
    net = Net().eval()
    x = torch.randn(1, 3, 33, 33)
    small = tenfold.compress(net, x, {"budget": "macs=0.7", "keep": "2"}, runtime=QUIET)
    assert type(small.model[2]) is Same
    assert small.plan.layer("2").reason == "kept as asked by '2'"


def test_a_budget_of_latency_opens_them_too() -> None:
    net, x = Net().eval(), torch.randn(1, 3, 33, 33)
    assert separated(unroll_for_plan(net, tenfold.Recipe.of("latency=0.9"), x)) == padded_convs(net)
